"""`--precision` and `--bf16_discriminators` of the training script."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from core.checkpoint import load_checkpoint

import train_procst
from core.networks import Discriminator
from core.running import image_layout
from test_bad_input import check_refusal
from test_train_cli import only_run, training_flags
from worlds import write_cityscapes, write_gta5


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=4, size=(60, 44))
    write_cityscapes(tmp_path / "cityscapes", count=3, size=(64, 40), labels=False)
    return tmp_path


def test_a_run_in_bf16(world, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.bf16_pays", lambda device: True)
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    flags = training_flags(world, world / "out", precision="auto", save_checkpoint_rate=1)
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    assert "precision bf16 (discriminators in float32)" in result.out
    checkpoint = load_checkpoint(only_run(world / "out") / "latest.pth")
    assert checkpoint.config.compute.precision == "bf16"
    states = [state for states in checkpoint.networks.values() for state in states]
    states += [values for optimizer in checkpoint.optimizers.values() for values in optimizer["state"].values()]
    assert {tensor.dtype for state in states for tensor in state.values()} == {torch.float32}


def test_rounded_discriminators(world, tmp_path, run_script, monkeypatch):
    """The flag acts, a continued run keeps it, and with a precision that has no use for it it goes."""
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    asked, step = [], train_procst.Trainer.one_step

    def watched(self, *arguments):
        rounded = Discriminator not in self.run_network.keep_float32
        asked.append((self.run_network.precision, rounded and self.run_network.precision == "bf16"))
        assert self.run_network.layout is image_layout
        if len(asked) in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments)

    monkeypatch.setattr(train_procst.Trainer, "one_step", watched)
    flags = training_flags(world, tmp_path, precision="bf16", bf16_discriminators=())
    first = run_script(train_procst, *flags)
    assert first.code == 75, first.err
    assert "precision bf16 (discriminators too)" in first.out
    run = only_run(tmp_path)
    assert run_script(train_procst, "--continue_train_from_path", run).code == 75
    assert asked == [("bf16", True)] * 4
    last = run_script(train_procst, "--continue_train_from_path", run, "--precision", "fp32")
    assert last.code == 0, last.err
    assert set(asked[4:]) == {("fp32", False)}


def test_precisions_that_the_device_lacks(world, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: False)
    for precision, parts in (("tf32", ("--precision tf32", "NVIDIA")), ("bf16", ("--precision bf16", "fp32"))):
        check_refusal(run_script(train_procst, *training_flags(world, world / "out", precision=precision)), *parts)
    assert not (world / "out").exists()
