"""The folder a training works in: a new one, or the one of the run that it continues."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from training.checkpoint import LATEST, PREVIOUS, has_checkpoint, set_damaged_aside
from training.record import CONFIG
from utils.errors import UserError
from utils.files import TEMPORARY, check_folder, make_folder, new_run_folder
from utils.locks import LOCK, locked


def folder_to_continue(continued: str, run_dir: str) -> Path | None:
    """The folder of the run that `--continue_train_from_path` or `--run_dir` continues, None for a new run.

    Raises:
        UserError: `--continue_train_from_path` holds no checkpoint, or `--run_dir` is no folder for a run.
    """
    if continued:
        path = Path(continued)
        if path.is_file() and path.name != LATEST:
            # Continuing from an older state in the same folder would overwrite the newer ones.
            raise UserError(
                f"--continue_train_from_path {path}: a run continues from its {LATEST}; to continue from another "
                f"checkpoint, copy it into an empty folder under the name {LATEST}"
            )
        folder = path.parent if path.is_file() else path
        if not has_checkpoint(folder):
            raise UserError(f"--continue_train_from_path {path}: there is no {LATEST} to continue from")
        return folder.resolve()  # the folder's name names the TensorBoard log
    if not run_dir:
        return None
    folder = Path(run_dir)
    check_folder(folder, "--run_dir")
    if has_checkpoint(folder):
        return folder.resolve()
    if folder.is_dir() and any(
        path.name not in (CONFIG, LOCK) and not path.name.endswith(TEMPORARY) for path in folder.iterdir()
    ):
        # A run that was ended before its first checkpoint leaves no more than these.
        raise UserError(f"--run_dir {folder}: this folder holds files, but no checkpoint of a run; name another one")
    return None


def log_name(folder: Path) -> str:
    """Name of a run's TensorBoard log: its folder's, with a part that tells apart those whose names a user chose."""
    if re.match(r"\d{4}-\d\d-\d\d_", folder.name):
        return folder.name
    return f"{folder.name}_{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"


def checkpoint_ids(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the checkpoints in a folder: they tell whether these are still the ones that were read."""
    found = {}
    for name in (LATEST, PREVIOUS):
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def lock_run_folder(
    *,
    origin: Path | None,
    ids_before: dict[str, tuple[int, int]],
    run_dir: str,
    parent: Path,
    task: str,
    stack: ExitStack,
) -> Path:
    """The run's folder, locked for this process until `stack` is closed; made here for a new run.

    Args:
        origin: checkpoint the run continues from, as `read_newest` named it, or None.
        ids_before: the `checkpoint_ids` of its folder before it was read.
        run_dir: `--run_dir`.
        parent: `--checkpoints_dir`, where new runs go without `--run_dir`.
        task: ends the name of a new folder there.

    Raises:
        UserError: another process works in it, or it cannot be made.
    """
    if origin is not None:
        stack.enter_context(locked(origin.parent, "--run_dir" if run_dir else "--continue_train_from_path"))
        if checkpoint_ids(origin.parent) != ids_before:
            raise UserError(f"{origin.parent}: another process has continued this run meanwhile; run the command again")
        set_damaged_aside(origin)
        return origin.parent
    if run_dir:
        folder = make_folder(Path(run_dir), "--run_dir").resolve()
    else:
        folder = new_run_folder(parent, "--checkpoints_dir", task)
    stack.enter_context(locked(folder, "--run_dir"))
    if has_checkpoint(folder):
        raise UserError(f"--run_dir {folder}: another process has started this run meanwhile; run the command again")
    return folder


def print_skipped(reasons: Sequence[str]) -> None:
    """List what `--on_bad_image skip` replaced."""
    if reasons:
        print(f"{len(reasons)} images or labels could not be used and were skipped:")
        print("\n".join(f"  {reason}" for reason in reasons))
