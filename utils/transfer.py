"""Bringing tensors to the device that computes."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without waiting for what the device is doing: a GPU copies by itself from locked memory."""
    if device.type != "cuda":
        return tensor.to(device)
    locked = tensor if tensor.is_pinned() else tensor.pin_memory()
    return locked.to(device, non_blocking=True)
