"""Choosing the device a script computes on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from utils.errors import UserError

CPU_DESCRIPTION = Path("/proc/cpuinfo")


def resolve_device(gpus: Sequence[str]) -> torch.device:
    """The device of `--gpus`: `cpu`, or the index of one CUDA device; where it is empty, the default, which is printed.

    Raises:
        UserError: several devices, not a number, or a device this machine does not have.
    """
    if not gpus:
        device = resolve_device(default_gpus())
        print(f"computing on {device} (choose with --gpus)")
        return device
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


def resolve_devices(gpus: Sequence[str]) -> list[torch.device]:
    """The devices of `--gpus`, one for each process: CUDA devices, each once, or `cpu` any number of times.

    Raises:
        UserError: no device, one that is named twice, or one that this machine does not have.
    """
    names = [name.lower() for name in gpus]
    if len(set(names)) != len(names) and set(names) != {"cpu"}:
        raise UserError(f"--gpus {' '.join(gpus)} names a device twice")
    return [resolve_device([name]) for name in gpus]


def default_gpus() -> tuple[str, ...]:
    """What `--gpus` stands for where it is not given: the first GPU, or the CPU where there is none."""
    return ("0",) if torch.cuda.is_available() else ("cpu",)


def training_devices(gpus: Sequence[str]) -> list[torch.device]:
    """`resolve_devices` for processes that compute one step together, which unlike devices cannot.

    Raises:
        UserError: see there; also GPUs mixed with `cpu`.
    """
    devices = resolve_devices(gpus)
    if len({device.type for device in devices}) > 1:
        raise UserError(f"--gpus {' '.join(gpus)}: GPUs and the CPU cannot share a training step; name GPUs, or cpu")
    return devices


def cpu_vendor() -> str:
    """The maker that the CPU names, such as AuthenticAMD or GenuineIntel; '' where the system does not tell."""
    return _cpu_property("vendor_id")


def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them, such as avx512_bf16; empty where the system does not tell."""
    return frozenset(_cpu_property("flags").split())


def _cpu_property(name: str) -> str:
    """The value that /proc/cpuinfo gives for the first CPU; '' where there is no such file or line."""
    try:
        found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", CPU_DESCRIPTION.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def cpus_per_device(devices: Sequence[torch.device] = ()) -> int:
    """CPUs that this process may run on, divided among the devices; at least 1."""
    # The CPUs a batch system or a container gives, where the system tells; a quota of CPU time does not show here.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // max(1, len(devices)))


def default_workers(devices: Sequence[torch.device] = ()) -> int:
    """Loader processes for each device by default: the published 6, but no more than there are CPUs for it.

    Where the CPU computes, loaders take its time away, so they get half of the CPUs at most. Without `devices` a GPU is
    meant.
    """
    cpus = cpus_per_device(devices)
    if any(device.type == "cpu" for device in devices):
        cpus = max(1, cpus // 2)
    return min(6, cpus)


def workers_for(wanted: int | None, device: torch.device, processes: int = 1) -> int:
    """Loader processes of one process that computes on `device` beside others: as wanted, or `default_workers`."""
    return default_workers([device] * processes) if wanted is None else wanted
