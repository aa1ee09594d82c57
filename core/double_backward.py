"""Blocks of a discriminator that are differentiable twice, for the gradient penalty.

The gradient penalty is a function of the gradient to the image, so its backward pass differentiates the backward pass
of the discriminator. PyTorch saves the tensors of norm, LeakyReLU and convolution separately until then, and
differentiates the backward of a norm in many passes. The functions here save the input of a block and the gradients to
its output and input, and on a CPU, where time is short, the input of the convolution and the gradient to it; a GPU,
where memory is short, recomputes these. The double backward of a norm is a closed form that costs little more than the
norm's backward.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Whether the input of a convolution and the gradient to it are recomputed instead of saved, by type of device.
RECOMPUTES = {"cpu": False, "cuda": True}


def _convolution_gradients(
    gradient: Tensor, y: Tensor, weight: Tensor, padding: int, wanted: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients to the input `y`, the weight and the bias of a convolution; None for those that are not `wanted`."""
    return torch.ops.aten.convolution_backward(
        gradient, y, weight, [weight.shape[0]], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )


@dataclass(frozen=True)
class Block:
    """A block norm -> LeakyReLU(slope) -> convolution without its tensors; the norm is in train mode."""

    norm: nn.BatchNorm2d | nn.GroupNorm
    slope: float
    padding: int

    @property
    def by_batch(self) -> bool:
        return isinstance(self.norm, nn.BatchNorm2d)

    def normalise(
        self, x: Tensor, weight: Tensor, bias: Tensor, update_running_stats: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The norm of x (B,C,h,w), and the mean and inverse standard deviation that it used."""
        if not self.by_batch:
            batch, channels, height, width = x.shape
            return torch.native_group_norm(
                x, weight, bias, batch, channels, height * width, self.norm.num_groups, self.norm.eps
            )
        updates = update_running_stats and self.norm.track_running_stats
        running = (self.norm.running_mean, self.norm.running_var) if updates else (None, None)
        if updates:
            self.norm.num_batches_tracked.add_(1)
        return torch.native_batch_norm(x, weight, bias, *running, True, self.norm.momentum, self.norm.eps)

    def activated(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The input of the convolution, recomputed bit for bit."""
        return F.leaky_relu_(self.normalise(x, weight, bias, update_running_stats=False)[0], self.slope)

    def through_activation(self, gradient: Tensor, y: Tensor, out: Tensor) -> Tensor:
        """The gradient to the input of the LeakyReLU with output `y`, in `out`, which may be `gradient` or `y`."""
        return torch.ops.aten.leaky_relu_backward.grad_input(gradient, y, self.slope, True, grad_input=out)

    def norm_gradients(
        self, gradient: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, wanted: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients to x, weight and bias of the norm; None where not `wanted`."""
        gradient = gradient.contiguous()
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
        """The gradient to x, and sums of `gradient`, that to the output of the norm, times the normalised x.

        The sums are (1,C) for batch norm, over batch and pixels, and (B,C) for group norm, over pixels.
        """
        batch, channels, height, width = x.shape
        if self.by_batch or batch == 1:
            to_x, sums, _ = self.norm_gradients(gradient, x, weight, mean, inverse, [True, True, False])
            return to_x, sums[None]
        # The kernel sums over the batch, so all images are treated as one image of B * C channels.
        whole = (1, batch * channels, height, width)
        to_x, sums = self.input_gradient(
            gradient.contiguous().view(whole), x.view(whole), weight.repeat(batch), mean.view(1, -1),
            inverse.view(1, -1),
        )  # fmt: skip
        return to_x.view_as(x), sums.view(batch, channels)


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, block: Block, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        normalised, mean, inverse = block.normalise(x, norm_weight, norm_bias, update_running_stats=True)
        y = F.leaky_relu_(normalised, block.slope)
        ctx.block = block
        saved = None if RECOMPUTES[x.device.type] else y
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, mean, inverse, saved)
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
    """The gradient to the input of a block as a function of the gradient to its output, its input and its weights."""

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
        saved = (None, None) if recompute else (y, to_y)
        to_norm = block.through_activation(to_y, y, out=to_y if recompute else torch.empty_like(to_y))
        del to_y, y
        to_x, sums = block.input_gradient(to_norm, x, norm_weight, mean, inverse)
        ctx.save_for_backward(gradient, x, norm_weight, norm_bias, weight, mean, inverse, sums, *saved)
        # Not saved by `save_for_backward`, so that the backward can free it before the others.
        ctx.to_x, ctx.version = to_x.detach(), to_x._version
        return to_x

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Double backward of norm, LeakyReLU and convolution.

        With n the normalised x, s the inverse deviation, h the gradient to n and m the mean over values that share a
        deviation, the gradient to x is P(h) = s (h - m(h) - n m(h n)). P is its own adjoint, so with v = `upstream` the
        gradient to h is P(v); that to x is -s (b P(v) + a P(h) + c n), where a = m(v n), b = m(h n), c = m(P(v) h).
        """
        block: Block = ctx.block
        gradient, x, norm_weight, norm_bias, weight, mean, inverse, sums, y, to_y = ctx.saved_tensors
        if ctx.to_x is None or ctx.to_x._version != ctx.version:
            raise RuntimeError("a gradient was modified by an inplace operation, or its graph is walked back twice")
        recompute = y is None
        s = inverse.view(len(sums), -1)

        def m(products: Tensor) -> Tensor:
            return products.view(*s.shape, -1).sum(2) * (s.numel() / x.numel())

        to_h, upstream_sums = block.input_gradient(upstream, x, torch.ones_like(norm_weight), mean, inverse)
        if recompute:
            y = block.activated(x, norm_weight, norm_bias)
        # The derivative of the LeakyReLU is its own adjoint as well.
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


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of groups, (G) or (samples,G), laid out for products with x (B,C,h,w)."""
    groups, channels = values.shape[-1], x.shape[1]
    return values.reshape(-1, groups, 1).expand(-1, -1, channels // groups).reshape(-1, channels, 1, 1)


def has_double_backward(norm: nn.Module | None, x: Tensor) -> bool:
    """Whether the block below supports this norm: PyTorch's batch or group norm in train mode.

    It needs gradients to be enabled, and no autocast.
    """
    known = type(norm) in (nn.BatchNorm2d, nn.GroupNorm) and norm.training
    return known and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


def block_with_double_backward(
    x: Tensor, norm: nn.BatchNorm2d | nn.GroupNorm, slope: float, convolution: nn.Conv2d
) -> Tensor:
    """norm -> LeakyReLU -> convolution, (B,in,h,w) -> (B,out,h,w), for the gradient penalty.

    A first backward pass with `create_graph` gives a gradient only to `x`. The second pass, and a pass without
    `create_graph`, give gradients to all inputs. The second pass overwrites the tensors it uses: it can be made once.
    """
    block = Block(norm, slope, convolution.padding[0])
    return _Forward.apply(block, x.contiguous(), norm.weight, norm.bias, convolution.weight, convolution.bias)
