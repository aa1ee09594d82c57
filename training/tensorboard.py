"""TensorBoard logging that a full or missing disk ends without ending the run."""

from __future__ import annotations

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

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Log a number."""
        self._call("add_scalar", tag, value, step)

    def add_image(self, tag: str, image: Any, step: int, dataformats: str = "CHW") -> None:
        """Log a picture, float in [0,1] or uint8."""
        self._call("add_image", tag, image, step, dataformats=dataformats)

    def add_histogram_raw(self, tag: str, **counts: Any) -> None:
        """Log a histogram from its counts; see `SummaryWriter.add_histogram_raw`."""
        self._call("add_histogram_raw", tag, **counts)

    def flush(self) -> None:
        """Write the pending entries."""
        self._call("flush")

    def close(self) -> None:
        """Flush, and log no more."""
        self._call("close")
        self._writer = None

    def _call(self, method: str, *arguments: Any, **named: Any) -> None:
        if self._writer is not None:
            try:
                getattr(self._writer, method)(*arguments, **named)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        say(f"WARNING: cannot log to {self.folder} ({error.strerror or error}); the run goes on without TensorBoard")


def _without_writer_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's writer thread: the next call on its log raises the same error."""
    if not type(args.thread).__module__.startswith("tensorboard.") or not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
