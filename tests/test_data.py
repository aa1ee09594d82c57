"""Declarations, lists, readers and the step-indexed stream."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_handlers.classes import CITYSCAPES_IDS, SYNTHIA_13, SYNTHIA_16
from data_handlers.datasets import DATA_SETS, DataSet
from data_handlers.domain import Domain, Samples
from data_handlers.images import PROCST_INPUT, NetworkInput, image_pyramid, read_label
from data_handlers.label_maps import to_train_ids
from data_handlers.lists import label_path, list_images, require_labels
from utils.errors import UserError
from worlds import index_label, noise_image, write_cityscapes, write_gta5, write_png16, write_synthia

WHOLE = partial(image_pyramid, num_scales=2, scale_factor=0.5, up_to=2, resample="exact")


def domain_of(files, **changes):
    values = {"name": "source", "seed": 7, "resize": (40, 30), "crop": (32, 24), "labels": True}
    return Domain(files=files, **{**values, **changes})


def stream(domain, steps, **changes):
    values = {"stage": 1, "batch_size": 2, "per_epoch": 6, "epoch_length": 6, "pyramid": WHOLE, **changes}
    size = values.pop("batch_size")
    return Samples(domain=domain, **values).batches(steps, size, range(size))


SINGLE = {"batch_size": 1, "per_epoch": 1, "epoch_length": 1}


def test_label_maps_cover_the_19_classes():
    for data_set in (DATA_SETS["gta5"], DATA_SETS["synthia"], DATA_SETS["cityscapes"]):
        assert sorted(data_set.id_map.values()) == list(range(19))
    assert (len(SYNTHIA_16), len(SYNTHIA_13)) == (16, 13)
    assert set(SYNTHIA_16) - set(SYNTHIA_13) == {3, 4, 5}
    assert set(range(19)) - set(SYNTHIA_16) == {9, 14, 16}
    assert to_train_ids(np.array([7, 33, 0, 34]), CITYSCAPES_IDS).tolist() == [0, 18, 255, 255]


def test_declarations_are_read_without_anything_heavy():
    """The command lines read the names of the data sets before they import PyTorch."""
    code = "import sys, data_handlers.datasets, data_handlers.choices; print(*sys.modules)"
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "PIL", "tqdm"} & set(result.stdout.split())


def test_network_input_is_what_the_network_was_trained_on():
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = ((pixels.float() - 128.0) / 128.0).permute(0, 3, 1, 2)
    assert torch.equal(PROCST_INPUT(pixels), expected)
    assert torch.equal(PROCST_INPUT(pixels[0]), expected[0])
    assert PROCST_INPUT(pixels).is_contiguous()
    kept = pixels.clone()
    mean, std = (104.0, 117.0, 123.0), (1.0, 2.0, 3.0)
    found = NetworkInput(mean=mean, std=std)(pixels, torch.float64)
    for k in range(3):
        assert torch.equal(found[:, k], (pixels[..., k].double() - mean[k]) / std[k])
    assert torch.equal(pixels, kept)
    floats = pixels.float()
    PROCST_INPUT(floats)
    assert torch.equal(floats, kept.float())  # not changed in place


def test_label_paths():
    assert label_path(DATA_SETS["gta5"], "images/00001.png") == "labels/00001.png"
    assert label_path(DATA_SETS["synthia"], "RGB/0000001.png") == "GT/LABELS/0000001.png"
    image = "leftImg8bit/train/a/a_000000_000019_leftImg8bit.png"
    assert label_path(DATA_SETS["cityscapes"], image) == "gtFine/train/a/a_000000_000019_gtFine_labelIds.png"


def test_gta5_palette_is_read_by_index(tmp_path):
    write_gta5(tmp_path, count=1)
    ids = index_label((48, 32), 0)
    label = read_label(tmp_path / "labels" / "00001.png", DATA_SETS["gta5"], (48, 32))
    np.testing.assert_array_equal(label, to_train_ids(ids, CITYSCAPES_IDS))
    assert len(np.unique(label)) == 7


def test_synthia_class_is_channel_0_of_16_bits(tmp_path):
    write_synthia(tmp_path, count=1)
    ids = index_label((48, 32), 0, ids=(1, 2, 3, 8, 22, 0))
    label = read_label(tmp_path / "GT/LABELS/0000000.png", DATA_SETS["synthia"], (48, 32))
    np.testing.assert_array_equal(label, to_train_ids(ids, DATA_SETS["synthia"].id_map))
    assert set(np.unique(label)) == {10, 2, 0, 13, 255}


def test_the_two_known_gta5_frames_are_exported_but_not_trained_on(tmp_path):
    write_gta5(tmp_path, names=["00001", "15188", "17705"])
    training = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir")
    export = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir", training=False)
    assert training.images == ("images/00001.png",)
    assert len(export) == 3
    assert "15188" in training.describe()
    assert "17705" in training.describe()
    assert "\n" not in training.describe()


def test_cityscapes_reads_train_and_train_extra_in_place(tmp_path):
    write_cityscapes(tmp_path, count=3)
    write_cityscapes(tmp_path, count=2, split="val", city="valtown")
    extra = tmp_path / "leftImg8bit" / "train_extra" / "troisdorf"
    extra.mkdir(parents=True)
    for number in (72, 73, 74):
        noise_image((48, 32), number).save(extra / f"troisdorf_000000_{number:06d}_leftImg8bit.png")
    noise_image((48, 32), 0).save(extra / ".troisdorf_000000_000099_leftImg8bit.png")
    files = list_images(DATA_SETS["cityscapes"], tmp_path, "--trg_data_dir")
    assert len(files) == 5
    assert not any("000073" in image or "/." in image for image in files.images)
    assert "troisdorf_000000_000073" in files.describe()
    assert len(list_images(DATA_SETS["cityscapes"], tmp_path, "--trg_data_dir", split="val")) == 2


def test_a_list_file_overrides(tmp_path):
    write_gta5(tmp_path / "gta", count=5)
    listing = tmp_path / "list.txt"
    listing.write_text("00003.png\nimages/00001.png\n\n# comment\n")
    files = list_images(DATA_SETS["gta5"], tmp_path / "gta", "--src_data_dir", list_file=str(listing))
    assert files.images == ("images/00003.png", "images/00001.png")
    listing.write_text("00009.png\n")
    with pytest.raises(UserError, match="line 1"):
        list_images(DATA_SETS["gta5"], tmp_path / "gta", "--src_data_dir", list_file=str(listing))


def test_a_new_data_set_is_one_declaration(tmp_path):
    mine = DataSet(
        name="mine",
        images={"train": ("left/*/*.png",)},
        label_path=(("left/", "mask/"), (".png", "_mask.png")),
        id_map={1: 0, 2: 13},
        resize=(40, 30),
        crop=(40, 30),
    )
    (tmp_path / "left" / "a").mkdir(parents=True)
    (tmp_path / "mask" / "a").mkdir(parents=True)
    noise_image((48, 32), 0).save(tmp_path / "left/a/x.png")
    Image.fromarray(index_label((48, 32), 0, ids=(1, 2, 3))).save(tmp_path / "mask/a/x_mask.png")
    files = list_images(mine, tmp_path, "--src_data_dir")
    require_labels(files, "--src_data_dir")
    batch = next(stream(domain_of(files, resize=mine.resize, crop=mine.crop), range(1), **SINGLE))
    assert [tuple(level.shape) for level in batch.levels] == [(1, 8, 10, 3), (1, 15, 20, 3), (1, 30, 40, 3)]
    assert set(batch.label.unique().tolist()) == {0, 13, 255}


def collect(domain, steps, **changes):
    return [[*batch.levels, batch.label] for batch in stream(domain, steps, **changes)]


def test_a_step_depends_on_seed_and_number_alone(tmp_path):
    write_gta5(tmp_path)
    files = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir")
    alone = collect(domain_of(files), range(8))
    for workers, first in ((0, 5), (1, 0), (3, 0), (3, 5)):
        other = collect(domain_of(files, num_workers=workers), range(first, 8))
        for ours, theirs in zip(alone[first:], other, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert torch.equal(a, b)
    for changes, stage in (({"seed": 8}, 1), ({"name": "target"}, 1), ({}, 2)):
        other = collect(domain_of(files, **changes), range(8), stage=stage)
        assert not all(torch.equal(a[-2], b[-2]) for a, b in zip(alone, other, strict=True))


def test_an_epoch_shows_every_image_and_the_shorter_list_is_repeated(tmp_path):
    write_gta5(tmp_path, count=3)
    files = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir")
    samples = Samples(domain=domain_of(files), stage=1, per_epoch=7, epoch_length=7, pyramid=WHOLE)
    first = [samples.image_index(position) for position in range(7)]
    second = [samples.image_index(position) for position in range(7, 14)]
    assert sorted(first) == sorted(second) == [0, 0, 0, 1, 1, 2, 2]
    assert first != second


def test_every_crop_offset_is_reachable_and_the_whole_image_is_a_crop(tmp_path):
    write_gta5(tmp_path, count=1)
    files = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir")
    for resize, positions, expected in (
        ((34, 27), 400, {(x, y) for x in range(3) for y in range(4)}),
        ((32, 24), 20, {(0, 0)}),
    ):
        samples = Samples(domain=domain_of(files, resize=resize), stage=1, per_epoch=6, epoch_length=6, pyramid=WHOLE)
        assert {samples.crop_offset(position, samples.domain.resize) for position in range(positions)} == expected


def test_image_and_label_share_the_crop(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    ids = np.repeat(np.arange(48, dtype=np.uint8)[None], 32, axis=0) % 34
    Image.fromarray(ids).save(tmp_path / "labels/1.png")
    Image.fromarray(np.repeat(ids[..., None], 3, axis=2)).save(tmp_path / "images/1.png")
    files = list_images(DATA_SETS["gta5"], tmp_path, "--src_data_dir")
    for batch in stream(domain_of(files, resize=(48, 32), crop=(20, 16)), range(12), **SINGLE):
        pixels = batch.levels[-1][0, ..., 0].numpy()
        np.testing.assert_array_equal(batch.label[0].numpy(), to_train_ids(pixels, CITYSCAPES_IDS))


def test_sixteen_bit_labels_resize_without_new_values(tmp_path):
    write_synthia(tmp_path, count=2)
    write_png16(tmp_path / "GT/LABELS/0000001.png", np.full((32, 48, 3), 3, dtype=np.uint16))
    files = list_images(DATA_SETS["synthia"], tmp_path, "--src_data_dir")
    batch = next(stream(domain_of(files), range(1), epoch_length=2, per_epoch=2))
    assert set(batch.label.unique().tolist()) <= {0, 2, 10, 13, 255}
    assert any(set(label.unique().tolist()) == {0} for label in batch.label)
