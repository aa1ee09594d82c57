"""Standard output and error that do not end a program: a run of days outlives the terminal or pipe that shows it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class _SafeStream:
    """A text stream that cannot fail: once its file is broken, as a pipe without reader, what is printed is lost."""

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
            # What is still buffered goes to the null device, also where Python flushes the stream at its end.
            with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Inside the block printing never fails: not for a name that a terminal cannot show, not for a broken pipe."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed by who started the program: a file opened later would get the number, and the output
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before = sys.stdout, sys.stderr
    # Python has no streams where it found their files closed.
    sys.stdout, sys.stderr = safe = [_SafeStream(s or open(os.devnull, "w")) for s in before]  # noqa: SIM115
    if isinstance(before[0], io.TextIOWrapper):
        before[0].reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in safe:
            stream.flush()
        sys.stdout, sys.stderr = before
