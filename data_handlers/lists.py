"""From a data set's declaration and root folder to the list of its files."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from data_handlers.datasets import DataSet
from utils.errors import UserError


@dataclass(frozen=True)
class FileList:
    """The images of one split, as POSIX paths relative to `root`, in a fixed order.

    Attributes:
        left_out: relative paths of known bad files that were found and left out.
        label_root: folder the label paths are relative to; None means `root`. SiT images have their source's labels.
    """

    data_set: DataSet
    root: Path
    images: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    label_root: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def label_of(self, image: str) -> str:
        """Relative path of the image's label."""
        return label_path(self.data_set, image)

    def label_file(self, image: str) -> Path:
        """Path of the image's label."""
        return (self.label_root or self.root) / self.label_of(image)

    def fingerprint(self) -> str:
        """SHA-256 over the names in order: what decides which image a step sees."""
        return hashlib.sha256("\n".join((self.data_set.name, *self.images)).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log, naming what was left out."""
        text = f"{self.data_set.name}: {len(self.images)} images in {self.root}"
        if self.left_out:
            text += f" (left out, known to be unusable: {', '.join(self.left_out)})"
        return text


def label_path(data_set: DataSet, image: str) -> str:
    """Relative label path of a relative image path; each declared replacement acts on the last occurrence."""
    for old, new in data_set.label_path:
        head, found, tail = image.rpartition(old)
        if not found:
            raise UserError(f"image {image} does not contain '{old}', so {data_set.name} cannot name its label")
        image = head + new + tail
    return image


def list_images(
    data_set: DataSet, root: Path | str, flag: str, split: str = "train", list_file: str = "", training: bool = True
) -> FileList:
    """List the images of a split.

    Args:
        root: folder of the data set.
        flag: command line flag that names `root`, for messages.
        list_file: text file with one image a line, relative to `root` or to a declared image folder, or a bare name
            in one of them; overrides the derived list.
        training: leave out the images whose labels are known not to fit, too.

    Raises:
        UserError: missing or empty folder, a list file that is missing, empty or names a missing image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder; it must hold the {data_set.name} data set")
    if split not in data_set.images:
        raise UserError(f"{data_set.name} declares no '{split}' split (it has: {', '.join(data_set.images)})")
    if list_file:
        found = _read_list(data_set, root, split, Path(list_file))
    else:
        found = [path for pattern in data_set.images[split] for path in sorted(_glob(root, pattern))]
    excluded = data_set.never_used | (data_set.not_for_training if training else frozenset())
    images = tuple(path for path in found if PurePosixPath(path).stem not in excluded)
    left_out = tuple(path for path in found if PurePosixPath(path).stem in excluded)
    if not images:
        patterns = " or ".join(data_set.images[split])
        raise UserError(f"{flag} {root}: no images found; {data_set.name} expects {patterns} in it")
    return FileList(data_set, root, images, left_out)


def hold_out(files: FileList, count: int, flag: str) -> tuple[FileList, FileList]:
    """Split a list into all but its last `count` images and these last ones.

    Raises:
        UserError: `count`, which `flag` names, leaves one of the two empty.
    """
    if not 0 < count < len(files):
        raise UserError(
            f"{flag} {count}: of {len(files)} images in {files.root}, 1 to {len(files) - 1} can be kept for validation"
        )
    return replace(files, images=files.images[:-count]), replace(files, images=files.images[-count:])


def list_validation(
    data_set: DataSet, root: Path | str, flag: str, list_file: str, count: int, count_flag: str
) -> FileList:
    """The images a segmentation net is scored on: a list, the last `count` of all, or the data set's own split.

    Raises:
        UserError: as `list_images`, or there are fewer than `count` images.
    """
    if list_file or ("val" in data_set.images and not count):
        split = "val" if "val" in data_set.images else "train"
        return list_images(data_set, root, flag, split, list_file, training=False)
    files = list_images(data_set, root, flag)
    count = count or data_set.held_out
    if not 0 < count <= len(files):
        raise UserError(f"{count_flag} {count}: there are {len(files)} images in {files.root}")
    return replace(files, images=files.images[-count:])


def require_labels(files: FileList, flag: str) -> None:
    """Check that every image has its label file, by listing folders rather than asking for each file.

    A data set that declares no labels passes.

    Raises:
        UserError: names the first image without one and how many there are.
    """
    missing = missing_labels(files)
    if missing:
        image, label = missing[0]
        raise UserError(
            f"{flag} {files.label_root or files.root}: {len(missing)} of {len(files)} images have no label; the first "
            f"is {image}, whose label should be {label}: complete the labels, or list the images to use in a file"
        )


def missing_labels(files: FileList) -> list[tuple[str, str]]:
    """(image, label) relative paths where the label file is missing; none for a data set that declares no labels."""
    if not files.data_set.label_path:
        return []
    present: dict[str, set[str]] = {}
    missing = []
    for image in files.images:
        label = PurePosixPath(files.label_of(image))
        folder = str(label.parent)
        if folder not in present:
            path = (files.label_root or files.root) / folder
            present[folder] = {entry.name for entry in os.scandir(path)} if path.is_dir() else set()
        if label.name not in present[folder]:
            missing.append((image, str(label)))
    return missing


def _fixed_part(pattern: str) -> list[str]:
    parts = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(character in part for character in "*?["):
            break
        parts.append(part)
    return parts


def _glob(root: Path, pattern: str) -> Iterator[str]:
    """Relative POSIX paths of files that match, hidden ones left out: temporary files have hidden names."""

    def walk(relative: str, parts: tuple[str, ...]) -> Iterator[str]:
        part, rest = parts[0], parts[1:]
        try:
            entries = os.scandir(root / relative)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise UserError(f"cannot list {root / relative}: {error.strerror}") from None
        with entries:
            for entry in entries:
                if entry.name.startswith(".") or not fnmatch.fnmatchcase(entry.name, part):
                    continue
                path = f"{relative}/{entry.name}" if relative else entry.name
                if rest:
                    yield from walk(path, rest)
                else:
                    yield path

    return walk("", PurePosixPath(pattern).parts)


def _read_list(data_set: DataSet, root: Path, split: str, list_file: Path) -> list[str]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list file {list_file}: {error}") from None
    folders = ["", *("/".join(_fixed_part(pattern)) for pattern in data_set.images[split])]
    images = []
    for number, line in enumerate(lines, start=1):
        name = line.strip().replace("\\", "/")
        if not name or name.startswith("#"):
            continue
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or len(name) > 1000:
            raise UserError(f"{list_file} line {number}: give the image relative to {root}, without '..'")
        name = str(PurePosixPath(name))
        candidates = [f"{folder}/{name}" if folder else name for folder in folders]
        image = next((c for c in candidates if (root / c).is_file()), None)
        if image is None:
            raise UserError(f"{list_file} line {number}: no image {name} in {root}")
        images.append(image)
    if not images:
        raise UserError(f"the list file {list_file} names no image")
    if len(set(images)) != len(images):
        raise UserError(f"the list file {list_file} names an image twice")
    return images
