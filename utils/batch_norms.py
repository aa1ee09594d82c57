"""Context managers for the running statistics of batch norms."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def _batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def frozen_bn_stats(network: nn.Module) -> Iterator[None]:
    """Inside the block batch norms update a temporary copy of their running statistics.

    In train mode they normalise by the batch as before.
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
