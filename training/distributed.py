"""Several processes that train together, one for each device, on one machine or on several.

`training.launching` starts those of this machine. In each of them, and in those that `torchrun` or a batch system has
started with `RANK`, `WORLD_SIZE` and `LOCAL_RANK` in the environment, `joined` connects it with the others.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.devices import cpus_per_device
from utils.errors import UserError
from utils.stopping import Stopped

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Processes wait for each other while one builds a cache or writes a checkpoint. One that died is noticed at once.
TIMEOUT = timedelta(hours=3)
CLOSING = 5.0  # seconds in which connections are closed after an error


@dataclass(frozen=True)
class Rank:
    """This process among those that train together; alone by default.

    Attributes:
        index: from 0, over all machines.
        count: of processes, over all machines.
        device: the one it computes on.
    """

    index: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def is_main(self) -> bool:
        """Whether it is this process that writes and prints."""
        return self.index == 0

    def part(self, batch: int) -> range:
        """The samples of a batch that are this process's: contiguous, and as many as every other's, or one more."""
        size, rest = divmod(batch, self.count)
        start = self.index * size + min(self.index, rest)
        return range(start, start + size + (self.index < rest))

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
        """Check that the processes agree on plain values, given by a name for the message.

        Raises:
            UserError: in each process that differs from the main one.
        """
        for name, value in self.broadcast(dict(values)).items():
            if values.get(name) != value:
                raise UserError(
                    f"the {name} of process {self.index} ({self.device}) is not that of process 0: all machines need "
                    "the same command, files and versions"
                )

    def at(self, devices: Sequence[torch.device]) -> Rank:
        """This process with its device, one of those that `--gpus` names for this machine.

        Raises:
            UserError: there are more or fewer processes on this machine than devices.
        """
        if self.count == 1:
            return replace(self, device=devices[0])
        local = _number("LOCAL_RANK")
        here = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else None
        if local >= len(devices) or (here is not None and here != len(devices)):
            runs = f"{here} processes" if here is not None else f"a process of LOCAL_RANK {local}"
            raise UserError(f"--gpus names {len(devices)} devices, but this machine runs {runs}; name one for each")
        device = devices[local]
        if device.type == "cuda":
            torch.cuda.set_device(device)
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(cpus_per_device(devices), torch.get_num_threads()))
        return replace(self, device=device)


def group_size() -> int:
    """Processes that were started to work together, this one included, by the environment."""
    return _number("WORLD_SIZE") if all(name in os.environ for name in VARIABLES) else 1


def is_restarted() -> bool:
    """Whether torchrun has started this process again after one of the group died."""
    return _restarts() != "0"


def _restarts() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _has_torchrun() -> bool:
    """Whether torchrun, or `training.launching`, has started this process and watches it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(variable: str) -> int:
    value = os.environ[variable]
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"the environment variable {variable} is {value!r}, not a number; unset it, or use torchrun")
    return int(value)


@contextmanager
def joined(if_lost: str = "") -> Iterator[Rank]:
    """Connect with the other processes, if there are any, for the time of the block; device not yet chosen.

    At the end of the block, and at a `Stopped`, on which all agree, processes wait for each other, so that none is
    ended while it writes. Bad input that all of them meet is reported by the one that meets it first.

    Args:
        if_lost: what to do where the connection to the others is lost, as the end of a message.

    Raises:
        UserError: the variables are wrong, or the others cannot be reached or are gone and are not restarted.
        SystemExit: code 2 where another process reports bad input; code 1 where another process is gone, after which
            torchrun starts all again.
    """
    if group_size() == 1:
        yield Rank()
        return
    rank = Rank(_number("RANK"), group_size())
    _end_with_launcher()
    store = _connect(rank)
    with _disconnected_at_the_end():
        try:
            yield rank
            rank.barrier()
        except Stopped:
            rank.barrier()
            raise
        except UserError:
            if _is_first(store):
                raise
            raise SystemExit(2) from None
        except Exception as error:
            if not _is_lost_connection(error):
                raise
            if _has_torchrun():
                raise SystemExit(1) from None
            raise UserError(
                "the connection to the other processes was lost: one of them was ended, or its machine cannot be "
                f"reached; {if_lost}"
            ) from None


@contextmanager
def _disconnected_at_the_end() -> Iterator[None]:
    """Close all connections, without which gloo's threads end the process by SIGABRT."""
    try:
        yield
    except BaseException:
        # NCCL may wait for processes that are gone.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(CLOSING)
        raise
    dist.destroy_process_group()


def _connect(rank: Rank) -> dist.Store:
    # NCCL for what is on GPUs, gloo for what is in memory, whatever --gpus will say.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.index, rank.count, timeout=timedelta(minutes=10)))
        # torchrun's store outlives a restart; gloo would look for those that were connected before it.
        store = dist.PrefixStore(f"start_{_restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(
            f"process {rank.index} of {rank.count} cannot reach the others at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR', '(not set)')}, MASTER_PORT {os.environ.get('MASTER_PORT', '(not set)')} "
            f"({reason})"
        ) from None
    return store


def _is_first(store: dist.Store) -> bool:
    """Whether this process is the first to fail."""
    try:
        return store.add("procst/failures", 1) == 1
    except RuntimeError:
        return True  # the process that holds the store is gone


def _is_lost_connection(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


def _end_with_launcher() -> None:
    """Ask this process to stop when torchrun, which started it, has been killed."""
    if not _has_torchrun():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
