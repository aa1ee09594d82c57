"""How long training waits for its data: real steps fed by the real loader."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.meters import synchronise
from benchmarks.pictures import write_gta5
from core.config import ProCSTConfig
from core.networks import freeze
from core.procst import ProCST
from data_handlers.datasets import DATA_SETS
from data_handlers.domain import Domain
from data_handlers.lists import list_images
from models.segmentation import build_segmentation_net
from models.vgg import build_vgg
from training.distributed import Rank
from utils.devices import workers_for

PREFETCHED = 4  # batches that every worker has ready
WARM_UP = 3  # steps, of which the first chooses algorithms and takes seconds on a GPU
NATIVE = 1.7  # size of the pictures, relative to the size they are resized to, as GTA5's


def picture_domains(folder: Path, config: ProCSTConfig, device: torch.device) -> dict[str, Domain]:
    """A few pictures with labels, written to a folder, as `source` and `target`, with a cache there."""
    width, height = config.source.src_resize
    count, size = max(config.schedule.batch_size_list), (round(NATIVE * width), round(NATIVE * height))
    files = list_images(DATA_SETS["gta5"], write_gta5(folder / "gta", count, size), "--src_data_dir")
    labels = {"source": not config.labels.no_semseg, "target": False}
    resize = {"source": config.source.src_resize, "target": config.target.trg_resize}
    return {
        name: Domain(
            files=files, name=name, seed=0, resize=resize[name], crop=config.source.crop_size, labels=labels[name],
            resample=config.loader.resample, num_workers=workers_for(config.loader.num_workers, device),
            cache_dir=str(folder / "cache"),
        )
        for name in resize
    }  # fmt: skip


def procst_at(config: ProCSTConfig, scale: int, domains: Mapping[str, Domain], device: torch.device) -> ProCST:
    """ProCST of random weights at the beginning of a scale."""
    nets = {}
    if not config.labels.no_semseg:
        nets = {name: build_segmentation_net(config.net.shape()) for name in ("seg_source", "seg_sit")}
        freeze(nets["seg_source"])
    perceptual = build_vgg(config.loss.vgg_weights, config.loss.perceptual_layers)
    method = ProCST(config=config, rank=Rank(device=device), **domains, perceptual=perceptual, **nets)
    for stage in range(scale + 1):
        method.begin_stage(stage, resumed=False)
        if stage < scale:
            method.end_stage(stage)
    return method


def share_waiting(method: ProCST, scale: int, steps: int) -> float:
    """Share of the time of `steps` steps that goes by before their batch is there; nothing is ready at the start.

    At least twice as many steps as batches are made ahead, so that what was ready is used up.
    """
    first = PREFETCHED * max(1, method.domains["source"].num_workers)
    steps = max(steps, 2 * first)
    batches = method.batches(scale, range(WARM_UP + first + steps))
    for k in range(WARM_UP):
        method.step(next(batches), scale, k)
    synchronise(method.device)
    for _ in range(first):
        next(batches)
    waited = 0.0
    started = time.perf_counter()
    for k in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        method.step(batch, scale, k)
        synchronise(method.device)
    return waited / (time.perf_counter() - started)
