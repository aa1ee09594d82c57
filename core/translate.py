"""Translating whole images of any size with a trained cascade (`docs/method.md`, section 2).

A generator runs on the whole image where that fits into memory, and otherwise on overlapping tiles. Group norm takes
its mean and variance over the whole image; tiles normalised by their own would differ in brightness, and seams would
show. The tiled path therefore measures mean and variance of every group norm over all tiles first, layer by layer. Its
result is that of the whole image up to float32 rounding.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor, nn

from core.cascade import to_pixels, translate_pyramid
from core.command_flags import MIN_TILE_PIXELS
from core.networks import ConvBlock, Generator
from data_handlers.images import PROCST_INPUT
from training.precision import Precision, Runner, exact_convolutions
from utils.devices import available_memory

# Copies of the widest feature map that exist at once inside a block, workspace of the convolution included.
FEATURE_COPIES = 5
SUMMED_PIXELS = 2**16  # of which a copy in float64 exists at once


Affine = tuple[Tensor, Tensor]  # a group norm with known statistics: x * scale + shift, each (B,C,1,1)
Window = tuple[EllipsisType, slice, slice]  # index of rows and columns


def tiles(height: int, width: int, halo: int, max_pixels: int) -> Iterator[tuple[Window, Window, Window]]:
    """Cover (height, width) with tiles of at most about `max_pixels` pixels each, halo included.

    There is no halo at the image's border, where the convolutions' zero padding acts as it does for the whole image.

    Yields:
        What to read (core plus halo), the core in what was read, and the core in the image.
    """
    side = max(math.isqrt(max(max_pixels, MIN_TILE_PIXELS)) - 2 * halo, 16)

    def spans(length: int) -> Iterator[tuple[slice, slice, slice]]:
        for start in range(0, length, side):
            stop = min(start + side, length)
            read = slice(max(start - halo, 0), min(stop + halo, length))
            yield read, slice(start - read.start, stop - read.start), slice(start, stop)

    for vertical, horizontal in itertools.product(spans(height), spans(width)):
        read, core, target = ((..., rows, columns) for rows, columns in zip(vertical, horizontal, strict=True))
        yield read, core, target


def _run_blocks(blocks: Sequence[ConvBlock], norms: Sequence[Affine | None], x: Tensor) -> Tensor:
    """Run the blocks on a tile, with `norms` in place of their group norms."""
    for block, norm in zip(blocks, norms, strict=True):
        x = block(x) if norm is None else block.conv(block.actvn(x * norm[0] + norm[1]))
    return x


def _group_sums(x: Tensor, groups: int) -> Tensor:
    """Sums of the values and of their squares in every group of channels of (B,C,H,W): (2,B,groups) in float64."""
    sums = torch.zeros(2, len(x), groups, dtype=torch.float64, device=x.device)
    for band in x.split(max(SUMMED_PIXELS // x.shape[-1], 1), dim=-2):
        values = band.double().unflatten(1, (groups, -1)).flatten(2)
        sums += torch.stack([values.sum(dim=2), values.square().sum(dim=2)])
    return sums


def _affine(norm: nn.GroupNorm, sums: Tensor, pixels: int) -> Affine:
    """The group norm of an image of `pixels` pixels with these `_group_sums`."""
    spread = norm.num_channels // norm.num_groups
    mean, mean_square = sums / (pixels * spread)
    inverse_std = ((mean_square - mean.square()).clamp(min=0) + norm.eps).rsqrt()
    scale = inverse_std.repeat_interleave(spread, 1) * norm.weight.double()
    shift = norm.bias.double() - mean.repeat_interleave(spread, 1) * scale
    return scale.float()[..., None, None], shift.float()[..., None, None]


@torch.no_grad()
def forward_tiled(generator: Generator, image: Tensor, coarser: Tensor | None, max_pixels: int) -> Tensor:
    """The generator's output (B,3,h,w) for a whole image, computed on tiles of at most `max_pixels` pixels.

    The generator must be in eval mode. With group norm the layers below each norm are computed once more for its
    statistics: with L layers, this takes about L/2 times as long as the whole image, and saves memory.
    """
    x = generator.join_inputs(image, coarser)
    blocks = generator.blocks()
    halo = sum(block.conv.padding[0] for block in blocks)
    cover = list(tiles(*x.shape[-2:], halo, max_pixels))
    norms: list[Affine | None] = []
    for i, norm in enumerate(block.norm for block in blocks):
        if not isinstance(norm, nn.GroupNorm):
            norms.append(None)
            continue
        features = (_run_blocks(blocks[:i], norms, x[read])[core] for read, core, _ in cover)
        sums = sum(_group_sums(part, norm.num_groups) for part in features)
        norms.append(_affine(norm, sums, x.shape[-2] * x.shape[-1]))
    output = torch.empty_like(image)
    for read, core, target in cover:
        output[target] = torch.tanh(_run_blocks(blocks, norms, x[read]))[core]
    return output


@dataclass(frozen=True)
class Translator:
    """Translates image pyramids with a frozen cascade, on tiles where an image is too large for memory.

    Attributes:
        generators: frozen, coarse to fine, on `device`.
        max_pixels: most pixels a generator may see at once; None measures free memory for each batch.
        precision: of whole images; tiles are computed in float32.
    """

    generators: Sequence[Generator]
    scale_factor: float
    device: torch.device
    max_pixels: int | None = None
    precision: Precision = "fp32"

    def _pixels_that_fit(self) -> int:
        """Pixels of a batch that fit into memory."""
        if self.max_pixels is not None:
            return self.max_pixels
        widest = max(generator.shape.channels for generator in self.generators)
        return available_memory(self.device) // 2 // (4 * widest * FEATURE_COPIES)

    @torch.no_grad()
    def __call__(self, levels: Sequence[Tensor]) -> np.ndarray:
        """Translate a batch of equally sized images.

        Args:
            levels: uint8 pyramid levels 0..N, (B,h_i,w_i,3).

        Returns:
            uint8 (B,H,W,3): the pixels to save.
        """
        # PyTorch's group norm sums images that are channels last so inexactly that it shows in float32.
        layout = torch.contiguous_format if self.precision == "fp32" else torch.channels_last
        moved = [level.to(self.device, non_blocking=True) for level in levels]
        inputs = [PROCST_INPUT(level).contiguous(memory_format=layout) for level in moved]
        run_whole, most_pixels = Runner(self.precision), self._pixels_that_fit() // len(inputs[0])

        def run(generator: Generator, image: Tensor, coarser: Tensor | None) -> Tensor:
            if image.shape[-2] * image.shape[-1] <= most_pixels:
                return run_whole(generator, image, coarser)
            with exact_convolutions():
                return forward_tiled(generator, image, coarser, most_pixels)

        output = translate_pyramid(self.generators, inputs, self.scale_factor, run)
        return to_pixels(output).permute(0, 2, 3, 1).contiguous().cpu().numpy()
