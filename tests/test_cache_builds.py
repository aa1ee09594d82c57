"""Builds of a cache that are disturbed: by other runs, kills, full disks and damage to what they made."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from data_handlers import cache_building as cache_module
from data_handlers.cache_building import open_cache
from test_cache import SIZE, change_image, folders, gta
from utils import locks as locks_module
from utils.errors import UserError
from worlds import write_gta5


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=5, size=(60, 44))
    return tmp_path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hooked_read(number, hook):
    """A `read_resized` that first calls `hook` when it is called for the given time."""
    real, calls = cache_module.read_resized, []

    def read(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            hook()
        return real(*arguments)

    return read


def interrupt():
    raise KeyboardInterrupt


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for(condition, process=None):
    """Poll until a condition holds, for a minute at most; `process` must go on until then."""
    for _ in range(6000):
        if condition():
            return
        assert process is None or process.process.is_alive(), process.said()
        time.sleep(0.01)
    raise AssertionError("nothing came in a minute")


class Forked:
    """A process that calls `work(*arguments)`; forked, since importing PyTorch takes seconds."""

    def __init__(self, log, work, *arguments):
        self.log = log
        self.process = multiprocessing.get_context("fork").Process(target=self._main, args=(work, arguments))
        self.process.start()

    def _main(self, work, arguments):
        tqdm.set_lock(threading.RLock())  # its own: what a killed process locks stays locked
        with open(self.log, "w", buffering=1) as sys.stderr:
            work(*arguments)

    def said(self):
        return self.log.read_text() if self.log.exists() else ""

    def exit_code(self):
        self.process.join(60)
        return self.process.exitcode


@pytest.fixture
def forked(tmp_path):
    processes = []

    def start(work, *arguments):
        processes.append(Forked(tmp_path / f"log{len(processes)}", work, *arguments))
        return processes[-1]

    yield start
    (tmp_path / "gate").touch()
    for process in processes:
        process.process.kill()
        process.process.join()


def build(world, num_workers=0):
    open_cache(world / "cache", gta(world), SIZE, "exact", False, num_workers)


def build_slowly(world, num_workers=0):
    """Stops at the third image until there is a file `gate`."""

    def stop():
        (world / "stopped").touch()
        wait_for((world / "gate").exists)

    cache_module.read_resized = hooked_read(3, stop)
    build(world, num_workers)


def build_nothing(world):
    cache_module.read_resized = None
    build(world)


def build_until(world, moment, after):
    """Is killed before or after it calls the function `moment`."""
    home, _, name = moment.rpartition(".")
    home = {"": cache_module, "os": os, "Path": Path}[home]
    real = getattr(home, name)

    def call(*arguments):
        if after:
            real(*arguments)
        kill_this_process()

    setattr(home, name, call)
    build(world)


def build_until_a_worker_is_ahead(world):
    """Is killed when its worker waits for it to take images larger than a pipe holds."""
    real = cache_module.read_resized

    def read(*arguments):
        with open(world / "reads", "a") as file:
            file.write(f"{os.getpid()}\n")
        return real(*arguments)

    def take_one(samples, **_):
        iterator = iter(samples)
        yield next(iterator)
        wait_for(lambda: len((world / "reads").read_text().split()) == 3)
        kill_this_process()

    cache_module.read_resized, cache_module.tqdm = read, take_one
    open_cache(world / "cache", gta(world), (400, 300), "exact", False, 1)


def building(world):
    return list((world / "cache").glob(f"{cache_module.BUILDING}*"))


def check_like_undisturbed(world):
    """The next run finds or makes the same cache as one without disturbance, and nothing else is left."""
    build(world)
    open_cache(world / "undisturbed", gta(world), SIZE, "exact", False, 0)
    assert content(world / "cache") == content(world / "undisturbed")
    assert len(folders(world / "cache")) == 1


def truncate(folder):
    os.truncate(folder / "images.npy", (folder / "images.npy").stat().st_size - 1)


def lengthen(folder):
    with open(folder / "images.npy", "ab") as file:
        file.write(b"0")


def set_header(folder):
    with open(folder / "images.npy", "r+b") as file:
        file.seek(12)
        file.write(b"('")


def be_a_link(folder):
    truncate(folder)
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


DAMAGES = {
    "truncated array": truncate,
    "longer array": lengthen,
    "empty array": lambda folder: os.truncate(folder / "images.npy", 0),
    "broken header": set_header,
    "no array": lambda folder: (folder / "images.npy").unlink(),
    "other dtype": lambda folder: np.save(folder / "images.npy", np.zeros((5, 40, 52, 3), np.int8)),
    "other shape": lambda folder: np.save(folder / "images.npy", np.zeros((5, 52, 40, 3), np.uint8)),
    "pickle": lambda folder: np.save(folder / "images.npy", np.array([None]), allow_pickle=True),
    "empty manifest": lambda folder: os.truncate(folder / "cache.json", 0),
    "manifest of another cache": lambda folder: (folder / "cache.json").write_text("[]"),
    "deep manifest": lambda folder: (folder / "cache.json").write_text("[" * 100_000),
    "binary manifest": lambda folder: (folder / "cache.json").write_bytes(bytes(range(256))),
    "no manifest": lambda folder: (folder / "cache.json").unlink(),
    "file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "link in its place": be_a_link,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_built_anew(world, damage, capsys):
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    (folder,) = folders(world / "cache")
    before = content(world / "cache")
    damage(folder)
    for lines in (1, 0):
        capsys.readouterr()
        open_cache(world / "cache", gta(world), SIZE, "exact", False, 0).image(4)
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
        assert len(said) == lines, said
        assert all(line.startswith(f"{folder}: ") and line.endswith("built anew") for line in said)
    assert {path: data for path, data in content(world / "cache").items() if "elsewhere" not in path} == before


def test_a_damaged_cache_that_cannot_be_deleted(world, monkeypatch):
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    truncate(*folders(world / "cache"))
    refuse = fail_with(errno.EACCES)
    monkeypatch.setattr(cache_module.shutil, "rmtree", lambda _, ignore_errors=False: ignore_errors or refuse())
    with pytest.raises(UserError, match=r"--cache_dir: cannot delete .*images"):
        open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)


def test_a_stopped_build_leaves_nothing(world, monkeypatch):
    monkeypatch.setattr(cache_module, "read_resized", hooked_read(3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert not folders(world / "cache")


def test_files_that_change_while_they_are_cached(world, monkeypatch):
    monkeypatch.setattr(cache_module, "read_resized", hooked_read(3, lambda: change_image(world)))
    with pytest.raises(UserError, match="changed while their cache was built"):
        open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert not folders(world / "cache")


def test_files_and_disks_that_cannot_be_used(world, monkeypatch):
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"--cache_dir .*cache takes .* GB"):
        open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    monkeypatch.undo()
    for labels in (True, False):
        (world / "gta/images/00003.png").write_bytes(b"no image")
        with pytest.raises(UserError, match=r"00003\.png"):
            open_cache(world / "cache", gta(world), SIZE, "exact", labels, 1)
        assert not folders(world / "cache")
    (world / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        open_cache(world / "file", gta(world), SIZE, "exact", True, 0)


def fail_with(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_disk_that_fills_up(world, monkeypatch):
    read = []
    monkeypatch.setattr(cache_module, "read_resized", lambda *arguments: read.append(arguments))
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.ENOSPC))
    with pytest.raises(UserError, match=r"--cache_dir .*No space left"):
        open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert not read
    assert not folders(world / "cache")
    monkeypatch.undo()
    # Where space cannot be reserved, writing finds out; this device is always full.
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.EOPNOTSUPP))
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(cache_module, "open", lambda *_: os.fdopen(full, "wb"), raising=False)
    with pytest.raises(UserError, match=r"--cache_dir .*No space left"):
        open_cache(world / "full", gta(world), SIZE, "exact", False, 0)
    assert not folders(world / "full")


def test_a_cache_is_for_all_users(world, monkeypatch):
    open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    umask = os.umask(0)
    os.umask(umask)
    for folder in folders(world / "cache"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~umask}
    assert {stat.S_IMODE(path.stat().st_mode) for path in (world / "cache").glob("*.lock")} == {0o666}
    monkeypatch.setattr(Path, "read_bytes", fail_with(errno.EACCES))  # root may read everything
    with pytest.raises(UserError, match=r"--cache_dir: cannot read .*cache\.json"):
        open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)


def test_the_array_is_on_the_disk_before_it_counts(world, monkeypatch):
    events = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append((path.name.strip(".").partition(".")[0], path.read_bytes()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda *paths: (events.append(("rename", b"")), rename(*paths)))
    open_cache(world / "cache", gta(world), (26, 20), "exact", False, 0)  # images that fit into the file's buffer
    (folder,) = folders(world / "cache")
    assert [name for name, _ in events] == ["images", "cache", "rename"]
    assert events[0][1] == (folder / "images.npy").read_bytes()


def test_runs_started_together_build_one_cache(world, forked):
    builder = forked(build_slowly, world)
    wait_for((world / "stopped").exists, builder)
    second = forked(build_nothing, world)
    wait_for(lambda: "waiting for another process" in second.said(), second)
    assert building(world)
    (world / "gate").touch()
    assert (builder.exit_code(), second.exit_code()) == (0, 0), builder.said() + second.said()
    check_like_undisturbed(world)


def test_a_waiting_run_goes_on_when_the_builder_is_killed(world, forked):
    builder = forked(build_slowly, world, 1)
    wait_for((world / "stopped").exists, builder)
    second = forked(build, world)
    wait_for(lambda: "waiting for another process" in second.said(), second)
    builder.process.kill()
    assert second.exit_code() == 0, second.said()
    (world / "gate").touch()
    check_like_undisturbed(world)


MOMENTS = ("_require_space", "_write_array", "read_resized", "_reserve", "os.fsync", "atomic_write_json", "Path.rename")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_is_done_again(world, forked, moment, after):
    killed = forked(build_until, world, moment, after)
    assert killed.exit_code() == -signal.SIGKILL, killed.said()
    check_like_undisturbed(world)


def test_workers_end_when_the_builder_is_killed(world, forked):
    killed = forked(build_until_a_worker_is_ahead, world)
    assert killed.exit_code() == -signal.SIGKILL, killed.said()
    worker = (world / "reads").read_text().split()[0]

    def has_ended():
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_for(has_ended)


def test_file_systems_without_locks(world, monkeypatch, capsys):
    monkeypatch.setattr(locks_module.fcntl, "lockf", fail_with(errno.ENOLCK))
    open_cache(world / "other", gta(world), SIZE, "exact", False, 0)
    (whole,) = folders(world / "other")
    key = whole.name.split("_")[-2]
    theirs = world / "cache" / f"{cache_module.BUILDING}{key}-theirs"
    theirs.mkdir(parents=True)
    # Another process finishes the same cache first.
    there_first = hooked_read(3, lambda: shutil.copytree(whole, world / "cache" / whole.name))
    monkeypatch.setattr(cache_module, "read_resized", there_first)
    capsys.readouterr()
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert "no locks" in capsys.readouterr().err
    assert set(folders(world / "cache")) == {theirs, world / "cache" / whole.name}
    monkeypatch.setattr(locks_module.fcntl, "lockf", fail_with(errno.EIO))
    with pytest.raises(UserError, match=r"--cache_dir .*cannot lock"):
        open_cache(world / "third", gta(world), SIZE, "exact", False, 0)
