"""Building the cache of resized images and labels that `data_handlers.cache` reads.

The name of a cache's folder holds a fingerprint of its contents: names, sizes and times of the files, the size and the
resampling, and how labels are read. Where one of these changes, another cache is built beside the first, so a run can
go on with its own. A cache is built under a temporary name and renamed when it is complete and on the disk.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from data_handlers.cache import ARRAY, MANIFEST, OR_SKIP, ImageCache, read_unusable
from data_handlers.choices import Resample
from data_handlers.images import image_size, read_label, read_resized, resize_label
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.files import atomic_write_json, make_folder
from utils.loaders import load_in_order
from utils.locks import say

# To be raised when the code that reads or resizes images and labels changes its results.
FORMAT = 2
BUILDING = ".building-"


@dataclass(frozen=True)
class _Part:
    """The images of a list at a size (W,H), or their labels: the contents of one folder."""

    kind: Literal["images", "labels"]
    files: FileList
    size: tuple[int, int]
    resample: Resample

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the uint8 array: (N,H,W,3) or (N,H,W)."""
        return (len(self.files), self.size[1], self.size[0], *((3,) if self.kind == "images" else ()))

    def name(self) -> str:
        """Name of the folder, which ends in the fingerprint of the contents; asks for the state of every file."""
        files, data_set = self.files, self.files.data_set
        root, label_root = files.root.resolve(), (files.label_root or files.root).resolve()
        reading: list[object] = [FORMAT, self.kind, self.size]
        if self.kind == "images":
            reading.append(self.resample)
        else:
            ignored = None if data_set.ignored_values is None else sorted(data_set.ignored_values)
            reading += [sorted(data_set.value_map.items()), ignored, data_set.storage]
        digest = hashlib.sha256(json.dumps(reading).encode())
        for image in files.images:
            paths = [f"{root}/{image}"]  # text: for a million files, path objects take longer than the disk's answers
            if self.kind == "labels":  # a label is checked against its image's size, so it depends on both files
                paths.append(f"{label_root}/{files.label_of(image)}")
            for path in paths:
                try:
                    status = os.stat(path)
                    state = f"{status.st_size} {status.st_mtime_ns}"
                except OSError:
                    state = "unusable"  # `read` says why
                digest.update(os.fsencode(f"{path} {state}\n"))
        return f"{data_set.name}_{self.size[0]}x{self.size[1]}_{self.kind}_{digest.hexdigest()[:32]}"

    def read(self, index: int) -> np.ndarray:
        """The resized image, or label, at a position of the list.

        Raises:
            UserError: its file cannot be used.
        """
        name = self.files.images[index]
        path = self.files.root / name
        if self.kind == "images":
            return read_resized(path, self.size, self.resample)[0]
        label = read_label(self.files.label_file(name), self.files.data_set, image_size(path))
        return np.array(resize_label(label, self.size))


def open_cache(
    *,
    cache_dir: Path,
    files: FileList,
    size: tuple[int, int],
    resample: Resample,
    with_labels: bool,
    num_workers: int,
    skip_unusable: bool = False,
) -> ImageCache:
    """The cache of a list at a size (W,H). What is missing is built first; what is damaged is deleted and built again.

    Processes that start together build it once: one at a time builds in a `cache_dir`, and the others wait.

    Args:
        skip_unusable: build the cache without the files that cannot be used; they raise when they are asked for.

    Raises:
        UserError: a file cannot be used or changes during the build, or the disk is too small or cannot be written to.
    """
    parts = _parts(files, size, resample, with_labels)
    folders = {part.kind: cache_dir / part.name() for part in parts}
    if not all(_is_finished(folders[part.kind], part) for part in parts):
        make_folder(cache_dir, "--cache_dir")
        try:
            with _only_builder(cache_dir):
                # Asked again: another process may have built it meanwhile.
                missing = {folders[part.kind]: part for part in parts if not _is_finished(folders[part.kind], part)}
                _make_room(cache_dir, missing)
                for folder, part in missing.items():
                    _build(folder, part, num_workers, skip_unusable)
        except OSError as error:
            raise UserError(
                f"--cache_dir {cache_dir}: cannot write the cache ({error.strerror}); check the folder and the free "
                "space"
            ) from None
    cache = ImageCache(**folders)
    if not skip_unusable:
        cache.require_all_usable()
    return cache


def bytes_to_build(
    *, cache_dir: Path, files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool
) -> int:
    """Disk space, in bytes, that `open_cache` would take for what is missing."""
    parts = _parts(files, size, resample, with_labels)
    return sum(math.prod(part.shape) for part in parts if not _is_finished(cache_dir / part.name(), part))


def _parts(files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool) -> list[_Part]:
    # Labels first: they take minutes, and show most of what can be wrong with the files.
    kinds = ("labels", "images") if with_labels else ("images",)
    return [_Part(kind, files, size, resample) for kind in kinds]


def _is_finished(folder: Path, part: _Part) -> bool:
    try:
        read_unusable(folder)
        array = np.load(folder / ARRAY, mmap_mode="r")  # checks that the file is large enough
        return (array.shape, array.dtype) == (part.shape, np.uint8)
    except Exception:  # the parsers raise errors of many kinds on arbitrary bytes
        return False


@contextmanager
def _only_builder(cache_dir: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder; a lock ends with its process."""
    with open(cache_dir / ".lock", "ab") as file:
        try:
            # A lock of `lockf` belongs to this process alone; forked workers would hold one of `flock` as well.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"--cache_dir {cache_dir}: waiting for another process that is building a cache there")
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def _make_room(cache_dir: Path, missing: dict[Path, _Part]) -> None:
    """Delete unfinished builds of killed processes and damaged caches, and require space for what is missing."""
    for leftover in cache_dir.glob(f"{BUILDING}*"):
        shutil.rmtree(leftover)
    for folder in missing:
        if os.path.lexists(folder):
            say(f"{folder}: this cache is damaged; it is deleted and built again")
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
            else:
                folder.unlink()
    needed, free = sum(math.prod(part.shape) for part in missing.values()), shutil.disk_usage(cache_dir).free
    if needed > free:
        raise UserError(
            f"--cache_dir {cache_dir}: the cache takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; delete "
            "caches there that no run uses, choose another disk, or leave the flag out"
        )


def _build(folder: Path, part: _Part, num_workers: int, skip_unusable: bool) -> None:
    """Build a part under a temporary name, and rename it when it is complete and on the disk."""
    building = folder.with_name(BUILDING + folder.name)
    try:
        building.mkdir()
        unusable = _write_array(building / ARRAY, part, num_workers, skip_unusable)
        if part.name() != folder.name:
            raise UserError(f"files of {part.files.root} changed while their cache was built; start again")
        atomic_write_json(building / MANIFEST, {"of": part.files.describe(), "unusable": unusable})
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_array(path: Path, part: _Part, num_workers: int, skip_unusable: bool) -> dict[int, str]:
    """Write the part as a .npy file and wait until it is on the disk; files that cannot be used become zeros.

    Returns:
        What was wrong with the files that cannot be used, by position in the list.
    """
    unusable: dict[int, str] = {}
    # Written, not memory-mapped: in a mapped file, a full disk kills the process without a message.
    with open(path, "xb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": part.shape}
        np.lib.format.write_array_header_1_0(file, header)
        loaded = load_in_order(
            _Samples(part),
            range(len(part.files)),
            num_workers=num_workers,
            skip_unusable=skip_unusable,
            or_else=OR_SKIP,
        )
        named = f"caching {part.kind} of {part.files.data_set.name}"
        for index, sample in enumerate(tqdm(loaded, desc=named, unit="img", total=len(part.files))):
            if isinstance(sample, UserError):
                unusable[index] = str(sample)
                sample = bytes(math.prod(part.shape[1:]))
            file.write(sample)
        file.flush()
        os.fsync(file.fileno())
    return unusable


class _Samples(Dataset):
    def __init__(self, part: _Part) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.files)

    def __getitem__(self, index: int) -> np.ndarray | UserError:
        try:
            return self.part.read(index)
        except UserError as error:
            return error
