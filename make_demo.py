"""Run the main job end to end on a generated world: draw, train, translate, compare.

    python make_demo.py --out demo

Calls the same scripts a user would, two at a time with one thread each, and prints each command when it begins. What
they print goes to DIR/logs. At the end DIR holds results.md, results.json, results.png and before_after.png.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.flags import build_parser, option, parse, section_from
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes, atomic_write_json, make_folder, read_json

FRAMES = 120
VAL_FRAMES = 40
SEEDS = (1, 2)
PROCST_SEED = 1
SIZE = ("96", "48")
SOURCE_SIZE = ("108", "54")  # cropped to SIZE
COLUMNS = 5
# Rows of the table: what the nets are trained on, and how the table names it.
ARMS = {"source": "source only", "histogram": "histogram matching", "sit": "SiT (ProCST)", "oracle": "oracle: target"}
# What an earlier demo left, and this one makes anew.
MADE = ("toy_gta", "toy_cs", "TrainedModels", "runs", "sit", "histogram", "semseg", "logs")
RESULTS = ("results.md", "results.json", "results.png", "before_after.png")
MARKER = ".made_by_make_demo"
# Small and quick: a quarter of the published width, a larger learning rate, and the toy world's own perceptual net
# (benchmarks/train_toy_features.py), so that nothing is downloaded.
FEATURES = Path(__file__).resolve().parent / "data_handlers" / "toy" / "features.pth"
TRAINING = f"""
    --no_semseg --src_resize 108 54 --trg_resize 96 48 --crop_size 96 48 --base_channels_list 16
    --batch_size_list 16 8 4 --lr_g 1e-3 --lr_d 1e-3 --steps_per_scale 300 300 400
    --vgg_weights {shlex.quote(str(FEATURES))} --content_layers 8 15 --style_layers 3 8 --lambda_cyclic 0.5
    --content_weight 0.1 --tv_weight 0 --num_workers 0 --print_rate 25 --precision fp32
"""
# The segmentation net that is trained on each set, from the same seeds. Its last state counts, so that no label of the
# target chooses anything.
SEGMENTATION = """
    --model UNet --crop_size 96 48 --num_steps 300 --batch_size 8 --lr_semseg 0.03 --select_by none --val_count 12
    --num_workers 0 --print_rate 25 --output ''
"""


@dataclass(frozen=True)
class DemoFlags:
    """The flags of this script."""

    out: str = option("demo", "folder of the demo, made anew", metavar="DIR", required=True)


class Commands:
    """Runs the scripts with this interpreter, on one thread each, and keeps what they print in a folder of logs."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.lock = logs, threading.Lock()
        self.running: set[subprocess.Popen[bytes]] = set()
        self.failed = False

    def __call__(self, name: str, script: str, *arguments: str) -> None:
        """Run a script to its end. Raises `UserError` with its last line if it fails."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).parent / script), *arguments]
        with open(self.logs / f"{name}.log", "wb") as log:
            with self.lock:
                if self.failed:
                    raise UserError("another command failed")
                print(f"\n$ python {script} {shlex.join(arguments)}", flush=True)
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                self.running.add(process)
            process.wait()
        with self.lock:
            self.running.discard(process)
            if process.returncode == 0:
                return
            first, self.failed = not self.failed, True
            for other in self.running:
                other.terminate()
        if not first:
            raise UserError("another command failed")
        last = (self.logs / f"{name}.log").read_text(errors="replace").replace("\r", "\n").strip().splitlines()
        raise UserError(f"{script} failed ({self.logs / f'{name}.log'}): {last[-1] if last else 'no message'}")


def two_at_a_time(jobs: Sequence[Callable[[], None]]) -> None:
    """Run jobs in their order, two at a time. Raises the error of the first that fails."""
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(job) for job in jobs]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise min(errors, key=lambda error: str(error) == "another command failed")


def train_and_score(run: Commands, out: Path, arm: str, seed: int) -> None:
    """Train the small net on the images of one arm and score its last state on the target's val split."""
    name, folder = f"{arm}_{seed}", out / "semseg"
    images = {"source": "toy_gta", "oracle": "toy_cs"}.get(arm, arm)
    data = ["--src_data_dir", str(out / images), "--src_resize", *(SIZE if arm == "oracle" else SOURCE_SIZE)]
    if arm == "oracle":
        data += ["--source", "cityscapes"]
    elif images != "toy_gta":
        data += ["--src_label_dir", str(out / "toy_gta")]
    run(
        name, "train_semseg_on_source.py", "--gpus", "cpu", *data, *shlex.split(SEGMENTATION), "--manual_seed",
        str(seed), "--run_dir", str(folder / name), "--tb_logs_dir", str(out / "runs"),
    )  # fmt: skip
    run(
        f"{name}_score", "evaluate.py", "--gpus", "cpu", "--weights", str(folder / name / "latest.pth"), "--data_dir",
        str(out / "toy_cs"), "--classes", "categories", "--json", str(folder / f"{name}.json"), "--num_workers", "0",
    )  # fmt: skip


def make_sit(run: Commands, out: Path) -> None:
    """Train ProCST and export its SiT set."""
    data = ("--gpus", "cpu", "--src_data_dir", str(out / "toy_gta"), "--trg_data_dir", str(out / "toy_cs"))
    trained = str(out / "TrainedModels" / "procst")
    run(
        "procst", "train_procst.py", *data, *shlex.split(TRAINING), "--manual_seed", str(PROCST_SEED), "--run_dir",
        trained, "--tb_logs_dir", str(out / "runs"),
    )  # fmt: skip
    run(
        "sit", "create_sit_dataset.py", "--gpus", "cpu", "--trained_procst_path", trained, "--sit_output_path",
        str(out / "sit"), "--num_workers", "0",
    )  # fmt: skip


def make_histogram(run: Commands, out: Path) -> None:
    """Export the set of histogram matching."""
    run(
        "histogram", "create_sit_dataset.py", "--gpus", "cpu", "--translator", "histogram", "--src_data_dir",
        str(out / "toy_gta"), "--trg_data_dir", str(out / "toy_cs"), "--sit_output_path", str(out / "histogram"),
        "--num_workers", "0",
    )  # fmt: skip


def images_of(root: Path, name: str) -> list[Any]:
    """Evenly spaced images of a set, uint8 (H,W,3)."""
    # Imported after the flags are read: a mistyped flag is answered at once.
    import numpy as np

    from data_handlers.datasets import DATA_SETS
    from data_handlers.images import read_image
    from data_handlers.lists import list_images
    from utils.sizes import evenly_spaced

    files = list_images(DATA_SETS[name], root, "--out")
    return [np.asarray(read_image(root / image)) for image in evenly_spaced(files.images, COLUMNS)]


def before_and_after(out: Path) -> None:
    """Write the picture: rows source, SiT of the same frames, target."""
    from core.contact_sheet import save_rows

    rows = [("source", "toy_gta", "gta5"), ("SiT", "sit", "gta5"), ("target", "toy_cs", "cityscapes")]
    save_rows(out / "before_after.png", [(caption, images_of(out / folder, name)) for caption, folder, name in rows])


def score_picture(out: Path, scores: Mapping[str, Sequence[float]]) -> None:
    """Write results.png: a bar for each arm, as long as its mean mIoU, with a mark for every seed."""
    from PIL import Image, ImageDraw, ImageFont

    row, left, width = 44, 190, 760
    sheet = Image.new("RGB", (width, row * len(ARMS) + 50), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    scale = (width - left - 80) / 100
    for index, (arm, caption) in enumerate(ARMS.items()):
        top, mean = 10 + row * index, sum(scores[arm]) / len(scores[arm])
        draw.text((10, top + 6), caption, fill="black", font=font)
        colour = "#c8452c" if arm == "sit" else "#6a7a8c"
        draw.rectangle((left, top, left + mean * scale, top + row - 14), fill=colour)
        for value in scores[arm]:
            draw.line((left + value * scale, top - 2, left + value * scale, top + row - 12), fill="black", width=2)
        draw.text((left + max(mean, *scores[arm]) * scale + 8, top + 6), f"{mean:.1f}", fill="black", font=font)
    draw.text((10, row * len(ARMS) + 20), "mIoU of seven categories on the target, percent", fill="black", font=font)
    sheet.save(out / "results.png")


def closed(scores: Mapping[str, Sequence[float]], arm: str) -> float:
    """Share of the gap between source and oracle that an arm closes, of the means, in percent."""
    mean = {name: sum(values) / len(values) for name, values in scores.items()}
    return 100 * (mean[arm] - mean["source"]) / (mean["oracle"] - mean["source"])


def write_results(out: Path, seconds: float) -> None:
    """Write results.json, results.md and results.png, and print the table."""
    reports = {arm: [read_json(out / "semseg" / f"{arm}_{seed}.json") for seed in SEEDS] for arm in ARMS}
    scores = {arm: [100 * report["miou"] for report in found] for arm, found in reports.items()}
    atomic_write_json(out / "results.json", scores)
    score_picture(out, scores)
    names = list(reports["source"][0]["iou"])
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    lines = [
        f"| U-Net trained on | mIoU, mean | {seeds} | gap closed | {' | '.join(names)} |",
        "| --- " * (3 + len(SEEDS) + len(names)) + "|",
    ]
    for arm, caption in ARMS.items():
        means = [100 * sum(report["iou"][name] or 0 for report in reports[arm]) / len(SEEDS) for name in names]
        values = [sum(scores[arm]) / len(SEEDS), *scores[arm]]
        cells = [f"{value:.1f}" for value in values] + [f"{closed(scores, arm):.0f}%"] + [f"{v:.1f}" for v in means]
        lines.append(f"| {caption} | {' | '.join(cells)} |")
    text = "\n".join(lines) + (
        f"\n\nmIoU and IoU in percent over Cityscapes' seven categories, on {VAL_FRAMES} target frames that no net was "
        f"trained on. One ProCST run, {len(SEEDS)} U-Nets for each row: same net, steps and seeds, last state.\n\n"
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
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    (out / MARKER).touch()
    (out / "semseg").mkdir()
    (out / "logs").mkdir()

    started, run = time.perf_counter(), Commands(out / "logs")
    count, size = ("--count", str(FRAMES)), ("--size", *SIZE)
    cityscapes = ("make_toy_data.py", "--out", str(out / "toy_cs"), "--domain", "cityscapes", *size)
    gta = ("make_toy_data.py", "--out", str(out / "toy_gta"), "--domain", "gta5", *size)
    two_at_a_time([
        lambda: run("toy_gta", *gta, *count, "--seed", "1"), lambda: run("toy_cs", *cityscapes, *count, "--seed", "2"),
    ])  # fmt: skip
    run("toy_val", *cityscapes, "--count", str(VAL_FRAMES), "--split", "val", "--seed", "3")

    def nets(*arms: str) -> list[Callable[[], None]]:
        return [lambda arm=arm, seed=seed: train_and_score(run, out, arm, seed) for arm in arms for seed in SEEDS]

    # ProCST takes one CPU, the nets that do not need it the other.
    others = [lambda: make_histogram(run, out), *nets("source", "histogram", "oracle")]
    two_at_a_time([lambda: make_sit(run, out), *others])
    two_at_a_time(nets("sit"))
    before_and_after(out)
    write_results(out, time.perf_counter() - started)
    print(f"look at {out / 'before_after.png'} and {out / 'results.png'}; the table is in {out / 'results.md'}")


if __name__ == "__main__":
    run_cli(main)
