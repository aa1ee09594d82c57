"""Images and labels of a list at their training size, from their files or from a cache on the disk.

With a cache, a sample is a crop of a memory-mapped array instead of a decoded and resized file. A cache is one folder
for the images and one for the labels, so that runs with and without labels share the images. The folder's name holds a
fingerprint of its contents: names, sizes and times of the files, the size and the resampling, and how labels are read.
Where one of these changes, another cache is built beside the first. A cache is built under a temporary name, renamed
when it is complete and on the disk, and never changed.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_handlers.choices import OR_SKIP, Resample
from data_handlers.images import image_size, read_label, read_resized
from data_handlers.lists import FileList, label_path
from utils.errors import UserError
from utils.files import atomic_write_json, make_folder
from utils.loaders import load_in_order
from utils.locks import locked

# To be raised when the code that reads or resizes images and labels changes its results.
FORMAT = 2
ARRAY = "array.npy"
MANIFEST = "cache.json"
BUILDING = ".building-"


@dataclass(frozen=True)
class ResizedFiles:
    """The images and labels of a list at a size (W,H), read from their files.

    Both methods take a position of the list and raise a `UserError` for a file that cannot be used.
    """

    files: FileList
    size: tuple[int, int]
    resample: Resample

    def image(self, index: int) -> np.ndarray:
        """The resized image, uint8 (H,W,3)."""
        return read_resized(self.files.image_file(self.files.images[index]), self.size, self.resample)

    def label(self, index: int) -> np.ndarray:
        """The label resized by taking the nearest pixel, trainIds uint8 (H,W)."""
        files, name = self.files, self.files.images[index]
        label = read_label(files.label_file(name), files.data_set, image_size(files.image_file(name)))
        return np.array(Image.fromarray(label).resize(self.size, Image.Resampling.NEAREST))


@dataclass(frozen=True, eq=False)
class ImageCache:
    """A finished cache, which takes the place of `ResizedFiles`; what it returns is read-only.

    Attributes:
        arrays: memory-mapped `images`, uint8 (N,H,W,3), and where labels are read `labels`, trainIds uint8 (N,H,W).
        unusable: what was wrong with the files that each was built without, by position in the list.
    """

    arrays: Mapping[str, np.ndarray]
    unusable: Mapping[str, Mapping[int, str]]

    def image(self, index: int) -> np.ndarray:
        """The resized image, uint8 (H,W,3)."""
        return self._at("images", index)

    def label(self, index: int) -> np.ndarray:
        """The resized label, trainIds uint8 (H,W)."""
        return self._at("labels", index)

    def _at(self, kind: str, index: int) -> np.ndarray:
        if reason := self.unusable[kind].get(index):
            raise UserError(reason)
        return self.arrays[kind][index]


@dataclass(frozen=True)
class _Part:
    """The resized images of a list, or the labels: the contents of one folder."""

    kind: Literal["images", "labels"]
    resized: ResizedFiles

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the uint8 array: (N,H,W,3) or (N,H,W)."""
        width, height = self.resized.size
        return (len(self.resized.files), height, width, *((3,) if self.kind == "images" else ()))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)

    def load(self, index: int) -> np.ndarray:
        return self.resized.image(index) if self.kind == "images" else self.resized.label(index)

    def name(self) -> str:
        """Name of the folder, which ends in the fingerprint of the contents; asks for the state of every file."""
        files, size = self.resized.files, self.resized.size
        data_set, root, label_root = files.data_set, files.root.resolve(), (files.label_root or files.root).resolve()
        reading: list[object] = [FORMAT, self.kind, size]
        if self.kind == "images":
            reading.append(self.resized.resample)
        else:
            ignored = None if data_set.ignored_values is None else sorted(data_set.ignored_values)
            reading += [sorted(data_set.value_map.items()), ignored, data_set.storage]
        digest = hashlib.sha256(json.dumps(reading).encode())
        for image in files.images:
            # Text: for a million files, path objects take longer than the disk's answers.
            held = image if image.endswith(".png") else files.image_file(image).relative_to(files.root)
            paths = [f"{root}/{held}"]
            if self.kind == "labels":  # a label is checked against its image's size, so it depends on both files
                paths.append(f"{label_root}/{label_path(data_set, image)}")
            for path in paths:
                try:
                    status = os.stat(path)
                    state = f"{status.st_size} {status.st_mtime_ns}"
                except OSError:
                    state = "unusable"  # reading the file says why
                digest.update(os.fsencode(f"{path} {state}\n"))
        return f"{data_set.name}_{size[0]}x{size[1]}_{self.kind}_{digest.hexdigest()[:32]}"

    def open(self, folder: Path) -> tuple[np.ndarray, dict[int, str]]:
        """The array in a finished folder, and what it was built without. Raises `UserError` where it is damaged."""
        try:
            unusable = json.loads((folder / MANIFEST).read_bytes())["unusable"]
            array = np.load(folder / ARRAY, mmap_mode="r")  # checks that the file is large enough
            if (array.shape, array.dtype) != (self.shape, np.uint8):
                raise ValueError
            return array, {int(index): str(reason) for index, reason in unusable.items()}
        except PermissionError as error:
            raise UserError(f"--cache_dir: cannot read {folder} ({error.strerror})") from None
        except Exception:  # the parsers raise errors of many kinds on arbitrary bytes
            raise UserError(f"{folder}: this cache is damaged; delete it, and it is built again") from None


def open_cache(
    cache_dir: Path, resized: ResizedFiles, *, with_labels: bool, num_workers: int, skip_unusable: bool = False
) -> ImageCache:
    """The cache of a list at a size. What is missing is built first, by one process at a time in a `cache_dir`.

    Args:
        skip_unusable: build the cache without the files that cannot be used; they raise when they are asked for.

    Raises:
        UserError: a file cannot be used, a cache is damaged, or the disk is too small or cannot be written to.
    """
    parts = _parts(cache_dir, resized, with_labels)
    if _missing(parts):
        make_folder(cache_dir, "--cache_dir")
        waiting = f"--cache_dir {cache_dir}: waiting for another process that is building a cache there"
        try:
            with locked(cache_dir, "--cache_dir", waiting):
                missing = _missing(parts)  # asked again: another process may have built it meanwhile
                _make_room(cache_dir, missing)
                for folder, part in missing.items():
                    _build(folder, part, num_workers, skip_unusable)
        except OSError as error:
            raise UserError(
                f"--cache_dir {cache_dir}: cannot write the cache ({error.strerror}); check the folder and the free "
                "space"
            ) from None
    arrays, unusable = {}, {}
    for folder, part in parts.items():
        arrays[part.kind], reasons = part.open(folder)
        unusable[part.kind] = reasons
        if reasons and not skip_unusable:
            again = f"if the file is sound by now, delete {folder}, which was built without it"
            raise UserError(f"{next(iter(reasons.values()))}{OR_SKIP}; {again}")
    return ImageCache(arrays, unusable)


def bytes_to_build(cache_dir: Path, resized: ResizedFiles, *, with_labels: bool) -> int:
    """Disk space, in bytes, that `open_cache` would take for what is missing."""
    return sum(part.nbytes for part in _missing(_parts(cache_dir, resized, with_labels)).values())


def _parts(cache_dir: Path, resized: ResizedFiles, with_labels: bool) -> dict[Path, _Part]:
    # Labels first: they take minutes, and show most of what can be wrong with the files.
    parts = [_Part("labels", resized)] if with_labels else []
    return {cache_dir / part.name(): part for part in (*parts, _Part("images", resized))}


def _missing(parts: Mapping[Path, _Part]) -> dict[Path, _Part]:
    return {folder: part for folder, part in parts.items() if not os.path.lexists(folder)}


def _make_room(cache_dir: Path, missing: Mapping[Path, _Part]) -> None:
    """Delete unfinished builds of killed processes, and require space for what is missing."""
    for leftover in cache_dir.glob(f"{BUILDING}*"):
        shutil.rmtree(leftover)
    needed, free = sum(part.nbytes for part in missing.values()), shutil.disk_usage(cache_dir).free
    if needed > free:
        raise UserError(
            f"--cache_dir {cache_dir}: the cache takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; delete "
            "caches there that no run uses, choose another disk, or omit the flag"
        )


def _build(folder: Path, part: _Part, num_workers: int, skip_unusable: bool) -> None:
    """Build a part under a temporary name, and rename it when it is complete and on the disk."""
    building = folder.with_name(BUILDING + folder.name)
    try:
        building.mkdir()
        unusable = _write_array(building / ARRAY, part, num_workers, skip_unusable)
        if part.name() != folder.name:
            raise UserError(f"files of {part.resized.files.root} changed while their cache was built; start again")
        atomic_write_json(building / MANIFEST, {"of": part.resized.files.describe(), "unusable": unusable})
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write_array(path: Path, part: _Part, num_workers: int, skip_unusable: bool) -> dict[int, str]:
    """Write the part's .npy file, synced. Returns what was wrong with files, which become zeros, by position."""
    unusable: dict[int, str] = {}
    count, *shape = part.shape
    loaded = load_in_order(
        part.load, range(count), num_workers=num_workers, skip_unusable=skip_unusable, or_else=OR_SKIP
    )
    named = f"caching {part.kind} of {part.resized.files.data_set.name}"
    # Written, not memory-mapped: in a mapped file, a full disk kills the process without a message.
    with open(path, "xb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": part.shape})
        for index, sample in enumerate(tqdm(loaded, desc=named, unit="img", total=count)):
            if isinstance(sample, UserError):
                unusable[index] = str(sample)
                sample = bytes(math.prod(shape))
            file.write(sample)
        file.flush()
        os.fsync(file.fileno())
    return unusable
