"""A domain of a training: a list of images, how they are read and drawn, and their cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_handlers.cache import ImageCache
from data_handlers.cache_building import bytes_to_build, open_cache
from data_handlers.choices import OnBadImage, Resample
from data_handlers.lists import FileList
from data_handlers.stream import DomainBatch, LabelUse, PyramidOf, StreamConfig, open_stream


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Images of one list as a training reads them.

    Attributes:
        files: the list.
        name: `source` or `target`; every domain of a run has its own random order.
        seed: of the run.
        resize, crop: (W,H).
        labels: whether labels are read, checked by their header where nothing is cached, or ignored.
        flip: mirror every second sample, drawn at random.
        num_workers: loader processes.
        cache_dir: folder of caches, or ''.
        cache: opened by `with_cache`.
    """

    files: FileList
    name: str
    seed: int
    resize: tuple[int, int]
    crop: tuple[int, int]
    labels: LabelUse = "none"
    flip: bool = False
    resample: Resample = "exact"
    on_bad_image: OnBadImage = "stop"
    num_workers: int = 0
    cache_dir: str = ""
    cache: ImageCache | None = None

    def __len__(self) -> int:
        return len(self.files)

    @property
    def skips(self) -> bool:
        """Whether another image takes the place of one that cannot be used."""
        return self.on_bad_image == "skip"

    def with_cache(self) -> Domain:
        """The domain with its cache opened, which is built first where it is missing; itself without `cache_dir`.

        Raises:
            UserError: a file cannot be used, or the cache cannot be written or read.
        """
        if not self.cache_dir:
            return self
        return replace(
            self,
            cache=open_cache(
                cache_dir=Path(self.cache_dir),
                files=self.files,
                size=self.resize,
                resample=self.resample,
                with_labels=self.labels == "read",
                num_workers=self.num_workers,
                skip_unusable=self.skips,
            ),
        )

    def bytes_to_cache(self) -> int:
        """Disk space that `with_cache` would take for what is missing.

        Raises:
            UserError: the cache cannot be read.
        """
        if not self.cache_dir:
            return 0
        return bytes_to_build(
            cache_dir=Path(self.cache_dir),
            files=self.files,
            size=self.resize,
            resample=self.resample,
            with_labels=self.labels == "read",
        )

    def stream(
        self,
        *,
        stage: int,
        steps: range,
        batch_size: int,
        part: range,
        steps_per_epoch: int,
        epoch_length: int,
        pyramid: PyramidOf,
        pin_memory: bool,
        labels: LabelUse | None = None,
    ) -> Iterator[DomainBatch]:
        """The batches of some steps of a stage, in order.

        Args:
            batch_size: samples in a step over all processes; `part` are the places of those wanted here.
            steps_per_epoch: steps before a new random order is drawn.
            epoch_length: images in an epoch; a shorter list is repeated to this length.
            pyramid: makes the levels of the cropped image.
            labels: use of the labels where it differs from the domain's.

        Raises:
            UserError: a file of a step cannot be used.
        """
        drawn = StreamConfig(
            seed=self.seed,
            domain=self.name,
            scale=stage,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            epoch_length=epoch_length,
            resize=self.resize,
            crop=self.crop,
            labels=labels or self.labels,
            flip=self.flip,
            resample=self.resample,
            on_bad_image=self.on_bad_image,
        )
        return open_stream(self.files, drawn, pyramid, steps, self.num_workers, pin_memory, self.cache, part)
