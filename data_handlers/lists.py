"""Lists of a data set's files, from its declaration and root folder or from a text file."""

import fnmatch
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_handlers.datasets import DataSet
from utils.errors import UserError


@dataclass(frozen=True)
class FileList:
    """The images of one split, as POSIX paths relative to `root`, in a fixed order.

    Attributes:
        excluded: relative paths of files that were found but are known to be unusable, and are not in `images`.
        label_root: folder the label paths are relative to; None means `root`. SiT images use their source's labels.
    """

    data_set: DataSet
    root: Path
    images: tuple[str, ...]
    excluded: tuple[str, ...] = ()
    label_root: Path | None = None

    def __len__(self) -> int:
        return len(self.images)

    def with_images_of(self, root: Path) -> "FileList":
        """The same names with the images of another folder, such as a SiT set; the labels stay."""
        return replace(self, root=root, label_root=self.label_root or self.root)

    def label_file(self, image: str) -> Path:
        """Path of the image's label."""
        return (self.label_root or self.root) / label_path(self.data_set, image)

    def fingerprint(self) -> str:
        """SHA-256 over the names in order, which decide the image that a step sees."""
        return hashlib.sha256("\n".join((self.data_set.name, *self.images)).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log, with the names of excluded images."""
        known = f" (excluded, known to be unusable: {', '.join(self.excluded)})" if self.excluded else ""
        return f"{self.data_set.name}: {len(self.images)} images in {self.root}{known}"


def label_path(data_set: DataSet, image: str) -> str:
    """Relative label path of a relative image path. Raises `UserError` if a declared replacement finds nothing."""
    for old, new in data_set.label_path:
        head, found, tail = image.rpartition(old)
        if not found:
            raise UserError(f"image {image} does not contain '{old}', so {data_set.name} cannot name its label")
        image = head + new + tail
    return image


def list_images(
    data_set: DataSet,
    root: Path | str,
    flag: str,
    split: str = "train",
    list_file: str = "",
    training: bool = True,
) -> FileList:
    """List the images of a split.

    Args:
        root: folder of the data set.
        flag: command line flag that names `root`, for messages.
        list_file: text file with one image a line, relative to `root` or to a declared image folder, or a bare name
            in one of them. The images are those of this file instead of those that the declared patterns match.
        training: exclude the images whose labels are known not to fit as well.

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
    for path in found:
        shown = path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()
        if shown != path:
            raise UserError(f"{root}: the name of {shown} is not UTF-8; rename it")
    unusable = data_set.never_used | (data_set.not_for_training if training else frozenset())
    excluded = tuple(path for path in found if unusable and path.rpartition("/")[2].rpartition(".")[0] in unusable)
    images = tuple(path for path in found if path not in excluded)
    if not images:
        patterns = " or ".join(data_set.images[split])
        raise UserError(f"{flag} {root}: no images found; {data_set.name} expects {patterns} in it")
    return FileList(data_set, root, images, excluded)


def require_labels(files: FileList, flag: str) -> None:
    """Raise `UserError` unless every image has its label file; a data set that declares no labels passes."""
    missing = missing_labels(files)
    if missing:
        image, label = missing[0]
        raise UserError(
            f"{flag} {files.label_root or files.root}: {len(missing)} of {len(files)} images have no label; the first "
            f"is {image}, whose label should be {label}: complete the labels, or list the images to use in a file"
        )


def require_images(files: FileList, flag: str) -> None:
    """Raise `UserError` unless every image of the list is in its folder."""
    present = Listing(files.root)
    missing = [image for image in files.images if image not in present]
    if missing:
        raise UserError(
            f"{flag} {files.root}: {len(missing)} of {len(files)} images are missing; the first is {missing[0]}: "
            "complete the set, or list the images to use in a file"
        )


def missing_labels(files: FileList) -> list[tuple[str, str]]:
    """Relative paths (image, label) of every image whose label file is missing; none for a data set without labels."""
    if not files.data_set.label_path:
        return []
    labels = Listing(files.label_root or files.root)
    pairs = ((image, label_path(files.data_set, image)) for image in files.images)
    return [(image, label) for image, label in pairs if label not in labels]


class Listing:
    """The files below a folder. Each folder is listed once, when it is first asked about.

    A question to the file system for each file would take minutes for a million files. Symbolic links are not followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, frozenset[str]] = {}

    def __contains__(self, path: str) -> bool:
        """Whether there is a file at the path below the root. Raises `UserError` if its folder cannot be listed."""
        folder, _, name = path.rpartition("/")
        if folder not in self._names:
            entries = _entries(self.root / folder)
            self._names[folder] = frozenset(entry.name for entry in entries if not entry.is_dir(follow_symlinks=False))
        return name in self._names[folder]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """The entries of a folder, none where there is no folder. Their kind is known without another disk access."""
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; check the folder and its permissions") from None


def _matching(root: Path, pattern: str) -> list[str]:
    """Relative paths of files that match, without hidden files, as temporary files have hidden names."""
    *folders, last = pattern.split("/")
    found = [""]
    for part in folders:
        found = [f"{path}{entry.name}/" for path in found for entry in _visible(root / path, part)]
    images = []
    for path in found:
        for entry in _visible(root / path, last):
            if entry.is_dir(follow_symlinks=False):
                raise UserError(f"{entry.path} is a folder with the name of an image; move it away")
            images.append(path + entry.name)
    return images


def _visible(folder: Path, pattern: str) -> Iterator[os.DirEntry[str]]:
    return (e for e in _entries(folder) if fnmatch.fnmatchcase(e.name, pattern) and not e.name.startswith("."))


def _read_list(data_set: DataSet, root: Path, split: str, list_file: Path) -> list[str]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list file {list_file}: {error}") from None
    patterns = [pattern for name in (split, *data_set.images) for pattern in data_set.images[name]]
    # The image folders are the leading folders of a pattern that hold no wildcard.
    folders = dict.fromkeys(["", *(re.match(r"([^*?[/]+/)*", pattern)[0] for pattern in patterns)])
    present = Listing(root)
    images = []
    for number, line in enumerate(lines, start=1):
        name = line.strip().replace("\\", "/")
        if not name or name.startswith("#"):
            continue
        name = posixpath.normpath(name)
        if name.startswith(("/", "..")) or len(name) > 1000 or "\0" in name:
            raise UserError(f"{list_file} line {number}: give the image relative to {root}, without '..'")
        image = next((folder + name for folder in folders if folder + name in present), None)
        if image is None:
            raise UserError(f"{list_file} line {number}: no image {name} in {root}")
        images.append(image)
    if not images:
        raise UserError(f"the list file {list_file} names no image")
    if len(set(images)) != len(images):
        raise UserError(f"the list file {list_file} names an image twice")
    return images
