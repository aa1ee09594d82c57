"""Building the one-time cache of decoded, resized images (and labels) that `data_handlers.cache` reads.

Images and labels are cached apart, so runs with and without labels share the images. The
name of a finished cache says what it holds, down to the sizes and times of the files, and its content never changes: a
run can go on with a cache while others are built beside it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from data_handlers.cache import OR_SKIP, UNUSABLE, ImageCache, unusable_files
from data_handlers.images import Resample, image_size, read_label, read_resized, resize_label
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.files import atomic_write_json, make_folder
from utils.loaders import load_in_order
from utils.locks import only_builder, say

# To be raised when the code that reads or resizes images and labels changes what comes out.
FORMAT = 1
MANIFEST = "cache.json"
BUILDING = ".building-"
REPLACED = "-replaced"

# What file systems that cannot reserve space answer.
NO_RESERVING = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@dataclass(frozen=True)
class _Part:
    """The images of a list at one size, or their labels: what one folder of the cache holds.

    Attributes:
        size: (W,H).
        resample: how images are resized; None stands for the labels, which take the nearest pixel.
    """

    files: FileList
    size: tuple[int, int]
    resample: Resample | None

    @property
    def kind(self) -> str:
        """`images` or `labels`."""
        return "labels" if self.resample is None else "images"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array, which is uint8: (N,H,W,3) or (N,H,W)."""
        width, height = self.size
        return (len(self.files), height, width, *((3,) if self.kind == "images" else ()))

    def description(self) -> dict[str, object]:
        """What was asked for; not what the files hold, which `state` stands for."""
        files = self.files
        roots = [files.root] if self.kind == "images" else [files.root, files.label_root or files.root]
        return {
            "kind": self.kind,
            "data_set": files.data_set.name,
            "roots": [str(root.resolve()) for root in roots],
            "list": files.fingerprint(),
            "size": list(self.size),
            "resample": self.resample,
        }

    def state(self) -> str:
        """SHA-256 over the names, sizes and times of all files, and how they are read: new whenever one of these is."""
        data_set = self.files.data_set
        reading: list[object] = [FORMAT]
        if self.kind == "labels":
            void_ids = None if data_set.void_ids is None else sorted(data_set.void_ids)
            reading += [sorted(data_set.id_map.items()), void_ids, data_set.label_encoding, data_set.label_path]
        digest = hashlib.sha256(json.dumps(reading).encode())
        # Joined as text: for a million files, paths take longer than the file system's answers.
        root = self.files.root
        labels = (self.files.label_root or root) if self.kind == "labels" else None
        for name in self.files.images:
            # A label is checked against its image's size, so it depends on the image.
            for path in (f"{root}/{name}", *([f"{labels}/{self.files.label_of(name)}"] if labels else [])):
                try:
                    status = os.stat(path)
                    seen = f"{status.st_size} {status.st_mtime_ns}"
                except OSError:
                    seen = "unusable"  # `read` says why
                digest.update(f"{path.rpartition('/')[2]} {seen}\n".encode())
        return digest.hexdigest()

    def read(self, index: int) -> np.ndarray:
        """The resized image, or label, at a position of the list.

        Raises:
            UserError: its file cannot be used.
        """
        name = self.files.images[index]
        path = self.files.root / name
        if self.resample is not None:
            return read_resized(path, self.size, self.resample)[0]
        label = read_label(self.files.label_file(name), self.files.data_set, image_size(path))
        return np.array(resize_label(label, self.size))


def open_cache(
    cache_dir: Path,
    files: FileList,
    size: tuple[int, int],
    resample: Resample,
    with_labels: bool,
    num_workers: int,
    skip_unusable: bool = False,
) -> ImageCache:
    """The cache of a list at a size; what there is not yet, of the files as they are now, is built first.

    Processes that need the same cache build it once: the others wait. A cache has another name until it is complete
    and on the disk, so a killed build is never taken for a cache. What does not fit is replaced where it is damaged,
    and left alone with a line on stderr where it is of another state of the files: a run may be using it. A cache that
    lacks files which can be read now gives its place to one that has them, once that is complete.

    Args:
        skip_unusable: build it without the files that cannot be used; they raise when they are asked for.

    Raises:
        UserError: a file cannot be used or changed meanwhile, the disk is too small, or the cache cannot be read.
    """
    # Labels first: they take minutes, and find most of what can be wrong with the files.
    found = {part.kind: _open_part(cache_dir, part, num_workers, skip_unusable)
             for part in _parts(files, size, resample, with_labels)}  # fmt: skip
    cache = ImageCache(**found)
    if not skip_unusable:
        cache.require_all_usable()
    return cache


def bytes_to_build(
    cache_dir: Path,
    files: FileList,
    size: tuple[int, int],
    resample: Resample,
    with_labels: bool,
    skip_unusable: bool = False,
) -> int:
    """Disk space that `open_cache` would take for what is not there yet.

    Raises:
        UserError: the cache cannot be read.
    """
    missing = 0
    for part in _parts(files, size, resample, with_labels):
        folder, manifest = _place(cache_dir, part)
        if _defect(folder, part, manifest) or _lacks(folder, part, skip_unusable):
            missing += math.prod(part.shape)
    return missing


def _parts(files: FileList, size: tuple[int, int], resample: Resample, with_labels: bool) -> list[_Part]:
    labels = [_Part(files, size, None)] if with_labels else []
    return [*labels, _Part(files, size, resample)]


def _place(cache_dir: Path, part: _Part) -> tuple[Path, dict[str, object]]:
    """The folder of a part of the files as they are now, and what its manifest has to say."""
    description, state = part.description(), part.state()
    width, height = part.size
    stem = f"{part.files.data_set.name}_{width}x{height}_{part.kind}_{_key(part)}"
    return cache_dir / f"{stem}_{state[:16]}", {**description, "state": state}


def _key(part: _Part) -> str:
    return hashlib.sha256(json.dumps(part.description()).encode()).hexdigest()[:16]


def _open_part(cache_dir: Path, part: _Part, num_workers: int, skip_unusable: bool) -> Path:
    """The file of the finished array."""
    folder, manifest = _place(cache_dir, part)
    key = _key(part)
    for other in sorted(set(cache_dir.glob(f"*_{key}_*")) - {folder}):
        say(f"{other} is a cache of another state of these files; delete it if no run uses it any more")
    if _defect(folder, part, manifest) or _lacks(folder, part, skip_unusable):
        make_folder(cache_dir, "--cache_dir")
        with only_builder(cache_dir / f"{key}.lock", f"what killed builds left ({BUILDING}*)") as is_only_one:
            if is_only_one:
                for replaced in cache_dir.glob(f"{BUILDING}{key}-*{REPLACED}"):
                    with suppress(UserError, OSError):  # as of another user's
                        if not os.path.lexists(folder) and not _defect(replaced, part, manifest):
                            replaced.rename(folder)  # killed just before its better was put in its place
                for leftover in cache_dir.glob(f"{BUILDING}{key}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)  # another user's may have to stay
            # Asked again: another process may have built it in the meantime.
            defect = _defect(folder, part, manifest)
            if reason := defect or _lacks(folder, part, skip_unusable):
                if os.path.lexists(folder):
                    say(f"{folder}: {reason}; this cache is built anew")
                if defect:
                    _remove(folder)
                building = cache_dir / f"{BUILDING}{key}-{secrets.token_hex(4)}"
                try:
                    _build(building, folder, part, manifest, num_workers, skip_unusable)
                except UserError as error:
                    if defect or not skip_unusable:
                        raise
                    say(f"WARNING: {error}; going on with {folder} as it is")
    return _array_file(folder, part)


def _array_file(folder: Path, part: _Part) -> Path:
    return folder / f"{part.kind}.npy"


def _reads(part: _Part, index: int) -> bool:
    try:
        part.read(index)
    except UserError:
        return False
    return True


def _defect(folder: Path, part: _Part, manifest: dict[str, object]) -> str:
    """What keeps a folder from being the finished cache; empty if nothing does.

    Raises:
        UserError: this user may not read it, or the disk fails.
    """
    path = folder / MANIFEST
    try:
        if json.loads(path.read_bytes()) != manifest:
            return f"{path.name} describes another cache"
        path = _array_file(folder, part)
        with open(path, "rb") as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return f"{path.name} is of another format"
            found = np.lib.format.read_array_header_1_0(file)
            if found != (part.shape, False, np.dtype(np.uint8)):
                return f"{path.name} holds another array"
            if os.fstat(file.fileno()).st_size != file.tell() + math.prod(part.shape):
                return f"{path.name} is not of the size it should be"
        path = folder / UNUSABLE
        unusable_files(folder)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return f"there is no file {path.name}"
    except OSError as error:
        raise UserError(
            f"--cache_dir: cannot read {path} ({error.strerror}); make it readable (chmod -R a+rX {folder}) or choose "
            "another folder"
        ) from None
    except Exception:  # whatever a parser makes of arbitrary bytes
        return f"{path.name} is damaged"
    return ""


def _lacks(folder: Path, part: _Part, skip_unusable: bool) -> str:
    """Which file a finished cache lacks that can be read now, in words; empty where building it anew is of no use."""
    unusable = unusable_files(folder)
    readable = [index for index in unusable if _reads(part, index)]
    if not readable or (len(readable) < len(unusable) and not skip_unusable):
        return ""
    return f"{part.files.images[readable[0]]} can be read now"


def _build(
    building: Path, folder: Path, part: _Part, manifest: dict[str, object], num_workers: int, skip_unusable: bool
) -> None:
    """Build a cache in the folder `building`, and rename it to `folder` when it is complete."""
    replaced = building.with_name(building.name + REPLACED)
    try:
        _require_space(folder.parent, math.prod(part.shape))
        building.mkdir()  # with the umask's mode: others may read it
        unusable = _write_array(_array_file(building, part), part, num_workers, skip_unusable)
        if os.path.lexists(folder) and not unusable.keys() <= unusable_files(folder).keys():
            # A run that uses the cache knows what it lacks, and would take zeros for what the new one lacks.
            raise UserError(f"another file than before cannot be read: {next(iter(unusable.values()))}")
        if unusable:
            atomic_write_json(building / UNUSABLE, unusable)
        if part.state() != manifest["state"]:
            raise UserError(f"files of {part.files.root} changed while their cache was built; start again")
        atomic_write_json(building / MANIFEST, manifest)
        try:
            if os.path.lexists(folder):
                folder.rename(replaced)  # whoever reads it has the file open
            building.rename(folder)
        except OSError:
            if replaced.exists() and not os.path.lexists(folder):
                replaced.rename(folder)
            # Where nothing can be locked, another process may have been faster.
            if _defect(folder, part, manifest):
                raise
    except OSError as error:
        raise UserError(
            f"--cache_dir {folder.parent}: cannot write the cache ({error.strerror}); check the folder and the free "
            "space"
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if os.path.lexists(folder):
            shutil.rmtree(replaced, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a folder with all it holds, or a file; a link, and not what it leads to.

    Raises:
        UserError: it cannot be deleted, as where it is another user's.
    """
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--cache_dir: cannot delete {path} ({error.strerror}); choose another folder") from None


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"--cache_dir {folder}: the cache takes {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; choose "
            "another disk, or leave the flag out"
        )


def _write_array(path: Path, part: _Part, num_workers: int, skip_unusable: bool) -> dict[int, str]:
    """Write the part as a .npy file, and see to it that it is on the disk; returns what was wrong where zeros stand."""
    unusable: dict[int, str] = {}
    # Written and not memory-mapped: in a mapped file, a full disk kills the process without a word.
    with open(path, "xb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": part.shape}
        np.lib.format.write_array_header_1_0(file, header)
        _reserve(file.fileno(), file.tell() + math.prod(part.shape))
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


def _reserve(handle: int, size: int) -> None:
    """Take the space on the disk now, not after an hour: two caches may be in the making. Not all file systems can."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in NO_RESERVING:
            raise


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
