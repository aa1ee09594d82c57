"""A one-time cache of decoded, resized images (and labels), read through the page cache of the operating system.

Decoding a PNG and resizing it takes far longer than anything else the loader does. With a cache a sample is a crop cut
out of a memory-mapped array. A cache belongs to one list of files, one size and one way of resampling; it is used only
if it is complete and none of its files has changed since.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_handlers.images import Resample, read_image, read_label, resize_image, resize_label
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.files import atomic_write_json, make_folder, read_json

MANIFEST = "cache.json"
IMAGES, LABELS = "images.npy", "labels.npy"
BUILDING = ".building-"


class ImageCache:
    """A finished cache.

    Args:
        folder: holds `images.npy`, uint8 (N,H,W,3), and maybe `labels.npy`, trainIds uint8 (N,H,W).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Opened where it is read: every worker process maps the file itself.
        self._images: np.ndarray | None = None
        self._labels: np.ndarray | None = None

    def image(self, index: int) -> np.ndarray:
        """The resized image at a position of the list, uint8 (H,W,3), read-only."""
        if self._images is None:
            self._images = np.load(self.folder / IMAGES, mmap_mode="r")
        return self._images[index]

    def label(self, index: int) -> np.ndarray:
        """Its resized label, trainIds uint8 (H,W), read-only."""
        if self._labels is None:
            self._labels = np.load(self.folder / LABELS, mmap_mode="r")
        return self._labels[index]

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "_images": None, "_labels": None}


class _Resized(Dataset):
    def __init__(self, files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool) -> None:
        self.files, self.size, self.resample, self.with_labels = files, size, resample, with_labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray, np.ndarray | None] | UserError:
        name = self.files.images[index]
        try:
            image = read_image(self.files.root / name)
            label = None
            if self.with_labels:
                ids = read_label(self.files.label_file(name), self.files.data_set, image.size)
                label = resize_label(ids, self.size)
            return index, resize_image(image, self.size, self.resample), label
        except UserError as error:
            return error  # raised in the main process, without a worker's traceback around it


def _state_of_files(files: FileList, with_labels: bool) -> str:
    """SHA-256 over names, sizes and times of all files: it changes when any file does."""
    digest = hashlib.sha256()
    for name in files.images:
        for path in (files.root / name, *([files.label_file(name)] if with_labels else [])):
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def open_cache(
    cache_dir: Path, files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool, num_workers: int
) -> ImageCache:
    """The cache of a list at a size, built first where there is none, or where its files have changed.

    A cache that is being built has another name until it is complete, so a killed build is never taken for a cache.

    Raises:
        UserError: a file cannot be used, or the disk is too small.
    """
    description = {
        "data_set": files.data_set.name,
        "root": str(files.root.resolve()),
        "list": files.fingerprint(),
        "size": list(size),
        "resample": resample,
        "labels": with_labels,
    }
    key = hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]
    folder = cache_dir / f"{files.data_set.name}_{size[0]}x{size[1]}_{key}"
    description["files"] = _state_of_files(files, with_labels)
    if (folder / MANIFEST).is_file() and read_json(folder / MANIFEST) == description:
        return ImageCache(folder)
    make_folder(cache_dir, "--cache_dir")
    for leftover in cache_dir.glob(f"{BUILDING}{key}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _require_space(cache_dir, len(files) * size[0] * size[1] * (4 if with_labels else 3))
    building = Path(tempfile.mkdtemp(prefix=f"{BUILDING}{key}-", dir=cache_dir))
    try:
        _build(building, files, size, resample, with_labels, num_workers)
        atomic_write_json(building / MANIFEST, description)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except OSError as error:
        raise UserError(f"--cache_dir {cache_dir}: cannot write ({error.strerror}); check the free space") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return ImageCache(folder)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache_dir {folder}: the cache takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; choose "
            "another disk, or leave the flag out"
        )


def _build(
    folder: Path, files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool, num_workers: int
) -> None:
    width, height = size

    def array(name: str, *shape: int) -> np.memmap:
        return np.lib.format.open_memmap(folder / name, mode="w+", dtype=np.uint8, shape=(len(files), *shape))

    images = array(IMAGES, height, width, 3)
    labels = array(LABELS, height, width) if with_labels else None
    samples = DataLoader(
        _Resized(files, size, resample, with_labels), batch_size=None, num_workers=num_workers, collate_fn=_as_it_is
    )
    for index, image, label in _checked(tqdm(samples, desc=f"caching {files.data_set.name}", unit="img")):
        images[index] = image
        if labels is not None:
            labels[index] = label
    images.flush()
    if labels is not None:
        labels.flush()


def _checked(samples: Iterator[object]) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    for sample in samples:
        if isinstance(sample, UserError):
            raise sample
        yield sample


def _as_it_is(sample: object) -> object:
    return sample
