"""A smoke test on a GPU: both trainings in every precision, translation without enough memory, NCCL, repeatability."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import train_procst
import train_semseg_on_source
from commands import assert_same_tensors, procst_flags, source_flags
from core.networks import Generator, freeze
from core.translate import Translator
from data_handlers.images import image_pyramid
from methods import CASES, steps_of, write_world
from steps import build
from training.checkpoint import LATEST
from training.distributed import Rank
from training.precision import computes_in_bf16, set_convolution_precision
from worlds import noise_image

GPU = torch.device("cuda", 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TRAINED = ("procst-labels", "procst-batch", "source-unet", "source-batchnorm")


@pytest.fixture(scope="module")
def methods_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


@pytest.fixture(autouse=True)
def convolutions():
    """Leave the setting of TF32 as it was."""
    before = torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = before


def losses_of(world, case, device, precision):
    """The losses of three steps of every stage, after which weights are finite and have moved."""
    if precision != "fp32" and not computes_in_bf16(device):
        pytest.skip("needs a GPU from Ampere on")
    set_convolution_precision(precision)
    method = CASES[case].prepared(world, Rank(device=device), precision=precision)
    losses = []
    for stage in range(len(method.stages())):
        for step, batch in steps_of(method, stage, 3):
            if step == 0:
                before = {name: optimizer.param_groups[0]["params"][0].clone() for name, optimizer in groups(method)}
            losses.append({name: float(value) for name, value in method.step(batch, stage, step).items()})
        for name, optimizer in groups(method):
            weight = optimizer.param_groups[0]["params"][0]
            assert weight.device == device
            assert weight.dtype == torch.float32
            assert weight.isfinite().all()
            assert not torch.equal(weight, before[name]), name
        method.end_stage(stage)
    return losses


def groups(method):
    return method.optimizers.items()


@pytest.mark.parametrize("case", TRAINED)
def test_the_first_step_is_the_cpus(methods_world, case):
    """On a GPU translations are recomputed, losses are taken in micro-batches, and optimisers are other kernels."""
    ours = losses_of(methods_world, case, GPU, "fp32")[0]
    assert ours == pytest.approx(losses_of(methods_world, case, torch.device("cpu"), "fp32")[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("case", TRAINED)
def test_rounded_convolutions(methods_world, case, precision):
    for losses in losses_of(methods_world, case, GPU, precision):
        assert np.isfinite(list(losses.values())).all()


def test_translation_without_memory_for_the_whole_image():
    generators = [freeze(build(Generator, scale, 1, 64, "group", scale)).to(GPU) for scale in range(2)]
    pixels = np.asarray(noise_image((2048, 1024), 1))
    levels = [torch.from_numpy(level)[None] for level in image_pyramid(pixels, 1, 0.5, 1)]
    everything = 10**12  # pixels
    whole = Translator(generators, 0.5, GPU, everything)(levels)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    # One layer's features of the whole image are 512 MiB.
    torch.cuda.set_per_process_memory_fraction(450 * 2**20 / total, GPU)
    try:
        tiled = Translator(generators, 0.5, GPU, everything)(levels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert np.abs(whole.astype(int) - tiled).max() <= 1


def run(script, flags):
    """A script in a process of its own, as settings of CUDA hold for the life of a process."""
    command = [sys.executable, script.__file__, *map(str, flags)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.processes
def test_deterministic_runs_are_the_same_bits(world, tmp_path):
    flags = {"gpus": "0", "checkpoints_dir": None, "deterministic": (), "precision": "fp32"}
    for name in ("one", "two"):
        run(train_procst, procst_flags(world, tmp_path, run_dir=tmp_path / name, **flags))
    assert_same_tensors(tmp_path / "one" / LATEST, tmp_path / "two" / LATEST)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_a_batch(world, tmp_path):
    flags = {"gpus": ("0", "1"), "checkpoints_dir": None, "run_dir": tmp_path / "procst", "batch_size_list": 2}
    assert "finished" in run(train_procst, procst_flags(world, tmp_path, **flags))
    flags = {"gpus": ("0", "1"), "checkpoints_dir": None, "run_dir": tmp_path / "source"}
    assert "finished" in run(train_semseg_on_source, source_flags(world, tmp_path, **flags))
