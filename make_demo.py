"""Run the main job end to end on a generated world: draw, train, export, compare.

    python make_demo.py --out demo

Calls the same scripts a user would, and prints each command before it runs.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from core.contact_sheet import draw_rows, save_png
from data_handlers.datasets import DATA_SETS
from data_handlers.images import read_image
from data_handlers.lists import list_images
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes, make_folder, read_json
from utils.flags import OneLineParser, parse_flags

FRAMES = 120
SIZE = ("128", "64")
COLUMNS = 5
MADE = ("toy_gta", "toy_cs", "TrainedModels", "runs", "sit")  # what an earlier demo left, and this one makes anew
MARKER = ".made_by_make_demo"
# Small and quick: a quarter of the published width, a shallow perceptual net with random weights (nothing is
# downloaded), a larger learning rate. Random features hold content less well than ImageNet's do, so content and cycle
# get more weight.
TRAINING = """
    --src_resize 144 72 --trg_resize 128 64 --crop_size 128 64 --base_channels_list 16 --batch_size_list 16 8 4
    --lr_g 1e-3 --lr_d 1e-3 --steps_per_scale 100 120 180 --vgg_weights random --content_layers 6 --style_layers 3 6
    --lambda_cyclic 5 --content_weight 0.3 --no_semseg --num_workers 1 --print_rate 25
"""


def run(script: str, *arguments: str) -> None:
    """Run one of the scripts with this interpreter; a failure ends the demo with its exit code."""
    print(f"\n$ python {script} {shlex.join(arguments)}", flush=True)
    result = subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments], check=False)
    if result.returncode:
        raise UserError(f"{script} failed with exit code {result.returncode}")


def before_and_after(out: Path) -> Path:
    """Write the picture: rows source, SiT of the same frames, target."""
    rows = []
    for caption, name, folder in (
        ("source", "gta5", "toy_gta"), ("SiT", "gta5", "sit"), ("target", "cityscapes", "toy_cs"),
    ):  # fmt: skip
        root = out / folder
        files = list_images(DATA_SETS[name], root, "--out")
        chosen = [files.images[k * len(files) // COLUMNS] for k in range(COLUMNS)]
        rows.append((caption, [np.asarray(read_image(root / image)) for image in chosen]))
    return save_png(draw_rows(rows), out / "before_after.png")


def write_table(out: Path, seconds: float) -> None:
    """Write and print the table of distances."""
    distances = read_json(out / "distances.json")
    source = distances["source-target"]
    rows = "".join(f"| {name} | {value:.4f} | {value / source:.0%} |\n" for name, value in distances.items())
    text = (
        "| images | Frechet distance of VGG16 features | of source-target |\n| --- | --- | --- |\n"
        f"{rows}\n{FRAMES} frames each, VGG16 with random weights (others than in training), "
        f"made in {seconds / 60:.1f} minutes.\n"
    )
    atomic_write_bytes(out / "distances.md", text.encode())
    print(f"\n{text}")


def main() -> None:
    """Command line entry."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo", help="folder of the demo, made anew (default: %(default)s)")
    flags, _ = parse_flags(parser)
    out = Path(flags.out)
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists():
        raise UserError(f"--out {out} holds something else than a demo; choose another folder")
    make_folder(out, "--out")
    for name in MADE:
        shutil.rmtree(out / name, ignore_errors=True)
    (out / MARKER).touch()

    started = time.perf_counter()
    gta, cityscapes, runs = str(out / "toy_gta"), str(out / "toy_cs"), out / "TrainedModels"
    toy = ("--count", str(FRAMES), "--size", *SIZE)
    run("make_toy_data.py", "--out", gta, "--domain", "gta5", *toy, "--seed", "1")
    run("make_toy_data.py", "--out", cityscapes, "--domain", "cityscapes", *toy, "--seed", "2")
    data = ("--gpus", "cpu", "--src_data_dir", gta, "--trg_data_dir", cityscapes)
    outputs = ("--checkpoints_dir", str(runs), "--tb_logs_dir", str(out / "runs"))
    run("train_procst.py", *data, *shlex.split(TRAINING), *outputs)
    (trained,) = runs.iterdir()
    sit = str(out / "sit")
    run("create_sit_dataset.py", "--gpus", "cpu", "--trained_procst_path", str(trained), "--sit_output_path", sit)
    run(
        "measure_domain_distance.py", *data, "--sit_data_dir", sit, "--size", *SIZE, "--vgg_weights", "random",
        "--json", str(out / "distances.json"),
    )  # fmt: skip
    picture = before_and_after(out)
    write_table(out, time.perf_counter() - started)
    print(f"before and after: {picture}\ntable: {out / 'distances.md'}\nrun folder: {trained}")


if __name__ == "__main__":
    run_cli(main)
