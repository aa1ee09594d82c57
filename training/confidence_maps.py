"""Class probabilities of a whole target image at its own size (docs/uda.md, section CBST).

The image is resized, normalised and padded; the net sees it and, if wanted, its mirror image; the mean of the
outputs is upsampled by the net's output stride, cropped and resized back.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_handlers.images import NetworkInput
from data_handlers.resampling import Size, resize_by_rule, upsample


def input_size(size: Size, longer_side: int | None) -> Size:
    """(h,w) of an image of `size` (H,W) resized so that its longer side is `longer_side`; None keeps the size.

    The shorter side is rounded to the nearest integer, halves to the even one.
    """
    if longer_side is None or max(size) == longer_side:
        return size
    shorter = round(longer_side * min(size) / max(size))
    return (shorter, longer_side) if size[0] < size[1] else (longer_side, shorter)


def padded_size(size: Size, stride: int) -> Size:
    """The sides rounded up to multiples of `stride`."""
    return -(-size[0] // stride) * stride, -(-size[1] // stride) * stride


def network_input(
    pixels: np.ndarray,
    *,
    longer_side: int | None,
    stride: int,
    normalise: NetworkInput,
    device: torch.device | None = None,
) -> Tensor:
    """The resized, normalised image with zeros at its lower and right border.

    Args:
        pixels: RGB uint8 (H,W,3).
        longer_side: of the resized image; None keeps the size.
        stride: the sides become multiples of it.

    Returns:
        float32 (3,h,w) on `device`.
    """
    resized = resize_by_rule(pixels, input_size(pixels.shape[:2], longer_side))
    height, width = padded_size(resized.shape[:2], stride)
    channels = normalise(torch.tensor(resized, device=device))
    return F.pad(channels, (0, width - channels.shape[2], 0, height - channels.shape[1]))


def flip_average(maps: Tensor, maps_of_mirrored: Tensor) -> Tensor:
    """Mean of the probabilities (C,h,w) of an input and of its left-right mirror image, the latter still mirrored."""
    return 0.5 * maps + 0.5 * maps_of_mirrored.flip(-1)


@torch.no_grad()
def confidence_map(
    probabilities: Callable[[Tensor], Tensor],
    pixels: np.ndarray,
    *,
    longer_side: int | None,
    stride: int,
    normalise: NetworkInput,
    device: torch.device | None = None,
    flip: bool = True,
) -> Tensor:
    """Class probabilities of every pixel of an image.

    Args:
        probabilities: the net in eval mode and a softmax, float32 (1,3,h,w) -> (1,C,h/stride,w/stride).
        pixels: RGB uint8 (H,W,3).
        longer_side: of the image that the net sees; None keeps the size.
        stride: the net's output stride.
        flip: average with the output for the mirror image.

    Returns:
        float32 (C,H,W). A value may lie a little outside [0,1], and the classes of a pixel need not sum to 1.
    """
    size = pixels.shape[:2]
    image = network_input(pixels, longer_side=longer_side, stride=stride, normalise=normalise, device=device)[None]
    maps = probabilities(image)[0].float()
    if flip:
        maps = flip_average(maps, probabilities(image.flip(-1))[0].float())
    return upsample(maps, stride=stride, used=input_size(size, longer_side), size=size)
