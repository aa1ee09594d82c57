"""Devices: those of `--gpus`, the CPU's features, loader processes for each, memory, and transfer."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

CPU_DESCRIPTION = Path("/proc/cpuinfo")


def resolve_device(gpus: Sequence[str]) -> torch.device:
    """The one device of `--gpus`; prints a default. Raises `UserError` for several, and as `resolve_devices`."""
    if len(gpus) > 1:
        raise UserError(f"--gpus {' '.join(gpus)}: one device at a time is supported; give one index, or cpu")
    (device,) = resolve_devices(gpus)
    if not gpus:
        print(f"computing on {device} (choose with --gpus)")
    return device


def resolve_devices(gpus: Sequence[str]) -> list[torch.device]:
    """The devices of `--gpus`, one for each process: CUDA devices, each once, or `cpu` any number of times.

    Where it is empty, the first GPU, or the CPU where there is none.

    Raises:
        UserError: not a number, a device that is named twice or that this machine does not have, or GPUs and the CPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names, flag = [name.lower() for name in gpus] or ["0" if count else "cpu"], f"--gpus {' '.join(gpus)}"
    if set(names) == {"cpu"}:
        return [torch.device("cpu")] * len(names)
    if "cpu" in names:
        raise UserError(f"{flag}: GPUs and the CPU cannot share the work; name GPUs, or cpu")
    if len(set(names)) != len(names):
        raise UserError(f"{flag} names a device twice")
    for name in names:
        if not (name.isascii() and name.isdecimal()):
            raise UserError(f"{flag}: {name} is no index of a CUDA device, such as 0, and not cpu")
        if int(name) >= count:
            have = f"devices 0 to {count - 1}" if count else "no usable CUDA device"
            raise UserError(f"{flag}: this machine has {have}; choose another one, or --gpus cpu")
    return [torch.device("cuda", int(name)) for name in names]


def cpu_property(name: str) -> str:
    """What Linux says about the first CPU, such as its `vendor_id` or its `flags`; '' where it does not tell."""
    try:
        found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", CPU_DESCRIPTION.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def cpus_per_device(devices: Sequence[torch.device]) -> int:
    """CPUs that this process may run on, divided among the devices; at least 1."""
    # This respects the CPUs that a batch system or a container assigns, but not a quota of CPU time.
    return max(1, len(os.sched_getaffinity(0)) // len(devices))


def workers_for(wanted: int | None, device: torch.device, processes: int = 1) -> int:
    """Loader processes of one of `processes` that compute on devices like this.

    As wanted, or by default the published 6, at most the CPUs of the process; half of them where a CPU computes.
    """
    cpus = cpus_per_device([device] * processes)
    return min(6, cpus if device.type == "cuda" else max(1, cpus // 2)) if wanted is None else wanted


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(available[1]) * 1024


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the copy to a GPU is asynchronous, from page-locked memory."""
    return tensor.to(device) if device.type != "cuda" else tensor.pin_memory().to(device, non_blocking=True)
