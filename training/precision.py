"""The arithmetic of a run: its precision, and how networks are called in it.

Weights, optimiser state and losses are float32 in every precision. In bf16 the inputs and weights of convolutions and
matrix products are rounded to bfloat16 (8 significant bits and the exponent range of float32, so that no loss scaling
is needed); losses convert the outputs to float32.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from utils.devices import cpu_property
from utils.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_property("flags").split())


def bf16_pays(device: torch.device) -> bool:
    """Whether the device computes faster in bfloat16 than in float32.

    The AVX-512 instructions for bfloat16 are twice as fast as those for float32 on AMD's cores and half as fast on
    Intel's, which need AMX for it (benchmarks/RESULTS.md).
    """
    if device.type == "cpu" and "amx_bf16" not in cpu_property("flags").split():
        return computes_in_bf16(device) and cpu_property("vendor_id") == "AuthenticAMD"
    return computes_in_bf16(device)


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """Resolve `auto` of `--precision`: bf16 where that pays, else fp32. Raises `UserError` if the device lacks it."""
    if wanted == "auto":
        return "bf16" if bf16_pays(device) else "fp32"
    if wanted == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(f"--precision tf32: a mode of NVIDIA GPUs from Ampere on, which {device} is not; use fp32")
    if wanted == "bf16" and not computes_in_bf16(device):
        raise UserError(
            f"--precision bf16: {device} does not compute in bfloat16; give --precision fp32, also to resume a run "
            "that was started in bf16"
        )
    return wanted


def set_convolution_precision(precision: Precision) -> None:
    """Let a GPU round float32 convolutions to TF32 (11 significant bits) in tf32 and bf16; matrix products never."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside the block float32 convolutions are not rounded to TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def set_determinism(deterministic: bool) -> None:
    """Choose a GPU's deterministic algorithms, where they exist, or its fastest ones; a CPU is always deterministic."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def channels_last(network: nn.Module) -> None:
    """Lay out the weights of `network` channels last, unless its class sets `prefers_channels_last` to False."""
    if getattr(network, "prefers_channels_last", True):
        network.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Runner:
    """Calls networks in a precision: `run(network, *inputs)` returns what `network(*inputs)` does.

    Attributes:
        precision: bf16 runs networks under autocast; fp32 and tf32 differ in `set_convolution_precision` alone.
        keep_float32: classes of networks that compute in float32 in a bf16 run, too.
    """

    precision: Precision = "fp32"
    keep_float32: tuple[type, ...] = ()

    def __call__(self, network: nn.Module, *inputs: Any) -> Any:
        rounds = self.precision == "bf16" and not isinstance(network, self.keep_float32)
        device = next(x.device for x in inputs if isinstance(x, Tensor))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=rounds):
            return network(*inputs)
