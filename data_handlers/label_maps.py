"""Label ids of the data sets, the 19 Cityscapes classes (trainIds) and the subsets they are scored on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

IGNORE = 255

CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

# Data set id -> trainId (specification section 1); every other id is ignored.
CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
SYNTHIA_IDS = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
    20: 16, 12: 17, 11: 18,
}  # fmt: skip

# Ids that occur in sound label files and belong to no class. License plate, -1, is 255 in 8 bits; GTA5 calls it 34.
CITYSCAPES_VOID = frozenset({*range(34), 255} - set(CITYSCAPES_IDS))
GTA5_VOID = CITYSCAPES_VOID | {34}
SYNTHIA_VOID = frozenset(set(range(23)) - set(SYNTHIA_IDS))

# Cityscapes colours of the classes; black stands for ignored pixels.
CLASS_COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip

ALL_19 = tuple(range(19))
SYNTHIA_16 = tuple(i for i in ALL_19 if CLASS_NAMES[i] not in ("terrain", "truck", "train"))
SYNTHIA_13 = tuple(i for i in SYNTHIA_16 if CLASS_NAMES[i] not in ("wall", "fence", "pole"))


UNKNOWN = 254  # stands in a table for ids that are neither mapped nor known to be void


def to_train_ids(label: np.ndarray, id_map: Mapping[int, int], void_ids: Collection[int] | None = None) -> np.ndarray:
    """Map data set ids (any unsigned integer array) to trainIds, uint8 of the same shape.

    Args:
        void_ids: ids that become 255; None means every id that `id_map` does not list.

    Raises:
        ValueError: holds the first id that is in neither.
    """
    table = np.full(65536, IGNORE if void_ids is None else UNKNOWN, dtype=np.uint8)
    if void_ids is not None:
        table[list(void_ids)] = IGNORE
    for data_set_id, train_id in id_map.items():
        table[data_set_id] = train_id
    mapped = table[label]
    if void_ids is not None and (unknown := mapped == UNKNOWN).any():
        raise ValueError(int(label[unknown][0]))
    return mapped


def to_label_ids(train_ids: np.ndarray) -> np.ndarray:
    """TrainIds 0..18 -> Cityscapes label ids, uint8, as the benchmark's server expects them; others become 0."""
    table = np.zeros(256, dtype=np.uint8)
    for label_id, train_id in CITYSCAPES_IDS.items():
        table[train_id] = label_id
    return table[train_ids]


def colourise(train_ids: np.ndarray) -> np.ndarray:
    """TrainIds (h,w) -> RGB uint8 (h,w,3) in the Cityscapes colours; ignored pixels and classes past 18 are black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(CLASS_COLOURS)] = CLASS_COLOURS
    return table[train_ids]
