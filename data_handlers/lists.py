"""From a data set's declaration and root folder to the list of its files."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
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
        UserError: missing or empty folder, a name that is not UTF-8 or a folder where an image should be, a list file
            that is missing, empty or names a missing image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder; it must hold the {data_set.name} data set")
    if split not in data_set.images:
        raise UserError(f"{data_set.name} declares no '{split}' split (it has: {', '.join(data_set.images)})")
    if list_file:
        found = _read_list(data_set, root, split, Path(list_file))
    else:
        found = [path for pattern in data_set.images[split] for path in sorted(_matching(root, pattern))]
    _require_utf8(root, found)
    excluded = data_set.never_used | (data_set.not_for_training if training else frozenset())
    left_out = tuple(path for path in found if _stem(path) in excluded) if excluded else ()
    images = tuple(path for path in found if path not in left_out) if left_out else tuple(found)
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
    labels = Listing(files.label_root or files.root)
    pairs = ((image, files.label_of(image)) for image in files.images)
    return [(image, label) for image, label in pairs if label not in labels]


class Listing:
    """Which files lie below a folder: each folder asked about is listed once, as a million questions take minutes.

    What a symbolic link points to is not looked at.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        """Whether there is a file at the POSIX path relative to the root.

        Raises:
            UserError: its folder cannot be listed.
        """
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            entries = _entries(self.root / folder)
            self._names[folder] = frozenset(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
        return name in self._names[folder]


def replace_suffix(path: str, suffix: str) -> str:
    """`str(PurePosixPath(path).with_suffix(suffix))`, in a twentieth of the time."""
    start = path.rfind("/") + 1
    dot = path.rfind(".", start)
    return (path[:dot] if start < dot < len(path) - 1 else path) + suffix


def _stem(path: str) -> str:
    return replace_suffix(path, "").rpartition("/")[2]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What a folder holds, nothing where there is no folder; the kind of an entry is known without asking the disk."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; check the folder and its permissions") from None


def _require_utf8(root: Path, paths: list[str]) -> None:
    try:
        "\n".join(paths).encode()
    except UnicodeEncodeError:
        bad = next(path for path in paths if not path.isascii() and path != path.encode("utf-8", "replace").decode())
        shown = bad.encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{root}: the name of {shown} is not UTF-8; rename it") from None


def _fixed_part(pattern: str) -> list[str]:
    parts = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(character in part for character in "*?["):
            break
        parts.append(part)
    return parts


def _matching(root: Path, pattern: str) -> list[str]:
    """Relative POSIX paths of files that match, hidden ones left out: temporary files have hidden names.

    Raises:
        UserError: a folder cannot be listed, or has the name of an image.
    """
    *folders, files = PurePosixPath(pattern).parts
    found = [""]
    for part in folders:
        found = [f"{path}{entry.name}/" for path in found for entry in _visible(root / path, part)]
    images = []
    for path in found:
        for entry in _visible(root / path, files):
            if entry.is_dir(follow_symlinks=False):
                raise UserError(f"{entry.path} is a folder with the name of an image; move it away")
            images.append(path + entry.name)
    return images


def _visible(folder: Path, pattern: str) -> Iterator[os.DirEntry[str]]:
    matches = re.compile(fnmatch.translate(pattern)).match
    return (entry for entry in _entries(folder) if matches(entry.name) and not entry.name.startswith("."))


def _read_list(data_set: DataSet, root: Path, split: str, list_file: Path) -> list[str]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list file {list_file}: {error}") from None
    folders = ["", *("/".join(_fixed_part(pattern)) for pattern in data_set.images[split])]
    present = Listing(root)
    images = []
    for number, line in enumerate(lines, start=1):
        name = line.strip().replace("\\", "/")
        if not name or name.startswith("#"):
            continue
        parts = name.split("/")
        if not parts[0] or ".." in parts or len(name) > 1000 or "\0" in name:
            raise UserError(f"{list_file} line {number}: give the image relative to {root}, without '..'")
        name = "/".join(part for part in parts if part not in ("", "."))
        candidates = (f"{folder}/{name}" if folder else name for folder in folders)
        image = next((path for path in candidates if path in present), None)
        if image is None:
            raise UserError(f"{list_file} line {number}: no image {name} in {root}")
        images.append(image)
    if not images:
        raise UserError(f"the list file {list_file} names no image")
    if len(set(images)) != len(images):
        raise UserError(f"the list file {list_file} names an image twice")
    return images
