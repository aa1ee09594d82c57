"""The cache of resized images and the fast resampling: the same samples, whatever happens to the files."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from core.checkpoint import load_checkpoint
from PIL import Image

import train_procst
from conftest import GOLDEN_DIR
from data_handlers import cache_building as cache_module
from data_handlers.cache_building import bytes_to_build, open_cache
from data_handlers.datasets import DATA_SETS
from data_handlers.label_maps import CITYSCAPES_IDS
from data_handlers.lists import list_images
from data_handlers.pyramid import array_pyramid
from data_handlers.stream import StreamConfig, open_stream
from test_bad_input import check_refusal
from test_train_cli import all_tensors, only_run, training_flags
from utils.errors import UserError
from worlds import noise_image, write_cityscapes, write_gta5

SIZE = (52, 40)


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=5, size=(60, 44))
    write_cityscapes(tmp_path / "cityscapes", count=3, size=(64, 40), labels=False)
    return tmp_path


def gta(world):
    return list_images(DATA_SETS["gta5"], world / "gta", "--src_data_dir")


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
    return sorted(path for path in cache_dir.iterdir() if not path.name.endswith(".lock"))


def change_image(world):
    noise_image((60, 44), 99).save(world / "gta/images/00002.png")
    os.utime(world / "gta/images/00002.png", ns=(1, 1))


def batches(files, resample, cache, labels="read", workers=0):
    config = StreamConfig(
        seed=1, domain="source", scale=2, batch_size=2, steps_per_epoch=2, epoch_length=5, resize=SIZE, crop=(48, 36),
        labels=labels, flip=True, resample=resample,
    )  # fmt: skip
    pyramid = partial(array_pyramid, num_scales=2, scale_factor=0.5, up_to=2, resample=resample)
    return list(open_stream(files, config, pyramid, range(6), workers, cache=cache))


@pytest.mark.parametrize("resample", ["exact", "fast"])
def test_samples_from_the_cache_are_the_same(world, resample):
    files = gta(world)
    cache = open_cache(world / "cache", files, SIZE, resample, with_labels=True, num_workers=1)
    for workers in (0, 1):
        plain = batches(files, resample, None, workers=workers)
        cached = batches(files, resample, cache, workers=workers)
        for ours, theirs in zip(cached, plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.levels, theirs.levels, strict=True))
            assert torch.equal(ours.label, theirs.label)
    assert len(folders(world / "cache")) == 2


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
        levels = array_pyramid(pixels, meta["num_scales"], meta["scale_factor"], scale, "fast")
        for k, level in enumerate(levels):
            expected = data[f"s{scale}/source_pyramid_{k}"][0].transpose(1, 2, 0) * 128 + 128
            assert np.abs(level - expected).max() <= 1


def test_a_cache_is_built_once_and_again_when_a_file_changes(world, built):
    for _ in range(2):
        cache = open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    assert built == ["labels", "images"]
    before = cache.image(1).copy()
    change_image(world)
    cache = open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    assert built == ["labels", "images"] * 2
    assert not np.array_equal(cache.image(1), before)
    os.utime(world / "gta/labels/00002.png", ns=(1, 1))
    open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    assert built == [*["labels", "images"] * 2, "labels"]
    open_cache(world / "cache", gta(world), (26, 20), "exact", True, 0)
    assert built == [*["labels", "images"] * 2, "labels", "labels", "images"]


def test_a_kill_in_the_exchange_of_two_caches_loses_none(world, built):
    open_cache(*(arguments := (world / "cache", gta(world), SIZE, "fast", False, 0)))
    (folder,) = folders(world / "cache")
    key = folder.name.split("_")[-2]
    folder.rename(folder.with_name(f".building-{key}-0123abcd-replaced"))
    (world / "cache" / f".building-{key}-0123abcd").mkdir()
    assert open_cache(*arguments).image(0).any()
    assert built == ["images"]
    assert folders(world / "cache") == [folder]


def test_the_bytes_to_build_are_those_that_are_built(world):
    arguments = (world / "cache", gta(world), (20, 12), "exact", True)
    found = [bytes_to_build(*arguments)]
    open_cache(*arguments[:4], False, 0)
    found.append(bytes_to_build(*arguments))
    open_cache(*arguments, 0)
    found.append(bytes_to_build(*arguments))
    count = len(gta(world)) * 20 * 12
    assert found == [4 * count, count, 0]


def test_runs_with_and_without_labels_share_the_images(world, built):
    open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert built == ["labels", "images"]
    open_cache(world / "other", gta(world), SIZE, "exact", False, 0)
    with pytest.raises(ValueError, match="without labels"):
        open_cache(world / "other", gta(world), SIZE, "exact", False, 0).label(0)
    open_cache(world / "other", gta(world), SIZE, "exact", True, 0)
    assert built == ["labels", "images", "images", "labels"]


def test_a_cache_in_use_stays_when_a_file_changes(world, capsys):
    old = open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    (folder,) = folders(world / "cache")
    for_a_worker = pickle.dumps(old)  # opens the files anew
    before = old.image(1).copy()
    change_image(world)
    capsys.readouterr()
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert f"{folder} is a cache of another state" in capsys.readouterr().err
    assert np.array_equal(pickle.loads(for_a_worker).image(1), before)
    shutil.rmtree(folder)
    open_cache(world / "cache", gta(world), SIZE, "exact", False, 0)
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"cannot read .*images\.npy"):
        pickle.loads(for_a_worker).image(1)


@pytest.mark.parametrize("change", [{"id_map": {**CITYSCAPES_IDS, 7: 5}}, {"void_ids": None}])
def test_labels_read_in_another_way_are_cached_anew(world, built, change):
    files = gta(world)
    open_cache(world / "cache", files, SIZE, "exact", True, 0)
    other = replace(files, data_set=replace(files.data_set, **change))
    label = open_cache(world / "cache", other, SIZE, "exact", True, 0).label(0)
    assert np.array_equal(label, open_cache(world / "fresh", other, SIZE, "exact", True, 0).label(0))
    assert built == ["labels", "images", "labels", "labels", "images"]
    other = replace(files, data_set=replace(files.data_set, label_encoding="16-bit channel 0"))
    with pytest.raises(UserError, match="16-bit"):
        open_cache(world / "cache", other, SIZE, "exact", True, 0)


def test_a_new_format_means_new_caches(world, built, monkeypatch):
    open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    monkeypatch.setattr(cache_module, "FORMAT", cache_module.FORMAT + 1)
    open_cache(world / "cache", gta(world), SIZE, "exact", True, 0)
    assert built == ["labels", "images"] * 2


def test_training_from_a_cache(world, run_script):
    runs = {}
    for name, changes in (("plain", {}), ("cached", {"cache_dir": world / "cache"})):
        result = run_script(train_procst, *training_flags(world, world / name, **changes))
        assert result.code == 0, result.err
        runs[name] = load_checkpoint(only_run(world / name) / "latest.pth")
    for (name, value), (_, expected) in zip(all_tensors(runs["cached"]), all_tensors(runs["plain"]), strict=True):
        assert torch.equal(value, expected), name
    check_refusal(
        run_script(train_procst, *training_flags(world, world / "bad", resample="best")), "--resample", "best"
    )
    assert Image.open(world / "gta/images/00001.png").size == (60, 44)


def test_a_cache_without_what_cannot_be_read(world, monkeypatch):
    files = gta(world)
    bad = world / "gta/images/00003.png"
    bad.write_bytes(bad.read_bytes()[:200])
    label = world / "gta/labels/00001.png"
    label.write_bytes(label.read_bytes()[:200])
    arguments = (world / "cache", files, SIZE, "fast", True, 1)
    with pytest.raises(UserError, match="skip"):
        open_cache(*arguments)
    cache = open_cache(*arguments, skip_unusable=True)
    assert cache.image(1).shape == (SIZE[1], SIZE[0], 3)
    with pytest.raises(UserError, match="00003"):
        cache.image(2)
    with pytest.raises(UserError, match="labels/00001"):
        pickle.loads(pickle.dumps(cache)).label(0)
    # The finished cache is refused to a run that does not skip.
    with pytest.raises(UserError, match="--on_bad_image skip"):
        open_cache(*arguments)
    # As good as new, and of the same size and time: a disk that did not answer for a while.
    monkeypatch.setattr(cache_module, "read_label", lambda path, data_set, size: np.zeros(size[::-1], np.uint8))
    real = cache_module.read_resized
    monkeypatch.setattr(cache_module, "read_resized", lambda path, *how: real(bad.with_name("00001.png"), *how))
    assert open_cache(*arguments).image(2).any()


def test_a_cache_that_lacks_files_stays_until_a_better_one_is_there(world, monkeypatch):
    """Another run may be at work with it, and a disk may fail again."""
    files, real = gta(world), cache_module.read_resized
    gone = {"00002.png", "00004.png"}

    def read(path, *how):
        if path.name in gone:
            raise UserError(f"{path}: not there for a while")
        return real(path, *how)

    monkeypatch.setattr(cache_module, "read_resized", read)
    arguments = (world / "cache", files, SIZE, "fast", False, 0)
    used = open_cache(*arguments, skip_unusable=True)
    before = [used.image(0).copy(), used.image(4).copy()]
    gone.remove("00002.png")
    with pytest.raises(UserError, match=r"0000\d\.png: not there for a while"):
        open_cache(*arguments)  # of no use while another one is gone
    assert np.array_equal(used.image(0), before[0])
    # With skip, a build that fails in the end leaves the old one, too.
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        cache = open_cache(*arguments, skip_unusable=True)
        assert np.array_equal(cache.image(4), before[1])
        with pytest.raises(UserError, match="00002"):
            cache.image(1)
    cache = open_cache(*arguments, skip_unusable=True)
    assert cache.image(1).any()
    with pytest.raises(UserError, match="00004"):
        cache.image(3)
    # Another file than before does not answer: those who use the cache would not know.
    gone.clear()
    gone.add("00001.png")
    stays = open_cache(*arguments, skip_unusable=True)
    assert np.array_equal(stays.image(0), before[0])
    with pytest.raises(UserError, match="00004"):
        stays.image(3)
    # The run that has the old one open goes on as it was.
    for fresh in (used, pickle.loads(pickle.dumps(used))):
        assert np.array_equal(fresh.image(4), before[1])
        with pytest.raises(UserError, match="00002"):
            fresh.image(1)
    assert [path.name for path in (world / "cache").iterdir() if "building" in path.name] == []


@pytest.mark.parametrize("labels", [False, True])
def test_links_that_lead_nowhere_are_unusable_files(world, labels):
    files = gta(world)
    bad = world / "gta" / ("labels" if labels else "images") / "00003.png"
    bad.unlink()
    bad.symlink_to("nowhere")
    arguments = (world / "cache", files, SIZE, "fast", labels, 0)
    with pytest.raises(UserError, match=r"00003\.png.*--on_bad_image skip"):
        open_cache(*arguments)
    cache = open_cache(*arguments, skip_unusable=True)
    assert cache.image(0).any()
    with pytest.raises(UserError, match="00003"):
        cache.label(2) if labels else cache.image(2)
