"""Precision and layout: what they may change, and what they must not lose."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import NetworkShape
from core.losses import gradient_penalty
from core.networks import Discriminator, Generator
from core.procst import image_layout, micro_batch_size, procst_runner
from models.unet import UNet
from steps import build
from training.precision import Runner, bf16_pays, channels_last, computes_in_bf16, recomputes_blocks, resolve_precision
from utils import devices
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_gradient_penalty_reaches_the_discriminator(precision, rounded, norm):
    def gradients(run):
        discriminator = build(Discriminator, 2, 2, 16, norm, seed=3).train()
        torch.manual_seed(0)
        real, fake = torch.rand(2, 3, 24, 32) * 2 - 1, torch.rand(2, 3, 24, 32) * 2 - 1
        with torch.no_grad():
            for parameter in discriminator.parameters():
                parameter.mul_(3)  # at their initial size the norm of the gradient is almost 0
        penalty = gradient_penalty(partial(run, discriminator), real, fake, torch.tensor(0.4))
        assert penalty.dtype == torch.float32
        penalty.backward()
        return {n: p.grad for n, p in discriminator.named_parameters() if n.endswith("weight")}

    exact, found = gradients(Runner()), gradients(procst_runner(precision, rounded))
    for name, value in exact.items():
        assert float(value.norm()) > 0, name
        assert 0.95 < float(found[name].norm() / value.norm()) < 1.05, name
    whole = [torch.cat([value.flatten() for value in each.values()]) for each in (exact, found)]
    if not rounded:
        assert torch.equal(*whole)
    else:
        assert not torch.equal(*whole)
        # Rounding to 8 bits lets some LeakyReLUs change side; the direction stays.
        assert float(torch.cosine_similarity(*whole, dim=0)) > 0.95


def test_generated_images_are_float32():
    image = torch.rand(1, 3, 16, 16)
    generator = build(Generator, 0, 2, 8, "group", 0)
    exact, rounded = generator(image, None), Runner("bf16")(generator, image, None)
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - exact).detach().abs().max()) < 0.02


def test_which_nets_recompute_their_blocks():
    """Where memory is short: on a GPU, in precisions whose activations are float32."""
    gpu = torch.device("cuda")
    assert {p: recomputes_blocks(p, gpu) for p in ("fp32", "tf32", "bf16")} == {"fp32": 1, "tf32": 1, "bf16": 0}
    assert not recomputes_blocks("fp32", CPU)


@pytest.fixture
def cpu(monkeypatch, tmp_path):
    """cpu(text) makes the text the description of this machine's CPU; None removes the description."""

    def describe(text):
        description = tmp_path / "cpuinfo"
        description.unlink(missing_ok=True)
        if text is not None:
            description.write_text(text)
        monkeypatch.setattr(devices, "CPU_DESCRIPTION", description)

    return describe


@pytest.mark.parametrize(
    ("vendor", "flags", "computes", "pays"),
    [
        ("AuthenticAMD", "fpu avx512f avx512_bf16 sse", True, True),
        ("GenuineIntel", "fpu avx512_bf16", True, False),
        ("GenuineIntel", "fpu avx512_bf16 amx_bf16 amx_tile", True, True),
        ("AuthenticAMD", "fpu avx2", False, False),
        ("AuthenticAMD", "", False, False),
    ],
)
def test_where_bf16_pays(vendor, flags, computes, pays, cpu):
    first = f"processor\t: 0\nvendor_id\t: {vendor}\nbugs\t\t: none\nflags\t\t: {flags}\n"
    cpu(f"{first}\nprocessor\t: 1\nvendor_id\t: other\nflags\t\t: other\n")
    assert devices.cpu_property("vendor_id") == vendor
    assert devices.cpu_property("flags") == flags
    assert computes_in_bf16(CPU) == computes
    assert bf16_pays(CPU) == pays
    assert resolve_precision("auto", CPU) == ("bf16" if pays else "fp32")


@pytest.mark.parametrize("text", [None, "", "processor\t: 0\nFeatures\t: fp asimd\n"])
def test_a_cpu_that_does_not_describe_itself(text, cpu):
    cpu(text)
    assert devices.cpu_property("vendor_id") == devices.cpu_property("flags") == ""
    assert resolve_precision("auto", CPU) == "fp32"
    with pytest.raises(UserError, match=r"--precision bf16.*--precision fp32"):
        resolve_precision("bf16", CPU)
    with pytest.raises(UserError, match=r"--precision tf32.*NVIDIA"):
        resolve_precision("tf32", CPU)


def test_choices_need_no_pytorch():
    code = "import sys, training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0


def test_nets_that_do_not_want_channels_last():
    for net, wanted in ((nn.Sequential(nn.Conv2d(3, 4, 3)), True), (UNet(4), False)):
        channels_last(net)
        kernels = [p for p in net.parameters() if p.dim() == 4 and p.shape[2:] == (3, 3)]
        assert {p.is_contiguous(memory_format=torch.channels_last) for p in kernels} == {wanted}


FAULTS = """
import ctypes, resource, sys
from utils.devices import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
c = ctypes.CDLL(None)
c.malloc.restype, c.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for megabytes in range(8, 25):
    block = c.malloc(megabytes * 2**20)
    c.memset(block, 1, megabytes * 2**20)
    c.free(block)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_freed_memory_is_kept():
    """Each block is larger than any before: the C library would take it from the system, with a fault for each page."""
    found = {}
    for how in ("keep", "plain"):
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        found[how] = [int(word) for word in done.stdout.split()]
    if not found["keep"][0]:
        pytest.skip("this C library always gives freed memory back")
    assert found["keep"][1] < found["plain"][1] / 5


@pytest.mark.parametrize(
    ("precision", "rounded", "laid_out"),
    [("fp32", False, {Generator, Discriminator}), ("bf16", False, {Discriminator}), ("bf16", True, set())],
)
def test_networks_in_float32_get_the_layout(precision, rounded, laid_out):
    """Those alone: in bfloat16 they keep the channels first, as every other network does in both."""
    keep = () if rounded else (Discriminator,)
    run = Runner(precision, keep_float32=keep, layout=lambda network, image: torch.channels_last)
    image = torch.zeros(2, 3, 8, 10)
    for kind in (Generator, Discriminator):
        seen = []
        net = build(kind, 1, 1, 8, "group", seed=0)
        net.head.conv.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        run(net, image, *([image] if kind is Generator else []))
        assert seen[0].is_contiguous(memory_format=torch.channels_last) == (kind in laid_out)
        assert seen[0].is_contiguous() != (kind in laid_out)


def test_channels_last_is_for_group_norms_of_wide_groups_and_few_pixels():
    image, first = torch.zeros(1, 3, 80, 160), torch.contiguous_format

    def layout(image=image, **changes):
        shape = NetworkShape(**{"scale": 2, "channels": 64, "layers": 5, "norm": "group", "groups": 8} | changes)
        return image_layout(Discriminator(shape), image)

    assert layout() is torch.channels_last
    assert layout(channels=32) is first
    assert layout(groups=16) is first
    assert layout(norm="batch") is first
    assert layout(torch.zeros(1, 3, 256, 512)) is first
    assert layout(image.to("meta")) is first
    assert image_layout(nn.Identity(), image) is None
    assert procst_runner("fp32")(nn.Identity(), image) is image


def test_micro_batches_of_the_published_sizes():
    cpu, gpu = CPU, torch.device("cuda")
    sizes = [micro_batch_size((8, 3, 512 // k, 1024 // k), "group", device) for k in (1, 2) for device in (gpu, cpu)]
    assert sizes == [1, 1, 4, 1]
    assert micro_batch_size((8, 3, 80, 160), "group", cpu) == 2
    assert micro_batch_size((32, 3, 80, 160), "batch", cpu) is None


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norms_of_dark_images_are_exact(norm):
    """Channels-last norms of many pixels lose digits where the mean is large against the deviation.

    Batch norm would be off by 3e-5; group norm gets that layout here, at the most pixels it does.
    """
    torch.manual_seed(0)
    net = build(Discriminator, 1, 1, 64, norm, seed=0).train()
    image = 0.1 * torch.randn(2, 3, 128, 256) - 0.7
    seen = []
    net.body[0].actvn.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().double().clone()))
    run = Runner(layout=image_layout)
    for dtype in (torch.float32, torch.float64):
        run(copy.deepcopy(net).to(dtype), image.to(dtype))
    assert float((seen[0] - seen[1]).norm() / seen[1].norm()) < 5e-6
