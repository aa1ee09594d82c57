"""`--precision` and `--bf16_discriminators` of the training script."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import train_procst
from commands import only_run, procst_flags
from core.networks import Discriminator
from core.procst import ProCST
from refusals import check_refusal
from training.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow


def test_a_run_in_bf16(world, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.bf16_pays", lambda device: True)
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    result = run_script(train_procst, *procst_flags(world, tmp_path, precision="auto"))
    assert result.code == 0, result.err
    assert "precision bf16 (discriminators in float32)" in result.out
    checkpoint = load_checkpoint(only_run(tmp_path) / "latest.pth")
    assert checkpoint.config["run"]["precision"] == "bf16"
    states = list(checkpoint.modules.values())
    states += [values for optimizer in checkpoint.optimizers.values() for values in optimizer["state"].values()]
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}


def test_rounded_discriminators(world, tmp_path, run_script, monkeypatch):
    """The flag acts, a continued run keeps it, and it is refused with a precision that has no use for it."""
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    asked, step = [], ProCST.step

    def watched(self, *arguments):
        rounded = Discriminator not in self.run.keep_float32
        asked.append((self.run.precision, rounded))
        if len(asked) in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(ProCST, "step", watched)
    first = run_script(train_procst, *procst_flags(world, tmp_path, precision="bf16", bf16_discriminators=()))
    assert first.code == 75, first.err
    assert "precision bf16 (discriminators too)" in first.out
    run = only_run(tmp_path)
    assert run_script(train_procst, "--continue_train_from_path", run).code == 75
    assert asked == [("bf16", True)] * 4
    other = ("--continue_train_from_path", run, "--precision", "fp32")
    check_refusal(run_script(train_procst, *other), "--bf16_discriminators", "--precision fp32")
    last = run_script(train_procst, *other, "--no-bf16_discriminators")
    assert last.code == 0, last.err
    assert {precision for precision, _ in asked[4:]} == {"fp32"}


def test_precisions_that_the_device_lacks(world, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: False)
    for precision, parts in (("tf32", ("--precision tf32", "NVIDIA")), ("bf16", ("--precision bf16", "fp32"))):
        result = run_script(train_procst, *procst_flags(world, tmp_path / "out", precision=precision))
        check_refusal(result, *parts)
    assert not (tmp_path / "out").exists()
