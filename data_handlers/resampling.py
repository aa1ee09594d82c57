"""Resizing with a filter that follows from the sizes, for pixels and for float maps (docs/uda.md, section CBST)."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Size = tuple[int, int]


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


def resize_maps(maps: Tensor, size: Size, kind: Image.Resampling) -> Tensor:
    """Float32 maps (C,h,w) resized to `size` (H,W) with a filter of Pillow, on their device; nothing is clipped."""
    if kind is Image.Resampling.LANCZOS:  # which PyTorch does not have
        planes = [np.array(Image.fromarray(plane).resize(size[::-1], kind)) for plane in maps.cpu().numpy()]
        return torch.from_numpy(np.stack(planes)).to(maps.device)
    return F.interpolate(maps[None].double(), size=size, mode=kind.name.lower(), antialias=True)[0].float()


def upsample(maps: Tensor, *, stride: int, used: Size, size: Size) -> Tensor:
    """Upsample the maps of a net by its output stride, crop the padding off, and resize them to the image's size.

    Nothing is clipped: values may lie a little outside the range of the maps, and classes need not sum to 1.

    Args:
        maps: float (C,h,w).
        used: (rows, columns) of the network input before it was padded to a multiple of `stride`.
        size: (H,W) of the result.

    Returns:
        float32 (C,H,W) on the device of `maps`.
    """
    maps = maps.float()
    if stride > 1:
        whole = (maps.shape[1] * stride, maps.shape[2] * stride)
        maps = resize_maps(maps, whole, Image.Resampling.BICUBIC)
    maps = maps[:, : used[0], : used[1]]
    return maps if used == size else resize_maps(maps, size, filter_of_sizes(used, size))
