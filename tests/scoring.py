"""Scores counted pixel by pixel, and the numbers and colours of the classes written down once more."""

from __future__ import annotations

from collections import Counter

NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
COLOURS = [
    "804080", "f423e8", "464646", "66669c", "be9999", "999999", "faaa1e", "dcdc00", "6b8e23", "98fb98", "4682b4",
    "dc143c", "ff0000", "00008e", "000046", "003c64", "005064", "0000e6", "770b20",
]  # fmt: skip
ALL = set(range(19))
SUBSETS = {19: ALL, 16: ALL - {9, 14, 16}, 13: ALL - {9, 14, 16, 3, 4, 5}}


def slow_scores(predictions, labels, classes):
    """Pixel by pixel: IoU by class (of the labelled classes only), their mean, pixel accuracy, and all counts."""
    counts = Counter()
    for prediction, label in zip(predictions, labels, strict=True):
        counts.update(zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True))
    counted = {(t, p): n for (t, p), n in counts.items() if t in classes}
    iou = {}
    for c in sorted({t for t, _ in counted}):
        either = sum(n for (t, p), n in counted.items() if c in (t, p))
        iou[c] = counted.get((c, c), 0) / either
    right = sum(n for (t, p), n in counted.items() if t == p)
    return iou, sum(iou.values()) / len(iou), right / sum(counted.values()), counts
