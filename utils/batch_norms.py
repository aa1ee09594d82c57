"""Context managers for the running statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def frozen_bn_stats(network: nn.Module) -> Iterator[None]:
    """Inside the block batch norms in train mode normalise by the batch and do not update running statistics."""
    norms = _batch_norms(network)
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@contextmanager
def bn_momentum(network: nn.Module, momentum: float) -> Iterator[None]:
    """Inside the block batch norms have this momentum, in [0,1]."""
    norms = _batch_norms(network)
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = momentum
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.momentum = value


@contextmanager
def with_spare_statistics(network: nn.Module) -> Iterator[None]:
    """As `frozen_bn_stats`, but the batch norms update a temporary copy of their running statistics.

    `torch.utils.checkpoint` requires that a recomputation saves the same tensors for the backward pass as the first
    forward pass, and a batch norm saves its running statistics.
    """
    norms = _batch_norms(network)
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
