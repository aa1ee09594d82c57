"""The optimiser of the published MaxSquare (docs/uda.md, section MaxSquare): it lists most tensors several times."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD


def repeats_of(backbone: nn.Module) -> dict[nn.Parameter, int]:
    """How often the published code lists each tensor of a backbone: once for each module that it lies in.

    It leaves the restitution out; this is a fault, and its tensors are listed once here.
    """
    names = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    return {p: 1 if name.startswith("snr.") else max(1, name.count(".")) for name, p in names.items()}


class RepeatedSGD(SGD):
    """SGD that updates a tensor with the same gradient once for each time that it is listed.

    In the first step each of these updates begins its momentum anew, and the last one's is kept.

    Args:
        repeats: of tensors that are listed more than once.
    """

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], repeats: Mapping[nn.Parameter, int], **settings: Any
    ) -> None:
        super().__init__(groups, foreach=False, fused=False, **settings)
        self.repeats = dict(repeats)

    @torch.no_grad()
    def step(self) -> None:
        """All updates of a step."""
        tensors = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients, new = {p: p.grad for p in tensors}, [p for p in tensors if p not in self.state]
        for number in range(max(self.repeats.get(p, 1) for p in tensors)):
            again = {p for p in tensors if self.repeats.get(p, 1) > number}
            for p in tensors:
                p.grad = gradients[p] if p in again else None
            for p in again.intersection(new):
                self.state.pop(p, None)
            super().step()
        for p, gradient in gradients.items():
            p.grad = gradient
