"""Locks between processes: one builder of a cache, one process for a run. They end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError

LOCK = ".lock"  # file of a locked folder
# What file systems that cannot lock answer.
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL}


def say(line: str) -> None:
    """A line on stderr, above any progress bar."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """Inside the block no other process can lock the folder; the lock ends with the process, however that ends.

    Raises:
        UserError: names `flag` when another process has locked it.
    """
    path = Path(folder) / LOCK
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot write to this folder ({error.strerror})") from None
    try:
        try:
            # A lock of this process alone, which processes forked from it do not hold.
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"{flag} {folder}: another process is at work on this run; wait or stop it") from None
            # A file system without locks: go on without.
        yield
    finally:
        os.close(handle)


@contextmanager
def only_builder(path: Path, leftovers: str) -> Iterator[bool]:
    """Wait, with a line on stderr, until no other process is in such a block for `path`; True if it can be told.

    Raises:
        UserError: the file cannot be made or locked.
    """
    handle = None
    try:
        try:
            with suppress(FileExistsError):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                os.fchmod(handle, 0o666)  # to lock it, other users must be able to write
            if handle is None:
                handle = os.open(path, os.O_RDWR)
            is_locked = _lock(handle, path, leftovers)
        except OSError as error:
            raise UserError(
                f"--cache_dir {path.parent}: cannot lock {path.name} ({error.strerror}); choose another folder"
            ) from None
        yield is_locked
    finally:
        if handle is not None:
            os.close(handle)  # this unlocks it; the file stays, as another process may be waiting for it


def _lock(handle: int, path: Path, leftovers: str) -> bool:
    # The lock belongs to this process alone and ends with it; one of `flock` would also be held by the workers that
    # the loader forks.
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            say(
                f"--cache_dir {path.parent}: this file system has no locks; runs started together build a cache each, "
                f"and {leftovers} has to be deleted by hand"
            )
            return False
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise
        say(f"--cache_dir {path.parent}: waiting for another process that is building this cache")
        fcntl.lockf(handle, fcntl.LOCK_EX)
    return True
