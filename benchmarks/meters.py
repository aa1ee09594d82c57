"""Counting what a piece of PyTorch code does: arithmetic, bytes, memory alive at once, and what the device could do."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

MATMUL_SIDE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**31}


class Meter(TorchDispatchMode):
    """What the operators inside do, backward included.

    Attributes:
        flops: floating point operations of convolutions and matrix products, from their shapes, by the type they are
            computed in.
        moved: bytes read and written. What is overwritten counts as read; what fused optimisers write is left out.
        operators: how many of them computed or moved something; on a GPU each is at least one kernel.
        peak: most bytes alive at once of those allocated inside; what a library takes within an operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.moved = self.operators = 0
        self.flops: Counter[torch.dtype] = Counter()
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops[args[0].dtype] += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=outputs)
        inputs, written = _tensors((args, kwargs)), _tensors(outputs)
        known = {x.untyped_storage()._cdata for x in inputs}
        fresh = [x.untyped_storage() for x in written if x.untyped_storage()._cdata not in known]
        if _computes(func, bool(fresh)):
            given = _tensors([kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in (kwargs or {})])
            self.moved += _size(inputs) - _size(given) + _size(written or given)
            self.operators += 1
        for storage in fresh:
            if storage not in self._known:
                self._add(storage)
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self.alive -= size


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def _computes(func: Any, allocates: bool) -> bool:
    """Whether an operator reads and writes: a view moves nothing, nor does memory that is only set aside."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments)
    return (writes or allocates) and not func.__name__.startswith(("empty", "new_empty"))


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall time of `run`, the device's work included."""
    synchronise(device)
    started = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - started


def matmul_ceiling(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> float:
    """Best measured operations per second of a large square matrix product."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    best = min(seconds_of(lambda: a @ b, device) for _ in range(6))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2.0 * side**3 / best


def copy_ceiling(device: torch.device) -> float:
    """Best measured bytes per second, read and written, of a large copy."""
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    best = min(seconds_of(lambda: target.copy_(source), device) for _ in range(6))
    return 2.0 * source.nbytes / best
