"""Loading samples in worker processes, in order, such that a worker that dies ends the run in good order.

Exact resume makes a dead worker cheap: the run saves, exits with code 75, and the same command goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError
from utils.stopping import LoaderDied, is_loader_death

MOST_SKIPPED = 10  # so many unusable samples one after the other are a fault of the disk, not of the files
# A batch that a worker could not send is dropped, which only shows in its absence. Five minutes are far longer than a
# batch takes on a slow, shared disk, and a network disk that stalls is usually back by then.
TIMEOUT = 300  # seconds
GRACE = 5.0  # seconds in which workers end by themselves


def load_in_order(
    dataset: Dataset,
    order: Iterable[Any],
    *,
    num_workers: int,
    collate: Callable[[Sequence[Any]], Any] | None = None,
    skip_unusable: bool = False,
    or_else: str = "",
    pin_memory: bool = False,
    prefetch: int = 2,
) -> Iterator[Any]:
    """Yield the samples of a data set, or batches of them, in the given order. To be used in the main thread.

    A data set returns a `UserError` for a sample that cannot be used; raised in a worker, its message would come
    wrapped in a traceback.

    Args:
        order: index of every sample; with `collate`, the indices of every batch.
        collate: makes a batch of samples, in the worker. It returns a `UserError` where one of them is one.
        skip_unusable: yield the `UserError`s among the samples, for the caller to note, instead of raising them.
        or_else: what else there is to do about a sample that cannot be used, as the end of the message.
        pin_memory: copy tensors to page-locked memory, for asynchronous transfer to a GPU.
        prefetch: samples or batches that each worker makes ahead.

    Raises:
        UserError: a sample cannot be used; with `skip_unusable`, too many one after the other cannot.
        LoaderDied: a worker died, cannot be started, or has sent nothing for `TIMEOUT` seconds.
    """
    loader = DataLoader(
        dataset,
        **({"sampler": order, "batch_size": None} if collate is None else {"batch_sampler": order}),
        collate_fn=collate or _as_it_is,
        num_workers=num_workers,
        worker_init_fn=_init_worker,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if num_workers else None,
        timeout=TIMEOUT if num_workers else 0,
    )
    in_a_row = 0
    for sample in _from_workers(loader) if num_workers else loader:
        in_a_row = in_a_row + 1 if isinstance(sample, UserError) else 0
        if in_a_row and not skip_unusable:
            raise UserError(f"{sample}{or_else}")
        if in_a_row == MOST_SKIPPED:
            raise disk_fault(sample)
        yield sample


def disk_fault(error: UserError) -> UserError:
    """The error of the last of `MOST_SKIPPED` samples one after the other that cannot be used."""
    return UserError(f"{error}; and so are the {MOST_SKIPPED - 1} files before it: is the disk there?")


def _as_it_is(sample: Any) -> Any:
    return sample


def _from_workers(loader: DataLoader) -> Iterator[Any]:
    """The batches of a loader with worker processes.

    PyTorch's handler of SIGCHLD raises in the main thread when a worker has died, also while it waits for the rest of a
    batch that the worker was writing.
    """
    before = set(multiprocessing.active_children())
    try:
        batches = iter(loader)
    except (OSError, RuntimeError) as error:
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        traceback.clear_frames(error.__traceback__)  # deletes a half-made loader, which fails to end its workers
        sys.unraisablehook = hook
        _end(set(multiprocessing.active_children()) - before)
        reason = getattr(error, "strerror", None) or error
        raise LoaderDied.because(f"loader processes cannot be started ({reason})") from None
    workers = set(multiprocessing.active_children()) - before
    try:
        yield from batches
    except Exception as error:
        if reason := _death(error):
            raise LoaderDied.because(reason) from None
        raise
    finally:
        _end(workers)


def _death(error: Exception) -> str:
    """How a worker died or why it is stuck, if that is what an error of the loader means, else ''."""
    text = str(error)
    if "in DataLoader worker process" in text:  # the error was raised in the worker, which lives
        return "a loader process found no shared memory" if "shared memory" in text else ""
    # Tensors are fetched from the worker that made them: the lost connection may be noticed before its death is.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or "pin memory thread" in text.lower()
    return text or "a loader process is gone" if lost or is_loader_death(error) else ""


def _end(workers: Iterable[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()  # see `_follow_parent`
    for worker in workers:
        worker.join(GRACE)


def _init_worker(worker_id: int) -> None:
    """Make a worker ignore what a scheduler or a terminal sends to the whole process group, and end with its parent.

    The parent needs its workers to finish the step that it is in when it is told to stop.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()


def _follow_parent(parent: int) -> None:
    """End this process, whatever its main thread is at, when the parent sends SIGTERM or is gone.

    PyTorch's own check misses the end of the parent where the worker waits for room in its pipe.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            os._exit(0)  # PyTorch takes any other exit code for an accident
    os._exit(1)
