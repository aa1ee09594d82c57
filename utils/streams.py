"""Standard output and error that never fail, so that a run outlives the terminal or pipe that shows it."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class _SafeStream:
    """A text stream that drops its text once its file is broken, as a pipe without reader."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, action: Callable[..., object], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError:
            # The buffer goes to the null device, also when Python flushes the stream at its end.
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside the block printing never fails, neither for characters the terminal lacks nor for a broken pipe."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_SafeStream, before)
    if isinstance(before[0], io.TextIOWrapper):
        before[0].reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = before
