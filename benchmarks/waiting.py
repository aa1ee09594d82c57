"""How long training waits for its data: real steps fed by the real loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from core.batches import open_streams, penalty_alphas, step_batch
from data_handlers.cache_building import open_cache

from benchmarks.meters import synchronise
from benchmarks.pictures import write_gta5
from core.config import ProCSTConfig
from core.step import Batch
from data_handlers.cache import ImageCache
from data_handlers.datasets import DATA_SETS
from data_handlers.lists import FileList, list_images

PREFETCHED = 4  # batches that every worker has ready
WARM_UP = 3  # steps, of which the first chooses algorithms and takes seconds on a GPU
NATIVE = 1.7  # size of the pictures, relative to the size they are resized to, as GTA5's


def write_pictures(folder: Path, config: ProCSTConfig) -> tuple[FileList, Mapping[str, ImageCache]]:
    """A few pictures with labels and their caches as `source` and `target`, of the configured resize."""
    width, height = config.data.src_resize
    count, size = max(config.schedule.batch_size_list), (round(NATIVE * width), round(NATIVE * height))
    root = write_gta5(folder / "gta", count, size)
    files = list_images(DATA_SETS["gta5"], root, "--src_data_dir")
    sizes = {"source": config.data.src_resize, "target": config.data.trg_resize}
    caches = {
        domain: open_cache(
            cache_dir=folder / "cache", files=files, size=size, resample=config.data.resample,
            with_labels=domain == "source", num_workers=1,
        )
        for domain, size in sizes.items()
    }
    return files, caches


def share_waiting(
    config: ProCSTConfig,
    scale: int,
    files: FileList,
    caches: Mapping[str, ImageCache],
    step: Callable[[Batch], object],
    device: torch.device,
    steps: int,
) -> float:
    """Share of the time of `steps` steps that goes by before their batch is there; nothing is ready at the start.

    At least twice as many steps as batches are made ahead, so that what was ready is used up.
    """
    first = PREFETCHED * max(1, config.data.num_workers)
    steps = max(steps, 2 * first)
    batches = open_streams(
        config, scale, range(WARM_UP + first + steps), files, files, caches,
        with_labels=scale == config.network.num_scales, pin_memory=device.type == "cuda",
    )  # fmt: skip
    for k in range(WARM_UP):
        step(step_batch(*next(batches), penalty_alphas(0, scale, k), device))
    synchronise(device)
    for _ in range(first):
        next(batches)
    waited = 0.0
    started = time.perf_counter()
    for k in range(steps):
        asked = time.perf_counter()
        source, target = next(batches)
        waited += time.perf_counter() - asked
        step(step_batch(source, target, penalty_alphas(0, scale, k), device))
        synchronise(device)
    return waited / (time.perf_counter() - started)
