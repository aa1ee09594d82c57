"""Which folder a training works in: a new one, or one it goes on with. The same rules for both kinds of training."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from core.checkpoint import CONFIG, LATEST, PREVIOUS, has_checkpoint, set_damaged_aside
from utils.errors import UserError
from utils.files import TEMPORARY, check_folder, make_folder, new_run_folder
from utils.locks import LOCK, claimed


def run_to_continue(continued: str, run_dir: str) -> Path | None:
    """The run that `--continue_train_from_path` or `--run_dir` goes on with, None for a new one.

    Raises:
        UserError: both are given, or `--run_dir` is no folder for a run.
    """
    if run_dir and continued:
        raise UserError("--run_dir and --continue_train_from_path both name a run; give one")
    if continued:
        return Path(continued)
    if not run_dir:
        return None
    folder = Path(run_dir)
    check_folder(folder, "--run_dir")
    if has_checkpoint(folder):
        return folder
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


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether the checkpoints in a folder are still those that were read."""
    found = {}
    for name in (LATEST, PREVIOUS):
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def claim_run_folder(
    origin: Path | None,
    seen: dict[str, tuple[int, int]],
    run_dir: str,
    parent: Path,
    task: str,
    claims: ExitStack,
) -> Path:
    """The run's folder, for this process alone until `claims` are closed; made here for a new run.

    Args:
        origin: checkpoint the run goes on from, as `read_newest` named it, or None.
        seen: the `stamps` of its folder before it was read.
        run_dir: `--run_dir`.
        parent: `--checkpoints_dir`, where new runs go without `--run_dir`.
        task: ends the name of a new folder there.

    Raises:
        UserError: another process works in it, or it cannot be made.
    """
    if origin is not None:
        claims.enter_context(claimed(origin.parent, "--run_dir" if run_dir else "--continue_train_from_path"))
        if stamps(origin.parent) != seen:
            raise UserError(f"{origin.parent}: another process has gone on with this run meanwhile; run it again")
        set_damaged_aside(origin)
        return origin.parent
    if run_dir:
        folder = make_folder(Path(run_dir), "--run_dir").resolve()
    else:
        folder = new_run_folder(parent, "--checkpoints_dir", task)
    claims.enter_context(claimed(folder, "--run_dir"))
    if has_checkpoint(folder):
        raise UserError(f"--run_dir {folder}: another process has started this run meanwhile; run the command again")
    return folder


def print_skipped(reasons: Sequence[str]) -> None:
    """List what `--on_bad_image skip` left out."""
    if reasons:
        print(f"{len(reasons)} images or labels could not be used and were skipped:")
        print("\n".join(f"  {reason}" for reason in reasons))
