"""The samples of DDB: how images are resized, cropped and distorted (docs/uda.md, section DDB)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data_handlers.cache import ResizedFiles
from data_handlers.classes import IGNORE
from data_handlers.domain import CROP, Samples
from data_handlers.images import image_size, read_label, read_pixels
from uda.strong_augmentation import hsv, rgb_of
from utils.errors import UserError

DISTORTION = 5  # purpose of the random numbers
CROPS = 10  # that are looked at before one is taken as it is


def fitted_size(size: tuple[int, int], box: tuple[int, int], short_side: int = 0) -> tuple[int, int]:
    """(W,H) of an image of `size` made to fit into a box, which may be turned; `short_side` raises the smaller one."""
    short, long = sorted(box)
    if short < short_side:
        short, long = short_side, short_side * max(size) / min(size)
    scale = min(long / max(size), short / min(size))
    width, height = (int(side * scale + 0.5) for side in size)
    return width, height


def bilinear(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixels uint8 (h,w,3) resized to (W,H) without antialiasing, as the published loader does within one level."""
    levels = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    found = F.interpolate(levels, size=size[::-1], mode="bilinear", align_corners=False)
    return found[0].round().byte().permute(1, 2, 0).contiguous().numpy()


def top_left(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label uint8 (h,w) resized to (W,H) by taking the pixel at or before each point, as published."""
    found = F.interpolate(torch.from_numpy(label)[None, None].float(), size=size[::-1], mode="nearest")
    return found[0, 0].byte().numpy()


class FittedFiles(ResizedFiles):
    """Images and labels that keep their ratio, and fit into a box `size`, resized as published."""

    def image(self, index: int) -> np.ndarray:
        """See `ResizedFiles.image`."""
        path = self.files.image_file(self.files.images[index])

        def read() -> np.ndarray:
            pixels = read_pixels(path)
            return bilinear(pixels, fitted_size(pixels.shape[1::-1], self.size))

        return self._cached(read, ["fitted"], path)

    def label(self, index: int) -> np.ndarray:
        """See `ResizedFiles.label`."""
        name = self.files.images[index]
        size = image_size(self.files.image_file(name))
        label = read_label(self.files.label_file(name), self.files.data_set, size)
        return top_left(label, fitted_size(size, self.size))


def balanced_offset(
    label: np.ndarray, crop: tuple[int, int], most: float, draw: Callable[[int], int]
) -> tuple[int, int]:
    """(x,y) of a crop in which no class has a share of `most` of the labelled pixels, and there are two classes.

    Where ten crops were none, the next one is taken; at `most` 1, the first one.

    Args:
        crop: (W,H).
        draw: a random integer below its argument; the vertical offset is drawn first.
    """
    width, height = crop

    def offset() -> tuple[int, int]:
        y = draw(label.shape[0] - height + 1)
        return draw(label.shape[1] - width + 1), y

    for _ in range(CROPS if most < 1.0 else 0):
        x, y = offset()
        window = label[y : y + height, x : x + width]
        counts = np.bincount(window[window != IGNORE])
        if np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < most:
            return x, y
    return offset()


def distorted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pixels uint8 (h,w,3) with random brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast comes before or after saturation and hue; these are changed in 8-bit HSV, with hues of two degrees.
    """

    def scaled(image: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
        return (image.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)

    def contrast(image: np.ndarray) -> np.ndarray:
        return scaled(image, rng.uniform(0.5, 1.5)) if rng.integers(2) else image

    if rng.integers(2):
        pixels = scaled(pixels, 1.0, rng.uniform(-32.0, 32.0))
    contrast_first = rng.integers(2)
    if contrast_first:
        pixels = contrast(pixels)
    if rng.integers(2):
        hue, saturation, value = _hsv8(pixels)
        pixels = _rgb8(hue, scaled(saturation, rng.uniform(0.5, 1.5)), value)
    if rng.integers(2):
        hue, saturation, value = _hsv8(pixels)
        pixels = _rgb8((hue + rng.integers(-18, 18)) % 180, saturation, value)
    return pixels if contrast_first else contrast(pixels)


def _hsv8(pixels: np.ndarray) -> list[np.ndarray]:
    hue, *others = hsv(torch.from_numpy(pixels).permute(2, 0, 1) / 255.0)
    return [(180 * hue).round().remainder(180).int().numpy(), *((255 * x).round().byte().numpy() for x in others)]


def _rgb8(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    turns, *others = (torch.from_numpy(x) / most for x, most in ((hue, 180.0), (saturation, 255.0), (value, 255.0)))
    return (255 * rgb_of(turns, *others)).round().byte().permute(1, 2, 0).contiguous().numpy()


@dataclass(frozen=True, kw_only=True)
class DDBSamples(Samples):
    """Samples of a domain.

    Attributes:
        reference: images are resized as published.
        cat_max_ratio: see `balanced_offset`, where labels are read.
        distorts: colours are changed by `distorted`.
    """

    reference: bool
    cat_max_ratio: float
    distorts: bool

    @property
    def stored(self) -> Sequence[ResizedFiles]:
        """See `Samples.stored`."""
        domain = self.domain
        if not self.reference:
            return domain.resized
        return [FittedFiles(files, domain.resize, domain.resample, domain.cache_dir) for files in domain.lists]

    def crop_offset(self, position: int, size: tuple[int, int], label: np.ndarray | None = None) -> tuple[int, int]:
        """See `Samples.crop_offset`. Raises `UserError` for an image that is smaller than the crop."""
        crop = self.domain.crop
        if size[0] < crop[0] or size[1] < crop[1]:
            raise UserError(f"--crop_size {crop[0]} {crop[1]}: an image that keeps its ratio is only {size} large")
        if label is None:
            return super().crop_offset(position, size)
        rng = self.generator(CROP, position)
        return balanced_offset(label, crop, self.cat_max_ratio, lambda below: int(rng.integers(below)))

    def read(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray | None]:
        """As `Samples.read`."""
        levels, label = super().read(index, position)
        if self.distorts:
            levels = [distorted(level, self.generator(DISTORTION, position)) for level in levels]
        return levels, label
