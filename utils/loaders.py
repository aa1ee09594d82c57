"""DataLoaders whose worker processes may die."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

from utils.errors import UserError
from utils.locks import say

RESTARTS = 3
Batch = TypeVar("Batch")


def batches_in_order(loader_at: Callable[[int], DataLoader], what_to_do: str) -> Iterator[Batch]:
    """The batches of a loader; where a worker process dies, a new loader goes on with the batch that is missing.

    Args:
        loader_at: makes the loader whose first batch is the k-th of all.
        what_to_do: end of the message when workers keep dying.

    Raises:
        UserError: workers died more than `RESTARTS` times without a batch in between.
    """
    position, deaths = 0, 0
    while True:
        try:
            for batch in _iterate(loader_at(position)):
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


def _iterate(loader: DataLoader) -> Iterable[Batch]:
    iterator = iter(loader)
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "").startswith("torch.utils.data"):
            # PyTorch's handler raises wherever this process happens to be, as in the middle of a training step. Without
            # it a death is found, some seconds later, when the next batch is asked for.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return iterator
