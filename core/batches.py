"""From the files of both domains to the batch of a step on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from core.config import ProCSTConfig, Size
from data_handlers.pyramid import array_pyramid
from core.step import Batch
from data_handlers.cache import ImageCache
from data_handlers.images import PROCST_INPUT
from data_handlers.lists import FileList
from data_handlers.stream import DomainBatch, LabelUse, StreamConfig, open_stream
from utils.transfer import to_device


def penalty_alphas(seed: int, scale: int, step: int) -> Tensor:
    """The two interpolation factors of a step's gradient penalties, uniform in [0,1], from (seed, scale, step)."""
    return torch.from_numpy(np.random.default_rng([seed, 2, scale, step]).random(2, dtype=np.float32))


def open_streams(
    config: ProCSTConfig,
    scale: int,
    steps: range,
    source: FileList,
    target: FileList,
    caches: Mapping[str, ImageCache],
    with_labels: bool,
    pin_memory: bool,
    share: range | None = None,
) -> Iterator[tuple[DomainBatch, DomainBatch]]:
    """The source and target batches of the given steps of a scale, in order.

    Args:
        caches: of the `source` and `target` images, where there are some.
        with_labels: read the source's labels; otherwise only their headers are looked at, with a cache not even those.
        share: the samples of each batch that are wanted, None for all.

    Raises:
        UserError: an image or label cannot be used.
    """
    data, schedule = config.data, config.schedule
    epoch_length = max(len(source), len(target))
    pyramid = partial(
        array_pyramid,
        num_scales=config.network.num_scales,
        scale_factor=config.network.scale_factor,
        up_to=scale,
        resample=data.resample,
    )

    def stream(files: FileList, domain: str, resize: Size, labels: LabelUse) -> Iterator[DomainBatch]:
        cache = caches.get(domain)
        drawn = StreamConfig(
            seed=config.run.manual_seed,
            domain=domain,
            scale=scale,
            batch_size=schedule.batch_size_list[scale],
            steps_per_epoch=schedule.steps_per_epoch(scale, epoch_length),
            epoch_length=epoch_length,
            resize=resize,
            crop=data.crop_size,
            labels=labels,
            resample=data.resample,
            on_bad_image=data.on_bad_image,
        )
        return open_stream(files, drawn, pyramid, steps, data.num_workers, pin_memory, cache, share)

    labels: LabelUse = "read" if with_labels else "check" if source.data_set.label_path else "none"
    return zip(
        stream(source, "source", data.src_resize, labels),
        stream(target, "target", data.trg_resize, "none"),
        strict=True,
    )


def step_batch(source: DomainBatch, target: DomainBatch, alphas: Tensor, device: torch.device) -> Batch:
    """What a step sees, on `device` and normalised; the label where the source has one."""

    def images(levels: list[Tensor]) -> list[Tensor]:
        # Channels first for every network; `Execution` lays out anew where another layout pays.
        return [PROCST_INPUT(to_device(level, device)) for level in levels]

    return Batch(
        source=images(source.levels),
        target=images(target.levels),
        alphas=to_device(alphas, device),
        label=None if source.label is None else to_device(source.label, device),
    )
