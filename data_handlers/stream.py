"""An endless stream of training batches for each domain, drawn by step number.

The batch of step k is a function of (seed, domain, scale, k): the order of an epoch comes from a permutation seeded by
the epoch's number, and the crop from a generator seeded by the sample's position. The number of worker processes does
not change the batches, and a resumed run continues the stream by starting at its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from data_handlers.cache import OR_SKIP, ImageCache
from data_handlers.choices import OnBadImage, Resample
from data_handlers.images import check_label_header, read_label, read_resized, resize_label
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.loaders import MOST_SKIPPED, disk_fault, load_in_order

DOMAINS = ("source", "target")
LabelUse = Literal["none", "check", "read"]  # labels are ignored; checked by their header; decoded and returned

# Cropped base image, uint8 (h,w,3) -> uint8 arrays of the pyramid levels wanted.
PyramidOf = Callable[[np.ndarray], Sequence[np.ndarray]]


@dataclass(frozen=True)
class StreamConfig:
    """The order in which a stream draws samples, and how it makes them (docs/method.md, section 1).

    Attributes:
        seed: of the run.
        domain: `source` or `target`.
        scale: scale in training; every scale has its own order.
        batch_size: samples in a step.
        steps_per_epoch: steps before a new permutation is drawn.
        epoch_length: images in an epoch; a shorter list is repeated to this length.
        resize, crop: (W,H) in pixels.
        labels: whether labels are ignored, checked by their header (not where images are cached), or read.
        flip: mirror samples left to right with probability 1/2.
        resample: how images are resized.
        on_bad_image: `stop` raises for an image that cannot be used; `skip` takes the next one of the epoch instead.
    """

    seed: int
    domain: str
    scale: int
    batch_size: int
    steps_per_epoch: int
    epoch_length: int
    resize: tuple[int, int]
    crop: tuple[int, int]
    labels: LabelUse = "none"
    flip: bool = False
    resample: Resample = "exact"
    on_bad_image: OnBadImage = "stop"


@dataclass(frozen=True)
class Sample:
    """One sample of a stream.

    Attributes:
        levels: pyramid levels, coarse to fine, uint8 (h_i,w_i,3).
        label: trainIds uint8 (H,W), None where labels are not read.
        skipped: the messages about images that could not be used and that this one replaces.
    """

    levels: list[np.ndarray]
    label: np.ndarray | None
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class DomainBatch:
    """The samples of one step.

    Attributes:
        levels: pyramid levels, coarse to fine, uint8 (B,h_i,w_i,3).
        label: trainIds uint8 (B,H,W), None where labels are not read.
        skipped: the messages about images that could not be used and that others replace.
    """

    levels: list[Tensor]
    label: Tensor | None
    skipped: tuple[str, ...] = field(default=())

    def pin_memory(self) -> DomainBatch:
        """Page-locked copy, for asynchronous transfer to a GPU; the DataLoader calls this."""
        label = None if self.label is None else self.label.pin_memory()
        return DomainBatch([level.pin_memory() for level in self.levels], label, self.skipped)


class StreamSamples(Dataset):
    """The sample at each position of the stream; position = step * batch size + place in the batch."""

    def __init__(
        self, files: FileList, config: StreamConfig, pyramid: PyramidOf, cache: ImageCache | None = None
    ) -> None:
        self.files = files
        self.cache = cache
        self.config = config
        self.pyramid = pyramid
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def image_index(self, position: int, skipped: int = 0) -> int:
        """Index into the file list of the image at a stream position, or of the n-th after it in the epoch's order."""
        config = self.config
        epoch, place = divmod(position, config.steps_per_epoch * config.batch_size)
        if epoch != self._epoch:
            rng = np.random.default_rng([config.seed, DOMAINS.index(config.domain), config.scale, 0, epoch])
            self._order = rng.permutation(config.epoch_length) % len(self.files)
            self._epoch = epoch
        return int(self._order[(place + skipped) % len(self._order)])

    def crop_offset(self, position: int) -> tuple[int, int]:
        """(x,y) of the crop in the resized image; every offset that fits is possible, the last one included."""
        config = self.config
        rng = np.random.default_rng([config.seed, DOMAINS.index(config.domain), config.scale, 1, position])
        x, y = (int(rng.integers(r - c + 1)) for r, c in zip(config.resize, config.crop, strict=True))
        return x, y

    def is_flipped(self, position: int) -> bool:
        """Whether the sample at a stream position is mirrored."""
        config = self.config
        rng = np.random.default_rng([config.seed, DOMAINS.index(config.domain), config.scale, 2, position])
        return config.flip and bool(rng.integers(2))

    def __getitem__(self, position: int) -> Sample | UserError:
        wrong: list[str] = []
        while True:
            try:
                return self._load(position, wrong)
            except UserError as error:
                if self.config.on_bad_image == "stop":
                    return UserError(f"{error}{OR_SKIP}")
                wrong.append(str(error))
                if len(wrong) == MOST_SKIPPED:
                    return disk_fault(error)

    def _load(self, position: int, skipped: Sequence[str]) -> Sample:
        image, label = self._resized(self.image_index(position, len(skipped)))
        x, y = self.crop_offset(position)
        width, height = self.config.crop
        window = np.s_[y : y + height, x : x + width]
        step = -1 if self.is_flipped(position) else 1
        image = np.array(image[window][:, ::step], order="C")  # a copy: the cache is read-only
        label = None if label is None else np.array(label[window][:, ::step], order="C")
        return Sample(list(self.pyramid(image)), label, tuple(skipped))

    def _resized(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The image and, where it is read, the label at their training size."""
        if self.cache is not None:
            return self.cache.image(index), self.cache.label(index) if self.config.labels == "read" else None
        name = self.files.images[index]
        resized, own_size = read_resized(self.files.root / name, self.config.resize, self.config.resample)
        label = self._label(name, own_size)
        return resized, None if label is None else resize_label(label, self.config.resize)

    def _label(self, name: str, size: tuple[int, int]) -> np.ndarray | None:
        if self.config.labels == "none":
            return None
        path = self.files.label_file(name)
        if self.config.labels == "check":
            check_label_header(path, self.files.data_set, size)
            return None
        return read_label(path, self.files.data_set, size)


def _collate(samples: Sequence[Sample | UserError]) -> DomainBatch | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    levels = [torch.from_numpy(np.stack(level)) for level in zip(*(sample.levels for sample in samples), strict=True)]
    labels = [sample.label for sample in samples if sample.label is not None]
    label = torch.from_numpy(np.stack(labels)) if labels else None
    if get_worker_info() is not None:
        # Here, where it can be told that there is none: the thread that sends a batch drops it without an error.
        for tensor in (*levels, *(() if label is None else (label,))):
            tensor.share_memory_()
    skipped = tuple(reason for sample in samples for reason in sample.skipped)
    return DomainBatch(levels, label, skipped)


def open_stream(
    files: FileList,
    config: StreamConfig,
    pyramid: PyramidOf,
    steps: range,
    num_workers: int,
    pin_memory: bool = False,
    cache: ImageCache | None = None,
    share: range | None = None,
) -> Iterator[DomainBatch]:
    """Yield the batches of the given steps in order.

    Args:
        pyramid: makes the levels that are wanted of a cropped image.
        pin_memory: page-locked batches, for asynchronous transfer to a GPU.
        cache: of these files at the configured size, which is read instead of the files.
        share: places in each batch whose samples are wanted, None for all; the samples are the same either way.

    Raises:
        UserError: in the main process, when a file of a step cannot be used.
        LoaderDied: a loader process died; see `load_in_order`.
    """
    samples = StreamSamples(files, config, pyramid, cache)
    places = range(config.batch_size) if share is None else share

    starts = range(steps.start * config.batch_size, steps.stop * config.batch_size, config.batch_size)
    return load_in_order(
        samples,
        (range(start + places.start, start + places.stop) for start in starts),
        num_workers=num_workers,
        collate=_collate,
        pin_memory=pin_memory,
        prefetch=4,
    )
