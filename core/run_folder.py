"""Which folder a training works in: a new one, or one it goes on with. The same rules for both kinds of training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from core.checkpoint import CONFIG, has_checkpoint, set_damaged_aside
from utils.errors import UserError
from utils.files import check_folder, make_folder, new_run_folder
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
    if folder.is_dir() and not {path.name for path in folder.iterdir()} <= {CONFIG, LOCK}:
        # A run that was stopped before its first checkpoint leaves no more than these.
        raise UserError(f"--run_dir {folder}: this folder holds files, but no checkpoint of a run; name another one")
    return None


def claim_run_folder(origin: Path | None, run_dir: str, parent: Path, task: str, claims: ExitStack) -> Path:
    """The run's folder, for this process alone until `claims` are closed; made here for a new run.

    Args:
        origin: checkpoint the run goes on from, as `read_newest` named it, or None.
        run_dir: `--run_dir`.
        parent: `--checkpoints_dir`, where new runs go without `--run_dir`.
        task: ends the name of a new folder there.

    Raises:
        UserError: another process works in it, or it cannot be made.
    """
    if origin is not None:
        claims.enter_context(claimed(origin.parent, "--continue_train_from_path"))
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
