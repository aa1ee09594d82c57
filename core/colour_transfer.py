"""Training-free translators: each source image takes colours or low frequencies of a target image drawn by seed.

They are what trained translators are compared with (`docs/method.md`, section 6). Histogram matching: Gonzalez and
Woods, Digital Image Processing, section 3.3. FDA: Yang and Soatto, FDA: Fourier Domain Adaptation for Semantic
Segmentation, CVPR 2020, equation 3.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import fft
from skimage.exposure import match_histograms

from data_handlers.images import read_image
from data_handlers.lists import FileList
from utils.errors import UserError
from utils.loaders import MOST_SKIPPED

# A source and a target image, uint8 (h,w,3) and (h',w',3) -> the translated source image, uint8 (h,w,3).
Transfer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def histogram_matched(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The source image with the target's histogram in each of red, green and blue.

    Args:
        source, target: uint8 (h,w,3) and (h',w',3); the sizes may differ.

    Returns:
        uint8 (h,w,3); levels between two of the target's are interpolated, and their fraction is dropped.
    """
    return match_histograms(source, target, channel_axis=-1)


def low_frequencies_swapped(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """The source image with the target's amplitudes at the lowest frequencies; phases stay the source's (FDA).

    Args:
        source, target: uint8 (h,w,3) and (h',w',3); the target is resized to the source's size.
        beta: the amplitudes of -n..n cycles in both directions are swapped, n = floor(beta * min(h,w)).

    Returns:
        uint8 (h,w,3).
    """
    height, width = source.shape[:2]
    if target.shape != source.shape:
        target = np.asarray(Image.fromarray(target).resize((width, height), Image.Resampling.BICUBIC))
    reach = int(beta * min(height, width))
    spectrum, other = (fft.rfft2(pixels.astype(np.float64), axes=(0, 1)) for pixels in (source, target))
    # Of a real image, the columns of negative frequencies are the conjugates of those of positive ones.
    rows = np.arange(-reach, reach + 1) % height
    low = np.ix_(np.unique(rows), np.arange(min(reach, width // 2) + 1))
    spectrum[low] = np.abs(other[low]) * np.exp(1j * np.angle(spectrum[low]))
    return np.clip(np.rint(fft.irfft2(spectrum, s=(height, width), axes=(0, 1))), 0, 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class ColourTransfer:
    """A training-free translator of the images of a data set.

    Attributes:
        files: the source images.
        target: the images of which one is drawn for each source image.
        transfer: see `Transfer`.
        seed, variant: the draw depends on these and the image's name alone.
        skips: another target image is drawn for one that cannot be read, instead of an error.
    """

    files: FileList
    target: FileList
    transfer: Transfer
    seed: int
    variant: int = 0
    skips: bool = False

    def __call__(self, name: str) -> list[np.ndarray]:
        """The translated image alone, uint8 (h,w,3), as `translate_images` takes it.

        Raises `UserError`: one of the two images cannot be read.
        """
        source = np.asarray(read_image(self.files.image_file(name)))
        for attempt in range(MOST_SKIPPED):
            rng = np.random.default_rng([self.seed, self.variant, zlib.crc32(name.encode()), attempt])
            partner = self.target.images[int(rng.integers(len(self.target)))]
            try:
                target = np.asarray(read_image(self.target.image_file(partner)))
                break
            except UserError:
                if not self.skips or attempt == MOST_SKIPPED - 1:
                    raise
        return [self.transfer(source, target)]
