"""A lock on a run's folder between processes. It ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

LOCK = ".lock"  # file of a locked folder


def say(line: str) -> None:
    """A line on stderr, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Inside the block no other process can lock the folder. Raises `UserError`, which names `flag`, if one has."""
    path = Path(folder) / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write to this folder ({error.strerror})") from None
    try:
        try:
            # Processes forked from this one do not hold the lock.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{flag} {folder}: another process is at work on this run; wait or stop it") from None
            # The file system has no locks.
        yield
    finally:
        os.close(handle)
