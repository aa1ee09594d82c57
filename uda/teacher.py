"""A teacher whose weights are the moving average of a student's."""

from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ramped(updates: int, alpha: float) -> float:
    """Share of the teacher that stays at an update, as `updates` were made before: a mean of all students at first."""
    return min(1.0 - 1.0 / (updates + 1), alpha)


class Teacher:
    """A frozen copy of a net that follows it; dropout is off.

    Args:
        student: the net.
        batch_statistics: batch norms normalise by the batch and keep statistics of their own; otherwise they use the
            student's running statistics, so that a label does not depend on the other images of its batch.

    Attributes:
        net: the copy, a module with state.
        updates: how often it followed; to be kept with the state of the net.
    """

    def __init__(self, student: nn.Module, batch_statistics: bool) -> None:
        self.net = deepcopy(student).requires_grad_(False).eval()
        self.updates = 0
        self.batch_statistics = batch_statistics
        if batch_statistics:
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train()

    @torch.no_grad()
    def follow(self, student: nn.Module, stays: float) -> None:
        """Become `stays` times itself and (1 - stays) times the student."""
        get_ema_multi_avg_fn(stays)(list(self.net.parameters()), list(student.parameters()), None)
        if not self.batch_statistics:
            for own, given in zip(self.net.buffers(), student.buffers(), strict=True):
                own.copy_(given)
        self.updates += 1
