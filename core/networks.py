"""Generator and discriminator of one scale (docs/method.md, section 2), with the parameter names of published files."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import NetworkShape, Norm
from core.double_backward import block_with_double_backward, has_double_backward
from models.losses import at_least_float32

LEAKY_SLOPE = 0.2


class ConvBlock(nn.Module):
    """norm -> LeakyReLU -> conv, or conv -> LeakyReLU where the input has no norm. (B,in,H,W) -> (B,out,H,W)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, groups: int, kernel_size: int) -> None:
        super().__init__()
        self.norm: nn.Module | None
        if norm == "batch":
            self.norm = nn.BatchNorm2d(in_channels)
        elif in_channels % groups == 0:
            self.norm = nn.GroupNorm(groups, in_channels)
        else:
            self.norm = None
        # In place, as no backward needs the output of the norm or convolution before it.
        self.actvn = nn.LeakyReLU(LEAKY_SLOPE, inplace=True)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, differentiable_twice: bool = False) -> Tensor:
        """`differentiable_twice`: the gradient to `x` is to be differentiated in its turn."""
        if self.norm is None:
            return self.actvn(self.conv(x))
        if differentiable_twice and has_double_backward(self.norm, x):
            return block_with_double_backward(x, self.norm, LEAKY_SLOPE, self.conv)
        return self.conv(self.actvn(_normalised(self.norm, x)))


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The norm of `x` in the precision of `x`; statistics, weight and bias are float32.

    A weight near 1 rounded to bfloat16 moves in steps of 0.4 to 0.8 percent, more than an optimiser's step, and a
    rounded mean or variance shifts a whole image. A GPU's group norm does not take such a mixture.
    """
    if x.dtype == torch.float32 or not isinstance(norm, nn.GroupNorm):
        return norm(x)
    with torch.autocast(x.device.type, enabled=False):
        features = x if x.device.type == "cpu" else at_least_float32(x)
        return F.group_norm(features, norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)


def _build_trunk(module: nn.Module, shape: NetworkShape, in_channels: int, out_channels: int, last: nn.Module) -> None:
    """Fill `module` with head, body and tail under the parameter names of the published checkpoints."""

    def block(inputs: int, outputs: int) -> ConvBlock:
        return ConvBlock(inputs, outputs, shape.norm, shape.groups, shape.kernel_size)

    module.head = block(in_channels, shape.channels)
    module.body = nn.Sequential(
        OrderedDict((f"block{i + 1}", block(shape.channels, shape.channels)) for i in range(shape.layers - 2))
    )
    module.tail = nn.Sequential(block(shape.channels, out_channels), last)


class Generator(nn.Module):
    """Translates an image to the other domain at one scale: `forward(image, coarser)` returns (B,3,h,w) in (-1,1).

    `image` is (B,3,h,w) in [-1,1]; `coarser`, of the same shape, is the upsampled output of the scale below, and None
    at scale 0.
    """

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        _build_trunk(self, shape, 3 if shape.scale == 0 else 6, 3, nn.Tanh())

    def blocks(self) -> list[ConvBlock]:
        """The L blocks in order; the generator's output is tanh of that of the last one."""
        return [self.head, *self.body, self.tail[0]]

    def join_inputs(self, image: Tensor, coarser: Tensor | None) -> Tensor:
        """Image first, then the coarser output, along the channels."""
        if (coarser is None) != (self.shape.scale == 0):
            raise ValueError(f"the generator of scale {self.shape.scale} got coarser={type(coarser).__name__}")
        return image if coarser is None else torch.cat([image, coarser], dim=1)

    def forward(self, image: Tensor, coarser: Tensor | None) -> Tensor:
        features = self.body(self.head(self.join_inputs(image, coarser)))
        # The last layer is cheap, and bfloat16 is coarser than the 256 levels of an image.
        with torch.autocast(image.device.type, enabled=False):
            return self.tail(at_least_float32(features))


class Discriminator(nn.Module):
    """Critic of one scale: (B,3,h,w) in [-1,1] -> score map (B,1,h,w), whose mean is the score."""

    def __init__(self, shape: NetworkShape) -> None:
        super().__init__()
        self.shape = shape
        _build_trunk(self, shape, 3, 1, nn.LeakyReLU(LEAKY_SLOPE))

    def forward(self, image: Tensor, differentiable_twice: bool = False) -> Tensor:
        """`differentiable_twice`, for the gradient penalty: the first backward gives a gradient only to the image."""
        features = self.head(image, differentiable_twice)
        for block in self.body:
            features = block(features, differentiable_twice)
        last, activation = self.tail
        return activation(last(features, differentiable_twice))


def init_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Published initialisation: conv weights N(0, 0.02), norm weights N(1, 0.02), norm biases 0, conv biases PyTorch's.

    All are drawn from `generator`, so that a run's networks depend only on its seed.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            fan_in = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
            nn.init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)
            nn.init.zeros_(module.bias)


def freeze(network: nn.Module) -> nn.Module:
    """Switch a finished network to eval mode without gradients, and return it."""
    return network.eval().requires_grad_(False)
