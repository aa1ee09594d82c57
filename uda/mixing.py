"""Which pixels of a mixed image are source's: CutMix and ClassMix between domains (docs/uda.md, section DDB).

The random numbers of a sample are arguments; masks are made on the device of the labels, without reading back.
"""

import numpy as np
import torch
from torch import Tensor

from data_handlers.classes import IGNORE

AREA = 0.4  # share of the image that CutMix takes from source
VALUES = IGNORE + 1  # that a label can hold


def cut_box(draws: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """The rows and columns y0, x0, y1, x1 (ends excluded) of a rectangle of `AREA` of an image.

    Args:
        draws: three numbers in [0,1): how the area is divided into height and width, and the place of the rectangle.
    """
    share = AREA ** draws[0]
    box = (round(share * height), round(AREA / share * width))
    y, x = (round((side - part) * draw) for side, part, draw in zip((height, width), box, draws[1:], strict=True))
    return y, x, y + box[0], x + box[1]


def cut_mask(box: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """A mask (h,w) that is true in a box of `cut_box`, on the device of a label (h,w)."""
    y0, x0, y1, x1 = box
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def class_masks(label: Tensor, order: Tensor, reference: bool) -> Tensor:
    """Masks (B,h,w) of half of the classes in each label, rounded up: those that come first in its order.

    Ignored pixels are of no class, and of a label with one class nothing is taken: otherwise the mixed image would be
    the source image.

    Args:
        label: trainIds (B,h,w), 255 = ignore.
        order: random numbers (B,256), for the values of the label.
        reference: as published: 255 is a class, and a single class is taken.
    """
    values = label.long().flatten(1)
    present = torch.zeros(len(label), VALUES, dtype=torch.bool, device=label.device)
    present.scatter_(1, values, torch.ones_like(values, dtype=torch.bool))
    if not reference:
        present[:, IGNORE] = False
    found = present.sum(dim=1, keepdim=True)
    wanted = (found + 1) // 2 if reference else torch.where(found > 1, (found + 1) // 2, 0)
    place = torch.where(present, order, torch.inf).argsort(dim=1).argsort(dim=1)
    return (present & (place < wanted)).gather(1, values).view(label.shape)
