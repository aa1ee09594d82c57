"""Pyramids of file images: every level is resized from the base image (docs/method.md, section 1).

Images of files are resized with an antialiased bicubic filter. Generated images are tensors and are resized without
antialiasing, see `core.cascade`.
"""

import numpy as np
from PIL import Image

from data_handlers.choices import Resample
from data_handlers.images import resize_pixels
from utils.sizes import level_size


def image_pyramid(image: Image.Image, num_scales: int, scale_factor: float, up_to: int) -> list[np.ndarray]:
    """Levels 0..`up_to` of an image, each resized from the base image with Pillow's bicubic filter.

    Args:
        image: RGB base image, in training a resized and cropped one, in export a whole image at native size.
        num_scales: N; level N has the base size.
        up_to: finest level wanted (training at scale s needs 0..s only).

    Returns:
        uint8 arrays (h_i, w_i, 3).
    """
    levels = []
    for scale in range(up_to + 1):
        size = level_size(image.size, num_scales - scale, scale_factor)
        level = image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)
        levels.append(np.asarray(level))
    return levels


def array_pyramid(
    pixels: np.ndarray, num_scales: int, scale_factor: float, up_to: int, resample: Resample
) -> list[np.ndarray]:
    """`image_pyramid` of uint8 (h,w,3); the values are equal with `exact`, and at most one off with `fast`."""
    if resample == "exact":
        return image_pyramid(Image.fromarray(pixels), num_scales, scale_factor, up_to)
    base = pixels.shape[1::-1]
    return [resize_pixels(pixels, level_size(base, num_scales - scale, scale_factor)) for scale in range(up_to + 1)]
