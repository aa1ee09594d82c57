"""Constants of the label encodings: ids of the data sets, the 19 Cityscapes classes and the subsets scored on.

This module imports nothing heavy, as the command lines read the data sets' declarations before anything else.
"""

IGNORE = 255

CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip

# Data set id -> trainId (docs/method.md, section 1); every other id is ignored.
CITYSCAPES_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
    28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip
SYNTHIA_IDS = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13, 18: 14, 19: 15,
    20: 16, 12: 17, 11: 18,
}  # fmt: skip

# Cityscapes colours of the classes; ignored pixels are drawn black.
CLASS_COLOURS = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip

ALL_19 = tuple(range(19))
SYNTHIA_16 = tuple(i for i in ALL_19 if CLASS_NAMES[i] not in ("terrain", "truck", "train"))
SYNTHIA_13 = tuple(i for i in SYNTHIA_16 if CLASS_NAMES[i] not in ("wall", "fence", "pole"))
CLASS_NAMES_16 = tuple(CLASS_NAMES[c] for c in SYNTHIA_16)

# Data set id -> trainId 0..15 of the classes of SYNTHIA_16, for nets of 16 classes.
CITYSCAPES_16_IDS = {i: SYNTHIA_16.index(t) for i, t in CITYSCAPES_IDS.items() if t in SYNTHIA_16}
SYNTHIA_16_IDS = {i: SYNTHIA_16.index(t) for i, t in SYNTHIA_IDS.items() if t in SYNTHIA_16}

# What a description may refer to by name.
ID_MAPS = {
    "cityscapes": CITYSCAPES_IDS, "synthia": SYNTHIA_IDS, "cityscapes16": CITYSCAPES_16_IDS, "synthia16": SYNTHIA_16_IDS
}  # fmt: skip
SUBSETS = {"synthia16": SYNTHIA_16, "synthia13": SYNTHIA_13}

# Cityscapes' label id -> trainId, by the names of the classes: all of them, or those of a subset as 0, 1, ....
LABEL_IDS = {
    tuple(CLASS_NAMES[c] for c in kept): {i: kept.index(t) for i, t in CITYSCAPES_IDS.items() if t in kept}
    for kept in (ALL_19, *SUBSETS.values())
}

# Cityscapes' categories of the classes.
CATEGORIES = {
    "flat": (0, 1), "construction": (2, 3, 4), "object": (5, 6, 7), "nature": (8, 9), "sky": (10,), "human": (11, 12),
    "vehicle": (13, 14, 15, 16, 17, 18),
}  # fmt: skip
