"""A lock on a folder between processes, which ends with the process that holds it; lines above a progress bar."""

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
    """Inside the block no other process can lock the folder.

    Raises `UserError`, which names `flag`, where another process holds the lock or the folder cannot be written to.
    """
    try:
        handle = os.open(Path(folder) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write to this folder ({error.strerror})") from None
    try:
        # Processes forked from this one do not hold the lock.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # otherwise the file system has no locks
            os.close(handle)
            raise UserError(f"{flag} {folder}: another process is at work in this folder; wait or stop it") from None
    try:
        yield
    finally:
        os.close(handle)
