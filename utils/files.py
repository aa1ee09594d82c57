"""Atomic writes: a reader sees the old file or the new one, never half of one."""

import json
import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import UserError

TEMPORARY = ".procst-tmp"


def atomic_write(path: Path, write: Callable[[BinaryIO], None], keep: Path | None = None) -> None:
    """Let `write` fill a temporary file beside `path`, fsync it, then rename it to `path`. Raises `UserError`.

    The temporary file is hidden, and is removed on any failure, when `path` keeps its former content.

    Args:
        keep: another name in the same folder, which a former file at `path` gets once the new one is complete.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; check the folder and the free space") from None
    finally:
        with suppress(OSError):  # it has been renamed, or the folder is gone
            temporary.unlink()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed `atomic_write` left in `folder`; no other may write there now."""
    # `Path.glob` is slow in a folder of a million images.
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith(".") and name.endswith(TEMPORARY):
            (Path(folder) / name).unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically; see `atomic_write`."""
    atomic_write(path, lambda file: file.write(data))


def atomic_write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON to `path` atomically; see `atomic_write`."""
    atomic_write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `UserError` if it is missing, unreadable or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read {path} as JSON: {error}") from None


def check_folder(path: Path, flag: str) -> None:
    """Raise `UserError`, which names `flag`, unless `path` is a writable folder or can be made."""
    path = Path(path).absolute()
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=nearest):  # permissions do not tell all, as in /proc
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {nearest} is not a folder that can be written to ({error.strerror})") from None


def check_output_file(path: Path, flag: str) -> None:
    """Raise `UserError`, which names `flag`, unless a file can be written to `path`, whose folder may be missing."""
    check_folder(path.parent, flag)
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; name a file")


def make_folder(path: Path, flag: str) -> Path:
    """Create the folder `path` with its parents. Raises `UserError` as `check_folder`."""
    check_folder(path, flag)
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: the folder cannot be made ({error.strerror})") from None
    return Path(path)
