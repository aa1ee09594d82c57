"""What a run was made with: `config.json` beside its checkpoints."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision

from utils.errors import UserError
from utils.files import atomic_write_json, read_json

CONFIG = "config.json"
STARTS = "starts"


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Versions, devices and the commit of this checkout, as far as results depend on them."""
    found: dict[str, Any] = {
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "system": platform.platform(),
        "device": str(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found |= {
            "device_name": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout a folder is in, with `+changes` where files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def write_record(folder: Path, content: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write `config.json`: method, configuration, fingerprints of all inputs, and each start of the run.

    Args:
        content: what holds for the whole run.
        start: what this start was made with: the stage and step it begins with, see also `environment`.
    """
    path = folder / CONFIG
    starts = []
    if path.exists():
        try:
            before = read_json(path)
            starts = list(before.get(STARTS, ())) if isinstance(before, dict) else []
        except UserError:
            pass  # a record that cannot be read is no reason not to continue the run
    now = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **start}
    atomic_write_json(path, {**content, STARTS: [*starts, now]})
