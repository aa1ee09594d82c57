"""How much memory a device has left, and what happens to what a process frees."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# Of glibc's malloc.h; blocks of more than the largest threshold it takes always come from the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_THRESHOLD = -1, -3, 32 * 2**20


def keep_freed_memory() -> bool:
    """Let this process keep what it frees in blocks of up to 32 MiB: training and export on a CPU ask for it again.

    Otherwise glibc gives it back, and the system zeroes every page anew: 3 to 7% of the time on small images. It
    costs memory: after a scale of smaller images a process was seen to need 18% more.

    Returns:
        Whether the C library knows how; others than glibc may not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_TRIM_THRESHOLD, -1) and mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`; on the CPU what the operating system says is available."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        # No such file outside Linux; half of all memory is a careful guess.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
