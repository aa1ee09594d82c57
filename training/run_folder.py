"""The folder of a run: finding, making and locking it, and its record `config.json`."""

import hashlib
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision

from training.checkpoint import LATEST, PREVIOUS, Checkpoint, has_checkpoint, read_newest
from utils.errors import UserError
from utils.files import TEMPORARY, atomic_write_json, check_folder, make_folder, read_json, remove_leftovers
from utils.locks import LOCK, locked

CONFIG = "config.json"
STARTS = "starts"
DAMAGED = "damaged.pth"


@dataclass(frozen=True, kw_only=True)
class Continued:
    """The run that is continued: its newest checkpoint, and the file that holds it."""

    checkpoint: Checkpoint
    origin: Path


def run_to_continue(path: str, run_dir: str, method: str) -> Continued | None:
    """The run that `--continue_train_from_path` or `--run_dir` continues, None for a new run. Raises `UserError`."""
    folder = _folder_to_continue(path, run_dir)
    if folder is None:
        return None
    checkpoint, origin = read_newest(folder)
    if checkpoint.method != method:
        named = checkpoint.config.get("method", {}).get("method", "")
        raise UserError(
            f"{origin} is a checkpoint of another training ({checkpoint.method}); continue it with its script "
            f"or --method {named}".rstrip()
        )
    if not checkpoint.optimizers:
        raise UserError(f"{origin} holds a finished net and no training state")
    return Continued(checkpoint=checkpoint, origin=origin)


def _folder_to_continue(continued: str, run_dir: str) -> Path | None:
    if continued:
        folder = Path(continued)
        if not has_checkpoint(folder):
            raise UserError(
                f"--continue_train_from_path {folder}: no folder with a {LATEST}; to continue from another checkpoint, "
                f"copy it into an empty folder under the name {LATEST}"
            )
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
    """Name of a run's TensorBoard log: its folder's name and a hash of its path, as users name folders alike."""
    return f"{folder.name}_{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:8]}"


@contextmanager
def locked_run_folder(continued: Continued | None, *, run_dir: str, parent: Path, task: str) -> Iterator[Path]:
    """The run's folder, locked for this process inside the block; made here for a new run. Raises `UserError`.

    Without `run_dir` (`--run_dir`) a new run goes into a new folder in `parent`; `task` ends its name.
    """
    if continued:
        folder = continued.origin.parent
    else:
        folder = (make_folder(Path(run_dir), "--run_dir") if run_dir else new_run_folder(parent, task)).resolve()
    with locked(folder, "--continue_train_from_path" if continued and not run_dir else "--run_dir"):
        if continued and continued.origin.name == PREVIOUS and (folder / LATEST).is_file():
            os.replace(folder / LATEST, folder / DAMAGED)  # the next save would keep it in the place of the good one
        remove_leftovers(folder)
        yield folder


def new_run_folder(parent: Path, task: str) -> Path:
    """Make a folder that is named by the time and the task; another run may have started in the same second."""
    folder = make_folder(parent, "--checkpoints_dir") / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{task}"
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder = folder.with_name(f"{folder.name}_2")


# --- the record ------------------------------------------------------------------------------------------------------


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, devices and the commit of this checkout, as far as results depend on them."""
    found: dict[str, Any] = {
        "commit": git_commit(Path(__file__).parent), "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "system": platform.platform(), "device": str(device),
        "processes": processes, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if device.type == "cuda":
        found |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        found["cudnn"] = torch.backends.cudnn.version()
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout a folder is in, with `+changes` where files differ from it; None outside of one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(folder: Path, content: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write `config.json`: `content`, which holds for the whole run, and a list of all its starts with this one."""
    path, starts = folder / CONFIG, []
    if path.exists():
        with suppress(UserError, AttributeError):  # a damaged record does not prevent continuing the run
            starts = list(read_json(path).get(STARTS, ()))
    now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start}
    atomic_write_json(path, {**content, STARTS: [*starts, now]})
