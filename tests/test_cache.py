"""The cache of resized images and the fast resampling: the same samples, whatever happens to files and builders."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import train_procst
from commands import assert_same_tensors, only_run, procst_flags
from conftest import GOLDEN_DIR
from data_handlers import cache as cache_module
from data_handlers.cache import ResizedFiles
from data_handlers.classes import CITYSCAPES_IDS
from data_handlers.datasets import DATA_SETS
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


def cached(world, **changes):
    values = {"files": gta(world), "size": SIZE, "resample": "exact", "cache_dir": str(world / "cache")}
    return ResizedFiles(**{**values, **changes})


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were decoded."""
    names = []
    for function in ("read_resized", "read_label"):
        real = getattr(cache_module, function)
        monkeypatch.setattr(
            cache_module, function, lambda path, *rest, real=real: names.append(path.name) or real(path, *rest)
        )
    return names


# --- samples --------------------------------------------------------------------------------------------


def batches(files, resample, cache_dir="", workers=0):
    domain = Domain(
        files=files, name="source", seed=1, resize=SIZE, crop=(48, 36), labels=True, flip=True, resample=resample,
        num_workers=workers, cache_dir=str(cache_dir),
    )  # fmt: skip
    pyramid = partial(image_pyramid, num_scales=2, scale_factor=0.5, up_to=2, resample=resample)
    samples = Samples(domain=domain, stage=2, per_epoch=4, epoch_length=5, pyramid=pyramid)
    return list(samples.batches(range(6), 2, range(2)))


@pytest.mark.parametrize("resample", ["exact", "fast"])
def test_samples_from_the_cache_are_the_same(world, resample):
    files = gta(world)
    plain = batches(files, resample)
    for workers in (1, 0):  # makes the cache, and reads it
        for ours, theirs in zip(batches(files, resample, world / "cache", workers), plain, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours.levels, theirs.levels, strict=True))
            assert torch.equal(ours.label, theirs.label)


def test_fast_resampling_is_at_most_one_level_off(world):
    files = gta(world)
    for exact, fast in zip(batches(files, "exact"), batches(files, "fast"), strict=True):
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


# --- what is kept ---------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_anew_when_it_changes(world, read):
    for _ in range(2):
        before = cached(world).image(1)
        cached(world).label(1)
    assert read == ["00002.png", "00002.png"]
    noise_image((60, 44), 99).save(world / "gta/images/00002.png")
    os.utime(world / "gta/images/00002.png", ns=(1, 1))
    assert not np.array_equal(cached(world).image(1), before)
    assert isinstance(cached(world).image(1), np.memmap)
    cached(world).label(1)  # is checked against the size of its image
    assert len(read) == 4
    for changes in ({"size": (26, 20)}, {"resample": "fast"}):
        for _ in range(2):
            cached(world, **changes).image(1)
    assert len(read) == 6


@pytest.mark.parametrize("change", [{"id_map": {**CITYSCAPES_IDS, 7: 5}}, {"void_ids": None}])
def test_labels_read_in_another_way_are_cached_anew(world, read, change):
    files = gta(world)
    cached(world).label(0)
    other = replace(files, data_set=replace(files.data_set, **change))
    label = cached(world, files=other).label(0)
    assert np.array_equal(label, cached(world, files=other, cache_dir="").label(0))
    assert len(read) == 3


@pytest.mark.parametrize("damage", ["cut short", "a link that leads nowhere"])
@pytest.mark.parametrize("kind", ["images", "labels"])
def test_what_cannot_be_read_is_not_kept(world, kind, damage):
    bad = world / "gta" / kind / "00003.png"
    whole = bad.read_bytes()
    bad.unlink()
    bad.symlink_to("nowhere") if damage != "cut short" else bad.write_bytes(whole[:200])
    for _ in range(2):
        with pytest.raises(UserError, match=r"00003\.png"):
            (cached(world).image if kind == "images" else cached(world).label)(2)
    bad.unlink()
    bad.write_bytes(whole)
    assert cached(world).image(2).any()
    cached(world).label(2)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY\x01\x00v\x00{'(" + bytes(10_000), b"cut"])
def test_a_damaged_array_is_made_again(world, damage):
    whole = np.array(cached(world).image(0))
    (kept,) = (world / "cache").rglob("*.npy")
    kept.write_bytes(damage)
    for _ in range(2):
        assert np.array_equal(cached(world).image(0), whole)
    assert isinstance(cached(world).image(0), np.memmap)


def test_a_cache_that_cannot_be_written(world):
    (world / "file").write_text("")
    with pytest.raises(UserError, match="--cache_dir"):
        cached(world, cache_dir=str(world / "file")).image(0)
