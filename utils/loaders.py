"""Loading samples in worker processes, in order. When a worker dies, the run saves and exits with code 75."""

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset

from utils.errors import UserError
from utils.stopping import STOP_SIGNALS, LoaderDied, is_loader_death, signal_at_parents_end

MOST_SKIPPED = 10  # so many unusable samples in a row are a fault of the disk, not of the files
TIMEOUT = 300  # seconds for a batch: a batch that a worker could not send is missing without an error


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
        LoaderDied: a worker died or has sent nothing for `TIMEOUT` seconds.
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
    batches = iter(loader)
    try:
        yield from batches
    except Exception as error:
        if reason := _death(error):
            raise LoaderDied.because(reason) from None
        raise
    finally:
        batches.__del__()  # ends the workers; the object itself is part of a cycle and would live on


def _death(error: Exception) -> str:
    """How a worker died or why it is stuck; '' for other errors of the loader."""
    text = str(error)
    if "in DataLoader worker process" in text:  # the error was raised in the worker, which lives
        return "a loader process found no shared memory" if "shared memory" in text else ""
    # Tensors are fetched from their worker: the lost connection may be noticed before its death.
    lost = isinstance(error, ConnectionError | EOFError | FileNotFoundError) or is_loader_death(error)
    return text or "a loader process is gone" if lost else ""


def _init_worker(worker_id: int) -> None:
    """Make a worker end with its parent, and ignore signals to the process group: the parent finishes its step.

    PyTorch's own check misses the end of the parent while the worker waits for room in its pipe.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal_at_parents_end(signal.SIGKILL)
