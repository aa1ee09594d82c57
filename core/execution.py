"""How networks are run: the precision of their arithmetic, and whether they are compiled. One object for a whole run.

Weights, optimiser state and losses stay in float32 always. With bf16, convolutions and matrix products of a network
see their inputs and weights rounded to bfloat16 (8 significant bits, the exponent range of float32, so nothing has to
be scaled); what comes out is used in float32 by every loss. Discriminators are left out of that unless asked for: when
rounded, their losses were off by up to 6%, and SiT was worth less than float32's in three of six runs (RESULTS.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from core.networks import Discriminator, Generator, NetworkShape, Norm
from models.unet import UNet
from utils.devices import cpu_vendor
from utils.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS = ("auto", "fp32", "tf32", "bf16")
# Pixels whose losses are computed at once. A GPU is busy with one image of the published size; on a CPU more pixels do
# not run faster.
MICRO_BATCH_PIXELS = {"cuda": 2**19, "cpu": 2**15}

# Where a CPU feeds generators and discriminators channels last: images of at most so many pixels, groups of at least so
# many channels.
CHANNELS_LAST_PIXELS = 2**15
CHANNELS_LAST_GROUP = 8

# (network, *inputs) -> its output
Forward = Callable[..., Any]


def run_plainly(network: nn.Module, *inputs: Any) -> Any:
    """Float32, not compiled."""
    return network(*inputs)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has arithmetic for bfloat16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bf16_pays(device: torch.device) -> bool:
    """Whether a device that computes in bfloat16 does so faster than in float32.

    The AVX-512 instructions for it do twice the work of float32's on AMD's cores and half of it on Intel's, which are
    made for AMX (benchmarks/RESULTS.md). A timed convolution would tell, too, but not on a busy machine.
    """
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return computes_in_bf16(device) and cpu_vendor() == "AuthenticAMD"
    return computes_in_bf16(device)


def resolve_precision(wanted: str, device: torch.device) -> Precision:
    """`auto` becomes bf16 where that pays, else fp32.

    Raises:
        UserError: the device cannot do what is asked for.
    """
    if wanted == "auto":
        return "bf16" if bf16_pays(device) else "fp32"
    if wanted == "tf32" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise UserError(f"--precision tf32: a mode of NVIDIA GPUs from Ampere on, which {device} is not; use fp32")
    if wanted == "bf16" and not computes_in_bf16(device):
        raise UserError(
            f"--precision bf16: {device} does not compute in bfloat16; give --precision fp32, also to go on with a "
            "run that was started in bf16"
        )
    return wanted


def set_convolution_precision(precision: Precision) -> None:
    """What float32 convolutions of this process do on a GPU: in fp32 they are exact, else rounded for tensor cores.

    With bf16 these are the ones it leaves alone, which TF32 rounds to 11 significant bits. Matrix products stay exact
    in every mode: the Gram matrices are float32.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Inside the block convolutions in float32 are exact, as `evaluate.py` computes, whatever the run trains with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def set_determinism(deterministic: bool) -> None:
    """Whether a GPU computes the same bits every time, or as fast as it can; the CPU does the former in any case.

    PyTorch warns of an operation that it cannot do so.
    """
    torch.backends.cudnn.benchmark = not deterministic  # otherwise, the fastest algorithm for the input size of a scale
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def micro_batch_size(batch: Sequence[int], norm: Norm, device: torch.device) -> int | None:
    """Samples of a batch of shape (B,3,h,w) whose losses are computed at once; None, the whole, for batch norm."""
    if norm == "batch":
        return None
    return max(1, MICRO_BATCH_PIXELS[device.type] // (batch[-2] * batch[-1]))


def recomputes_blocks(precision: Precision, device: torch.device) -> bool:
    """Whether the net trained on SiT computes its blocks twice to save memory.

    Its batch norms need the whole batch, so pieces cannot save any. In bf16 its activations take half the room; the
    step then keeps 30% of what the literal step does (19% with it), and time is saved instead.
    """
    return device.type == "cuda" and precision != "bf16"


def channels_last(network: nn.Module) -> None:
    """Lay a network's weights out as convolutions like them: for networks of large, many-channelled convolutions.

    The U-Net's group norms of few channels lose more on a CPU than its convolutions gain; on a GPU it was not measured.
    """
    if not isinstance(network, UNet):
        network.to(memory_format=torch.channels_last)


def image_layout(shape: NetworkShape, image: Tensor) -> torch.memory_format:
    """How training feeds images to a generator or discriminator that computes in float32.

    A CPU's convolutions save a copy in and out with channels last, which is more than group norms of at least eight
    channels a group lose; smaller groups lose more (benchmarks/RESULTS.md). And channels-last norms sum less exactly,
    the more pixels and the smaller the contrast, batch norm of the image itself most: so only group norms of few pixels
    get them. In bfloat16 it does not pay, and on a GPU it was not measured.
    """
    few = image.shape[-2] * image.shape[-1] <= CHANNELS_LAST_PIXELS
    wide = shape.norm == "group" and shape.channels // shape.groups >= CHANNELS_LAST_GROUP
    return torch.channels_last if image.device.type == "cpu" and few and wide else torch.contiguous_format


class Execution:
    """Runs networks in a precision, compiled or not; call it with a network and its inputs.

    A call raises `UserError` where the compiler fails.

    Args:
        compiled: compile every network but the discriminators and, in fp32, the generators. Compiled code has no double
            backward, which the gradient penalty needs; older PyTorch versions dropped its graph without a word. And it
            sums norms in another order: in fp32, which promises the reference's numbers, a single LeakyReLU that
            changes side over that moves a gradient by more than their tolerance.
        bf16_discriminators: with bf16, round in discriminators, too.
        backend: of `torch.compile`.
        layout: of the images that generators and discriminators see where they compute in float32, by their shape and
            the image, as `image_layout`; None for as they are.
    """

    def __init__(
        self,
        precision: Precision = "fp32",
        compiled: bool = False,
        bf16_discriminators: bool = False,
        backend: str = "inductor",
        layout: Callable[[NetworkShape, Tensor], torch.memory_format] | None = None,
    ) -> None:
        self.precision = precision
        self.bf16_discriminators = bf16_discriminators
        self.compiled = compiled
        self.backend = backend
        self.layout = layout
        if compiled:
            # All generators share one piece of code, and every scale compiles its own, trained and frozen.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._programs: dict[int, tuple[nn.Module, Forward]] = {}

    def __call__(self, network: nn.Module, *inputs: Any) -> Any:
        device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        if self.layout is not None and isinstance(network, Discriminator | Generator) and not self._rounds(network):
            layout = self.layout(network.shape, inputs[0])
            inputs = [x.contiguous(memory_format=layout) if isinstance(x, Tensor) else x for x in inputs]
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._rounds(network)):
                return self._program(network)(*inputs)
        except Exception as error:
            # The compiler's errors have many classes, and a missing C++ compiler is the usual one.
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0][:150]
            raise UserError(f"--compile: PyTorch's compiler failed ({reason}); leave the flag out") from None

    def _rounds(self, network: nn.Module) -> bool:
        return self.precision == "bf16" and (self.bf16_discriminators or not isinstance(network, Discriminator))

    def _program(self, network: nn.Module) -> Forward:
        eager = (Discriminator, Generator) if self.precision == "fp32" else Discriminator
        if not self.compiled or isinstance(network, eager):
            return network
        if id(network) not in self._programs:
            # The network is kept with its program, so that its id stays its own.
            self._programs[id(network)] = (network, torch.compile(network, dynamic=False, backend=self.backend))
        return self._programs[id(network)][1]
