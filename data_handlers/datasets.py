"""The data sets this toolkit knows. One declaration each; adding a data set means adding one to `DATA_SETS`.

For example, frames `left/*.png` with labels `mask/*_mask.png` that use Cityscapes ids:

    "mine": DataSet(
        name="mine",
        images={"train": ("left/*.png",), "val": ("left_val/*.png",)},
        label_path=(("left", "mask"), (".png", "_mask.png")),
        id_map=CITYSCAPES_IDS,
        resize=(1024, 512),
        crop=(1024, 512),
    )

Classes of its own it declares with `class_names`, one name for each trainId, and `classes=tuple(range(n))`; nets are
then trained with `--num_classes n`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from data_handlers.label_maps import (
    ALL_19,
    CITYSCAPES_IDS,
    CITYSCAPES_VOID,
    CLASS_NAMES,
    GTA5_VOID,
    SYNTHIA_16,
    SYNTHIA_IDS,
    SYNTHIA_VOID,
)

LabelEncoding = Literal["8-bit index", "16-bit channel 0"]


@dataclass(frozen=True)
class DataSet:
    """Where a data set's files are and how they are read.

    Attributes:
        name: what `--source` and `--target` call it.
        images: for each split, glob patterns relative to the root, read in place and in this order. A pattern of a
            folder that does not exist is passed over as long as another pattern of the split finds images.
        label_path: replacements that turn an image's relative path into its label's; each replaces the last
            occurrence. Empty for a data set without labels.
        id_map: label id -> trainId.
        void_ids: label ids that are known and ignored; an id in neither means that the wrong file is read and is
            refused. None ignores every id that `id_map` does not list.
        resize: (W,H) images are resized to for training.
        crop: (W,H) of the random crop for training.
        label_encoding: `8-bit index` (grey or palette PNG) or `16-bit channel 0` (id in the first of 16-bit channels).
        classes: trainIds the data set is scored on.
        class_names: names of trainIds 0, 1, ...
        held_out: for a data set without its own `val` images, how many of its last images are kept for validation
            when a segmentation net is trained on it.
        never_used: file stems left out everywhere: the file itself is damaged.
        not_for_training: file stems left out of training only: the image is sound but its label does not fit.

    Raises:
        ValueError: `id_map` or `classes` name a trainId that `class_names` does not.
    """

    name: str
    images: Mapping[str, tuple[str, ...]]
    label_path: tuple[tuple[str, str], ...]
    id_map: Mapping[int, int]
    resize: tuple[int, int]
    crop: tuple[int, int]
    label_encoding: LabelEncoding = "8-bit index"
    classes: tuple[int, ...] = ALL_19
    class_names: tuple[str, ...] = CLASS_NAMES
    void_ids: frozenset[int] | None = None
    held_out: int = 0
    never_used: frozenset[str] = field(default=frozenset())
    not_for_training: frozenset[str] = field(default=frozenset())

    def __post_init__(self) -> None:
        largest = max((*self.id_map.values(), *self.classes), default=0)
        if largest >= len(self.class_names):
            raise ValueError(f"{self.name}: trainId {largest} has no name; class_names has {len(self.class_names)}")


DATA_SETS = {
    "gta5": DataSet(
        name="gta5",
        images={"train": ("images/*.png",)},
        label_path=(("images/", "labels/"),),
        id_map=CITYSCAPES_IDS,
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
            "train": (
                "leftImg8bit/train/*/*_leftImg8bit.png",
                "leftImg8bit/train_extra/*/*_leftImg8bit.png",
            ),
            "val": ("leftImg8bit/val/*/*_leftImg8bit.png",),
        },
        label_path=(("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
        id_map=CITYSCAPES_IDS,
        resize=(1024, 512),
        crop=(1024, 512),
        never_used=frozenset({"troisdorf_000000_000073_leftImg8bit"}),
        void_ids=CITYSCAPES_VOID,
    ),
    # Any folder of pictures: no labels, so nothing that needs labels can use it.
    "folder": DataSet(
        name="folder",
        images={"train": ("*.[pP][nN][gG]", "*.[jJ][pP][gG]", "*.[jJ][pP][eE][gG]")},
        label_path=(),
        id_map={},
        resize=(1024, 512),
        crop=(1024, 512),
    ),
}
