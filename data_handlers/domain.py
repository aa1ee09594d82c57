"""A domain of a training: a list of images, how they are read and drawn, and their cache.

The batch of step k is a function of (seed, domain, stage, k): the order of an epoch comes from a permutation seeded by
the epoch's number, and the crop from a generator seeded by the sample's position (docs/method.md, section 1). The
number of worker processes does not change the batches, and a resumed run continues by starting at its step.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from data_handlers.cache import ResizedFiles
from data_handlers.choices import OR_SKIP, Resample
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.loaders import MOST_SKIPPED, disk_fault, load_in_order

DOMAINS = ("source", "target")
CROP = 1  # purpose of the random numbers of a crop

# Cropped base image, uint8 (h,w,3) -> uint8 arrays of the pyramid levels wanted.
PyramidOf = Callable[[np.ndarray], Sequence[np.ndarray]]

Source = TypeVar("Source")


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
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class PairBatch:
    """The source and the target samples of one step."""

    source: DomainBatch
    target: DomainBatch

    @property
    def skipped(self) -> tuple[str, ...]:
        """The messages about images of both that could not be used and that others replace."""
        return (*self.source.skipped, *self.target.skipped)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Images of one list as a training reads them.

    Attributes:
        name: such as `source` or `target`; each name has its own random order.
        seed: of the run.
        resize, crop: (W,H) in pixels.
        labels: whether labels are read.
        flip: mirror samples left to right with probability 1/2.
        skips: an image that cannot be used is replaced by the next one of the epoch, instead of an error.
        num_workers: loader processes.
        cache_dir: folder of the cache, or ''.
        image_roots: folders with images of the same names, of which one is drawn for each sample; empty means the
            list's own.
    """

    files: FileList
    name: str
    seed: int
    resize: tuple[int, int]
    crop: tuple[int, int]
    labels: bool = False
    flip: bool = False
    resample: Resample = "exact"
    skips: bool = False
    num_workers: int = 0
    cache_dir: str = ""
    image_roots: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def lists(self) -> list[FileList]:
        """The list with the images of each folder."""
        return [self.files.with_images_of(root) for root in self.image_roots] or [self.files]

    @property
    def resized(self) -> tuple[ResizedFiles, ...]:
        """The images and labels at their training size, from each folder of images."""
        return tuple(ResizedFiles(files, self.resize, self.resample, self.cache_dir) for files in self.lists)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a stage, each at its position; position = step * batch size + place in the batch.

    Attributes:
        stage: every stage has its own random order.
        per_epoch: samples before a new random order is drawn.
        epoch_length: images in an epoch; a shorter list is repeated to this length.
        pyramid: makes the levels of the cropped image; by default that image is the only one.
        labels: False ignores the labels of a domain that reads them.
    """

    domain: Domain
    stage: int
    per_epoch: int
    epoch_length: int
    pyramid: PyramidOf = lambda image: [image]
    labels: bool = True

    def batches(self, steps: range, batch_size: int, part: range) -> Iterator[DomainBatch]:
        """The batches of some steps, in order.

        Args:
            batch_size: samples in a step over all processes; `part` are the places of those wanted here.

        Raises:
            UserError: in the main process, when a file of a step cannot be used.
            LoaderDied: a loader process died; see `load_in_order`.
        """
        positions = (range(step * batch_size + part.start, step * batch_size + part.stop) for step in steps)
        return load_in_order(self.batch, positions, num_workers=self.domain.num_workers, prefetch=4)

    def _seed(self, purpose: int, number: int) -> tuple[int, ...]:
        name = self.domain.name
        domain = DOMAINS.index(name) if name in DOMAINS else zlib.crc32(name.encode())
        return (self.domain.seed, domain, self.stage, purpose, number)

    def __len__(self) -> int:
        return len(self.domain)

    def image_index(self, position: int, skipped: int = 0) -> int:
        """Index into the file list of the image at a stream position, or of the n-th after it in the epoch's order."""
        epoch, place = divmod(position, self.per_epoch)
        order = _permutation(self._seed(0, epoch), self.epoch_length)
        return int(order[(place + skipped) % self.epoch_length]) % len(self)

    @property
    def stored(self) -> Sequence[ResizedFiles]:
        """The images and labels that are cropped, from each folder of images."""
        return self.domain.resized

    def crop_offset(self, position: int, size: tuple[int, int], label: np.ndarray | None = None) -> tuple[int, int]:
        """(x,y) of the crop in a resized image; every offset that fits is possible, the last one included.

        Args:
            size: (W,H) of that image; `label`, (H,W), is its label where labels are read.
        """
        rng = self.generator(CROP, position)
        x, y = (int(rng.integers(r - c + 1)) for r, c in zip(size, self.domain.crop, strict=True))
        return x, y

    def batch(self, positions: Iterable[int]) -> DomainBatch:
        """The samples at some positions. Raises `UserError` if an image, or the one in its place, cannot be used."""
        images, labels, skipped = zip(*[self[position] for position in positions], strict=True)
        levels = [torch.from_numpy(np.stack(level)) for level in zip(*images, strict=True)]
        label = None if labels[0] is None else torch.from_numpy(np.stack(labels))
        if get_worker_info() is not None:
            # A lack of shared memory raises an error here; the thread that sends a batch would drop it without one.
            for tensor in (*levels, *(() if label is None else (label,))):
                tensor.share_memory_()
        return DomainBatch(levels, label, tuple(chain(*skipped)))

    def __getitem__(self, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None, list[str]]:
        """Pyramid levels, uint8 (h_i,w_i,3); label, uint8 (H,W) or None; messages about the images this one replaces.

        Raises `UserError`: an image cannot be used and no other is taken in its place.
        """
        wrong: list[str] = []
        while True:
            try:
                return *self.read(self.image_index(position, len(wrong)), position), wrong
            except UserError as error:
                if not self.domain.skips:
                    raise UserError(f"{error}{OR_SKIP}") from None
                wrong.append(str(error))
                if len(wrong) == MOST_SKIPPED:
                    raise disk_fault(error) from None

    def generator(self, purpose: int, position: int) -> np.random.Generator:
        """The random numbers of a sample for a purpose."""
        return np.random.default_rng(self._seed(purpose, position))

    def drawn(self, sources: Sequence[Source], position: int) -> Source:
        """The one of several folders of images that is drawn for a sample."""
        return sources[int(self.generator(3, position).integers(len(sources))) if len(sources) > 1 else 0]

    def read(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        """Levels and label of image `index` for the sample at a position. Raises `UserError` if it cannot be used."""
        stored = self.drawn(self.stored, position)
        image = stored.image(index)
        label = stored.label(index) if self.domain.labels and self.labels else None
        x, y = self.crop_offset(position, image.shape[1::-1], label)
        width, height = self.domain.crop
        window = np.s_[y : y + height, x : x + width]
        step = -1 if self.domain.flip and self.generator(2, position).integers(2) else 1
        image = np.array(image[window][:, ::step], order="C")  # a copy: the cache is read-only
        label = None if label is None else np.array(label[window][:, ::step], order="C")
        return self.pyramid(image), label


@lru_cache(maxsize=len(DOMAINS))
def _permutation(seed: tuple[int, ...], length: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(length)
