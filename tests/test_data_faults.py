"""Images turn unreadable and loader processes die while a training runs."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train_procst
from commands import assert_same_tensors, at_step
from core.procst import ProCST
from data_handlers.domain import Samples as DomainSamples
from faults import one_line, run_flags
from training.checkpoint import LATEST, load_checkpoint
from utils import loaders as loaders_module
from utils.errors import UserError
from utils.loaders import MOST_SKIPPED, load_in_order
from utils.stopping import LoaderDied, is_loader_death

pytestmark = pytest.mark.slow

# --- images ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(world, tmp_path):
    """A copy of the world, and what cuts one of its images short."""
    root = shutil.copytree(world, tmp_path / "world")
    bad = root / "gta" / "images" / "00002.png"
    return root, bad, lambda: bad.write_bytes(bad.read_bytes()[:200])


def test_an_image_turns_unreadable(spoilt, tmp_path, run_script, monkeypatch):
    root, bad, spoil = spoilt
    whole = bad.read_bytes()
    with monkeypatch.context() as patch:
        at_step(patch, ProCST, 0, 0, spoil)
        line = one_line(run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=5)))
    assert str(bad) in line
    assert "--on_bad_image skip" in line
    assert load_checkpoint(tmp_path / "run" / LATEST).stage == 0
    bad.write_bytes(whole)
    assert run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=5)).code == 0


def test_unreadable_images_are_skipped_and_listed(spoilt, tmp_path, run_script, monkeypatch):
    root, bad, spoil = spoilt
    at_step(monkeypatch, ProCST, 0, 0, spoil)
    flags = run_flags(root, tmp_path, steps_per_scale=8, on_bad_image="skip", num_workers=1)
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    listed = result.out[result.out.index("were skipped:") :].splitlines()
    assert listed[1].strip().startswith(str(bad))
    assert load_checkpoint(tmp_path / "run" / LATEST).skipped == [listed[1].strip()]


def test_a_disk_that_is_gone_is_no_bad_image(spoilt, tmp_path, run_script, monkeypatch):
    root, _, _ = spoilt

    def lose():
        for path in (root / "gta" / "images").iterdir():
            path.unlink()

    at_step(monkeypatch, ProCST, 0, 0, lose)
    # More images than those of the first step are tried one after the other, all of them in vain.
    result = run_script(train_procst, *run_flags(root, tmp_path, steps_per_scale=8, on_bad_image="skip"))
    assert "is the disk there?" in one_line(result)


# --- loaders --------------------------------------------------------------------------------------------------------


def test_a_killed_loader_ends_the_run_and_the_same_command_continues_it(
    world, undisturbed_run, tmp_path, run_script, monkeypatch
):
    real = DomainSamples.__getitem__
    main = os.getpid()

    def die(self, position):
        if position == 4 and os.getpid() != main:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, position)

    with monkeypatch.context() as patch:
        patch.setattr(DomainSamples, "__getitem__", die)
        line = one_line(run_script(train_procst, *run_flags(world, tmp_path, num_workers=1)), code=75)
    assert "Killed" in line or "exited unexpectedly" in line
    assert "--continue_train_from_path" in line or "run the same command again" in line
    assert run_script(train_procst, *run_flags(world, tmp_path, num_workers=1)).code == 0
    assert_same_tensors(tmp_path / "run" / LATEST, undisturbed_run / LATEST)


class Samples:
    """Numbers, and what happens in the worker in place of some of them."""

    def __init__(self, **happens):
        self.happens = {int(name[1:]): action for name, action in happens.items()}

    def __call__(self, index):
        return self.happens[index](index) if index in self.happens else index


def bad(index):
    raise UserError(f"file {index} is bad")


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_used(workers):
    samples = Samples(_1=bad)
    with pytest.raises(UserError, match=r"^file 1 is bad; do something$"):
        list(load_in_order(samples, range(3), num_workers=workers, or_else="; do something"))
    loaded = list(load_in_order(samples, range(3), num_workers=workers, skip_unusable=True))
    assert [str(sample) for sample in loaded] == ["0", "file 1 is bad", "2"]
    gone = Samples(**{f"_{k}": bad for k in range(3, 3 + MOST_SKIPPED)})
    loaded = []
    with pytest.raises(UserError, match="is the disk there"):
        loaded.extend(load_in_order(gone, range(20), num_workers=workers, skip_unusable=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_other_errors_as_they_are(workers):
    def slow(index):
        time.sleep(0.2)
        return index

    samples = Samples(_0=slow)
    batches = load_in_order(lambda indices: [*map(samples, indices)], [(0, 1), (2,), (4, 3)], num_workers=workers)
    assert list(batches) == [[0, 1], [2], [4, 3]]

    def wrong(index):
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake"):
        list(load_in_order(Samples(_1=wrong), range(3), num_workers=workers))


def kill(index):
    os.kill(os.getpid(), signal.SIGKILL)


def no_shared_memory(index):
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


class Unsendable:
    """As a batch for which no file can be opened: multiprocessing drops it in another thread of the worker."""

    def __reduce__(self):
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("happens", "part"),
    [
        (kill, "killed by signal|exited unexpectedly"),
        (no_shared_memory, "no shared memory"),
        (lambda index: Unsendable(), "timed out after 3 seconds"),
    ],
    ids=["killed", "out of shared memory", "stuck"],
)
def test_a_worker_that_dies_or_is_stuck(monkeypatch, happens, part):
    monkeypatch.setattr(loaders_module, "TIMEOUT", 3)
    got = []
    with pytest.raises(LoaderDied, match=rf"({part}).*--num_workers") as death:
        got.extend(load_in_order(Samples(_2=happens), range(4), num_workers=1))
    assert got in ([0, 1], [0], [])  # what a killed worker had ready may be lost with it
    assert "\n" not in str(death.value)
    assert is_loader_death(death.value)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_in_the_middle_of_a_save():
    """PyTorch raises in the main thread, and `torch.save` turns that into an error of its own."""

    class File(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 5:
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
            return super().write(data)

    with pytest.raises(RuntimeError, match="unexpected pos") as found:
        torch.save({"weight": torch.zeros(1000)}, File())
    assert is_loader_death(found.value)
    assert "DataLoader worker (pid 7) is killed by signal: Killed: memory" in str(LoaderDied.because(found.value))
    assert not is_loader_death(RuntimeError("unexpected pos"))


def test_workers_killed_in_the_middle_of_sending():
    """The batches do not fit into a pipe, so that both workers wait with half of one sent."""
    large = Samples(**{f"_{k}": lambda index: np.zeros(1_000_000) for k in range(4)})
    samples = load_in_order(large, range(4), num_workers=2)
    next(samples)

    def kill_and_go_on():
        time.sleep(0.5)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        list(samples)

    with pytest.raises((LoaderDied, RuntimeError)) as death:
        kill_and_go_on()
    assert is_loader_death(death.value)


def test_a_loader_that_is_no_longer_needed_ends_its_workers():
    samples = load_in_order(Samples(), range(100), num_workers=2)
    assert next(samples) == 0
    assert len(multiprocessing.active_children()) == 2
    samples.close()
    assert not multiprocessing.active_children()


def test_workers_ignore_what_a_scheduler_sends_to_the_group():
    def send(index):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            # From another process than the parent, as a scheduler's.
            subprocess.run(["kill", f"-{number}", str(os.getpid())], check=True)
        return index

    assert list(load_in_order(Samples(_1=send), range(3), num_workers=1)) == [0, 1, 2]


def test_workers_of_a_killed_process_end():
    """Also where they wait for room in a pipe."""
    code = (
        "import multiprocessing, os, numpy, torch\n"
        "from utils.loaders import load_in_order\n"
        "data = [(torch.zeros(9), numpy.zeros(1_000_000)) for _ in range(9)]\n"
        "batches = load_in_order(data.__getitem__, range(9), num_workers=2)\n"
        "next(batches); next(batches); print(len(multiprocessing.active_children()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(train_procst.__file__).parent)}
    # Comes back when the last process that could write to the output is gone.
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "2", result.stderr
