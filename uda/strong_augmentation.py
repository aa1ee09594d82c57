"""Strong augmentation of mixed images: colour jitter, then blur (docs/uda.md, section DDB). Pure functions of tensors.

The random numbers of a sample come from its own generator, on the host; images stay on their device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTH = 0.2  # of all four changes of colour
SIGMAS = (0.15, 1.15)  # pixels
TAPS = 11  # of the blur's kernel: four of the largest sigmas to both sides, rounded up
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Strong:
    """What is done to one sample.

    Attributes:
        order: of the changes of colour, `BRIGHTNESS` to `HUE`; empty for none.
        factors: of brightness (its distance to 1 is added), contrast and saturation, and turns of the hue.
        sigma: of the blur, in pixels; 0 for none.
    """

    order: tuple[int, ...]
    factors: tuple[float, ...]
    sigma: float


def draw_strong(rng: np.random.Generator, jitter_p: float, blur_p: float) -> Strong:
    """What is done to a sample: jitter and blur with these probabilities."""
    gates, order = rng.random(2), tuple(rng.permutation(4).tolist())
    changes, sigma = rng.uniform(-STRENGTH, STRENGTH, 4).tolist(), rng.uniform(*SIGMAS)
    factors = (*(1.0 + change for change in changes[:HUE]), changes[HUE])
    return Strong(order if gates[0] < jitter_p else (), factors, sigma if gates[1] < blur_p else 0.0)


def jittered(image: Tensor, order: tuple[int, ...], factors: tuple[float, ...]) -> Tensor:
    """An image (3,h,w) in [0,1] with its colours changed; see `Strong`."""
    for change in order:
        factor = factors[change]
        if change == BRIGHTNESS:
            image = (image + (factor - 1.0)).clamp(0.0, 1.0)
        elif change == CONTRAST:
            image = (image * factor).clamp(0.0, 1.0)
        else:
            hue, saturation, value = hsv(image)
            if change == HUE:
                hue = hue + factor
            else:
                saturation = (saturation * factor).clamp(0.0, 1.0)
            image = rgb_of(hue, saturation, value)
    return image


def hsv(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation and value (h,w) of RGB (3,h,w)."""
    red, green, blue = image
    value, smallest = image.amax(dim=0), image.amin(dim=0)
    spread = value - smallest
    divisor = torch.where(spread == 0, 1, spread)
    sixths = torch.where(
        value == red, (green - blue) / divisor,
        torch.where(value == green, 2.0 + (blue - red) / divisor, 4.0 + (red - green) / divisor),
    )  # fmt: skip
    return sixths / 6.0, spread / torch.where(value == 0, 1, value), value


def rgb_of(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB (3,h,w) of hue in turns, any number of them, saturation and value (h,w)."""
    channels = []
    for offset in (5.0, 3.0, 1.0):
        sixths = torch.remainder(offset + 6.0 * hue, 6.0)
        channels.append(value - value * saturation * torch.minimum(sixths, 4.0 - sixths).clamp(0.0, 1.0))
    return torch.stack(channels)


def blurred(image: Tensor, sigma: float, taps: tuple[int, int]) -> Tensor:
    """An image (3,h,w) under a Gaussian of this standard deviation, mirrored at its borders.

    Args:
        taps: of the kernel, vertically and horizontally; odd.
    """
    for count in taps:  # the rows first; each pass swaps the axes
        distances = np.arange(count) - count // 2
        weights = np.exp(-(distances**2) / (2.0 * sigma**2))
        image = image.transpose(1, 2)
        padded = F.pad(image, (count // 2, count // 2), mode="reflect") if count > 1 else image
        shifted = (
            weight * padded[..., k : k + image.shape[2]] for k, weight in enumerate((weights / weights.sum()).tolist())
        )
        image = sum(shifted, torch.zeros_like(image))
    return image


def published_taps(height: int) -> tuple[int, int]:
    """The published kernel blurs rows alone, and its width follows from the image's height."""
    tenth = math.ceil(0.1 * height)
    return 1, math.floor(tenth - 0.5 + tenth % 2)


def strongly_augmented(image: Tensor, draws: list[Strong], reference: bool) -> Tensor:
    """Images (B,3,h,w) in [0,1], each changed as it was drawn for it.

    Args:
        reference: blur as published; otherwise in both directions.
    """
    taps = published_taps(image.shape[2]) if reference else (TAPS, TAPS)
    changed = (jittered(one, draw.order, draw.factors) for one, draw in zip(image, draws, strict=True))
    return torch.stack([blurred(x, d.sigma, taps) if d.sigma else x for x, d in zip(changed, draws, strict=True)])
