"""The export of SiT images: several processes, stops and accidents, precision, and flags."""

from __future__ import annotations

import json
import os
import shutil
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
from commands import export_flags
from core.export import SourcePyramids
from refusals import check_refusal
from utils.devices import cpus_per_device, workers_for
from worlds import is_whole, noise_image

COUNT = 6  # images of the world's source
# Far more than are translated before a test interrupts.
MANY = 300
PATIENCE = 180


def export(run_script, run, out, **flags):
    result = run_script(create_sit_dataset, *export_flags(run, out, **flags))
    assert result.code == 0, result.err
    return pixels_of(out / "images")


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def assert_same_pixels(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, pixels in theirs.items():
        np.testing.assert_array_equal(ours[name], pixels, name)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Sums depend on the number of threads by rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(_one_thread, finished_run, tmp_path_factory):
    """The pixels of an export in one piece."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["create_sit_dataset.py", *map(str, export_flags(finished_run, out))])
        create_sit_dataset.main()
    found = pixels_of(out / "images")
    assert len(found) == COUNT
    return found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """One picture under many names, so large that a loader has to wait until it can hand it over."""
    root = tmp_path_factory.mktemp("pictures")
    noise_image((480, 360), 1).save(root / "000.png")
    for k in range(1, MANY):
        os.link(root / "000.png", root / f"{k:03d}.png")
    return root


def many_flags(run, pictures, out, *gpus):
    return export_flags(run, out, gpus=gpus, source="folder", src_data_dir=pictures, num_workers=1, encoders=1)


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
    output: Path
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
        output, errors = tmp_path / "stdout.txt", tmp_path / "stderr.txt"
        with output.open("wb") as out, errors.open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, *map(str, command)],
                cwd=Path(__file__).parents[1],
                env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=err,
                start_new_session=True,
                # Tests that a shell started in the background ignore SIGINT, and programs inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        started.append(process)
        return Background(process, output, errors)

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


STOPPED = "stopped; the images translated so far stay, continue with --skip_created_files"
KILLED = "was ended by signal 9 (SIGKILL, as the system does where memory runs out); the images translated so far stay"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("target", "number", "code", "message"),
    [
        ("launcher", signal.SIGKILL, -signal.SIGKILL, STOPPED),
        ("launcher", signal.SIGTERM, 75, STOPPED),
        ("group", signal.SIGINT, 75, STOPPED),
        ("process", signal.SIGKILL, 2, KILLED),
    ],
)
def test_an_export_in_several_processes_ends_in_good_order(
    finished_run, pictures, tmp_path, background, target, number, code, message
):
    out = tmp_path / "sit"
    run = background("create_sit_dataset.py", *many_flags(finished_run, pictures, out, "cpu", "cpu"))
    written = lambda: list(out.glob("*.png"))  # noqa: E731
    wait_until(lambda: len(written()) > 3 and len(descendants(run.process.pid)) >= 4)  # two processes, their loaders
    processes = descendants(run.process.pid)
    if target == "process":
        os.kill(max(pid for pid, parent in parents().items() if parent == run.process.pid), number)
    else:
        (os.killpg if target == "group" else os.kill)(run.process.pid, number)
    ended, lines = run.finish(processes)
    assert ended == code, lines
    assert message in lines[-1]
    assert len(lines) == (1 if number == signal.SIGKILL else 2), lines  # a stop is acknowledged first
    assert 3 < len(written()) < MANY
    assert all(is_whole(path, (480, 360)) for path in written())


def test_a_stop_in_one_process(finished_run, whole, tmp_path, run_script, monkeypatch):
    real = SourcePyramids.__call__

    def stop_at_third(self, name):
        if name.endswith("00003.png"):
            signal.raise_signal(signal.SIGTERM)
        return real(self, name)

    monkeypatch.setattr(SourcePyramids, "__call__", stop_at_third)
    result = run_script(create_sit_dataset, *export_flags(finished_run, tmp_path / "sit"))
    assert result.code == 75
    assert "continue with --skip_created_files" in result.err
    assert json.loads((tmp_path / "sit" / "sit_manifest.json").read_text())["complete"] is False
    monkeypatch.undo()
    assert 0 < len(pixels_of(tmp_path / "sit" / "images")) < COUNT
    assert_same_pixels(export(run_script, finished_run, tmp_path / "sit", skip_created_files=()), whole)


@pytest.mark.processes
def test_an_error_in_one_of_several_processes(finished_run, pictures, tmp_path, background):
    source = tmp_path / "pictures"
    source.mkdir()
    for path in pictures.iterdir():
        os.link(path, source / path.name)
    (source / "003.png").unlink()
    (source / "003.png").write_bytes(b"no image")
    run = background("create_sit_dataset.py", *many_flags(finished_run, source, tmp_path / "sit", "cpu", "cpu"))
    code, lines = run.finish(set())
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "003.png" in lines[0]
    assert "--skip_created_files" in lines[0]
    written = {path.name for path in (tmp_path / "sit").glob("*.png")}
    assert "001.png" in written
    assert len(written) < MANY / 2


def test_the_death_of_a_loader_ends_the_export(finished_run, whole, tmp_path, run_script, monkeypatch):
    real = SourcePyramids.__call__

    def die_at_third(self, name):
        if name.endswith("00003.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, name)

    monkeypatch.setattr(SourcePyramids, "__call__", die_at_third)
    result = run_script(create_sit_dataset, *export_flags(finished_run, tmp_path / "sit", num_workers=1))
    assert result.code == 75
    assert "DataLoader worker" in result.err
    assert result.err.strip().splitlines()[-1].endswith("continue with --skip_created_files")
    monkeypatch.undo()
    assert_same_pixels(export(run_script, finished_run, tmp_path / "sit", skip_created_files=()), whole)


@pytest.mark.processes
def test_several_processes_write_the_same_images_and_list_unreadable_ones(
    world, finished_run, whole, tmp_path, run_script, background
):
    gta = shutil.copytree(world / "gta", tmp_path / "gta")
    bad, out = gta / "images" / "00002.png", tmp_path / "sit"
    data = bad.read_bytes()
    bad.write_bytes(data[:200])
    flags = export_flags(finished_run, out, src_data_dir=gta, skip_created_files=())
    check_refusal(run_script(create_sit_dataset, *flags), str(bad), "--on_bad_image skip")
    run = background("create_sit_dataset.py", *flags, "--on_bad_image", "skip", "--gpus", "cpu", "cpu")
    code, lines = run.finish(set())
    assert code == 0, lines
    shown = run.output.read_text()
    assert shown.count("SiT images") == 1
    assert f"{COUNT - 1} SiT images" in shown
    # Two processes write the images that one writes.
    assert_same_pixels(pixels_of(out / "images"), {name: whole[name] for name in whole if name != bad.name})
    assert shown.strip().splitlines()[-1].strip() == str(bad)
    assert json.loads((out / "sit_manifest.json").read_text())["complete"] is False
    bad.write_bytes(data)
    export(run_script, finished_run, tmp_path / "other", src_data_dir=gta)
    stale = out / "images" / bad.name
    stale.write_bytes((tmp_path / "other" / "images" / bad.name).read_bytes()[:500])
    bad.write_bytes(data[:200])
    result = run_script(create_sit_dataset, *flags, "--on_bad_image", "skip")
    assert f"{COUNT - 1} SiT images" in result.out
    assert json.loads((out / "sit_manifest.json").read_text())["complete"] is False
    bad.write_bytes(data)
    assert run_script(create_sit_dataset, *flags).code == 0
    assert_same_pixels(pixels_of(out / "images"), whole)


def test_a_set_is_never_continued_in_another_precision(finished_run, tmp_path, run_script):
    export(run_script, finished_run, tmp_path / "sit")
    path = tmp_path / "sit" / "sit_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "precision": "bf16"}))
    flags = export_flags(finished_run, tmp_path / "sit", skip_created_files=())
    check_refusal(run_script(create_sit_dataset, *flags), "another precision")


def test_the_default_device_is_named(finished_run, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run_script(create_sit_dataset, *export_flags(finished_run, tmp_path / "sit", gpus=None))
    assert result.code == 0, result.err
    assert "computing on cpu (choose with --gpus)" in result.out


@pytest.mark.parametrize(
    ("cpus", "names", "share", "workers"),
    [
        (2, ["cpu"], 2, 1),
        (1, ["cpu"], 1, 1),
        (2, ["cpu", "cpu", "cpu"], 1, 1),
        (16, ["cpu", "cpu"], 8, 4),
        (64, ["cpu"], 64, 6),
        (64, ["cuda:0"], 64, 6),
        (16, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], 4, 4),
    ],
)
def test_cpus_are_divided_among_the_devices(monkeypatch, cpus, names, share, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cpus)))
    devices = [torch.device(name) for name in names]
    assert cpus_per_device(devices) == share
    assert workers_for(None, devices[0], len(devices)) == workers
    assert workers_for(3, devices[0], len(devices)) == 3


def test_compression_changes_the_files_and_not_the_pixels(finished_run, whole, tmp_path, run_script):
    fast = export(run_script, finished_run, tmp_path / "fast", png_compression=0)
    small = export(run_script, finished_run, tmp_path / "small", png_compression=9, encoders=3)
    assert_same_pixels(fast, whole)
    assert_same_pixels(small, whole)
    sizes = [sum(path.stat().st_size for path in (tmp_path / name / "images").iterdir()) for name in ("fast", "small")]
    assert sizes[0] > sizes[1]


def test_bf16_moves_pixels_by_little(finished_run, whole, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("training.precision.computes_in_bf16", lambda device: True)
    rounded = export(run_script, finished_run, tmp_path / "rounded", precision="bf16")
    differences = np.concatenate([(whole[n].astype(int) - rounded[n].astype(int)).ravel() for n in whole])
    assert 0 < np.abs(differences).max() <= 3
    assert np.abs(differences).mean() < 0.5


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"png_compression": 10}, ("--png_compression", "10")),
        ({"png_compression": -1}, ("--png_compression",)),
        ({"encoders": 0}, ("--encoders",)),
        ({"gpus": ("0", "0")}, ("--gpus",)),
        ({"gpus": ("cpu", "99")}, ("--gpus", "99")),
        ({"precision": "tf32"}, ("--precision tf32",)),
        ({"scale_factor": 0.7}, ("--scale_factor 0.7", "0.5")),
        ({"source": "synthia"}, ("--source synthia", "gta5", "--src_data_dir")),
        ({"trained_procst_path": None}, ("--trained_procst_path is required",)),
        ({"sit_output_path": ""}, ("--sit_output_path is required",)),
    ],
)
def test_bad_flags(finished_run, tmp_path, run_script, flags, parts):
    result = run_script(create_sit_dataset, *export_flags(finished_run, tmp_path / "sit", **flags))
    check_refusal(result, *parts)
    assert not (tmp_path / "sit").exists()
