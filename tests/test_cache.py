"""The cache of resized images and the fast resampling: the same samples, whatever happens to files and builders."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import train_procst
from commands import assert_same_tensors, only_run, procst_flags
from conftest import GOLDEN_DIR
from data_handlers import cache as cache_module
from data_handlers.cache import BUILDING, ResizedFiles, bytes_to_build, open_cache
from data_handlers.classes import CITYSCAPES_IDS
from data_handlers.datasets import DATA_SETS, with_labels
from data_handlers.domain import Domain, Samples
from data_handlers.images import image_pyramid
from data_handlers.lists import list_images
from utils.errors import UserError
from worlds import noise_image, write_cityscapes, write_gta5

SIZE = (52, 40)


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=5, size=(60, 44))
    return tmp_path


def gta(world):
    return list_images(DATA_SETS["gta5"], world / "gta", "--src_data_dir")


def cache_of(world, **changes):
    values = {"cache_dir": world / "cache", "with_labels": True, "num_workers": 0}
    resized = {"files": gta(world), "size": SIZE, "resample": "exact"}
    resized = {name: changes.pop(name, value) for name, value in resized.items()}
    return open_cache(resized=ResizedFiles(**resized), **{**values, **changes})


@pytest.fixture
def built(monkeypatch):
    """Kinds of the arrays that were built."""
    kinds = []
    real = cache_module._write_array

    def write(path, part, *arguments):
        kinds.append(part.kind)
        return real(path, part, *arguments)

    monkeypatch.setattr(cache_module, "_write_array", write)
    return kinds


def folders(cache_dir):
    return sorted(path for path in cache_dir.iterdir() if path.name != ".lock")


def content(cache_dir):
    return {str(path.relative_to(cache_dir)): path.read_bytes() for path in cache_dir.rglob("*") if path.is_file()}


def change_image(world):
    noise_image((60, 44), 99).save(world / "gta/images/00002.png")
    os.utime(world / "gta/images/00002.png", ns=(1, 1))


# --- samples --------------------------------------------------------------------------------------------


def batches(files, resample, cache, workers=0):
    domain = Domain(
        files=files, name="source", seed=1, resize=SIZE, crop=(48, 36), labels=True, flip=True, resample=resample,
        num_workers=workers, caches=(cache,) if cache else (),
    )  # fmt: skip
    pyramid = partial(image_pyramid, num_scales=2, scale_factor=0.5, up_to=2, resample=resample)
    samples = Samples(domain=domain, stage=2, per_epoch=4, epoch_length=5, pyramid=pyramid)
    return list(samples.batches(range(6), 2, range(2)))


@pytest.mark.parametrize("resample", ["exact", "fast"])
def test_samples_from_the_cache_are_the_same(world, resample):
    files = gta(world)
    cache = cache_of(world, resample=resample, num_workers=1)
    for workers in (0, 1):
        plain = batches(files, resample, None, workers=workers)
        cached = batches(files, resample, cache, workers=workers)
        for ours, theirs in zip(cached, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.levels, theirs.levels, strict=True))
            assert torch.equal(ours.label, theirs.label)


def test_fast_resampling_is_at_most_one_level_off(world):
    files = gta(world)
    for exact, fast in zip(batches(files, "exact", None), batches(files, "fast", None), strict=True):
        assert torch.equal(exact.label, fast.label)
        # Two resamplings one after the other, each of them at most one level off.
        assert int((exact.levels[2].int() - fast.levels[2].int()).abs().max()) <= 1
        assert max(int((a.int() - b.int()).abs().max()) for a, b in zip(exact.levels, fast.levels, strict=True)) <= 2


@pytest.mark.parametrize("path", sorted(GOLDEN_DIR.glob("step_*.npz")), ids=lambda path: path.stem)
def test_fast_pyramids_against_the_reference(path):
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    for scale in meta["scales"]:
        pixels = data[f"s{scale}/source_rgb_0"]
        levels = image_pyramid(pixels, meta["num_scales"], meta["scale_factor"], scale, "fast")
        for k, level in enumerate(levels):
            expected = data[f"s{scale}/source_pyramid_{k}"][0].transpose(1, 2, 0) * 128 + 128
            assert np.abs(level - expected).max() <= 1


@pytest.mark.slow
def test_training_from_a_cache(world, run_script):
    write_cityscapes(world / "cityscapes", count=3, size=(64, 40), labels=False)
    runs = {}
    for name, changes in (("plain", {}), ("cached", {"cache_dir": world / "cache"})):
        result = run_script(train_procst, *procst_flags(world, world / name, **changes))
        assert result.code == 0, result.err
        runs[name] = only_run(world / name) / "latest.pth"
    assert_same_tensors(runs["cached"], runs["plain"])


# --- what a cache is made for ---------------------------------------------------------------------------


def test_a_cache_is_built_once_and_anew_when_a_file_changes(world, built):
    for _ in range(2):
        cache = cache_of(world)
    assert built == ["labels", "images"]
    before = cache.image(1).copy()
    change_image(world)
    assert not np.array_equal(cache_of(world).image(1), before)
    assert built == ["labels", "images"] * 2
    # The old one stays, and the run that uses it continues.
    assert len(folders(world / "cache")) == 4
    assert np.array_equal(cache.image(1), before)
    os.utime(world / "gta/labels/00002.png", ns=(1, 1))
    cache_of(world)
    assert built[4:] == ["labels"]
    cache_of(world, size=(26, 20))
    assert built[5:] == ["labels", "images"]
    cache_of(world, resample="fast")
    assert built[7:] == ["images"]
    shutil.rmtree(world / "cache")
    assert np.array_equal(cache.image(1), before)  # the file stays as long as it is mapped


def test_runs_with_and_without_labels_share_the_images(world, built):
    sizes = {"cache_dir": world / "cache", "resized": ResizedFiles(gta(world), SIZE, "exact")}
    count = len(gta(world)) * SIZE[0] * SIZE[1]
    assert bytes_to_build(**sizes, with_labels=True) == 4 * count
    with pytest.raises(KeyError, match="labels"):
        cache_of(world, with_labels=False).label(0)
    assert bytes_to_build(**sizes, with_labels=True) == count
    cache_of(world)
    assert bytes_to_build(**sizes, with_labels=True) == 0
    assert built == ["images", "labels"]


@pytest.mark.parametrize("change", [{"id_map": {**CITYSCAPES_IDS, 7: 5}}, {"void_ids": None}])
def test_labels_read_in_another_way_are_cached_anew(world, built, change):
    files = gta(world)
    cache_of(world)
    other = replace(files, data_set=replace(files.data_set, **change))
    label = cache_of(world, files=other).label(0)
    assert np.array_equal(label, cache_of(world, cache_dir=world / "fresh", files=other).label(0))
    assert built == ["labels", "images", "labels", "labels", "images"]
    for data_set in (
        replace(files.data_set, label_encoding="16-bit channel 0"),
        with_labels(files.data_set, "trainids", "--src_labels"),
    ):
        with pytest.raises(UserError, match=r"16-bit|--src_labels trainids"):
            cache_of(world, files=replace(files, data_set=data_set))


@pytest.mark.parametrize("damage", ["cut short", "a link that leads nowhere"])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_a_cache_without_what_cannot_be_read(world, kind, damage):
    bad = world / "gta" / kind / "00003.png"
    start = bad.read_bytes()[:200]
    bad.unlink()
    bad.symlink_to("nowhere") if damage != "cut short" else bad.write_bytes(start)
    with pytest.raises(UserError, match=r"00003\.png.*--on_bad_image skip"):
        cache_of(world, num_workers=1)
    assert not any(path.name.startswith(BUILDING) for path in folders(world / "cache"))
    cache = cache_of(world, skip_unusable=True)
    assert cache.image(0).any()
    with pytest.raises(UserError, match=r"00003\.png"):
        (cache.image if kind == "images" else cache.label)(2)
    # The finished cache is refused to a run that does not skip, and says what to do.
    with pytest.raises(UserError, match=r"00003\.png.*--on_bad_image skip; if the file is sound by now, delete "):
        cache_of(world)


# --- disturbed builds -----------------------------------------------------------------------------------


def rewrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def save(array):
    return lambda folder: np.save(folder / "array.npy", array, allow_pickle=True)


DAMAGES = {
    "truncated array": lambda folder: os.truncate(folder / "array.npy", (folder / "array.npy").stat().st_size - 1),
    "empty array": rewrite("array.npy", b""),
    "broken header": rewrite("array.npy", b"\x93NUMPY\x01\x00v\x00{'(" + bytes(10_000)),
    "other shape": save(np.zeros((5, 52, 40, 3), np.uint8)),
    "pickle": save(np.array([None])),
    "manifest of something else": rewrite("cache.json", b"[]"),
    "deep manifest": rewrite("cache.json", b"[" * 100_000),
    "no manifest": lambda folder: (folder / "cache.json").unlink(),
    "file in its place": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "link in its place": lambda folder: (shutil.rmtree(folder), folder.symlink_to("elsewhere")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_is_refused(world, damage):
    cache_of(world, with_labels=False)
    (folder,) = folders(world / "cache")
    damage(folder)
    with pytest.raises(UserError, match=f"{folder}: this cache is damaged; delete it"):
        cache_of(world, with_labels=False)


def during_the_build(monkeypatch, happens):
    """Let something happen before the third image is read."""
    real, calls = cache_module.read_resized, []

    def read(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            happens()
        return real(*arguments)

    monkeypatch.setattr(cache_module, "read_resized", read)


def interrupt():
    raise KeyboardInterrupt


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_stops_and_full_disks(world, monkeypatch):
    for happens, error, message in (
        (interrupt, KeyboardInterrupt, None),
        (disk_full, UserError, r"--cache_dir .*No space left"),
    ):
        with monkeypatch.context() as patch:
            during_the_build(patch, happens)
            with pytest.raises(error, match=message):
                cache_of(world, with_labels=False)
        assert not folders(world / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 4 * 5 * 52 * 40 - 1))
        patch.setattr(cache_module, "_write_array", None)
        with pytest.raises(UserError, match=r"--cache_dir .*cache takes .* GB.*delete caches"):
            cache_of(world)  # labels and images together do not fit, which is said before the labels are built
    (world / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        cache_of(world, cache_dir=world / "file")


def test_the_array_is_on_the_disk_before_it_counts(world, monkeypatch):
    events = []
    sync, rename = os.fsync, Path.rename

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        events.append((path.name.strip(".").partition(".")[0], path.read_bytes()))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", lambda *paths: (events.append(("rename", b"")), rename(*paths)))
    cache_of(world, with_labels=False, size=(26, 20))  # images that fit into the file's buffer
    (folder,) = folders(world / "cache")
    assert [name for name, _ in events] == ["array", "cache", "rename"]
    assert events[0][1] == (folder / "array.npy").read_bytes()


# --- several processes ----------------------------------------------------------------------------------


def wait_for(condition, process):
    """Poll until a condition holds, for a minute at most; `process` must go on until then."""
    for _ in range(6000):
        if condition():
            return
        assert process.is_alive()
        time.sleep(0.01)
    raise AssertionError("nothing came in a minute")


@pytest.fixture
def forked(world):
    """Start a process that builds the cache, after `prepare()`; forked, since importing PyTorch takes seconds."""
    processes = []

    def main(log, prepare):
        tqdm.set_lock(threading.RLock())  # its own: what a killed process locks stays locked
        with open(log, "w", buffering=1) as sys.stderr:
            prepare()
            cache_of(world, with_labels=False)

    def start(prepare=lambda: None):
        log = world / f"log{len(processes)}"
        processes.append(multiprocessing.get_context("fork").Process(target=main, args=(log, prepare)))
        processes[-1].start()
        return processes[-1], log

    yield start
    for process in processes:
        process.kill()
        process.join()


def wait_in_the_build(world):
    def wait():
        (world / "stopped").touch()
        while not (world / "gate").exists():
            time.sleep(0.01)

    during_the_build(pytest.MonkeyPatch(), wait)


@pytest.mark.parametrize("killed", [False, True], ids=["finishes", "is killed"])
def test_processes_started_together_build_once(world, forked, killed):
    builder, _ = forked(lambda: wait_in_the_build(world))
    wait_for((world / "stopped").exists, builder)
    other, log = forked(lambda: None if killed else setattr(cache_module, "_write_array", None))
    wait_for(lambda: log.exists() and "waiting for another process" in log.read_text(), other)
    builder.kill() if killed else (world / "gate").touch()
    for process in (builder, other):
        process.join(60)
    assert (builder.exitcode, other.exitcode) == (-signal.SIGKILL if killed else 0, 0), log.read_text()
    check_like_undisturbed(world)


def check_like_undisturbed(world):
    """The next run finds or makes the same cache as one without disturbance, and nothing else is there."""
    cache_of(world, with_labels=False)
    cache_of(world, with_labels=False, cache_dir=world / "undisturbed")
    assert content(world / "cache") == content(world / "undisturbed")
    assert len(folders(world / "cache")) == 1


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("moment", ["_make_room", "_write_array", "read_resized", "atomic_write_json", "Path.rename"])
def test_a_killed_build_is_done_again(world, forked, moment, after):
    def prepare():
        home = Path if moment == "Path.rename" else cache_module
        name = moment.removeprefix("Path.")
        real = getattr(home, name)

        def call(*arguments):
            if after:
                real(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(home, name, call)

    killed, log = forked(prepare)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    check_like_undisturbed(world)
