"""Images turn unreadable and loader processes die while a training runs."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from core.checkpoint import load_checkpoint
from torch.utils.data import DataLoader, Dataset

import train_procst
from data_handlers import stream as stream_module
from faults import at_step, one_line, run_flags, same_as, undisturbed, world  # noqa: F401
from utils import loaders as loaders_module
from utils import processes as processes_module
from utils.errors import UserError
from utils.loaders import RESTARTS, batches_in_order
from utils.processes import init_loader

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


class _Large(Dataset):
    """Batches that do not fit into a pipe, so that a worker has to wait in the middle of sending one."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return np.full(1_000_000, index, np.uint8)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_loader_that_dies_in_the_middle_of_a_batch(monkeypatch, number):
    def loader_at(index):
        return DataLoader(
            _Large(), batch_size=None, sampler=range(index, 4), num_workers=2, worker_init_fn=init_loader,
            collate_fn=lambda sample: sample,
        )  # fmt: skip

    monkeypatch.setattr(processes_module, "GRACE", 0.2)
    got = []
    for sample in batches_in_order(loader_at, ""):
        if not got:
            time.sleep(0.5)  # until both write
            workers = multiprocessing.active_children()
            for worker in workers:
                os.kill(worker.pid, number)
            time.sleep(0.5)
        got.append(int(sample[0]))
        assert len(sample) == 1_000_000
    assert len(workers) == 2
    assert got == [0, 1, 2, 3]
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


class _Unsendable(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return _Unpicklable() if index == 2 else index


class _Unpicklable:
    def __reduce__(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_batch_that_cannot_be_sent():
    """As where shared memory is full: multiprocessing would drop it, and it would be waited for without end."""

    def loader_at(index):
        return DataLoader(
            _Unsendable(), batch_size=None, sampler=range(index, 4), num_workers=1, worker_init_fn=init_loader,
            collate_fn=lambda sample: sample,
        )  # fmt: skip

    got = []
    with pytest.raises(UserError, match="shared memory"):
        got.extend(batches_in_order(loader_at, "start again"))
    assert got == [0, 1]


def test_loaders_that_cannot_be_started(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
        with pytest.raises(UserError, match=r"cannot be started .*--num_workers; start again"):
            next(batches_in_order(lambda index: DataLoader(_Large(), num_workers=1), "start again"))
    # A limit on processes counts threads, too.
    real = threading.Thread.start

    def refuse_thread(self):
        if self.name.startswith("QueueFeederThread"):
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", refuse_thread)
    with pytest.raises(UserError, match=r"cannot be started .*number of processes.*start again"):
        next(batches_in_order(lambda index: DataLoader(_Large(), num_workers=1), "start again"))
    assert not multiprocessing.active_children()


def test_a_second_death_while_the_first_is_handled():
    process = multiprocessing.get_context("fork").Process(target=os._exit, args=(1,))
    process.start()
    process.join()
    with pytest.raises(RuntimeError, match="DataLoader worker"), loaders_module._interrupted_by_death_of([process]):
        signal.raise_signal(signal.SIGCHLD)
    signal.raise_signal(signal.SIGCHLD)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    waiting = loaders_module._interrupted_by_death_of([process])
    waiting.__enter__()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        signal.getsignal(signal.SIGCHLD)(signal.SIGCHLD, None)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL


def test_killed_loaders_leave_nothing_in_the_temporary_folder(tmp_path):
    code = (
        "import multiprocessing, os, sys; from torch.utils.data import DataLoader\n"
        "from utils.processes import init_loader\n"
        "import torch; batches = iter(DataLoader(torch.zeros(9, 9), num_workers=2, worker_init_fn=init_loader))\n"
        "next(batches); next(batches); print(len(os.listdir(os.environ['TMPDIR'])), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(train_procst.__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert int(result.stdout) > 0, result.stderr
    for _ in range(100):
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


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
    assert process.exitcode == 1
