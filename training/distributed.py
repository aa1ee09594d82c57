"""Processes that compute one step together, one for each device: collectives, and the local part of a batch.

`training.launching` starts and connects them.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from data_handlers.classes import IGNORE
from utils.devices import cpus_per_device
from utils.errors import UserError

CPU = torch.device("cpu")


def environment_number(variable: str) -> int:
    """The number in an environment variable that is set. Raises `UserError` if it is none."""
    value = os.environ[variable]
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"the environment variable {variable} is {value!r}, not a number; unset it, or use torchrun")
    return int(value)


@dataclass(frozen=True)
class Rank:
    """This process: its index and the number of processes, over all machines, and the device it computes on."""

    index: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether it is this process that writes and prints."""
        return self.index == 0

    def part(self, batch: int) -> range:
        """The samples of a batch that this process computes; contiguous, and their numbers differ by at most one."""
        size, rest = divmod(batch, self.count)
        start = self.index * size + min(self.index, rest)
        return range(start, start + size + (self.index < rest))

    def fraction(self, batch: int) -> float:
        """Number of samples of a batch that this process computes over that of all, in (0,1].

        Losses are multiplied by it before the backward pass, and gradients are summed over the processes, not
        averaged: a synchronised batch norm passes gradients between processes, so each sample needs its weight in the
        global batch. All processes then take the same step.
        """
        return len(self.part(batch)) / batch

    def labelled_fraction(self, label: Tensor) -> Tensor | float:
        """Factor for a loss that is a mean over the labelled pixels of the local samples, in place of `fraction`.

        Args:
            label: trainIds (B,h,w) of the local samples, 255 = ignore.

        Returns:
            Labelled pixels of `label` over those of the global batch, a float64 scalar; 1.0 for a single process.
        """
        return self.labelled_fractions([label])[0]

    def labelled_fractions(self, labels: Sequence[Tensor]) -> Sequence[Tensor | float]:
        """`labelled_fraction` of each part of the local samples."""
        if self.count == 1 and len(labels) == 1:
            return [1.0]
        here = torch.stack([(label != IGNORE).sum() for label in labels]).double()
        everywhere = here.sum()
        self.all_reduce([everywhere])
        return (here / everywhere.clamp(min=1)).unbind()

    def passes(self, batch: int, micro_batch: int) -> int:
        """Number of passes in which every process computes its part of a batch.

        A pass has at most `micro_batch` samples, 0 for all; where processes have different numbers of them, one more,
        if it would have none otherwise.
        """
        smallest, largest = batch // self.count, -(-batch // self.count)
        return max(1, min(smallest, -(-largest // micro_batch))) if micro_batch else 1

    @torch.no_grad()
    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type and device, in place, by their sums over the processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def all_reduce_max(self, value: int) -> int:
        """The largest value of all processes. It does not wait for a GPU."""
        if self.count == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Return when every process has come here."""
        self.all_reduce_max(0)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, which can be pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=CPU)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in order, in each of them; they can be pickled."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Raise `UserError` in each process whose plain values, by a name for messages, differ from the main one's."""
        for name, value in self.broadcast(dict(values)).items():
            if values.get(name) != value:
                raise UserError(
                    f"the {name} of process {self.index} ({self.device}) is not that of process 0: all machines need "
                    "the same command, files and versions"
                )

    def at(self, devices: Sequence[torch.device]) -> "Rank":
        """This process with its device, one of those for this machine. Raises `UserError` if their numbers differ."""
        if self.count == 1:
            return replace(self, device=devices[0])
        local = environment_number("LOCAL_RANK")
        here = environment_number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else None
        if local >= len(devices) or (here is not None and here != len(devices)):
            runs = f"{here} processes" if here is not None else f"a process of LOCAL_RANK {local}"
            raise UserError(f"--gpus names {len(devices)} devices, but this machine runs {runs}; name one for each")
        device = devices[local]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(cpus_per_device(devices), torch.get_num_threads()))
        return replace(self, device=device)


ALONE = Rank()


def zero_gradients(*optimizers: Optimizer) -> None:
    """Set the gradients of the optimisers' parameters to None."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def all_reduce_and_step(rank: Rank, *optimizers: Optimizer) -> None:
    """Sum the gradients over the processes and step every optimiser."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    rank.all_reduce([p.grad for p in parameters if p.grad is not None])
    for optimizer in optimizers:
        optimizer.step()


def backward_in_passes(
    mean_loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, label: Tensor, *, passes: int, rank: Rank
) -> Tensor:
    """Add the gradients of a mean over the labelled pixels of the global batch to those that are there.

    Args:
        mean_loss: of images and label of one pass, a mean over its labelled pixels.
        images: (B,3,h,w), the local samples.
        label: trainIds (B,h,w), 255 = ignore.
        passes: see `Rank.passes`; the local samples are divided into so many parts, whose sizes differ by at most one.

    Returns:
        The local samples' share of the loss, a scalar without gradient.
    """
    labels, found = label.tensor_split(passes), []
    for part, of_part, share in zip(images.tensor_split(passes), labels, rank.labelled_fractions(labels), strict=True):
        loss = share * mean_loss(part, of_part)
        loss.backward()
        found.append(loss.detach())
    return torch.stack(found).sum()
