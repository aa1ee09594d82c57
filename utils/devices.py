"""Choosing the device a script computes on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from utils.errors import UserError


def resolve_device(gpus: Sequence[str]) -> torch.device:
    """The device of `--gpus`: `cpu`, or the index of one CUDA device.

    Raises:
        UserError: several devices, not a number, or a device this machine does not have.
    """
    if len(gpus) != 1:
        raise UserError(f"--gpus {' '.join(gpus)}: one device at a time is supported; give one index, or cpu")
    name = gpus[0].lower()
    if name == "cpu":
        return torch.device("cpu")
    if not (name.isascii() and name.isdecimal()):
        raise UserError(f"--gpus {gpus[0]}: give the index of a CUDA device, such as 0, or cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name) >= count:
        have = f"devices 0 to {count - 1}" if count else "no usable CUDA device"
        raise UserError(f"--gpus {name}: this machine has {have}; choose another one, or --gpus cpu")
    return torch.device("cuda", int(name))


def default_workers() -> int:
    """Loader processes by default: the published 6, but no more than there are CPUs."""
    return min(6, os.cpu_count() or 1)
