"""How a net is trained in a round of self-training (docs/uda.md, section CBST)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from models.losses import cross_entropy

BIAS_RATE = 2.0
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def parameter_groups(net: nn.Module, *, rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable tensors: weights, with those of norms, and biases, with those of norms.

    Weights learn at `rate` and decay. Biases learn twice as fast and do not decay.
    """
    weights, biases = [], []
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            (biases if name.rpartition(".")[2] == "bias" else weights).append(parameter)
    groups = ((weights, rate, weight_decay), (biases, BIAS_RATE * rate, 0.0))
    return [{"params": params, "lr": lr, "weight_decay": decay} for params, lr, decay in groups if params]


def self_training_optimizer(net: nn.Module, *, rate: float, weight_decay: float, momentum: float) -> SGD:
    """SGD with the groups of `parameter_groups`; a new one for every round, as the momentum starts at zero."""
    return SGD(parameter_groups(net, rate=rate, weight_decay=weight_decay), lr=rate, momentum=momentum)


def freeze_statistics(net: nn.Module) -> None:
    """Let the batch norms normalise by their running statistics and leave these alone; weights and biases still learn.

    Call it after every `net.train()`, which undoes it.
    """
    for module in net.modules():
        if isinstance(module, BATCH_NORMS):
            module.eval()


def mean_cross_entropy(logits: Tensor, label: Tensor, parts: int = 1) -> Tensor:
    """Mean over the parts of a batch of the mean cross-entropy over the valid cells of each, a scalar.

    A part without a valid cell counts as 0 and has no gradient.

    Args:
        logits: (B,C,h,w).
        label: trainIds (B,h,w), integer, 255 = ignore.
        parts: equal parts that the batch is taken in; the published code takes one for each GPU.

    Raises:
        ValueError: `parts` does not divide the batch.
    """
    if len(logits) % parts:
        raise ValueError(f"a batch of {len(logits)} cannot be taken in {parts} equal parts")
    means = [cross_entropy(x, y) for x, y in zip(logits.chunk(parts), label.chunk(parts), strict=True)]
    return torch.stack(means).mean()
