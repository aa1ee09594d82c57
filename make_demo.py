"""Run the main job end to end on a generated world: draw, train, export, compare.

    python make_demo.py --out demo

Calls the same scripts a user would, and prints each command before it runs.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from training.flags import build_parser, option, parse, section_from
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes, make_folder, read_json

FRAMES = 120
VAL_FRAMES = 40
HELD_OUT = 12
SEEDS = (1, 2)
SIZE = ("128", "64")
COLUMNS = 5
# What an earlier demo left, and this one makes anew.
MADE = ("toy_gta", "toy_cs", "TrainedModels", "runs", "sit", "semseg")
MARKER = ".made_by_make_demo"
# Small and quick: a quarter of the published width, a shallow perceptual net with random weights (nothing is
# downloaded), a larger learning rate. Random features hold content less well than ImageNet's do, so content and cycle
# get more weight.
TRAINING = """
    --src_resize 144 72 --trg_resize 128 64 --crop_size 128 64 --base_channels_list 16 --batch_size_list 16 8 4
    --lr_g 1e-3 --lr_d 1e-3 --steps_per_scale 600 300 150 --vgg_weights random --content_layers 3 6 --style_layers 3 6
    --lambda_cyclic 5 --content_weight 0.3 --model UNet --lr_semseg 0.02 --num_workers 1 --print_rate 25
    --precision auto
"""
# The segmentation net that is trained twice, on source and on SiT, from the same seeds.
SEGMENTATION = f"""
    --model UNet --src_resize 144 72 --crop_size 128 64 --val_count {HELD_OUT} --num_steps 300 --batch_size 8
    --lr_semseg 0.03 --validation_rate 150 --num_workers 1 --print_rate 25
"""


@dataclass(frozen=True)
class DemoFlags:
    """The flags of this script."""

    out: str = option("demo", "folder of the demo, made anew", metavar="DIR", required=True)


def run(script: str, *arguments: str) -> None:
    """Run one of the scripts with this interpreter; a failure ends the demo with its exit code."""
    print(f"\n$ python {script} {shlex.join(arguments)}", flush=True)
    result = subprocess.run([sys.executable, str(Path(__file__).parent / script), *arguments], check=False)
    if result.returncode:
        raise UserError(f"{script} failed with exit code {result.returncode}")


def before_and_after(out: Path) -> None:
    """Write before_after.png: rows source, SiT of the same frames, target."""
    # Imported after the flags are read: a mistyped flag is answered at once.
    import numpy as np

    from core.contact_sheet import save_rows
    from data_handlers.datasets import DATA_SETS
    from data_handlers.images import read_image
    from data_handlers.lists import list_images
    from utils.sizes import evenly_spaced

    rows = []
    for caption, name, folder in (
        ("source", "gta5", "toy_gta"), ("SiT", "gta5", "sit"), ("target", "cityscapes", "toy_cs"),
    ):  # fmt: skip
        root = out / folder
        files = list_images(DATA_SETS[name], root, "--out")
        chosen = evenly_spaced(files.images, COLUMNS)
        rows.append((caption, [np.asarray(read_image(root / image)) for image in chosen]))
    save_rows(out / "before_after.png", rows)


def train_segmentation(out: Path, arm: str, images: str, labels: str, seed: int) -> Path:
    """Train the small net on one set of images and score it on the val split of the target; returns its file."""
    folder = out / "semseg"
    net, scores = folder / f"{arm}_{seed}.pth", folder / f"{arm}_{seed}.json"
    run(
        "train_semseg_on_source.py", "--gpus", "cpu", "--src_data_dir", images, "--src_label_dir", labels,
        *shlex.split(SEGMENTATION), "--manual_seed", str(seed), "--output", str(net),
        "--checkpoints_dir", str(folder / "runs"), "--tb_logs_dir", str(out / "runs"),
    )  # fmt: skip
    run(
        "evaluate.py", "--gpus", "cpu", "--weights", str(net), "--data_dir", str(out / "toy_cs"), "--json", str(scores),
        "--num_workers", "1",
    )  # fmt: skip
    return net


def _mean_scores(out: Path, arm: str) -> tuple[list[float], dict[str, float]]:
    """mIoU of every seed, and the IoU of every class present averaged over the seeds, in percent."""
    reports = [read_json(out / "semseg" / f"{arm}_{seed}.json") for seed in SEEDS]
    classes = [name for name, value in reports[0]["iou"].items() if value is not None]
    means = {name: 100 * sum(report["iou"][name] for report in reports) / len(reports) for name in classes}
    return [100 * report["miou"] for report in reports], means


def write_table(out: Path, seconds: float) -> None:
    """Write and print the tables of distances and of mIoU."""
    distances = read_json(out / "distances.json")
    source = distances["source-target"]
    rows = "".join(f"| {name} | {value:.4f} | {value / source:.0%} |\n" for name, value in distances.items())
    arms = {"source": _mean_scores(out, "source"), "SiT": _mean_scores(out, "sit")}
    seeds = "".join(f" seed {seed} |" for seed in SEEDS)
    mious = "".join(f"| {arm} |" + "".join(f" {v:.1f} |" for v in values) + "\n" for arm, (values, _) in arms.items())
    classes = "".join(
        f"| {name} | {arms['source'][1][name]:.1f} | {arms['SiT'][1][name]:.1f} |\n" for name in arms["source"][1]
    )
    text = (
        "| images | Frechet distance of VGG16 features | of source-target |\n| --- | --- | --- |\n"
        f"{rows}\n{FRAMES} frames each, VGG16 with random weights (others than in training).\n\n"
        f"| small U-Net trained on |{seeds}\n| --- |{' --- |' * len(SEEDS)}\n{mious}\n"
        f"mIoU in percent on {VAL_FRAMES} target frames that neither ProCST nor the net was trained on; same net, "
        "seeds and number of steps. The two toy worlds share every shape, so a net trained on source loses little, "
        "and minutes of training with random perceptual features are not enough to gain from SiT: read this table as "
        "a test of the plumbing. README.md has the same comparison on real pictures.\n\n"
        f"| class (IoU, mean of the seeds) | source | SiT |\n| --- | --- | --- |\n{classes}\n"
        f"Made in {seconds / 60:.1f} minutes.\n"
    )
    atomic_write_bytes(out / "results.md", text.encode())
    print(f"\n{text}")


GROUPS = {"flags": [DemoFlags]}


def main() -> None:
    """Command line entry."""
    out = Path(section_from(DemoFlags, parse(build_parser(__doc__, GROUPS))).out)
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
    val = ("--count", str(VAL_FRAMES), "--size", *SIZE, "--split", "val")
    run("make_toy_data.py", "--out", cityscapes, "--domain", "cityscapes", *val, "--seed", "3")
    (out / "semseg").mkdir()
    source_nets = [train_segmentation(out, "source", gta, gta, seed) for seed in SEEDS]
    data = ("--gpus", "cpu", "--src_data_dir", gta, "--trg_data_dir", cityscapes)
    outputs = ("--checkpoints_dir", str(runs), "--tb_logs_dir", str(out / "runs"))
    run("train_procst.py", *data, *shlex.split(TRAINING), "--semseg_weights", str(source_nets[0]), *outputs)
    (trained,) = runs.iterdir()
    sit = str(out / "sit")
    run("create_sit_dataset.py", "--gpus", "cpu", "--trained_procst_path", str(trained), "--sit_output_path", sit)
    run(
        "measure_domain_distance.py", *data, "--sit_data_dir", sit, "--size", *SIZE, "--vgg_weights", "random",
        "--json", str(out / "distances.json"),
    )  # fmt: skip
    for seed in SEEDS:
        train_segmentation(out, "sit", sit, gta, seed)
    before_and_after(out)
    write_table(out, time.perf_counter() - started)
    print(f"before and after: {out / 'before_after.png'}\ntables: {out / 'results.md'}\nrun folder: {trained}")


if __name__ == "__main__":
    run_cli(main)
