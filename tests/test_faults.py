"""A training is told to stop, or its disk, images, loaders or numbers fail: nothing is lost, and it goes on."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import FileWriter

import train_procst
from core.checkpoint import load_checkpoint
from core.run_folder import log_name
from data_handlers import stream as stream_module
from test_train_cli import all_tensors, training_flags, world  # noqa: F401
from utils import files as files_module
from utils import processes as processes_module
from utils import stopping
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes
from utils.loaders import RESTARTS, batches_in_order
from utils.locks import claimed
from utils.processes import init_loader

LAST = 2  # scale
STEPS = 3  # of every scale


def run_flags(world, out, **changes):  # noqa: F811
    return training_flags(world, out, checkpoints_dir=None, run_dir=out / "run", **changes)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):  # noqa: F811
    """The tensors of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_procst.py", *map(str, run_flags(world, out))])
        train_procst.main()
    return dict(all_tensors(load_checkpoint(out / "run" / "latest.pth")))


def same_as(undisturbed, folder):
    ours = dict(all_tensors(load_checkpoint(folder / "latest.pth")))
    return ours.keys() == undisturbed.keys() and all(torch.equal(ours[k], v) for k, v in undisturbed.items())


def at_step(monkeypatch, scale, step, happens):
    """Let something happen before a step is taken."""
    real = train_procst.Trainer.one_step

    def one_step(self, *arguments):
        if (self.scale, self.step) == (scale, step):
            happens(self)
        return real(self, *arguments)

    monkeypatch.setattr(train_procst.Trainer, "one_step", one_step)


def one_line(result, code=2):
    """The message: the last line, as bars are drawn above it."""
    assert result.code == code
    assert "Traceback" not in result.err
    return result.err.strip().replace("\r", "\n").splitlines()[-1]


# --- told to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])  # the others: below, and in other tests
def test_a_signal_saves_and_the_same_command_goes_on(world, undisturbed, tmp_path, run_script, monkeypatch, number):  # noqa: F811
    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, lambda trainer: signal.raise_signal(number))
        result = run_script(train_procst, *run_flags(world, tmp_path))
    line = one_line(result, code=75)
    assert "step 2 of scale 1" in line
    assert str(tmp_path / "run") in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.scale, state.step) == (1, 2)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert same_as(undisturbed, tmp_path / "run")


def test_a_second_signal_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(stopping.os, "_exit", codes.append)
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.05)
    with stopping.StopRequests() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # to the group and to its leader: one request
        assert stop()
        assert codes == []
        time.sleep(0.1)
        signal.raise_signal(signal.SIGUSR1)
        assert codes == [128 + signal.SIGUSR1]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_loaders_outlive_what_a_scheduler_sends_to_all_processes(world, undisturbed, tmp_path, run_script, monkeypatch):  # noqa: F811
    sent = []

    def to_all(trainer):
        for number in (signal.SIGTERM, signal.SIGUSR1):
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)
                sent.append(child.pid)
        signal.raise_signal(signal.SIGUSR1)

    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, to_all)
        result = run_script(train_procst, *run_flags(world, tmp_path, num_workers=1))
    assert len(sent) == 4
    assert "step 2 of scale 1" in one_line(result, code=75)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert same_as(undisturbed, tmp_path / "run")


# --- the newest checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut short", "gone"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    world, undisturbed, tmp_path, run_script, monkeypatch, damage  # noqa: F811
):
    with monkeypatch.context() as patch:
        at_step(patch, 1, 2, lambda trainer: signal.raise_signal(signal.SIGTERM))
        assert run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1)).code == 75
    latest = tmp_path / "run" / "latest.pth"
    data = latest.read_bytes()
    if damage == "gone":
        latest.unlink()
    else:
        latest.write_bytes(data[: len(data) // 2])
    before = load_checkpoint(tmp_path / "run" / "previous.pth")
    assert (before.scale, before.step) == (1, 2)
    result = run_script(train_procst, *run_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert "latest.pth" in result.err
    assert "previous.pth" in result.err
    assert (tmp_path / "run" / "damaged.pth").exists() == (damage != "gone")
    assert same_as(undisturbed, tmp_path / "run")


def test_the_one_before_is_always_whole(tmp_path):
    path, before = tmp_path / "latest", tmp_path / "previous"
    for k in range(4):
        files_module.atomic_write(path, lambda file, k=k: file.write(bytes([k])), before)
        assert path.read_bytes() == bytes([k])
        assert not before.exists() if k == 0 else before.read_bytes() == bytes([k - 1])
    # Killed between the two names: both are of one file.
    before.unlink()
    os.link(path, before)
    files_module.atomic_write(path, lambda file: file.write(b"new"), before)
    assert (path.read_bytes(), before.read_bytes()) == (b"new", bytes([3]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "previous"]


def test_the_one_before_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module.os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    path, before = tmp_path / "latest", tmp_path / "previous"
    for content in (b"1", b"2"):
        files_module.atomic_write(path, lambda file, content=content: file.write(content), before)
    assert (path.read_bytes(), before.read_bytes()) == (b"2", b"1")


def test_a_full_disk_keeps_the_checkpoint(world, undisturbed, tmp_path, run_script, monkeypatch):  # noqa: F811
    real = files_module.os.fsync

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").rpartition("/")[2].startswith(".latest"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        at_step(patch, 1, 1, lambda trainer: patch.setattr(files_module.os, "fsync", full))
        result = run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1))
    line = one_line(result)
    assert "latest.pth" in line
    assert "No space left" in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.scale, state.step) == (1, 1)
    assert run_script(train_procst, *run_flags(world, tmp_path)).code == 0
    assert same_as(undisturbed, tmp_path / "run")


def test_checkpoints_by_the_clock(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    seen = []

    def look(trainer):
        seen.append(load_checkpoint(tmp_path / "run" / "latest.pth").step)

    at_step(monkeypatch, LAST, 2, look)
    assert run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_minutes=1e-9)).code == 0
    assert seen == [2]


# --- which run ------------------------------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_no_run(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"x")
    assert "--run_dir" in one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


def test_a_run_in_use_is_left_alone(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with claimed(folder, "--run_dir"):
            ready.set()
            done.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert ready.wait(30)
        line = one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    finally:
        done.set()
        other.join()
    assert "another process" in line
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_kill_in_the_first_write_leaves_is_no_other_file(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".latest.pth.x1.procst-tmp", ".config.json.x2.procst-tmp", "config.json", ".lock"):
        (folder / name).write_bytes(b"{")
    assert run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)).code == 0
    assert not list(folder.glob(".*.procst-tmp"))


def test_a_run_that_went_on_meanwhile_is_left_alone(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    assert run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)).code == 0
    latest = tmp_path / "run" / "latest.pth"

    def and_another_saves(path):
        state = load_checkpoint(path)
        atomic_write_bytes(latest, latest.read_bytes())
        return state

    monkeypatch.setattr(train_procst, "load_checkpoint", and_another_saves)
    assert "meanwhile" in one_line(run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)))


def test_logs_of_runs_named_alike_are_apart(tmp_path):
    names = {log_name(tmp_path / name) for name in ("a/run", "b/run", "c/2026-11-21_10-00-00_gta5_to_cityscapes")}
    assert len(names) == 3
    assert "2026-11-21_10-00-00_gta5_to_cityscapes" in names


# --- what shows the run -----------------------------------------------------------------------------------------


def test_a_run_outlives_the_pipe_that_shows_it(world, undisturbed, tmp_path):  # noqa: F811
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
        real = train_procst.Trainer.one_step

        def one_step(self, *arguments):
            if (self.scale, self.step) == (1, 1):
                signal.raise_signal(signal.SIGINT)
            return real(self, *arguments)

        train_procst.Trainer.one_step = one_step
        run_cli(train_procst.main)

    process = context.Process(target=train)
    process.start()
    os.close(writing)
    os.read(reading, 10)
    os.close(reading)
    process.join(120)
    assert process.exitcode == 75
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.scale, state.step) == (1, 2)


def test_a_log_that_cannot_be_written_is_given_up(world, undisturbed, tmp_path, run_script, monkeypatch):  # noqa: F811
    def full(self, *arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileWriter, "add_summary", full)
    monkeypatch.setattr(FileWriter, "add_event", full)
    result = run_script(train_procst, *run_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert result.err.count("without TensorBoard") == 1
    assert same_as(undisturbed, tmp_path / "run")


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(world, tmp_path, run_script, monkeypatch, value):  # noqa: F811
    def spoil(trainer):
        with torch.no_grad():
            trainer.networks["Gst"][-1].tail[0].conv.weight.fill_(value)

    at_step(monkeypatch, 1, 2, spoil)
    result = run_script(train_procst, *run_flags(world, tmp_path, save_checkpoint_rate=1, print_rate=100))
    line = one_line(result)
    for part in ("Scale1/", "step 3 of scale 1", "latest.pth of step 2 of scale 1"):
        assert part in line
    state = load_checkpoint(tmp_path / "run" / "latest.pth")
    assert (state.scale, state.step) == (1, 2)


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 20 GiB", "can't allocate memory"])
def test_out_of_memory(world, tmp_path, run_script, monkeypatch, message):  # noqa: F811
    def fail(trainer):
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    at_step(monkeypatch, LAST, 0, fail)
    line = one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    for part in ("batch 1", "scale 2", "--batch_size_list", "--crop_size"):
        assert part in line
    assert load_checkpoint(tmp_path / "run" / "latest.pth").scale == 1


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(world, tmp_path):  # noqa: F811
    """A copy of the world in which an image is cut short once training has begun."""
    root = tmp_path / "world"
    for path in world.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(world)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    bad = root / "gta" / "images" / "00002.png"

    def spoil(trainer):
        bad.write_bytes(bad.read_bytes()[:200])

    return root, bad, spoil


def test_an_image_turns_unreadable(spoilt, tmp_path, run_script, monkeypatch):
    root, bad, spoil = spoilt
    whole = bad.read_bytes()
    with monkeypatch.context() as patch:
        at_step(patch, 0, 0, spoil)
        line = one_line(run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=5)))
    assert str(bad) in line
    assert "--on_bad_image skip" in line
    assert load_checkpoint(tmp_path / "run" / "latest.pth").scale == 0
    bad.write_bytes(whole)
    assert run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=5)).code == 0


def test_unreadable_images_are_skipped_and_listed(spoilt, tmp_path, run_script, monkeypatch):
    root, bad, spoil = spoilt
    at_step(monkeypatch, 0, 0, spoil)
    flags = run_flags(root, tmp_path, steps_per_scale=8, on_bad_image="skip", num_workers=1)
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    listed = result.out[result.out.index("were skipped:") :].splitlines()
    assert listed[1].strip().startswith(str(bad))
    assert load_checkpoint(tmp_path / "run" / "latest.pth").skipped == [listed[1].strip()]


def test_a_disk_that_is_gone_is_no_bad_image(spoilt, tmp_path, run_script, monkeypatch):
    root, _, _ = spoilt

    def lose(trainer):
        for path in (root / "gta" / "images").iterdir():
            path.unlink()

    at_step(monkeypatch, 0, 0, lose)
    result = run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=8, on_bad_image="skip"))
    assert "is the disk there?" in one_line(result)


# --- loaders --------------------------------------------------------------------------------------------------------


def test_a_killed_loader_is_replaced(world, undisturbed, tmp_path, run_script, monkeypatch):  # noqa: F811
    real = stream_module.StreamSamples.__getitem__
    once = tmp_path / "killed"

    def die_once(self, position):
        if self.config.scale == 1 and position >= 3 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, position)

    monkeypatch.setattr(stream_module.StreamSamples, "__getitem__", die_once)
    result = run_script(train_procst, *run_flags(world, tmp_path, num_workers=1))
    assert result.code == 0, result.err
    assert once.exists()
    assert "loading starts again" in result.err
    assert same_as(undisturbed, tmp_path / "run")


class _Deadly(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "gone")])
def test_a_loader_that_dies_while_its_tensors_are_fetched(error):
    def loader_at(index):
        return _Raising(iter(range(index, 4)), error if index == 0 else None)

    assert list(batches_in_order(loader_at, "")) == [0, 1, 2, 3]


class _Raising:
    """Gives two batches, and then an error."""

    def __init__(self, batches, error):
        self.batches, self.error = batches, error

    def __iter__(self):
        for count, batch in enumerate(self.batches):
            if self.error is not None and count == 2:
                raise self.error
            yield batch


def test_an_error_of_a_dataset_is_no_death():
    text = "Caught FileNotFoundError in DataLoader worker process 0."
    with pytest.raises(FileNotFoundError):
        list(batches_in_order(lambda index: _Raising(iter(range(4)), FileNotFoundError(text)), ""))


def test_loaders_that_keep_dying():
    starts = []

    def loader_at(index):
        starts.append(index)
        # Ends quickly: PyTorch looks after its workers every 5 seconds.
        return DataLoader(
            _Deadly(), batch_size=None, sampler=range(index, 4), num_workers=1, worker_init_fn=init_loader, timeout=1
        )

    got = []
    samples = batches_in_order(loader_at, "start again")
    with pytest.raises(UserError, match="--num_workers; start again"):
        got.extend(int(sample) for sample in samples)
    assert got[:1] == [0]
    assert got in ([0], [0, 1])  # what a dying worker had ready may be lost with it, and is then made again
    assert len(starts) > RESTARTS


def test_a_loader_that_is_told_to_end_does_so_later():
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def load():
        processes_module.GRACE = 0.2
        init_loader(0)
        ready.set()
        threading.Event().wait(60)

    process = context.Process(target=load)
    process.start()
    assert ready.wait(30)
    os.kill(process.pid, signal.SIGTERM)
    process.join(30)
    assert process.exitcode == 0


def test_writes_of_one_file_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write_bytes(path, b"old")
    monkeypatch.setattr(files_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(UserError, match="I/O error"):
        atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
