"""Floating point types of tensors."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half and bfloat16 tensors as float32; float32 and float64 tensors as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
