"""A training is told to stop, or its disk, its output or its numbers fail: nothing is lost, and it goes on."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.tensorboard import FileWriter

import train_procst
from commands import assert_same_tensors, at_step, stop_at
from core.procst import ProCST
from faults import LAST, one_line, run_flags
from training.checkpoint import LATEST, load_checkpoint, read_newest
from utils import files as files_module
from utils import stopping
from utils import tensor_files as tensor_files_module
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes
from utils.tensor_files import DamagedFileError

pytestmark = pytest.mark.slow

# --- told to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # the others: below, and in other tests
def test_a_signal_saves_and_the_same_command_goes_on(world, undisturbed_run, tmp_path, run_script, monkeypatch, number):
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 1, 1, number)
        result = run_script(train_procst, *run_flags(world, tmp_path))
    line = one_line(result, code=75)
    assert "step 2 of scale 1" in line
    assert str(tmp_path / "run") in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.stage, state.step) == (1, 2)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


def test_the_same_request_twice_does_not_end_what_has_saved():
    before = {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS}
    with stopping.StopRequests():
        pass
    assert {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS} == before
    try:
        with stopping.StopRequests():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_stop_while_a_checkpoint_is_read_is_no_damage(tmp_path, monkeypatch):
    for name in ("latest.pth", "previous.pth"):
        torch.save({}, tmp_path / name)
    monkeypatch.setattr(tensor_files_module.torch, "load", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = {number: signal.getsignal(number) for number in stopping.STOP_SIGNALS}
    try:
        stop = stopping.StopRequests()
        stop.at_once = True
        with pytest.raises(stopping.Stopped), stop:
            read_newest(tmp_path)
        assert stop()  # also where the exception is lost, as in what deletes an object
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.ESTALE, "Stale file handle")])
def test_a_checkpoint_that_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, error):
    for name in ("latest.pth", "previous.pth"):
        torch.save({}, tmp_path / name)

    def fail(*_, **__):
        raise error

    for module, name in ((tensor_files_module.torch, "load"), (tensor_files_module.zipfile.ZipFile, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fail)
            with pytest.raises(UserError, match=r"latest\.pth") as found:
                read_newest(tmp_path)
        assert not isinstance(found.value, DamagedFileError)


def test_loaders_outlive_what_a_scheduler_sends_to_all(world, undisturbed_run, tmp_path, run_script, monkeypatch):
    sent = []

    def to_all():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            for child in multiprocessing.active_children():
                # From another process: a worker ends where its parent sends it SIGTERM.
                subprocess.run(["kill", f"-{number}", str(child.pid)], check=True)
                sent.append(child.pid)
        signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        at_step(patch, ProCST, 1, 1, to_all)
        result = run_script(train_procst, *run_flags(world, tmp_path, num_workers=1))
    assert len(sent) == 4
    assert "step 2 of scale 1" in one_line(result, code=75)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


# --- the newest checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    world, undisturbed_run, tmp_path, run_script, monkeypatch, damage
):
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 1, 2)
        assert run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1)).code == 75
    latest = tmp_path / "run" / "latest.pth"
    data = latest.read_bytes()
    if damage == "gone":
        latest.unlink()
    else:
        latest.write_bytes(data[: len(data) // 2])
    before = load_checkpoint(tmp_path / "run" / "previous.pth")
    assert (before.stage, before.step) == (1, 2)
    result = run_script(train_procst, *run_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert "latest.pth" in result.err
    assert "previous.pth" in result.err
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


def test_the_one_before_is_always_whole(tmp_path):
    path, before = tmp_path / "latest", tmp_path / "previous"
    for k in range(4):
        files_module.atomic_write(path, lambda file, k=k: file.write(bytes([k])), before)
        assert path.read_bytes() == bytes([k])
        assert not before.exists() if k == 0 else before.read_bytes() == bytes([k - 1])
    path.replace(before)  # what a kill between the two renamings leaves
    files_module.atomic_write(path, lambda file: file.write(b"new"), before)
    assert (path.read_bytes(), before.read_bytes()) == (b"new", bytes([3]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "previous"]


def test_a_full_disk_keeps_the_checkpoint(world, undisturbed_run, tmp_path, run_script, monkeypatch):
    real = files_module.os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2].startswith(".latest"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        at_step(patch, ProCST, 1, 1, lambda: patch.setattr(files_module.os, "fsync", full))
        result = run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1))
    line = one_line(result)
    assert "latest.pth" in line
    assert "No space left" in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.stage, state.step) == (1, 1)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


def test_checkpoints_by_the_clock(world, tmp_path, run_script, monkeypatch):
    seen = []

    def look():
        seen.append(load_checkpoint(tmp_path / "run" / "latest.pth").step)

    at_step(monkeypatch, ProCST, LAST, 2, look)
    assert run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_minutes=1e-9)).code == 0
    assert seen == [2]


def test_writes_of_one_file_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(files_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(UserError, match="I/O error"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# --- what shows the run -----------------------------------------------------------------------------------------


def test_a_run_outlives_the_pipe_that_shows_it(world, undisturbed_run, tmp_path):
    """As where `tee` dies of the Ctrl-C that is to stop the run: nothing printed may keep it from saving."""
    reading, writing = os.pipe()
    context = multiprocessing.get_context("fork")

    def train():
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(reading)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.__stderr__ = sys.stderr
        torch.set_num_threads(1)
        sys.argv = ["train_procst.py", *map(str, run_flags(world, tmp_path, num_workers=0))]
        with pytest.MonkeyPatch.context() as patch:
            stop_at(patch, ProCST, 1, 1, signal.SIGINT)
            run_cli(train_procst.main)

    process = context.Process(target=train)
    process.start()
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    process.join(120)
    assert process.exitcode == 75
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.stage, state.step) == (1, 2)


def test_a_log_that_cannot_be_written_is_given_up(world, undisturbed_run, tmp_path, run_script, monkeypatch):
    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileWriter, "add_summary", full)
    monkeypatch.setattr(FileWriter, "add_event", full)
    result = run_script(train_procst, *run_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert result.err.count("continues without it") == 1
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(world, tmp_path, run_script, monkeypatch, value):
    real = ProCST.step

    def step(self, batch, stage, step):
        if (stage, step) == (1, 2):
            with torch.no_grad():
                self.modules["Gst.1"].tail[0].conv.weight.fill_(value)
        return real(self, batch, stage, step)

    monkeypatch.setattr(ProCST, "step", step)
    result = run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1, print_rate=100))
    line = one_line(result)
    for part in ("Scale1/", "step 3 of scale 1", "latest.pth of step 2 of scale 1"):
        assert part in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.stage, state.step) == (1, 2)


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 20 GiB", "can't allocate memory"])
def test_out_of_memory(world, tmp_path, run_script, monkeypatch, message):
    def fail():
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    at_step(monkeypatch, ProCST, LAST, 0, fail)
    line = one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    for part in ("batch 1", f"scale {LAST}", "--batch_size_list", "--crop_size"):
        assert part in line
    assert load_checkpoint(tmp_path / "run" / "latest.pth").stage == LAST - 1
