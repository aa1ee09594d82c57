"""Label ids of the data sets, the 19 Cityscapes classes (trainIds) and the subsets they are scored on."""

from __future__ import annotations

from collections.abc import Mapping

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

ALL_19 = tuple(range(19))
SYNTHIA_16 = tuple(i for i in ALL_19 if CLASS_NAMES[i] not in ("terrain", "truck", "train"))
SYNTHIA_13 = tuple(i for i in SYNTHIA_16 if CLASS_NAMES[i] not in ("wall", "fence", "pole"))


def to_train_ids(label: np.ndarray, id_map: Mapping[int, int]) -> np.ndarray:
    """Map data set ids (any integer array) to trainIds, uint8 of the same shape; unlisted ids become 255."""
    table = np.full(65536, IGNORE, dtype=np.uint8)
    for data_set_id, train_id in id_map.items():
        table[data_set_id] = train_id
    return table[label]
