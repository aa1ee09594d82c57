"""TensorBoard logging that a full or missing disk ends without ending the run."""

import threading
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils.locks import say


class TensorBoardLog:
    """A `SummaryWriter` that stops logging, with one line on stderr, at the first `OSError`.

    Args:
        folder: of the event files.
        purge_step: entries of this step and later ones, which an interrupted run logged after its last checkpoint, are
            not shown; None shows everything.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        threading.excepthook = _without_writer_errors
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:
            self._give_up(error)

    def write(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call a method of the `SummaryWriter`, such as `add_scalar`."""
        if self._writer is not None:
            try:
                getattr(self._writer, method)(*arguments, **named)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        say(f"WARNING: cannot log to {self.folder} ({error.strerror or error}); the run continues without TensorBoard")


def _without_writer_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writer thread: the next call on its log raises the same error."""
    if not type(args.thread).__module__.startswith("tensorboard.") or not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
