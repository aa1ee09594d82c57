"""The data sets of this toolkit, one declaration each. To add one, add a declaration to `DATA_SETS` (docs/own-data.md).

This module imports nothing heavy, as the command lines read the names of the data sets before anything else.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from data_handlers.choices import LABELS, Labels
from data_handlers.classes import (
    ALL_19,
    CATEGORIES,
    CITYSCAPES_IDS,
    CITYSCAPES_VOID,
    CLASS_NAMES,
    GTA5_VOID,
    IGNORE,
    SYNTHIA_16,
    SYNTHIA_IDS,
    SYNTHIA_VOID,
)
from utils.errors import UserError

LabelEncoding = Literal["8-bit index", "16-bit channel 0"]


@dataclass(frozen=True)
class DataSet:
    """Where a data set's files are and how they are read.

    Attributes:
        name: what `--source` and `--target` call it.
        images: for each split, glob patterns relative to the root. Images are listed in the order of the patterns. A
            pattern without a match is ignored as long as another pattern of the split finds images.
        label_path: replacements that turn an image's relative path into its label's; each replaces the last
            occurrence. Empty for a data set without labels.
        id_map: label id -> trainId; empty for a data set whose labels exist as trainIds only.
        void_ids: label ids that are known and ignored. An id in neither `id_map` nor `void_ids` means that the wrong
            file is read, and is refused. None ignores every id that `id_map` does not list.
        resize, crop: (W,H) that images are resized to for training, and of the random crop.
        labels: what the values of the label files are: `ids` of the data set, which `id_map` maps, or `trainids`, that
            is 0..C-1 for C class names and 255 for ignored pixels.
        labels_flag: command line flag that set `labels` (see `with_labels`); '' where the declaration did.
        label_encoding: how label ids are stored: `8-bit index` (grey or palette PNG) or `16-bit channel 0` (id in the
            first of 16-bit channels). TrainIds are always stored as `8-bit index`.
        classes: trainIds the data set is scored on.
        class_names: names of trainIds 0, 1, ..., C-1.
        categories: name of a category -> its trainIds, for scores by category; empty for a data set without them.
        held_out: for a data set without its own `val` images, how many of its last images are kept for validation
            when a segmentation net is trained on it.
        never_used: file stems of damaged images, which are excluded everywhere.
        not_for_training: file stems of sound images whose labels do not fit, which are excluded wherever labels count.

    Raises:
        ValueError: `id_map` or `classes` name a trainId without a class name, or `labels` has another value.
    """

    name: str
    images: Mapping[str, tuple[str, ...]]
    label_path: tuple[tuple[str, str], ...]
    id_map: Mapping[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]
    labels: Labels = "ids"
    labels_flag: str = ""
    label_encoding: LabelEncoding = "8-bit index"
    classes: tuple[int, ...] = ALL_19
    class_names: tuple[str, ...] = CLASS_NAMES
    categories: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    void_ids: frozenset[int] | None = None
    held_out: int = 0
    never_used: frozenset[str] = frozenset()
    not_for_training: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        largest = max((*self.id_map.values(), *self.classes), default=0)
        if largest >= len(self.class_names):
            raise ValueError(f"{self.name}: trainId {largest} has no name; class_names has {len(self.class_names)}")
        if self.labels not in LABELS:
            raise ValueError(f"{self.name}: labels is {self.labels!r}; it must be one of {', '.join(LABELS)}")

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
    """The data set with its labels read as a command line flag says.

    Args:
        labels: `ids` or `trainids`; '' keeps the declaration.
        flag: name of the flag, for messages (`--src_labels`, `--trg_labels`, `--labels`).

    Raises:
        UserError: a data set without labels, or `ids` for a data set without an `id_map`.
    """
    if not labels:
        return data_set
    if not data_set.label_path:
        raise UserError(f"{flag} {labels}: {data_set.name} has no labels; omit the flag")
    if labels == "ids" and not data_set.id_map:
        raise UserError(f"{flag} {labels}: {data_set.name} declares no label ids, only trainIds; omit the flag")
    return replace(data_set, labels=labels, labels_flag=flag)


def for_net_of(data_set: DataSet, num_classes: int) -> DataSet:
    """The data set as a net of `num_classes` sees it: one of 16 has SYNTHIA's 16 of the 19 classes as 0..15."""
    if num_classes != len(SYNTHIA_16) or data_set.class_names != CLASS_NAMES:
        return data_set
    ids = {i: SYNTHIA_16.index(train_id) for i, train_id in data_set.id_map.items() if train_id in SYNTHIA_16}
    void = None if data_set.void_ids is None else data_set.void_ids | (data_set.id_map.keys() - ids.keys())
    names = tuple(CLASS_NAMES[c] for c in SYNTHIA_16)
    return replace(
        data_set, id_map=ids, void_ids=void, classes=tuple(range(len(names))), class_names=names, categories={}
    )


DATA_SETS = {
    "gta5": DataSet(
        name="gta5",
        images={"train": ("images/*.png",)},
        label_path=(("images/", "labels/"),),
        id_map=CITYSCAPES_IDS,
        categories=CATEGORIES,
        resize=(1126, 619),
        crop=(1024, 512),
        not_for_training=frozenset({"15188", "17705"}),
        void_ids=GTA5_VOID,
        held_out=500,
    ),
    "synthia": DataSet(
        name="synthia",
        images={"train": ("RGB/*.png",)},
        label_path=(("RGB/", "GT/LABELS/"),),
        id_map=SYNTHIA_IDS,
        categories=CATEGORIES,
        resize=(1113, 661),
        crop=(1024, 512),
        label_encoding="16-bit channel 0",
        classes=SYNTHIA_16,
        void_ids=SYNTHIA_VOID,
        held_out=300,
    ),
    "cityscapes": DataSet(
        name="cityscapes",
        images={
            "train": ("leftImg8bit/train/*/*_leftImg8bit.png", "leftImg8bit/train_extra/*/*_leftImg8bit.png"),
            "val": ("leftImg8bit/val/*/*_leftImg8bit.png",),
        },
        label_path=(("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
        id_map=CITYSCAPES_IDS,
        categories=CATEGORIES,
        resize=(1024, 512),
        crop=(1024, 512),
        never_used=frozenset({"troisdorf_000000_000073_leftImg8bit"}),
        void_ids=CITYSCAPES_VOID,
    ),
    # Any folder of images. It has no labels, so it cannot be used where labels are needed.
    "folder": DataSet(
        name="folder",
        images={"train": ("*.[pP][nN][gG]", "*.[jJ][pP][gG]", "*.[jJ][pP][eE][gG]")},
        label_path=(),
        id_map={},
        resize=(1024, 512),
        crop=(1024, 512),
    ),
}
