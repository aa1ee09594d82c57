"""The share of a batch that one of several processes computes, so that together they make the step of the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

from data_handlers.label_maps import IGNORE


@dataclass(frozen=True)
class BatchShare:
    """Some samples of a batch, of which other processes compute the rest at the same time.

    Losses are weighted before anything is differentiated: a synchronised batch norm passes gradients from one process
    to another, and each must carry the weight of the samples it comes from.

    Attributes:
        weight: number of samples here over that of the whole batch.
        add_up: replaces tensors, in place, by their sums over the processes; None where there is but one process.
    """

    weight: float = 1.0
    add_up: Callable[[Sequence[Tensor]], None] | None = None

    def of_labelled(self, label: Tensor) -> Tensor | float:
        """Labelled pixels of `label` (B,h,w) over those of the whole batch: the weight of a mean over them."""
        if self.add_up is None:
            return 1.0
        here = (label != IGNORE).sum().double()
        whole = here.clone()
        self.add_up([whole])
        return (here / whole.clamp(min=1)).float()

    def sum_gradients(self, *optimizers: Optimizer) -> None:
        """Make the gradients of the optimisers' weights those of the whole batch, the same in every process."""
        if self.add_up is None:
            return
        weights = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        self.add_up([weight.grad for weight in weights if weight.grad is not None])


WHOLE = BatchShare()
