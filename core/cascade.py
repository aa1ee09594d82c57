"""The cascade of generators over the pyramid of an image (docs/method.md, sections 1 and 2).

Generated tensors are resized by PyTorch's bicubic interpolation with `align_corners=True` and no antialiasing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.networks import Generator
from utils.sizes import level_size

# (network, *inputs) -> the network's output
Run = Callable[..., Any]


def to_pixels(x: Tensor) -> Tensor:
    """Network range [-1,1], clamped -> uint8 [0,255], rounded to nearest."""
    return (((x + 1.0) / 2.0).clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)


def resize_bicubic(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic interpolation of (B,3,h,w) to `size` (h,w), corners aligned, no antialiasing."""
    return F.interpolate(x, size=tuple(size), mode="bicubic", align_corners=True)


def generated_pyramid(x: Tensor, scale: int, scale_factor: float) -> list[Tensor]:
    """Levels 0..`scale` of a generated image (B,3,h,w) that has the size of level `scale`."""
    lower = [resize_bicubic(x, level_size(x.shape[-2:], scale - i, scale_factor)) for i in range(scale)]
    return [*lower, x]


@torch.no_grad()
def cascade(
    lower: Sequence[Generator], levels: Sequence[Tensor], scale_factor: float, run: Run = nn.Module.__call__
) -> Tensor | None:
    """Second input of G_s: the frozen generators 0..s-1 run from coarse to fine, each result upsampled by 1/f.

    Args:
        lower: the s frozen lower generators of one direction.
        levels: pyramid levels 0..s (finer ones are ignored), (B,3,h_i,w_i).
        run: calls a generator with its image and coarser image; in export, on tiles.

    Returns:
        (B,3,h_s,w_s) without gradient, or None at scale 0, whose generator has no second input.
    """
    coarser = None
    for k, generator in enumerate(lower):
        output = run(generator, levels[k], coarser)
        upsampled_size = [math.ceil(side / scale_factor) for side in output.shape[-2:]]
        height, width = levels[k + 1].shape[-2:]
        # Rounding up can leave a row or column too many.
        coarser = resize_bicubic(output, upsampled_size)[..., :height, :width]
    return coarser


def translate_pyramid(
    generators: Sequence[Generator], levels: Sequence[Tensor], scale_factor: float, run: Run = nn.Module.__call__
) -> Tensor:
    """Run a whole cascade G_0..G_s on pyramid levels 0..s and return the finest output (B,3,h_s,w_s)."""
    *lower, finest = generators
    return run(finest, levels[len(lower)], cascade(lower, levels, scale_factor, run))
