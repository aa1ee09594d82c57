"""Ways to export faster: the same images from several processes, other compression, reduced precision."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import create_sit_dataset
import train_procst
from core.export import SourceImages
from test_bad_input import check_refusal
from test_train_cli import export_flags, only_run, training_flags
from utils.devices import cpus_per_device, default_workers
from utils.png import is_complete_rgb8
from worlds import noise_image, write_cityscapes, write_gta5

COUNT = 5
# Far more than are translated before a test interrupts.
MANY = 300
PATIENCE = 180


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_gta5(root / "gta", count=COUNT, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=3, size=(64, 40), labels=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_procst.py", *map(str, training_flags(root, root, steps_per_scale=2))])
        train_procst.main()
    return root


def export(run_script, world, out, *flags):
    result = run_script(create_sit_dataset, *export_flags(only_run(world), world, out), *flags)
    assert result.code == 0, result.err
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())}


def test_several_processes_write_the_same_images(world, tmp_path, run_script):
    alone = export(run_script, world, tmp_path / "alone")
    shared = export(run_script, world, tmp_path / "shared", "--gpus", "cpu", "cpu")
    assert len(alone) == COUNT
    assert alone.keys() == shared.keys()
    assert all(np.array_equal(pixels, shared[name]) for name, pixels in alone.items())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture under many names, so large that a loader has to wait until it can hand it over."""
    root = tmp_path_factory.mktemp("pictures")
    noise_image((480, 360), 1).save(root / "000.png")
    for k in range(1, MANY):
        os.link(root / "000.png", root / f"{k:03d}.png")
    return root


def many_flags(world, pictures, out, *gpus):
    flags = export_flags(only_run(world), world, out, gpus=gpus, source="folder", src_data_dir=pictures, num_workers=1)
    return [*map(str, flags), "--encoders", "1"]


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def parents():
    """Parent of every process that is no zombie."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX":
            found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid):
    known, found = parents(), {pid}
    while more := {process for process, parent in known.items() if parent in found} - found:
        found |= more
    return found - {pid}


@dataclass
class Background:
    """A program in a session of its own, as a shell starts it in a terminal."""

    process: subprocess.Popen
    errors: Path

    def finish(self, gone):
        """Exit code and messages, once every process in `gone` has ended."""
        code = self.process.wait(PATIENCE)
        wait_until(lambda: not gone & parents().keys())
        lines = self.errors.read_text().replace("\r", "\n").splitlines()
        return code, [line for line in lines if line.strip() and "%|" not in line]


@pytest.fixture
def background(tmp_path):
    started = []

    def start(*command):
        errors = tmp_path / "stderr.txt"
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "PYTHONPATH": "."},
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                # Tests that a shell started in the background ignore SIGINT, and programs inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        started.append(process)
        return Background(process, errors)

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize(
    ("target", "number", "code", "message"),
    [
        ("main", signal.SIGKILL, -signal.SIGKILL, None),
        ("group", signal.SIGINT, 130, "interrupted"),
    ],
)
def test_an_export_on_several_devices_leaves_no_process(
    world, pictures, tmp_path, background, target, number, code, message
):
    out = tmp_path / "sit"
    run = background("create_sit_dataset.py", *many_flags(world, pictures, out, "cpu", "cpu"))
    written = lambda: list(out.glob("*.png"))  # noqa: E731
    # Two that translate, their loaders, and a process of multiprocessing's own.
    wait_until(lambda: len(written()) > 3 and len(descendants(run.process.pid)) == 5)
    processes = descendants(run.process.pid)
    (os.killpg if target == "group" else os.kill)(run.process.pid, number)
    ended, lines = run.finish(processes)
    assert ended == code
    assert len(lines) == (message is not None), lines
    if message:
        assert lines[0].startswith(message)
    assert 3 < len(written()) < MANY
    assert all(is_complete_rgb8(path, (480, 360)) for path in written())


JOBS = """
import os, sys, time
from pathlib import Path
from utils.errors import UserError, run_cli
from utils.processes import Job, run_jobs

def work(folder, failing, go_on):
    (folder / "new").write_text(str(os.getpid()))
    (folder / "new").rename(folder / "started")
    while failing and not (folder.parent / "1/started").exists():
        time.sleep(0.01)
    if failing == "kindly":
        raise UserError("bad picture")
    if failing:
        {}["key"]
    while go_on(1):
        time.sleep(0.01)
    (folder / "stopped").touch()

if __name__ == "__main__":
    out, failing = Path(sys.argv[1]), sys.argv[2]
    for name in "01":
        (out / name).mkdir()
    jobs = [Job("device 0", work, (out / "0", failing)), Job("device 1", work, (out / "1", ""))]
    run_cli(lambda: run_jobs(jobs, lambda count: None, if_killed="go on"))
"""


@pytest.fixture
def jobs(tmp_path, background):
    """Start two jobs that only wait until they are stopped."""

    def start(failing=""):
        (tmp_path / "jobs.py").write_text(JOBS)
        return background(tmp_path / "jobs.py", tmp_path, failing)

    return start


KILLED = (
    "error: the process of device 1 was ended by signal 9 (SIGKILL, as the system does where memory runs out); go on"
)


@pytest.mark.parametrize(
    ("target", "number", "code", "messages"),
    [
        ("main", signal.SIGINT, 130, ["interrupted"]),
        ("main", signal.SIGTERM, -signal.SIGTERM, []),
        ("child", signal.SIGTERM, 2, ["error: the process of device 1 was ended by signal 15; go on"]),
        ("child", signal.SIGKILL, 2, [KILLED]),
    ],
)
def test_signals(jobs, tmp_path, target, number, code, messages):
    run = jobs()
    wait_until(lambda: all((tmp_path / name / "started").exists() for name in "01"))
    processes = descendants(run.process.pid)
    os.kill(int((tmp_path / "1/started").read_text()) if target == "child" else run.process.pid, number)
    assert run.finish(processes) == (code, messages)
    # A killed process is no reason to cut the other short.
    assert (tmp_path / "0/stopped").exists() == (target == "child")


def test_a_failure_stops_the_other_process(jobs, tmp_path):
    assert jobs("kindly").finish(set()) == (2, ["error: bad picture"])
    assert (tmp_path / "1/stopped").exists()


def test_a_mistake_in_a_process_shows_its_traceback(jobs, tmp_path):
    code, lines = jobs("badly").finish(set())
    assert code == 1
    assert "KeyError: 'key'" in "".join(lines)
    assert (tmp_path / "1/stopped").exists()


def test_an_error_in_one_of_several_processes(world, pictures, tmp_path, run_script):
    source = tmp_path / "pictures"
    source.mkdir()
    for path in pictures.iterdir():
        os.link(path, source / path.name)
    (source / "003.png").unlink()
    (source / "003.png").write_bytes(b"no image")
    result = run_script(create_sit_dataset, *many_flags(world, source, tmp_path / "sit", "cpu", "cpu"))
    check_refusal(result, "003.png", "--skip_created_files")
    written = {path.name for path in (tmp_path / "sit").glob("*.png")}
    assert "001.png" in written
    assert len(written) < MANY / 2


def test_a_killed_loader_ends_the_export_which_can_be_continued(world, tmp_path, run_script, monkeypatch):
    whole = export(run_script, world, tmp_path / "whole")
    real = SourceImages.__getitem__

    def die(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, index)

    flags = export_flags(only_run(world), world, tmp_path / "disturbed", num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(SourceImages, "__getitem__", die)
        result = run_script(create_sit_dataset, *flags)
    assert result.code == 75
    assert "Traceback" not in result.err
    for part in ("--num_workers", "--skip_created_files", "run the same command again"):
        assert part in result.err.strip().splitlines()[-1]
    assert run_script(create_sit_dataset, *flags, "--skip_created_files").code == 0
    for name, pixels in whole.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "disturbed" / "images" / name)), pixels)


def test_unreadable_images_are_left_out_and_listed(world, tmp_path, run_script):
    whole = export(run_script, world, tmp_path / "whole")
    bad = world / "gta" / "images" / "00002.png"
    data = bad.read_bytes()
    bad.write_bytes(data[:200])
    flags = [*export_flags(only_run(world), world, tmp_path / "sit"), "--skip_created_files"]
    try:
        check_refusal(run_script(create_sit_dataset, *flags), str(bad), "--on_bad_image skip")
        result = run_script(create_sit_dataset, *flags, "--on_bad_image", "skip", "--gpus", "cpu", "cpu")
    finally:
        bad.write_bytes(data)
    assert result.code == 0, result.err
    assert f"{COUNT - 1} SiT images" in result.out
    assert result.out.strip().splitlines()[-1].strip() == str(bad)
    manifest = json.loads((tmp_path / "sit" / "sit_manifest.json").read_text())
    assert manifest["complete"] is False
    stale = tmp_path / "sit" / "images" / bad.name
    stale.write_bytes((tmp_path / "whole" / "images" / bad.name).read_bytes()[:500])
    bad.write_bytes(data[:200])
    try:
        result = run_script(create_sit_dataset, *flags, "--on_bad_image", "skip")
    finally:
        bad.write_bytes(data)
    assert f"{COUNT - 1} SiT images" in result.out
    assert json.loads((tmp_path / "sit" / "sit_manifest.json").read_text())["complete"] is False
    assert run_script(create_sit_dataset, *flags).code == 0
    for name, pixels in whole.items():
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "sit" / "images" / name)), pixels)


def test_a_set_is_never_continued_in_another_precision(world, tmp_path, run_script):
    flags = export_flags(only_run(world), world, tmp_path / "sit")
    assert run_script(create_sit_dataset, *flags).code == 0
    path = tmp_path / "sit" / "sit_manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("precision") == "fp32"
    path.write_text(json.dumps(manifest))  # as sets were described before, which were float32
    assert run_script(create_sit_dataset, *flags, "--skip_created_files").code == 0
    path.write_text(json.dumps({**manifest, "precision": "bf16"}))
    check_refusal(run_script(create_sit_dataset, *flags, "--skip_created_files"), "another precision")


@pytest.mark.parametrize(
    ("cpus", "names", "share", "workers"),
    [
        (2, [], 2, 2),
        (2, ["cpu"], 2, 1),
        (1, ["cpu"], 1, 1),
        (2, ["cpu", "cpu", "cpu"], 1, 1),
        (16, ["cpu", "cpu"], 8, 4),
        (64, ["cpu"], 64, 6),
        (64, ["cuda:0"], 64, 6),
        (16, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 4, 4),
        (4, ["cuda:0", "cpu"], 2, 1),
    ],
)
def test_cpus_are_divided_among_the_devices(monkeypatch, cpus, names, share, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cpus)))
    devices = [torch.device(name) for name in names]
    assert cpus_per_device(devices) == share
    assert default_workers(devices) == workers


def test_compression_changes_the_files_and_not_the_pixels(world, tmp_path, run_script):
    fast = export(run_script, world, tmp_path / "fast", "--png_compression", "0")
    small = export(run_script, world, tmp_path / "small", "--png_compression", "9", "--encoders", "3")
    assert all(np.array_equal(pixels, small[name]) for name, pixels in fast.items())
    sizes = [sum(path.stat().st_size for path in (tmp_path / name / "images").iterdir()) for name in ("fast", "small")]
    assert sizes[0] > sizes[1]


def test_bf16_moves_pixels_by_little(world, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    exact = export(run_script, world, tmp_path / "exact")
    rounded = export(run_script, world, tmp_path / "rounded", "--precision", "bf16")
    differences = np.concatenate([(exact[n].astype(int) - rounded[n].astype(int)).ravel() for n in exact])
    assert 0 < np.abs(differences).max() <= 3
    assert np.abs(differences).mean() < 0.5


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--png_compression", "10"), ("--png_compression", "10")),
        (("--png_compression", "-1"), ("--png_compression",)),
        (("--encoders", "0"), ("--encoders",)),
        (("--gpus", "0", "0"), ("--gpus",)),
        (("--gpus", "cpu", "99"), ("--gpus", "99")),
        (("--precision", "tf32"), ("--precision tf32",)),
    ],
)
def test_bad_flags(world, tmp_path, run_script, flags, parts):
    result = run_script(create_sit_dataset, *export_flags(only_run(world), world, tmp_path / "sit"), *flags)
    check_refusal(result, *parts)
    assert not (tmp_path / "sit").exists()
