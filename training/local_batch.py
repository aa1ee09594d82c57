"""The part of a global batch that one of several processes computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from data_handlers.classes import IGNORE
from training.distributed import Rank


@dataclass(frozen=True)
class LocalBatch:
    """Some samples of a global batch, whose other samples other processes compute at the same time.

    Together the processes take the step of the global batch, and all of them end with the same weights.

    Losses are multiplied by the fraction before the backward pass, so that gradients are summed over the processes, not
    averaged: a synchronised batch norm passes gradients from one process to another, and each must have the weight of
    the samples that it comes from.

    Attributes:
        fraction: number of local samples over that of the global batch, in (0,1].
        all_reduce: replaces tensors, in place, by their sums over the processes; None for a single process.
    """

    fraction: float = 1.0
    all_reduce: Callable[[Sequence[Tensor]], None] | None = None

    @staticmethod
    def of(rank: Rank, batch_size: int) -> LocalBatch:
        """The part of a batch of `batch_size` samples, over all processes, that this process computes."""
        return WHOLE if rank.count == 1 else LocalBatch(len(rank.part(batch_size)) / batch_size, rank.all_reduce)

    def labelled_fraction(self, label: Tensor) -> Tensor | float:
        """Weight of a local mean over labelled pixels in the global one.

        Args:
            label: trainIds (B,h,w) of the local samples, 255 = ignore.

        Returns:
            Labelled pixels of `label` over those of the global batch, a float64 scalar; 1.0 for a single process.
        """
        if self.all_reduce is None:
            return 1.0
        here = (label != IGNORE).sum().double()
        everywhere = here.clone()
        self.all_reduce([everywhere])
        return here / everywhere.clamp(min=1)

    def all_reduce_gradients(self, *optimizers: Optimizer) -> None:
        """Sum the gradients of the optimisers' parameters over the processes."""
        if self.all_reduce is None:
            return
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.all_reduce([p.grad for p in parameters if p.grad is not None])


WHOLE = LocalBatch()


def zero_gradients(*optimizers: Optimizer) -> None:
    """Drop the gradients of the optimisers' parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def all_reduce_and_step(local: LocalBatch, *optimizers: Optimizer) -> None:
    """Sum the gradients over the processes and step every optimiser."""
    local.all_reduce_gradients(*optimizers)
    for optimizer in optimizers:
        optimizer.step()


def backward_and_step(loss: Tensor, local: LocalBatch, *optimizers: Optimizer) -> None:
    """Step every optimiser on the gradients of `loss` alone, summed over the processes."""
    zero_gradients(*optimizers)
    loss.backward()
    all_reduce_and_step(local, *optimizers)
