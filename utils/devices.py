"""Devices: those of `--gpus`, the CPU's features, loader processes for each, memory, and transfer."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from utils.errors import UserError

CPU_DESCRIPTION = Path("/proc/cpuinfo")
# Of glibc's malloc.h; larger blocks always come from the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 32 * 2**20


def resolve_device(gpus: Sequence[str]) -> torch.device:
    """The one device that `--gpus` names: `cpu`, or the index of a CUDA device. Where it is empty, prints the default.

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
    """The default of `--gpus`: the first GPU, or the CPU where there is none."""
    return ("0",) if torch.cuda.is_available() else ("cpu",)


def training_devices(gpus: Sequence[str]) -> list[torch.device]:
    """`resolve_devices` for processes that compute one step together; refuses GPUs mixed with `cpu`, too."""
    devices = resolve_devices(gpus)
    if len({device.type for device in devices}) > 1:
        raise UserError(f"--gpus {' '.join(gpus)}: GPUs and the CPU cannot share a training step; name GPUs, or cpu")
    return devices


def cpu_vendor() -> str:
    """The CPU's vendor, such as AuthenticAMD or GenuineIntel; '' where the system does not tell."""
    return _cpu_property("vendor_id")


def cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them, such as avx512_bf16; empty where the system does not tell."""
    return frozenset(_cpu_property("flags").split())


def _cpu_property(name: str) -> str:
    """The value in /proc/cpuinfo for the first CPU; '' where there is no such file or line."""
    try:
        found = re.search(rf"^{name}[ \t]*:[ \t]*(.*)$", CPU_DESCRIPTION.read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1].strip() if found else ""


def cpus_per_device(devices: Sequence[torch.device] = ()) -> int:
    """CPUs that this process may run on, divided among the devices; at least 1."""
    # This respects the CPUs that a batch system or a container assigns, but not a quota of CPU time.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // max(1, len(devices)))


def default_workers(devices: Sequence[torch.device] = ()) -> int:
    """Default loader processes for each device: the published 6, at most its CPUs; half of its CPUs if a CPU computes.

    No `devices` means one GPU.
    """
    cpus = cpus_per_device(devices)
    if any(device.type == "cpu" for device in devices):
        cpus = max(1, cpus // 2)
    return min(6, cpus)


def workers_for(wanted: int | None, device: torch.device, processes: int = 1) -> int:
    """Loader processes of one of `processes` that compute on devices like this: as wanted, or the default."""
    return default_workers([device] * processes) if wanted is None else wanted


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees in blocks of up to 32 MiB, for the next step on a CPU.

    Otherwise glibc returns it to the system, which zeroes every page again: 3 to 7% of the time on small images. The
    process may need more memory; 18% after a scale of smaller images was measured.

    Returns:
        Whether the C library supports it; others than glibc may not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        # Outside Linux there is no such file; half of all memory is a cautious guess.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; the copy to a GPU is asynchronous, from page-locked memory."""
    if device.type != "cuda":
        return tensor.to(device)
    locked = tensor if tensor.is_pinned() else tensor.pin_memory()
    return locked.to(device, non_blocking=True)
