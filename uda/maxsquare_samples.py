"""The samples of MaxSquare: resized, mirrored and blurred images (docs/uda.md, section MaxSquare)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from data_handlers.domain import Samples

BLUR = 4  # purpose of the random numbers


def blurred(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Pixels uint8 (H,W,3) under Pillow's Gaussian blur of this standard deviation, of the same shape."""
    return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(float(radius))))


@dataclass(frozen=True, kw_only=True)
class BlurredSamples(Samples):
    """Samples of which half are blurred, by radii that are uniform in [0,1)."""

    def read(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        """As `Samples.read`."""
        levels, label = super().read(index, position)
        chosen, radius = self.generator(BLUR, position).random(2)
        return [blurred(level, radius) for level in levels] if chosen < 0.5 else levels, label
