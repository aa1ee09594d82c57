"""A discriminator's block for the gradient penalty, which differentiates the gradient to the image once more.

PyTorch's own operators keep what each of norm, LeakyReLU and convolution needs until then, and differentiate a norm's
backward in many passes over whole tensors. Here a block on a GPU keeps its input and the gradients to its output and
its input, and computes the rest once more; on a CPU, which is short of time instead, it keeps the convolution's input
and the gradient to that, too. The norm's double backward is a closed form that needs its backward again and little
more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Whether a convolution's input and the gradient to it are computed once more instead of kept.
RECOMPUTES = {"cpu": False, "cuda": True}


def _convolution_gradients(
    gradient: Tensor, y: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients to the input y, the weight and the bias of a convolution; None where they are not `wanted`."""
    return torch.ops.aten.convolution_backward(
        gradient, y, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )


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

    def through_activation(self, gradient: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """The gradient to the LeakyReLU's input from the one to its output y, written to `out`, which may be either."""
        return torch.ops.aten.leaky_relu_backward.grad_input(gradient, y, self.slope, True, grad_input=out)

    def norm_gradients(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients to x, weight and bias from the one to the norm's output; None where they are not `wanted`."""
        gradient = gradient.contiguous(memory_format=_layout(x))
        if self.by_batch:
            return torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, inverse, True, self.norm.eps, wanted
            )
        return torch.ops.aten.native_group_norm_backward(
            gradient, x, mean, inverse, weight, *x.shape[:2], x.shape[2:].numel(), mean.shape[1], wanted
        )

    def input_gradient(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradient to x from the one to the norm's output, and the sums of the latter times the normalised x.

        The sums, (1,C) for batch norm and (B,C) for group norm, go over what has one mean and deviation.
        """
        batch, channels, height, width = x.shape
        if self.by_batch or batch == 1:
            to_x, sums, _ = self.norm_gradients(gradient, x, weight, mean, inverse, [True, True, False])
            return to_x, sums[None]
        if x.is_contiguous():
            # The kernel sums over the batch: let all images be one of many channels.
            whole = (1, batch * channels, height, width)
            to_x, sums = self.input_gradient(
                gradient.contiguous().view(whole), x.view(whole), weight.repeat(batch), mean.view(1, -1),
                inverse.view(1, -1),
            )  # fmt: skip
            return to_x.view_as(x), sums.view(batch, channels)
        images = zip(gradient.split(1), x.split(1), mean.split(1), inverse.split(1), strict=True)
        found = [self.input_gradient(g, image, weight, m, s) for g, image, m, s in images]
        return torch.cat([to_x for to_x, _ in found]), torch.cat([sums for _, sums in found])


class _Forward(torch.autograd.Function):
    """See `block_with_double_backward`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, block: Block, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normalised, mean, inverse = block.normalise(x, norm_weight, norm_bias, remember=True)
        y = F.leaky_relu_(normalised, block.slope)
        ctx.block = block
        kept = None if RECOMPUTES[x.device.type] else y
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
        to_y, to_weight, to_bias = _convolution_gradients(gradient, y, weight, block.padding, [True] * 3)
        to_norm = block.through_activation(to_y, y, out=to_y)
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
        to_y, _, _ = _convolution_gradients(gradient, y, weight, block.padding, [True, False, False])
        kept = (None, None) if recompute else (y, to_y)
        to_norm = block.through_activation(to_y, y, out=to_y if recompute else torch.empty_like(to_y))
        del to_y, y
        to_x, sums = block.input_gradient(to_norm, x, norm_weight, mean, inverse)
        ctx.save_for_backward(gradient, x, norm_weight, norm_bias, weight, mean, inverse, sums, *kept)
        ctx.to_x, ctx.version = to_x.detach(), to_x._version  # kept by hand, to be let go before the others
        return to_x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Double backward of norm, LeakyReLU and convolution.

        With n the normalised x, s the inverse deviation, h the gradient to n and m a mean over what is normalised
        together, the gradient to x is P(h) = s (h - m(h) - n m(h n)). P is its own adjoint, so with v, `upstream`, the
        gradient to h is P(v); that to x is -s (b P(v) + a P(h) + c n), where a = m(v n), b = m(h n), c = m(P(v) h).
        """
        block: Block = ctx.block
        gradient, x, norm_weight, norm_bias, weight, mean, inverse, sums, y, to_y = ctx.saved_tensors
        if ctx.to_x is None or ctx.to_x._version != ctx.version:
            raise RuntimeError("a gradient was modified by an inplace operation, or its graph is walked back once more")
        recompute = y is None
        s = inverse.view(len(sums), -1)

        def m(products: Tensor) -> Tensor:
            return products.view(*s.shape, -1).sum(2) * (s.numel() / x.numel())

        to_h, upstream_sums = block.input_gradient(upstream, x, torch.ones_like(norm_weight), mean, inverse)
        if recompute:
            y = block.activated(x, norm_weight, norm_bias)
        # The LeakyReLU's slopes, too, are their own adjoint.
        to_to_y = block.through_activation(to_h, y, out=y if recompute else torch.empty_like(y))
        del y
        a, b = m(upstream_sums), m(norm_weight * sums)
        of_x = to_h.mul_(_by_channel(-s * b, x)).addcmul_(ctx.to_x, _by_channel(-s * a, x))
        ctx.to_x = None
        if recompute:
            to_y, _, _ = _convolution_gradients(gradient, x, weight, block.padding, [True, False, False])
        to_norm_weight = to_y.mul_(to_to_y).sum((2, 3))
        if block.by_batch:
            to_norm_weight = to_norm_weight.sum(0, keepdim=True)
        c = m(norm_weight * to_norm_weight)
        centred = torch.sub(x, _by_channel(mean, x), out=to_y)
        of_x.addcmul_(centred, _by_channel(-s * s * c, x))
        del to_y, centred
        to_to_y.mul_(norm_weight.view(-1, 1, 1))
        to_gradient = F.conv2d(to_to_y, weight, padding=block.padding)
        _, to_weight, _ = _convolution_gradients(gradient, to_to_y, weight, block.padding, [False, True, False])
        return None, to_gradient, of_x, to_norm_weight.sum(0), None, to_weight, None, None, None


class _Convolution(torch.autograd.Function):
    """A convolution alone. PyTorch takes its weight's gradient of second order with kernels as large as the image."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _ConvolutionImageGradient.apply(gradient, x, weight, ctx.padding), None, None, None
        wanted = list(ctx.needs_input_grad[:3])
        return *_convolution_gradients(gradient, x, weight, ctx.padding, wanted), None


class _ConvolutionImageGradient(torch.autograd.Function):
    """The gradient to a convolution's input as a function of the one to its output and the weight."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, x: Tensor, weight: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(gradient, weight)
        return _convolution_gradients(gradient, x, weight, padding, [True, False, False])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, weight = ctx.saved_tensors
        _, to_weight, _ = _convolution_gradients(gradient, upstream, weight, ctx.padding, [False, True, False])
        return F.conv2d(upstream, weight, padding=ctx.padding), None, to_weight, None


def _layout(x: Tensor) -> torch.memory_format:
    """How the norms' kernels want all their tensors: they trust their callers. A CPU's know channels last, too."""
    last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of groups, (G) or (samples,G), laid out for products with x (B,C,h,w)."""
    groups, channels = values.shape[-1], x.shape[1]
    wide = values.reshape(-1, groups, 1).expand(-1, -1, channels // groups).reshape(-1, channels, 1, 1)
    if _layout(x) is torch.channels_last:
        # For a row of pixels instead of one: long inner loops.
        wide = wide.expand(-1, -1, 1, x.shape[3]).contiguous(memory_format=torch.channels_last)
    return wide


def has_double_backward(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether the functions below know the norm: PyTorch's own in train mode or none, nothing rounded by autocast."""
    known = norm is None or (type(norm) in (nn.BatchNorm2d, nn.GroupNorm) and norm.training and norm.affine)
    if known and isinstance(norm, nn.BatchNorm2d):
        known = norm.momentum is not None
    return known and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def block_with_double_backward(
    x: Tensor, norm: nn.BatchNorm2d | nn.GroupNorm, slope: float, convolution: nn.Conv2d
) -> Tensor:
    """norm -> LeakyReLU -> convolution, (B,in,h,w) -> (B,out,h,w), for the gradient penalty.

    A first backward with `create_graph` gives a gradient to `x` alone, though the other inputs take gradients; the
    second one, and a backward without `create_graph`, give those to everything. The second overwrites or lets go what
    it has used, so a graph can be walked back once.
    """
    block = Block(norm, slope, convolution.padding[0])
    x = x.contiguous(memory_format=_layout(x))
    return _Forward.apply(block, x, norm.weight, norm.bias, convolution.weight, convolution.bias)


def convolution_with_double_backward(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """The convolution of x, (B,in,h,w) -> (B,out,h,w), for the gradient penalty; differentiated like a block."""
    return _Convolution.apply(x, convolution.weight, convolution.bias, convolution.padding[0])
