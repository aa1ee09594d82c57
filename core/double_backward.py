"""A discriminator's block for the gradient penalty, which differentiates the gradient to the image once more.

PyTorch's own operators keep what each of norm, LeakyReLU and convolution needs until then, and differentiate a norm's
backward in many passes over whole tensors. Here a block on a GPU keeps its input and the gradient to its output and
computes the rest once more; on a CPU, which is short of time instead, it keeps the convolution's input and the gradient
to that, too. The norm's double backward is a closed form, applied to some channels at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable


@dataclass(frozen=True)
class Economy:
    """What a device is short of.

    Attributes:
        piece_bytes: of a tensor whose norm is differentiated at once.
        recompute: compute a convolution's input and the gradient to it once more instead of keeping them.
    """

    piece_bytes: int
    recompute: bool


# On a CPU what its cache holds beside seven others; on a GPU enough to hide the launches (not measured).
ECONOMY = {"cpu": Economy(2**20, recompute=False), "cuda": Economy(2**25, recompute=True)}


@dataclass(frozen=True)
class Block:
    """What a block computes, but for its tensors.

    Attributes:
        norm: the batch norm, which normalises by the batch it gets, or group norm.
        slope: of the LeakyReLU.
        padding: of the convolution.
    """

    norm: nn.BatchNorm2d | nn.GroupNorm
    slope: float
    padding: int

    @property
    def by_batch(self) -> bool:
        return isinstance(self.norm, nn.BatchNorm2d)

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor, remember: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The norm of x (B,C,h,w), and the mean and inverse deviation it divided by.

        Args:
            remember: add the batch to the running statistics, if the batch norm has some.
        """
        if not self.by_batch:
            batch, channels, height, width = x.shape
            return torch.native_group_norm(
                x, weight, bias, batch, channels, height * width, self.norm.num_groups, self.norm.eps
            )
        keeps = remember and self.norm.track_running_stats
        running = (self.norm.running_mean, self.norm.running_var) if keeps else (None, None)
        if keeps:
            self.norm.num_batches_tracked.add_(1)
        return torch.native_batch_norm(x, weight, bias, *running, True, self.norm.momentum, self.norm.eps)

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The input of the convolution once more, the same bits."""
        return F.leaky_relu_(self.normalise(x, weight, bias, remember=False)[0], self.slope)

    def norm_gradients(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients to x, weight and bias from the one to the norm's output; None where they are not `wanted`."""
        gradient = gradient.contiguous(memory_format=_layout(x))
        if self.by_batch:
            return torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, inverse, True, self.norm.eps, wanted
            )
        batch, channels, height, width = x.shape
        return torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, inverse, weight, batch, channels, height * width, self.norm.num_groups, wanted
        )

    def convolution_gradients(
        self, gradient: Tensor, y: Tensor, weight: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients to the input y, the weight and the bias of the convolution."""
        padding = [self.padding, self.padding]
        return torch.ops.aten.convolution_backward(
            gradient, y, weight, [weight.shape[0]], [1, 1], padding, [1, 1], False, [0, 0], 1, wanted
        )


class _Forward(torch.autograd.Function):
    """See `block_with_double_backward`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, block: Block, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normalised, mean, inverse = block.normalise(x, norm_weight, norm_bias, remember=True)
        y = F.leaky_relu_(normalised, block.slope)
        ctx.block = block
        kept = None if ECONOMY[x.device.type].recompute else y
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, inverse, kept)
        return F.conv2d(y, weight, bias, padding=block.padding)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return None, _ImageGradient.apply(ctx.block, gradient, *ctx.saved_tensors), None, None, None, None
        block: Block = ctx.block
        x, norm_weight, norm_bias, weight, mean, inverse, y = ctx.saved_tensors
        if y is None:
            y = block.activated(x, norm_weight, norm_bias)
        to_y, to_weight, to_bias = block.convolution_gradients(gradient, y, weight, [True, True, True])
        to_norm = torch.ops.aten.leaky_relu_backward(to_y, y, block.slope, True)
        del to_y, y
        return None, *block.norm_gradients(to_norm, x, norm_weight, mean, inverse, [True] * 3), to_weight, to_bias


class _ImageGradient(torch.autograd.Function):
    """The gradient to a block's input as a function of the one to its output, the input and the weights."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, block: Block, gradient: Tensor, x: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        weight: Tensor, mean: Tensor, inverse: Tensor, y: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.block = block
        recompute = y is None
        if recompute:
            y = block.activated(x, norm_weight, norm_bias)
        to_y, _, _ = block.convolution_gradients(gradient, y, weight, [True, False, False])
        kept = (None, None) if recompute else (y, to_y)
        ctx.save_for_backward(gradient, x, norm_weight, norm_bias, weight, mean, inverse, *kept)
        to_norm = torch.ops.aten.leaky_relu_backward(to_y, y, block.slope, True)
        del to_y, y
        return block.norm_gradients(to_norm, x, norm_weight, mean, inverse, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        gradient, x, norm_weight, norm_bias, weight, mean, inverse, y, to_y = ctx.saved_tensors
        if y is None:
            y = to_x = block.activated(x, norm_weight, norm_bias)
            to_y, _, _ = block.convolution_gradients(gradient, y, weight, [True, False, False])
        else:
            to_x = torch.empty_like(x)  # the walk through the block itself needs y
        to_norm_weight = torch.zeros_like(norm_weight)
        for piece in _pieces(block, upstream, x, norm_weight, mean, inverse, y, to_y, to_x, to_norm_weight):
            _differentiate_norm(*piece, block.by_batch, block.slope)
        # From here on `to_y` is the gradient to what it was.
        to_gradient = F.conv2d(to_y, weight, padding=block.padding)
        _, to_weight, _ = block.convolution_gradients(gradient, to_y, weight, [False, True, False])
        return None, to_gradient, to_x, to_norm_weight, None, to_weight, None, None, None


def _pieces(
    block: Block, upstream: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, y: Tensor, to_y: Tensor,
    to_x: Tensor, to_weight: Tensor,
) -> Iterator[tuple[Tensor, ...]]:  # fmt: skip
    """Views of the tensors as (B, groups, channels of a group, h, w), some of the groups at a time."""
    groups = x.shape[1] if block.by_batch else block.norm.num_groups

    def split(tensor: Tensor) -> Tensor:
        return tensor.unflatten(1, (groups, -1))

    images = [split(image) for image in (upstream, x, y, to_y, to_x)]
    weights = [one.view(1, groups, -1, 1, 1) for one in (weight, to_weight)]
    statistics = [one.view(-1, groups, 1, 1, 1) for one in (mean, inverse)]
    at_once = max(1, ECONOMY[x.device.type].piece_bytes * groups // x.nbytes)
    for first in range(0, groups, at_once):
        some = slice(first, first + at_once)
        yield tuple(tensor[:, some] for tensor in (*images, *weights, *statistics))


def _differentiate_norm(
    upstream: Tensor, x: Tensor, y: Tensor, to_y: Tensor, to_x: Tensor, weight: Tensor, to_weight: Tensor,
    mean: Tensor, inverse: Tensor, by_batch: bool, slope: float,
) -> None:  # fmt: skip
    """Double backward of norm and LeakyReLU for some groups. Writes to `to_x`, `to_weight` and, the one to it, `to_y`.

    The gradient to x is s (h - m(h) - n m(h n)), where s is `inverse`, n the normalised x, h the gradient to n and m a
    mean over what is normalised together. Its product with v, `upstream`, is differentiated by hand: with a = m(v n),
    b = m(h n), c = m(v h), the gradient to h is s (v - m(v) - a n), that to x is
    -s^2 (b (v - m(v)) + a (h - m(h)) + (c - m(v) m(h) - 3 a b) n).
    """
    together = (0, 2, 3, 4) if by_batch else (2, 3, 4)

    def m(tensor: Tensor) -> Tensor:
        return tensor.mean(together, keepdim=True)

    n = (x - mean).mul_(inverse)
    to_normed = torch.ops.aten.leaky_relu_backward(to_y, y, slope, True)
    h = to_normed * weight
    mean_v, mean_h, a, b, c = m(upstream), m(h), m(upstream * n), m(h * n), m(upstream * h)
    to_h = (upstream - mean_v).sub_(n * a).mul_(inverse)
    to_weight.copy_((to_h * to_normed).sum((0, 3, 4), keepdim=True))
    to_y.copy_(torch.ops.aten.leaky_relu_backward(to_h.mul_(weight), y, slope, True))
    sum_to_x = n.mul_(c - mean_v * mean_h - 3.0 * a * b).addcmul_(upstream, b).addcmul_(h, a)
    torch.mul(sum_to_x.sub_(b * mean_v + a * mean_h), -(inverse**2), out=to_x)


def _layout(x: Tensor) -> torch.memory_format:
    """How the norms' kernels want all their tensors: they trust their callers. A CPU's know channels last, too."""
    last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def has_double_backward(norm: nn.Module, x: Tensor) -> bool:
    """Whether `block_with_double_backward` knows the norm: PyTorch's own in train mode, nothing rounded by autocast."""
    known = type(norm) in (nn.BatchNorm2d, nn.GroupNorm) and norm.training and norm.affine
    if known and isinstance(norm, nn.BatchNorm2d):
        known = norm.momentum is not None
    return known and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def block_with_double_backward(
    x: Tensor, norm: nn.BatchNorm2d | nn.GroupNorm, slope: float, convolution: nn.Conv2d
) -> Tensor:
    """norm -> LeakyReLU -> convolution, (B,in,h,w) -> (B,out,h,w), for the gradient penalty.

    A first backward with `create_graph` gives a gradient to `x` alone, though the other inputs take gradients; the
    second one, and a backward without `create_graph`, give those to everything. On a CPU the second overwrites the kept
    gradient to the convolution's input, so a graph can be walked back once.
    """
    block = Block(norm, slope, convolution.padding[0])
    x = x.contiguous(memory_format=_layout(x))
    return _Forward.apply(block, x, norm.weight, norm.bias, convolution.weight, convolution.bias)
