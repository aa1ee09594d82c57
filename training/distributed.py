"""Several processes that train together, one for each device, on one machine or on several.

`training.launching` starts those of this machine. In each of them, and in those that `torchrun` or a batch system has
started with `RANK`, `WORLD_SIZE` and `LOCAL_RANK` in the environment, `joined` connects it with the others.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from utils.devices import cpus_per_device
from utils.errors import UserError
from utils.stopping import STOPPED, Stopped

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
# Folder, for the processes that `launch` started, in which each says which it is.
LAUNCHER_FOLDER = "PROCST_LAUNCHER_FOLDER"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Processes wait for each other while one builds a cache or writes a checkpoint. One that died is noticed at once.
TIMEOUT = timedelta(hours=3)
PATIENCE = 5.0  # seconds in which a process that lost its connection leaves it to the others to say why
LAST_WORDS = 60.0  # seconds to save in, when the launcher is gone


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
    def is_first(self) -> bool:
        """Whether it is this process that writes and prints."""
        return self.index == 0

    def share(self, batch: int) -> range:
        """The samples of a batch that are this process's: contiguous, and as many as every other's, or one more."""
        size, rest = divmod(batch, self.count)
        start = self.index * size + min(self.index, rest)
        return range(start, start + size + (self.index < rest))

    @torch.no_grad()
    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type and device, in place, by their sums over the processes."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view(tensor.shape))

    def agree(self, wish: int) -> int:
        """The largest of what the processes wish for, the same in all of them. Does not wait for a GPU."""
        if self.count == 1:
            return wish
        largest = torch.tensor(wish)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def wait_for_all(self) -> None:
        """Go on when every process has come here."""
        self.agree(0)

    def from_first(self, value: Any) -> Any:
        """The first process's value, which can be pickled."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
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
            UserError: in each process that differs from the first.
        """
        for name, value in self.from_first(dict(values)).items():
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


def is_launched() -> bool:
    """Whether this process was started by `launch`, which says what signals it passes on and who was killed."""
    return LAUNCHER_FOLDER in os.environ


def group_size() -> int:
    """Processes that were started to work together with this one and itself, by the environment."""
    return _number("WORLD_SIZE") if all(name in os.environ for name in VARIABLES) else 1


def _number(variable: str) -> int:
    value = os.environ[variable]
    if not (value.isascii() and value.isdecimal()):
        raise UserError(f"the environment variable {variable} is {value!r}, not a number; unset it, or use torchrun")
    return int(value)


@contextmanager
def joined() -> Iterator[Rank]:
    """Connect with the other processes, if there are any, for the time of the block; device not yet chosen.

    Only one of them lets an error out that a person is to read; the others end silently. At the end of the block, and
    at a `SystemExit` or `Stopped`, on which all are to agree, processes wait for each other, so that none is ended
    while it writes.

    Raises:
        UserError: the others cannot be reached, or one that was is gone and did not say why.
    """
    count = group_size()
    if count == 1:
        yield Rank()
        return
    rank = Rank(_number("RANK"), count)
    _follow_launcher(rank)
    store = _connect(rank)
    with _disconnected_at_the_end():
        try:
            yield rank
            rank.wait_for_all()
        except UserError:
            if not _is_first_to_speak(store):
                raise SystemExit(2) from None
            raise
        except SystemExit:
            rank.wait_for_all()
            raise
        except Stopped as stop:
            if rank.is_first:
                print(stop, file=sys.stderr, flush=True)
            rank.wait_for_all()
            raise SystemExit(STOPPED) from None
        except KeyboardInterrupt:
            if not _is_first_to_speak(store):
                raise SystemExit(130) from None
            raise
        except Exception as error:
            if not _is_lost_connection(error):
                _is_first_to_speak(store)
                raise
            _leave_the_word_to_others()
            if is_launched() or not _is_first_to_speak(store):
                raise SystemExit(1) from None
            raise UserError(
                f"process {rank.index} ({rank.device}) lost its connection to the others: one of them was ended, or "
                "its machine cannot be reached; go on from the last checkpoint"
            ) from None


@contextmanager
def _disconnected_at_the_end() -> Iterator[None]:
    """Close all connections, without which gloo's threads end the process by SIGABRT."""
    try:
        yield
    except BaseException:
        # Where others are gone, NCCL may wait for them.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(PATIENCE)
        raise
    dist.destroy_process_group()


def _connect(rank: Rank) -> dist.Store:
    # NCCL for what is on GPUs, gloo for what is in memory, whatever --gpus will say.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.index, rank.count, timeout=timedelta(minutes=10)))
        dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(
            f"process {rank.index} of {rank.count} cannot reach the others at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR', '(not set)')}, MASTER_PORT {os.environ.get('MASTER_PORT', '(not set)')} "
            f"({reason})"
        ) from None
    return store


def _is_first_to_speak(store: dist.Store) -> bool:
    try:
        return store.add("procst/failures", 1) == 1
    except RuntimeError:
        return True  # the process that holds the store is gone


def _is_lost_connection(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


def _leave_the_word_to_others() -> None:
    """Wait a little: the process that failed says why, and who started this one will end it."""
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE)


def _follow_launcher(rank: Rank) -> None:
    """Be known to the launcher, if there is one, and end when it has ended."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WORDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    if is_launched():
        folder = Path(os.environ[LAUNCHER_FOLDER])
        (folder / f"{os.getpid()}.rank").touch()
        if (folder / "signal").exists():  # sent before this process could be told
            signal.raise_signal(int((folder / "signal").read_text()))
