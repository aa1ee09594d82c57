"""Precision and layout: what they may change, and what they must not lose."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from core.losses import gradient_penalty
from core.networks import Discriminator, Generator
from core.procst import micro_batch_size, procst_runner
from models.unet import UNet
from steps import build
from training.precision import Runner, bf16_pays, channels_last, computes_in_bf16, resolve_precision
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

    exact, found = gradients(Runner()), gradients(Runner(precision) if rounded else procst_runner(precision))
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


def test_micro_batches_of_the_published_sizes():
    cpu, gpu = CPU, torch.device("cuda")
    sizes = [micro_batch_size((8, 3, 512 // k, 1024 // k), "group", device) for k in (1, 2) for device in (gpu, cpu)]
    assert sizes == [1, 1, 4, 1]
    assert micro_batch_size((8, 3, 80, 160), "group", cpu) == 2
    assert micro_batch_size((32, 3, 80, 160), "batch", cpu) is None
