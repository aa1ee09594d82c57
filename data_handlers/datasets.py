"""The data sets of this toolkit: one description each, in `data_handlers/descriptions/` or written by a user.

This module imports nothing heavy, as the command lines read the names of the data sets before anything else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from data_handlers.choices import Labels
from data_handlers.classes import ALL_19, CLASS_COLOURS, CLASS_NAMES, IGNORE, SUBSETS
from data_handlers.descriptions import FOLDER as DESCRIPTIONS
from data_handlers.descriptions import ListFile, read_description
from utils.errors import UserError

LabelEncoding = Literal["8-bit index", "16-bit channel 0", "colours"]


@dataclass(frozen=True)
class DataSet:
    """Where a data set's files are and how they are read.

    Attributes:
        name: of the known data set, or of the description's file.
        images: for each split, glob patterns relative to the root, or a file that lists them. Images are listed in the
            order of the patterns; `**` stands for any folders, links to folders excepted. A pattern without a match is
            ignored as long as another pattern of the split finds images.
        label_path: replacements that turn an image's relative path into its label's; each replaces the last
            occurrence.
        id_map: label id -> trainId; empty for a data set whose labels exist as trainIds only. With the storage
            `colours`, ids are `packed` colours.
        void_ids: label ids that are known and ignored. An id in neither `id_map` nor `void_ids` means that the wrong
            file is read, and is refused. None ignores every id that `id_map` does not list.
        resize, crop: (W,H) that images are resized to for training, and of the random crop.
        labels: what the values of the label files are: `ids` of the data set, which `id_map` maps, or `trainids`, that
            is 0..C-1 for C class names and 255 for ignored pixels.
        labels_flag: command line flag that set `labels` (see `with_labels`); '' where the declaration did.
        label_encoding: how label ids are stored: `8-bit index` (grey or palette PNG), `16-bit channel 0` (id in the
            first of 16-bit channels) or `colours` (RGB). TrainIds are always stored as `8-bit index`.
        classes: trainIds the data set is scored on.
        class_names, colours: names and colours (R,G,B) of trainIds 0, 1, ..., C-1.
        categories: name of a category -> its trainIds, for scores by category; empty for a data set without them.
        held_out: for a data set without its own `val` images, how many of its last images are kept for validation
            when a segmentation net is trained on it, or below 1 which fraction of all.
        never_used: file stems of damaged images, which are excluded everywhere.
        not_for_training: file stems of sound images whose labels do not fit, which are excluded wherever labels count.
        label_suffix: what replaces the suffix of the image in its label's path; '' keeps it.
        other_label_paths: further values of `label_path`; the first whose folder exists is taken (`lists.located`).
        label_note: says which one was taken, or ''.
        splits: what `--src_split` can name besides `images`.
        root: its root folder where no flag says it, or ''.
        fingerprint: of a user's description, or ''.
    """

    name: str
    images: Mapping[str, tuple[str, ...] | ListFile]
    label_path: tuple[tuple[str, str], ...]
    id_map: Mapping[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]
    labels: Labels = "ids"
    labels_flag: str = ""
    label_encoding: LabelEncoding = "8-bit index"
    classes: tuple[int, ...] = ALL_19
    class_names: tuple[str, ...] = CLASS_NAMES
    colours: tuple[tuple[int, ...], ...] = CLASS_COLOURS
    categories: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    void_ids: frozenset[int] | None = None
    held_out: float = 0
    never_used: frozenset[str] = frozenset()
    not_for_training: frozenset[str] = frozenset()
    label_suffix: str = ""
    other_label_paths: tuple[tuple[tuple[str, str], ...], ...] = ()
    label_note: str = ""
    splits: Mapping[str, ListFile] = field(default_factory=dict)
    root: str = ""
    fingerprint: str = ""

    @property
    def has_labels(self) -> bool:
        """Whether label files are declared."""
        return bool(self.label_path or self.label_suffix)

    @property
    def default_root(self) -> str:
        """The root folder where no flag says it."""
        return self.root or f"data/{self.name}"

    @property
    def value_map(self) -> Mapping[int, int]:
        """Value in a label file -> trainId, for the way in which the labels are read."""
        return self.id_map if self.labels == "ids" else {k: k for k in range(len(self.class_names))}

    @property
    def ignored_values(self) -> frozenset[int] | None:
        """Values in a label file that become 255; None stands for every value that `value_map` does not list."""
        return self.void_ids if self.labels == "ids" else frozenset({IGNORE})

    @property
    def storage(self) -> LabelEncoding:
        """How the label files store their values."""
        return self.label_encoding if self.labels == "ids" else "8-bit index"


def with_labels(data_set: DataSet, labels: str, flag: str) -> DataSet:
    """The data set with its labels read as a command line flag says. Raises `UserError`.

    Args:
        labels: `ids` or `trainids`; '' keeps the declaration.
        flag: name of the flag, for messages (`--src_labels`, `--trg_labels`, `--labels`).
    """
    if not labels:
        return data_set
    if not data_set.has_labels:
        raise UserError(f"{flag} {labels}: {data_set.name} has no labels; omit the flag")
    if labels == "ids" and not data_set.id_map:
        raise UserError(f"{flag} {labels}: {data_set.name} declares no label ids, only trainIds; omit the flag")
    return replace(data_set, labels=labels, labels_flag=flag)


def for_net_of(data_set: DataSet, num_classes: int) -> DataSet:
    """The data set as a net of `num_classes` sees it: one of 16 or 13 has SYNTHIA's of the 19 classes as 0, 1, ....

    Label files that hold trainIds hold those of the 19 classes, so they are mapped as ids.
    """
    kept = next((subset for subset in SUBSETS.values() if len(subset) == num_classes), ())
    if not kept or data_set.class_names != CLASS_NAMES:
        return data_set
    values, ignored = data_set.value_map, data_set.ignored_values
    ids = {value: kept.index(c) for value, c in values.items() if c in kept}
    groups = {name: tuple(kept.index(c) for c in of if c in kept) for name, of in data_set.categories.items()}
    return replace(
        data_set, labels="ids", label_encoding=data_set.storage, id_map=ids,
        void_ids=None if ignored is None else ignored | (values.keys() - ids.keys()),
        classes=tuple(kept.index(c) for c in data_set.classes if c in kept), categories=groups,
        class_names=tuple(CLASS_NAMES[c] for c in kept), colours=tuple(data_set.colours[c] for c in kept),
    )  # fmt: skip


def with_split(data_set: DataSet, split: str) -> DataSet:
    """The data set with a split's images in the place of its training images, as `--src_split` says; '' keeps it.

    Its other splits stay. Of a split file, `train` comes with the file's `val`, which is validated on.

    Raises:
        UserError: it declares no such split.
    """
    if not split:
        return data_set
    splits = {**data_set.images, **data_set.splits}
    if split not in splits:
        raise UserError(f"--src_split {split}: {data_set.name} has no such split; it has {', '.join(splits)}")
    val = {"val": splits["val"]} if split == "train" and "val" in splits else {}
    others = {name: rule for name, rule in data_set.images.items() if name != split}
    return replace(data_set, images={**others, "train": splits[split], **val})


def _described(name: str, path: Path) -> DataSet:
    return DataSet(name=name, **read_description(path))


# The descriptions that are shipped. What users describe themselves has a fingerprint, so that a run refuses changes.
DATA_SETS = {
    path.stem: replace(_described(path.stem, path), fingerprint="") for path in sorted(DESCRIPTIONS.glob("*.toml"))
}


def find_data_set(named: str, flag: str) -> DataSet:
    """The data set of a flag's value: a known name, the path of a description, or a folder of pictures without labels.

    Raises `UserError`: it is none of these, or the description holds a mistake.
    """
    if named in DATA_SETS:
        return DATA_SETS[named]
    path = Path(named).expanduser()
    if path.suffix.lower() == ".toml":
        return _described(path.stem, path)
    if not path.is_dir():
        known = ", ".join(DATA_SETS)
        raise UserError(f"{flag} {named}: neither a known data set ({known}), nor a .toml description, nor a folder")
    return replace(DATA_SETS["folder"], root=named)


def printed_description(named: str) -> str:
    """The text of a shipped description, or of a user's. Raises `UserError` where there is none of that name."""
    path = DESCRIPTIONS / f"{named}.toml" if named in DATA_SETS else Path(named)
    if named not in DATA_SETS and path.suffix != ".toml":
        raise UserError(f"--print_data {named}: no such data set; there are {', '.join(DATA_SETS)}")
    read_description(path)
    return path.read_text(encoding="utf-8")
