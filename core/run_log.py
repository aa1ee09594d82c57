"""TensorBoard of a run that matters more than its log."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from utils.locks import say


class RunLog(SummaryWriter):
    """A writer that gives up, with one line on stderr, where its disk is full or gone."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.has_failed = False
        threading.excepthook = _report
        super().__init__(str(folder), purge_step=purge_step)

    def _get_file_writer(self) -> Any:
        if not self.has_failed:
            try:
                return _Guarded(super()._get_file_writer(), self._fail)
            except OSError as error:
                self._fail(error)
        return _Nothing()

    def flush(self) -> None:
        """Write what has been logged."""
        self._try(super().flush)

    def close(self) -> None:
        """Write what has been logged, and no more."""
        self._try(super().close)

    def _try(self, action: Callable[[], None]) -> None:
        if not self.has_failed:
            try:
                action()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self.has_failed:
            reason = error.strerror or error
            say(f"WARNING: cannot log to {self.log_dir} ({reason}); the run goes on without TensorBoard")
        self.has_failed = True


def _report(args: threading.ExceptHookArgs) -> None:
    # TensorBoard writes in a thread of its own; `RunLog` learns of its end, and says so in one line.
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


class _Guarded:
    """A file writer whose methods call `fail` where the system refuses."""

    def __init__(self, writer: Any, fail: Callable[[OSError], None]) -> None:
        self._writer, self._fail = writer, fail

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._writer, name)

        def call(*arguments: Any, **named: Any) -> Any:
            try:
                return method(*arguments, **named)
            except OSError as error:
                self._fail(error)
                return None

        return call


class _Nothing:
    """A file writer that drops everything."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **named: None
