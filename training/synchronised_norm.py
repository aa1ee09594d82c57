"""Batch norm over the samples of all processes.

PyTorch's `SyncBatchNorm` needs CUDA and cannot be differentiated twice, as the gradient penalty requires. This one
consists of plain tensor operations and one all_reduce, whose gradient is the all_reduce of the gradients.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from models.losses import at_least_float32


class _AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes, differentiable any number of times.

    Every process must call it, forwards and backwards, and all in the same order.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> Tensor:
        return _AllReduce.apply(upstream)


class SynchronisedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that in train mode normalises by the samples of all processes together.

    Processes may have different numbers of samples, but each at least one. In eval mode nothing is exchanged.
    Parameters and running statistics have the names of `nn.BatchNorm2d`, and the values that it would compute for the
    batch of all processes, but for rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same shape and precision; statistics are at least float32."""
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            features = at_least_float32(x)
            mean, variance, count = _moments(features)
            if self.track_running_stats:
                self._update_running_statistics(mean.detach(), variance.detach(), count)
            scale = (variance + self.eps).rsqrt() * self.weight
            shift = self.bias - mean * scale
            # Only the features are kept for the backward, as PyTorch's own batch norm does.
            return torch.addcmul(shift[:, None, None], features, scale[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and number of values of each channel, over the samples of all processes.

    Each process writes its moments into its row of a table of zeros; the sum of the tables holds all rows. Sums of
    squares would need one number less, but cancel where the mean is large.
    """
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    count = torch.full_like(mean, x.numel() / x.shape[1])
    row = torch.stack([mean, variance, count])
    before = dist.get_rank()
    after = dist.get_world_size() - before - 1
    table = torch.cat([row.new_zeros(before, *row.shape), row[None], row.new_zeros(after, *row.shape)])
    means, variances, counts = _AllReduce.apply(table).unbind(dim=1)
    counts = counts.detach()
    total = counts.sum(dim=0)
    weights = counts / total
    mean = (weights * means).sum(dim=0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(dim=0)
    return mean, variance, total


def synchronise_batch_norms(network: nn.Module) -> nn.Module:
    """Turn the batch norms in `network` into synchronised ones, in place; returns it.

    Only their class changes, as it has no state of its own; optimisers of the weights stay valid.
    """
    for norm in network.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SynchronisedBatchNorm2d
    return network
