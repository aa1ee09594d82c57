"""The losses that every training of a segmentation net shares, as pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from data_handlers.classes import IGNORE


def at_least_float32(x: Tensor) -> Tensor:
    """Half and bfloat16 tensors as float32; float32 and float64 tensors as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels that are not ignored, a scalar.

    It is 0, with zero gradients, where every pixel is ignored: a small crop of void must not end a run.

    Args:
        logits: (B,C,h,w); computed in float32 at least.
        label: trainIds (B,h,w), integer, 255 = ignore.
    """
    target = label.long()
    logits = at_least_float32(logits)
    # The sum is taken outside of `F.cross_entropy`: the sum inside has no deterministic order on a GPU.
    total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none").sum()
    return total / (target != IGNORE).sum().clamp(min=1)
