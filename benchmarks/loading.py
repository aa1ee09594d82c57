"""Images per second and core of the data pipeline, with and without the cache, beside the literal one.

    python benchmarks/loading.py

Literal: image and label decoded by Pillow in a DataLoader worker, resized, cropped, every pyramid level made by Pillow,
normalised there, at every scale. One worker process, one thread; generated pictures of GTA5's size, read from the page
cache.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

# The scripts of this folder are run by path, and then their own folder is where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pictures import write_gta5
from data_handlers.classes import CITYSCAPES_IDS
from data_handlers.datasets import DATA_SETS
from data_handlers.domain import Domain, Samples
from data_handlers.images import image_pyramid
from data_handlers.lists import FileList, list_images
from training.flags import Parser
from utils.errors import run_cli

PREFETCHED = 4  # batches that a worker has ready
ENDLESS = 10**6
RESIZE, CROP, NATIVE = (1126, 619), (1024, 512), (1914, 1052)


class LiteralSamples(Dataset):
    """Pillow all the way, whatever the scale."""

    def __init__(self, files: FileList, scale: int, count: int) -> None:
        self.files, self.scale, self.count = files, scale, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        name = self.files.images[position % len(self.files)]
        image = Image.open(self.files.root / name).convert("RGB").resize(RESIZE, Image.Resampling.BICUBIC)
        label = Image.open(self.files.label_file(name)).resize(RESIZE, Image.Resampling.NEAREST)
        rng = np.random.default_rng(position)
        x, y = (int(rng.integers(r - c + 1)) for r, c in zip(RESIZE, CROP, strict=True))
        box = (x, y, x + CROP[0], y + CROP[1])
        levels = image_pyramid(np.asarray(image.crop(box)), 2, 0.5, self.scale)
        ids = np.asarray(label.crop(box))
        train_ids = np.full(ids.shape, 255, np.uint8)
        for label_id, train_id in CITYSCAPES_IDS.items():
            train_ids[ids == label_id] = train_id
        pixels = [torch.from_numpy((np.asarray(level, np.float32) - 128.0) / 128.0) for level in levels]
        return [level.permute(2, 0, 1) for level in pixels], torch.from_numpy(train_ids)


def literal(files: FileList, scale: int, count: int) -> Iterator[object]:
    """Batches of one from the literal pipeline."""
    return iter(DataLoader(LiteralSamples(files, scale, count), batch_size=1, num_workers=1))


def ours(domain: Domain, scale: int, count: int) -> Iterator[object]:
    """Batches of one from the trainer's pipeline."""
    return Samples(
        domain=domain, stage=scale, per_epoch=len(domain), epoch_length=len(domain), labels=scale == 2,
        pyramid=partial(image_pyramid, num_scales=2, scale_factor=0.5, up_to=scale, resample=domain.resample),
    ).batches(range(count), 1, range(1))  # fmt: skip


def images_per_second(batches: Iterator[object], seconds: float) -> float:
    """Rate over some seconds, after what the worker made while it started."""
    for _ in range(1 + PREFETCHED):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        next(batches)
        count += 1
    return count / (time.perf_counter() - started)


def main() -> None:
    """Command line entry."""
    parser = Parser(__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, help="time of every row (default: %(default)s)")
    parser.add_argument("--files", type=int, default=12, help="files they come from (default: %(default)s)")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_gta5(Path(folder) / "gta", flags.files, NATIVE)
        files = list_images(DATA_SETS["gta5"], root, "--files")
        started = time.perf_counter()
        fast = Domain(
            files=files, name="source", seed=1, resize=RESIZE, crop=CROP, labels=True, resample="fast", num_workers=1
        )
        cached = replace(fast, cache_dir=f"{folder}/cache")
        for index in range(len(files)):
            cached.resized[0].image(index)
            cached.resized[0].label(index)
        seconds = time.perf_counter() - started
        print(f"cache of {len(files)} images built in {seconds:.1f} s\n")
        print("| scale | pipeline | images/s | speed-up |\n| --- | --- | --- | --- |")
        for scale in range(3):
            ways = {
                "literal": literal(files, scale, ENDLESS),
                "exact": ours(replace(fast, resample="exact"), scale, ENDLESS),
                "fast": ours(fast, scale, ENDLESS),
                "cache": ours(cached, scale, ENDLESS),
            }
            rates = {}
            for name in list(ways):
                rates[name] = images_per_second(ways[name], flags.seconds)
                del ways[name]  # ends its worker
            for name, rate in rates.items():
                print(f"| {scale} | {name} | {rate:.1f} | {rate / rates['literal']:.2f} |", flush=True)


if __name__ == "__main__":
    run_cli(main)
