"""The samples of MaxSquare: resized or randomly scaled, mirrored and blurred (docs/uda.md, section MaxSquare)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from data_handlers.choices import Resample
from data_handlers.classes import IGNORE
from data_handlers.domain import Samples
from data_handlers.images import read_label, read_pixels, resized
from data_handlers.resampling import Size

BLUR, CROP = 4, 5  # purposes of the random numbers


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Pixels uint8 (H,W,3) under Pillow's Gaussian blur of this standard deviation, of the same shape."""
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(radius))))


def random_crop(
    pixels: np.ndarray, label: np.ndarray, *, base: Size, crop: Size, draw: Callable[[int, int], int],
    resample: Resample = "exact",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Pixels (h,w,3) and label (h,w), uint8, scaled to half to twice the larger side of `base`, and cropped.

    Args:
        base, crop: (W,H). What the crop lacks at the right and below is 0, in the label 255.
        draw: a random integer from the first to the last one given: a side of the scaled image, x and y of the crop.
    """
    size = pixels.shape[1::-1]
    side = 0 if base[0] * size[1] > base[1] * size[0] else 1  # the one at which the base is relatively larger
    drawn = draw(base[side] // 2, 2 * base[side])
    scaled = tuple(max(1, length * drawn // size[side]) for length in size)
    x, y = (draw(0, max(length - part, 0)) for length, part in zip(scaled, crop, strict=True))
    window = np.s_[y : y + crop[1], x : x + crop[0]]
    pixels = resized(pixels, scaled, resample)[window]
    label = np.array(Image.fromarray(label).resize(scaled, Image.Resampling.NEAREST))[window]
    missing = [(0, part - length) for part, length in zip(crop[::-1], label.shape, strict=True)]
    return np.pad(pixels, [*missing, (0, 0)]), np.pad(label, missing, constant_values=IGNORE)


@dataclass(frozen=True, kw_only=True)
class MaxSquareSamples(Samples):
    """Samples: with `scales` a `random_crop` of each image, its base `resize`; with `blurs` half by radii in [0,1)."""

    blurs: bool
    scales: bool

    def read(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        """As `Samples.read`."""
        levels, label = self._scaled(index, position) if self.scales else super().read(index, position)
        chosen, radius = self.generator(BLUR, position).random(2)
        return [blurred(level, radius) for level in levels] if self.blurs and chosen < 0.5 else levels, label

    def _scaled(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        domain, files, rng = self.domain, self.drawn(self.domain.lists, position), self.generator(CROP, position)
        name = files.images[index]
        pixels = read_pixels(files.image_file(name))
        size, step = pixels.shape[1::-1], -1 if domain.flip and self.generator(2, position).integers(2) else 1
        label = read_label(files.label_file(name), files.data_set, size) if domain.labels else pixels[..., 0]
        pixels, label = random_crop(
            pixels[:, ::step].copy(), label[:, ::step].copy(), base=domain.resize, crop=domain.crop,
            draw=lambda first, last: int(rng.integers(first, last + 1)), resample=domain.resample,
        )  # fmt: skip
        return [pixels], label if domain.labels else None
