"""Loading samples in worker processes, in order. When a worker dies, the run saves and exits with code 75."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError
from utils.stopping import LoaderDied, is_loader_death

MOST_SKIPPED = 10  # so many unusable samples in a row are a fault of the disk, not of the files
TIMEOUT = 300  # seconds for a batch: a batch that a worker could not send is missing without an error
GRACE = 5.0  # seconds in which workers end by themselves


@dataclass(frozen=True)
class _Loading(Dataset):
    load: Callable[[Any], Any]

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.load(index)
        except UserError as error:
            return error  # if a worker raised it, a traceback would be added to its message


def load_in_order(
    load: Callable[[Any], Any],
    order: Iterable[Any],
    *,
    num_workers: int,
    skip_unusable: bool = False,
    or_else: str = "",
    prefetch: int = 2,
) -> Iterator[Any]:
    """Yield `load(index)` for every index of `order`, in that order. Call it in the main thread.

    Args:
        load: called in a worker; raises `UserError` for a sample that cannot be used.
        skip_unusable: yield the `UserError`s among the samples instead of raising them.
        or_else: end of the message about a sample that cannot be used; it names an alternative.
        prefetch: samples that each worker loads ahead.

    Raises:
        UserError: a sample cannot be used; with `skip_unusable`, `MOST_SKIPPED` in a row.
        LoaderDied: a worker died, cannot be started, or has sent nothing for `TIMEOUT` seconds.
    """
    loader = DataLoader(
        _Loading(load),
        sampler=order,
        batch_size=None,
        collate_fn=lambda sample: sample,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # nothing that `load` holds is pickled
        worker_init_fn=_init_worker,
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
    """The error for `MOST_SKIPPED` unusable samples in a row, from that of the last one."""
    return UserError(f"{error}; and so are the {MOST_SKIPPED - 1} files before it: is the disk there?")


def _from_workers(loader: DataLoader) -> Iterator[Any]:
    """The samples of a loader with worker processes; raises `LoaderDied` when one has died."""
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
    """How a worker died or why it is stuck; '' for other errors of the loader."""
    text = str(error)
    if "in DataLoader worker process" in text:  # the error was raised in the worker, which lives
        return "a loader process found no shared memory" if "shared memory" in text else ""
    # Tensors are fetched from their worker: the lost connection may be noticed before its death.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or is_loader_death(error)
    return text or "a loader process is gone" if lost else ""


def _end(workers: Collection[BaseProcess]) -> None:
    for worker in workers:
        worker.terminate()  # see `_follow_parent`
    for worker in workers:
        worker.join(GRACE)


def _init_worker(worker_id: int) -> None:
    """Make a worker end with its parent, and ignore signals to the process group: the parent finishes its step."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()


def _follow_parent(parent: int) -> None:
    """End this process when the parent sends SIGTERM or is gone.

    PyTorch's own check misses the end of the parent while the worker waits for room in its pipe.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            os._exit(0)  # PyTorch reports any other exit code
    os._exit(1)
