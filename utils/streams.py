"""Standard output and error that do not end a program: a run of days outlives the terminal or pipe that shows it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class _Lasting:
    """A text stream; when nobody reads it any more, what is printed is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Let the file descriptor lead nowhere, for what Python writes at its end."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def _occupy_standard_files() -> None:
    """Let closed standard file descriptors lead nowhere; another file would get the number, and what is printed."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free


@contextmanager
def streams_that_last() -> Iterator[None]:
    """Inside the block printing never fails: not for a name that a terminal cannot show, not for a broken pipe."""
    _occupy_standard_files()
    before = sys.stdout, sys.stderr
    # Where the file descriptors are closed, as some starters of daemons leave them, Python has no streams.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in before)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = lasting = _Lasting(sys.stdout), _Lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in lasting:
            stream.flush()  # Python would do it at its end, and answer a broken pipe with an exit code of its own
        sys.stdout, sys.stderr = before
