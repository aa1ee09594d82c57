"""DataLoaders whose worker processes may die."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import TypeVar

from torch.utils.data import DataLoader

from utils.errors import UserError
from utils.locks import say
from utils.processes import end_loaders

RESTARTS = 3


class LoaderDied(Exception):
    """placeholder"""


def is_loader_death(error: BaseException) -> bool:
    return isinstance(error, LoaderDied)


REMINDER = 1.0  # seconds
Batch = TypeVar("Batch")


def batches_in_order(loader_at: Callable[[int], DataLoader], what_to_do: str) -> Iterator[Batch]:
    """The batches of a loader; where a worker process dies, a new loader goes on with the batch that is missing.

    Args:
        loader_at: makes the loader whose first batch is the k-th of all.
        what_to_do: end of the message when workers keep dying.

    Raises:
        UserError: workers cannot be started, or died more than `RESTARTS` times without a batch in between.
    """
    position, deaths = 0, 0
    while True:
        try:
            for batch in _iterate(loader_at(position), what_to_do):
                deaths = 0
                yield batch
                position += 1
            return
        except (RuntimeError, OSError, EOFError) as error:
            if not _means_death(error):
                raise
            reason = " ".join(str(error).split()).rstrip(".")
        deaths += 1
        if deaths > RESTARTS:
            raise UserError(
                f"loader processes keep dying ({reason}); memory or shared memory (/dev/shm) may be short: lower "
                f"--num_workers; {what_to_do}"
            )
        say(f"WARNING: a loader process is gone ({reason}): loading starts again where it was")


def _means_death(error: Exception) -> bool:
    """Whether an error of a loader means that a worker process is gone, in any of the ways that this shows."""
    text = str(error)
    if "in DataLoader worker process" in text:
        return False  # the worker's own error
    # Tensors are fetched from the worker that made them. On a GPU, the thread that does so may notice first.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError)
    return lost or text.startswith("DataLoader worker") or "pin memory thread" in text.lower()


def _iterate(loader: DataLoader, what_to_do: str) -> Iterator[Batch]:
    others, ended = set(multiprocessing.active_children()), threading.Event()
    try:
        iterator = iter(loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        can_be_interrupted = workers and threading.current_thread() is threading.main_thread()
        if can_be_interrupted:
            threading.Thread(target=_remind, args=(workers, ended), daemon=True).start()
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "new thread" not in str(error):
            raise
        with _silent_deletion():
            traceback.clear_frames(error.__traceback__)  # what PyTorch half made
        end_loaders(set(multiprocessing.active_children()) - others)
        raise UserError(
            f"loader processes cannot be started ({getattr(error, 'strerror', None) or error}); memory, shared memory "
            f"(/dev/shm) or the number of processes may be short: lower --num_workers; {what_to_do}"
        ) from None
    if not can_be_interrupted:
        yield from iterator
        return
    if getattr(signal.getsignal(signal.SIGCHLD), "__module__", "").startswith("torch.utils.data"):
        # PyTorch's handler raises wherever this process happens to be, as in the middle of a training step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end = object()
    try:
        while True:
            with _interrupted_by_death_of(workers):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch
    except Exception:
        end_loaders(workers)  # one that writes what nobody will read would be waited for
        raise
    finally:
        ended.set()


@contextmanager
def _silent_deletion() -> Iterator[None]:
    """Inside the block errors in the deletion of objects are not printed: a half-made loader cannot end itself."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = before


def _dead(workers: Sequence[BaseProcess]) -> list[BaseProcess]:
    return [process for process in workers if process.exitcode not in (None, 0)]


@contextmanager
def _interrupted_by_death_of(workers: Sequence[BaseProcess]) -> Iterator[None]:
    """Inside the block, in which batches are waited for, the death of a worker is an error.

    A worker that dies while it writes a large batch into its pipe leaves a reader that would wait for the rest forever.
    """

    def look(number: int, frame: FrameType | None) -> None:
        for process in _dead(workers):
            # Here, too: the signal of a second death, in the `finally` below, would leave this handler in place.
            signal.signal(signal.SIGCHLD, before)
            raise RuntimeError(f"DataLoader worker {process.pid} ended with exit code {process.exitcode}")

    before = signal.getsignal(signal.SIGCHLD)
    try:
        signal.signal(signal.SIGCHLD, look)
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _remind(workers: Sequence[BaseProcess], ended: threading.Event) -> None:
    """Send the signal of a death again and again: it may have come just before the reader began to wait."""
    while not ended.wait(REMINDER):
        if _dead(workers):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGCHLD)
