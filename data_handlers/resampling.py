"""Resizing with a filter that follows from the sizes, for pixels and for float maps (docs/uda.md, section CBST).

Float maps are multiplied by a matrix from each side. The matrices hold the weights of Pillow's filters, and those of
two resizings in a row are multiplied out, so that the map between is never made.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1.0 - np.abs(x), 0.0, None)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


# The function of a filter and the distance at which it ends, in pixels.
_FILTERS: dict[Image.Resampling, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    Image.Resampling.BILINEAR: (_triangle, 1.0),
    Image.Resampling.BICUBIC: (_cubic, 2.0),
    Image.Resampling.LANCZOS: (_lanczos, 3.0),
}


def filter_of_sizes(source: Size, target: Size) -> Image.Resampling:
    """Lanczos where both sides shrink, bicubic where both grow, bilinear otherwise.

    Args:
        source, target: two sides each, in the same order.
    """
    changes = [after - before for before, after in zip(source, target, strict=True)]
    if max(changes) < 0:
        return Image.Resampling.LANCZOS
    return Image.Resampling.BICUBIC if min(changes) > 0 else Image.Resampling.BILINEAR


def resize_by_rule(pixels: np.ndarray, size: Size) -> np.ndarray:
    """Pixels uint8 (h,w,3) resized by Pillow to `size` (H,W) with the filter of `filter_of_sizes`, uint8 (H,W,3).

    The same array where it has that size.
    """
    source = pixels.shape[:2]
    if source == size:
        return pixels
    return np.array(Image.fromarray(pixels).resize(size[::-1], filter_of_sizes(source, size)))


def filter_weights(kind: Image.Resampling, source: int, target: int) -> np.ndarray:
    """The matrix (target,source), float64, with which Pillow's filter takes a line of `source` pixels to `target`.

    Pixels are squares with their values at the centre. A filter that shrinks is widened by the factor. Weights beyond
    the border are left out, and the others are divided by their sum.
    """
    function, support = _FILTERS[kind]
    scale = source / target
    widening = max(scale, 1.0)
    centres = (np.arange(target) + 0.5) * scale
    first = np.trunc(centres - support * widening + 0.5).clip(min=0)
    end = np.trunc(centres + support * widening + 0.5).clip(max=source)
    pixels = np.arange(source)
    weights = function((pixels + 0.5 - centres[:, None]) / widening)
    weights[(pixels < first[:, None]) | (pixels >= end[:, None])] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)


@lru_cache(maxsize=16)
def upsampling_weights(cells: int, stride: int, used: int, target: int, kind: Image.Resampling) -> Tensor:
    """The matrix (target,cells) of three steps: bicubic upsampling by `stride`, crop to `used`, resizing by `kind`.

    Args:
        cells: length of a line of the map; at least `used / stride`.
        used: pixels that are kept of the upsampled line, its first ones.
        target: length of the result.
    """
    matrix = filter_weights(Image.Resampling.BICUBIC, cells, cells * stride)[:used]
    return torch.from_numpy(matrix if used == target else filter_weights(kind, used, target) @ matrix)


def upsample(maps: Tensor, *, stride: int, used: Size, size: Size) -> Tensor:
    """Upsample the maps of a net by its output stride, crop the padding off, and resize them to the image's size.

    Nothing is clipped: values may lie a little outside the range of the maps, and classes need not sum to 1.

    Args:
        maps: float (C,h,w).
        used: (rows, columns) of the network input before it was padded to a multiple of `stride`.
        size: (H,W) of the result.

    Returns:
        float32 (C,H,W), computed in float64 on the device of `maps`, one class at a time.
    """
    if stride == 1 and used == size:
        return maps[:, : used[0], : used[1]].float()
    kind = filter_of_sizes(used, size)
    rows = upsampling_weights(maps.shape[1], stride, used[0], size[0], kind).to(maps.device)
    columns = upsampling_weights(maps.shape[2], stride, used[1], size[1], kind).to(maps.device)
    result = torch.empty(len(maps), *size, dtype=torch.float32, device=maps.device)
    for target, source in zip(result, maps, strict=True):
        target.copy_(torch.linalg.multi_dot([rows, source.double(), columns.T]))
    return result
