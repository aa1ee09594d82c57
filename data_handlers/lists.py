"""Lists of a data set's files, from its declaration and root folder or from a text file."""

import fnmatch
import hashlib
import os
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from data_handlers.datasets import DataSet
from data_handlers.descriptions import ListFile
from utils.errors import UserError
from utils.matlab_files import read_matlab_variable
from utils.png import read_png_header


@dataclass(frozen=True)
class FileList:
    """The images of one split, as POSIX paths relative to `root`, in a fixed order.

    The names are those of the data set, also where `root` is a SiT set, which holds an image as PNG (`image_file`).

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

    def image_file(self, image: str) -> Path:
        """Path of the image; a PNG of the same stem where the folder does not hold it under its own suffix."""
        path = self.root / image
        return path if image.endswith(".png") or path.exists() or not as_png(path).exists() else as_png(path)

    def label_file(self, image: str) -> Path:
        """Path of the image's label."""
        return (self.label_root or self.root) / label_path(self.data_set, image)

    def fingerprint(self) -> str:
        """SHA-256 over the names in order, which decide the image that a step sees."""
        return hashlib.sha256("\n".join((self.data_set.name, *self.images)).encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log, with the names of excluded images."""
        known = f" (excluded, known to be unusable: {', '.join(self.excluded)})" if self.excluded else ""
        return f"{self.data_set.name}: {len(self.images)} images in {self.root}{self.data_set.label_note}{known}"


def as_png(path: Path) -> Path:
    """The path that the image has in a SiT set."""
    return path.with_suffix(".png")


def label_path(data_set: DataSet, image: str) -> str:
    """Relative label path of a relative image path. Raises `UserError` if a declared replacement finds nothing."""
    for old, new in data_set.label_path:
        head, found, tail = image.rpartition(old)
        if not found:
            raise UserError(f"image {image} does not contain '{old}', so {data_set.name} cannot name its label")
        image = head + new + tail
    return posixpath.splitext(image)[0] + data_set.label_suffix if data_set.label_suffix else image


def located(files: FileList) -> FileList:
    """The list with the first of several possible label folders that exists; its first label decides the encoding."""
    root, data_set = files.label_root or files.root, files.data_set
    paths = (data_set.label_path, *data_set.other_label_paths)
    for rule in paths if len(paths) > 1 else ():
        chosen = replace(data_set, label_path=rule)
        label = root / label_path(chosen, files.images[0])
        if not label.parent.is_dir():
            continue
        if rule != data_set.label_path and label.is_file() and read_png_header(label).bit_depth <= 8:
            chosen = replace(chosen, label_encoding="8-bit index")
        note = f" (labels in {label.parent}, {chosen.storage})"
        return replace(files, data_set=replace(chosen, other_label_paths=(), label_note=note))
    return files


def list_images(
    data_set: DataSet,
    root: Path | str,
    flag: str,
    split: str = "train",
    list_file: str = "",
    training: bool = True,
) -> FileList:
    """List the images of a split. Raises `UserError`.

    Args:
        root: folder of the data set.
        flag: command line flag that names `root`, for messages.
        list_file: text file with one image a line, relative to `root` or to a declared image folder, or a bare name
            in one of them; `.jpg` and `.png` may be left out. The images are those of this file instead of those that
            the declared patterns match.
        training: exclude the images whose labels are known not to fit as well.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{flag} {root}: no such folder; it must hold the {data_set.name} data set")
    if split not in data_set.images:
        raise UserError(f"{data_set.name} declares no '{split}' split (it has: {', '.join(data_set.images)})")
    found = _read_list(data_set, root, split, Path(list_file)) if list_file else _of_split(data_set, root, split)
    for path in found:
        shown = path if path.isascii() else path.encode("utf-8", "backslashreplace").decode()
        if shown != path:
            raise UserError(f"{root}: the name of {shown} is not UTF-8; rename it")
    unusable = data_set.never_used | (data_set.not_for_training if training else frozenset())
    excluded = tuple(path for path in found if unusable and path.rpartition("/")[2].rpartition(".")[0] in unusable)
    images = tuple(path for path in found if path not in excluded)
    if not images:
        patterns = " or ".join(patterns_of(data_set.images[split]))
        raise UserError(f"{flag} {root}: no images found; {data_set.name} expects {patterns} in it")
    return located(FileList(data_set, root, images, excluded))


def patterns_of(rule: tuple[str, ...] | ListFile) -> tuple[str, ...]:
    """The glob patterns of a split, or those that its list file chooses from."""
    return rule.within if isinstance(rule, ListFile) else rule


def has_images(data_set: DataSet, root: Path, split: str) -> bool:
    """Whether a split is declared and has images, or a file that lists them."""
    rule = data_set.images.get(split, ())
    return isinstance(rule, ListFile) or any(_matching(root, pattern) for pattern in rule)


def _of_split(data_set: DataSet, root: Path, split: str) -> list[str]:
    """The images of a split as its declaration says."""
    rule = data_set.images[split]
    if isinstance(rule, ListFile) and not rule.variable:
        return _read_list(data_set, root, split, root / rule.path)
    found = _of_patterns(root, patterns_of(rule))
    return _numbered(found, rule, root) if isinstance(rule, ListFile) else found


def _of_patterns(root: Path, patterns: Sequence[str]) -> list[str]:
    """The images that match; of a pattern without any those that are there as PNG, by its first suffix, each once."""
    matched = [sorted(_matching(root, pattern)) for pattern in patterns]
    taken, found = set(chain(*matched)), []
    for pattern, paths in zip(patterns, matched, strict=True):
        if not paths:
            stem, suffix = posixpath.splitext(pattern)
            held = [path for path in sorted(_matching(root, f"{stem}.png")) if path not in taken]
            taken.update(held)
            first = suffix.strip(".{}").partition(",")[0]
            paths = [f"{posixpath.splitext(path)[0]}.{first if first.isalnum() else 'png'}" for path in held]
        found += paths
    return list(dict.fromkeys(found))


def _numbered(images: list[str], rule: ListFile, root: Path) -> list[str]:
    """The images whose numbers a MATLAB file of the data set lists, in the order of the images."""
    path = root / rule.path
    values = read_matlab_variable(path, rule.variable)
    if values.dtype.kind not in "iuf":
        raise UserError(f"{path}: {rule.variable} holds no numbers; it must list the numbers of the split's images")
    wanted, stems = set(values.ravel().tolist()), (posixpath.splitext(posixpath.basename(name))[0] for name in images)
    numbers = {name: int(stem) if stem.isdecimal() else -1 for name, stem in zip(images, stems, strict=True)}
    missing = wanted - set(numbers.values())
    if missing or not wanted:
        first = f"the first is number {min(missing):g}" if missing else "its list is empty"
        raise UserError(
            f"{path}: {len(missing)} of the {len(wanted)} images of {rule.variable} are not in {root}; {first}: "
            "complete the images, or name those to use with a list file"
        )
    return [image for image in images if numbers[image] in wanted]


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
    missing = [image for image in files.images if image not in present and str(as_png(Path(image))) not in present]
    if missing:
        raise UserError(
            f"{flag} {files.root}: {len(missing)} of {len(files)} images are missing; the first is {missing[0]}: "
            "complete the set, or list the images to use in a file"
        )


def missing_labels(files: FileList) -> list[tuple[str, str]]:
    """Relative paths (image, label) of every image whose label file is missing; none for a data set without labels."""
    if not files.data_set.has_labels:
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
    """Relative paths of files that match, without hidden files, as temporary files have hidden names.

    `**` matches any number of folders, also none, but no links to folders; `{png,jpg}` one of several.
    """
    *folders, last = pattern.split("/")
    found = [""]
    for part in folders:
        if part == "**":
            found = [below for path in found for below in _folders_below(root, path)]
        else:
            found = [f"{path}{entry.name}/" for path in found for entry in _visible(root / path, part)]
    images = []
    for path in found:
        for entry in _visible(root / path, last):
            if entry.is_dir(follow_symlinks=False):
                raise UserError(f"{entry.path} is a folder with the name of an image; move it away")
            images.append(path + entry.name)
    return images


def _folders_below(root: Path, path: str) -> Iterator[str]:
    yield path
    for entry in _entries(root / path):
        if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _folders_below(root, f"{path}{entry.name}/")


def _visible(folder: Path, pattern: str) -> Iterator[os.DirEntry[str]]:
    head, _, rest = pattern.partition("{")
    choices, _, tail = rest.partition("}")
    matches = re.compile("|".join(fnmatch.translate(head + choice + tail) for choice in choices.split(","))).match
    return (entry for entry in _entries(folder) if matches(entry.name) and not entry.name.startswith("."))


def _read_list(data_set: DataSet, root: Path, split: str, list_file: Path) -> list[str]:
    try:
        lines = list_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list file {list_file}: {error}") from None
    patterns = [pattern for name in (split, *data_set.images) for pattern in patterns_of(data_set.images[name])]
    # The image folders are the leading folders of a pattern that hold no wildcard.
    folders = dict.fromkeys(["", *(re.match(r"([^*?[{/]+/)*", pattern)[0] for pattern in patterns)])
    present = Listing(root)
    images = []
    for number, line in enumerate(lines, start=1):
        name = line.strip().replace("\\", "/")
        if not name or name.startswith("#"):
            continue
        name = posixpath.normpath(name)
        if name.startswith(("/", "..")) or len(name) > 1000 or "\0" in name:
            raise UserError(f"{list_file} line {number}: give the image relative to {root}, without '..'")
        if "." not in name:
            name = next((name + s for s in (".jpg", ".png") if any(f + name + s in present for f in folders)), name)
        held = (name, *([] if name.endswith(".png") else [str(as_png(Path(name)))]))  # a SiT set holds PNGs
        image = next((folder + name for folder in folders if any(folder + n in present for n in held)), None)
        if image is None:
            raise UserError(f"{list_file} line {number}: no image {name} in {root}")
        images.append(image)
    if not images:
        raise UserError(f"the list file {list_file} names no image")
    if len(set(images)) != len(images):
        raise UserError(f"the list file {list_file} names an image twice")
    return images
