"""Forwards that batch norms do not remember."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def without_statistics(network: nn.Module) -> Iterator[None]:
    """Inside the block batch norms normalise by the batch, but do not add it to their running statistics."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def with_spare_statistics(network: nn.Module) -> Iterator[None]:
    """As `without_statistics`, but the batch norms do add the batch, to a copy that is thrown away.

    `torch.utils.checkpoint` wants a recomputation to keep as many tensors for the backward as the first computation,
    and a batch norm keeps its running statistics.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    held = [dict(norm.named_buffers()) for norm in norms]
    for norm, buffers in zip(norms, held, strict=True):
        for name, value in buffers.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, held, strict=True):
            for name, value in buffers.items():
                setattr(norm, name, value)
