"""`--precision` of the training script."""

from __future__ import annotations

import pytest
import torch

import train_procst
from commands import only_run, procst_flags
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


def test_precisions_that_the_device_lacks(world, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: False)
    for precision, parts in (("tf32", ("--precision tf32", "NVIDIA")), ("bf16", ("--precision bf16", "fp32"))):
        result = run_script(train_procst, *procst_flags(world, tmp_path / "out", precision=precision))
        check_refusal(result, *parts)
    assert not (tmp_path / "out").exists()
