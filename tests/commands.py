"""Command lines of tiny runs, and what such a run leaves: its folder, its tensors, its logs."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.checkpoint import load_checkpoint
from utils.errors import UserError

STEPS = 3  # of every scale


def command(flags, changes=None):
    """Words of a command line from values by flag; `()` is a flag without value, None leaves it out."""
    words = []
    for name, value in {**flags, **(changes or {})}.items():
        if value is not None:
            words += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return words


def procst_flags(world, out, **changes):
    """A ProCST run of three small scales without label losses."""
    flags = {
        "gpus": "cpu", "src_data_dir": world / "gta", "trg_data_dir": world / "cityscapes", "no_semseg": (),
        "src_resize": (52, 40), "trg_resize": (48, 36), "crop_size": (48, 36), "base_channels_list": 8,
        "batch_size_list": (2, 2, 1), "steps_per_scale": STEPS, "vgg_weights": "random", "content_layers": 6,
        "style_layers": (3, 6), "num_workers": 0, "precision": "fp32", "print_rate": 2, "lr_g": 1e-3, "lr_d": 1e-3,
        "checkpoints_dir": out / "models", "tb_logs_dir": out / "runs",
    }  # fmt: skip
    return command(flags, changes)


def label_flags(world, out, source_net, **changes):
    """The same with label losses and validation at the last scale."""
    labels = {
        "no_semseg": None, "model": "UNet", "semseg_weights": source_net, "lr_semseg": 1e-2, "validation_rate": 2,
    }  # fmt: skip
    return procst_flags(world, out, **{**labels, **changes})


def source_flags(world, out, **changes):
    """A training of a UNet on source."""
    flags = {
        "gpus": "cpu", "src_data_dir": world / "gta", "src_resize": (52, 40), "crop_size": (48, 36), "val_count": 2,
        "model": "UNet", "num_steps": 8, "batch_size": 2, "lr_semseg": 1e-2, "num_workers": 0, "precision": "fp32",
        "print_rate": 2, "output": out / "source.pth", "checkpoints_dir": out / "models", "tb_logs_dir": out / "runs",
    }  # fmt: skip
    return command(flags, changes)


def export_flags(run, out, **changes):
    """The export of a run's SiT images."""
    flags = {"gpus": "cpu", "trained_procst_path": run, "sit_output_path": out, "num_workers": 0}
    return command(flags, changes)


def only_run(out):
    """The folder of the only run in `--checkpoints_dir`."""
    (run,) = (out / "models").iterdir()
    return run


def tensors_of(path):
    """Every tensor of a checkpoint by where it stands."""
    checkpoint = load_checkpoint(path)

    def walk(value, place):
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(inner, f"{place} {key}")

    state = {"modules": checkpoint.modules, "optimizers": checkpoint.optimizers, "state": checkpoint.method_state}
    return dict(walk(state, ""))


def assert_same_tensors(ours, theirs):
    """Two checkpoints hold the same bits."""
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def metrics_of(run):
    """The lines of `metrics.jsonl` without what differs between two runs: the time they took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds_per_step"} for line in lines]


def logged(out):
    """The TensorBoard log of the only run in `--tb_logs_dir`."""
    (log,) = (out / "runs").iterdir()
    # TensorBoard reads files in the order of their names, which end in the second and a number within the process:
    # 9 would come after 10.
    written = sorted(log.glob("events.*"), key=lambda path: (path.name.split(".")[3], int(path.suffix[1:])))
    with tempfile.TemporaryDirectory() as ordered:
        for index, path in enumerate(written):
            shutil.copy(path, Path(ordered) / f"events.out.tfevents.{index:09d}")
        events = EventAccumulator(ordered)
        events.Reload()
    return events


def at_step(monkeypatch, method, stage, step, happens):
    """Let something happen before a method takes a step."""
    real = method.step

    def patched(self, batch, at_stage, at):
        if (at_stage, at) == (stage, step):
            happens()
        return real(self, batch, at_stage, at)

    monkeypatch.setattr(method, "step", patched)


def stop_at(monkeypatch, method, stage, step, number=signal.SIGTERM):
    """Ask a run to stop while it takes a step; it takes it, saves and ends with exit code 75."""
    at_step(monkeypatch, method, stage, step, lambda: signal.raise_signal(number))


def failing_at(call, function):
    """The function, which raises an error at its n-th call."""
    calls = []

    def counted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            raise UserError("killed")
        return function(*arguments, **keywords)

    return counted
