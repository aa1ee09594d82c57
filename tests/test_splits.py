"""The one rule for the split into training and validation images."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_handlers.datasets import DATA_SETS
from data_handlers.lists import list_images
from data_handlers.splits import train_and_validation, validation_images
from utils.errors import UserError
from utils.sizes import evenly_spaced
from worlds import noise_image, write_cityscapes, write_gta5

GTA5 = replace(DATA_SETS["gta5"], held_out=2)


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=6)
    write_cityscapes(tmp_path / "cityscapes", count=3)
    write_cityscapes(tmp_path / "cityscapes", count=2, split="val", city="village")
    for name, numbers in (("three", (1, 2, 3)), ("two", (2, 5)), ("all", range(1, 7))):
        (tmp_path / name).write_text("".join(f"{k:05d}.png\n" for k in numbers))
    return tmp_path


def numbers(files):
    return [int(name[-9:-4]) for name in files.images]


@pytest.mark.parametrize(
    ("flags", "train", "val"),
    [
        ({}, [1, 2, 3, 4], [5, 6]),
        ({"val_count": 3}, [1, 2, 3], [4, 5, 6]),
        ({"val_list": "two"}, [1, 3, 4, 6], [2, 5]),
        ({"list_file": "three", "val_count": 1}, [1, 2], [3]),
        ({"list_file": "three"}, [1], [2, 3]),
    ],
    ids=str,
)
def test_a_set_without_a_val_split(world, flags, train, val):
    flags = {name: str(world / value) if isinstance(value, str) else value for name, value in flags.items()}
    found = train_and_validation(GTA5, world / "gta", "--src_data_dir", **flags)
    assert [numbers(files) for files in found] == [train, val]
    if "list_file" not in flags:  # what evaluate.py scores on
        assert numbers(validation_images(GTA5, world / "gta", "--data_dir", **flags)) == val


def test_a_set_with_a_val_split(world):
    root, data_set = world / "cityscapes", DATA_SETS["cityscapes"]
    train, val = train_and_validation(data_set, root, "--src_data_dir")
    assert (len(train), len(val)) == (3, 2)
    assert all("/val/village/" in name for name in val.images)
    train, val = train_and_validation(data_set, root, "--src_data_dir", val_count=1)
    assert ["/train/town/" in name for name in (*train.images, *val.images)] == [True] * 3
    # Names in a list are looked for in the folders of both splits.
    names = ("town/town_000001_000019_leftImg8bit.png", "village/village_000000_000019_leftImg8bit.png")
    (world / "mixed").write_text("\n".join(names))
    train, val = train_and_validation(data_set, root, "--src_data_dir", val_list=str(world / "mixed"))
    assert [name.split("/")[1] for name in val.images] == ["train", "val"]
    assert len(train) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"val_count": 7}, r"--val_count 7: there are 6 images"),
        ({"val_count": 6}, r"--val_count 6: of 6 images .* 1 to 5 can be kept"),
        ({"val_list": "all"}, "all names every image .* none is left to train on"),
        ({"val_list": "two", "list_file": "three"}, r"two: images/00002\.png is in --src_list .*three, too"),
        ({"label_root": "nowhere"}, r"--src_label_dir .*nowhere: no such folder"),
        ({"label_root": "cityscapes"}, r"--src_label_dir .*cityscapes: 4 of 4 images have no label"),
    ],
    ids=str,
)
def test_splits_that_cannot_be(world, flags, message):
    flags = {name: str(world / value) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(UserError, match=message):
        train_and_validation(GTA5, world / "gta", "--src_data_dir", **flags)


def test_nothing_says_what_to_validate_on(world):
    with pytest.raises(UserError, match="gta5 declares no val split"):
        validation_images(replace(GTA5, held_out=0), world / "gta", "--data_dir")


def test_training_on_what_is_validated_on_is_refused(world):
    root, data_set = world / "cityscapes", DATA_SETS["cityscapes"]
    val = list_images(data_set, root, "--data_dir", split="val")
    (world / "list").write_text("\n".join(val.images))
    with pytest.raises(UserError, match=r"val split of cityscapes: .*village_000000.* is in --src_list"):
        train_and_validation(data_set, root, "--src_data_dir", list_file=str(world / "list"))


def test_labels_in_another_folder(world):
    (world / "gta/labels").rename(world / "labels")
    with pytest.raises(UserError, match="have no label"):
        train_and_validation(GTA5, world / "gta", "--src_data_dir")
    (world / "elsewhere").mkdir()
    (world / "labels").rename(world / "elsewhere/labels")
    for files in train_and_validation(GTA5, world / "gta", "--src_data_dir", label_root=world / "elsewhere"):
        assert files.label_file(files.images[0]).is_file()


def test_evenly_spaced_items():
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced("abc", 3) == evenly_spaced("abc", 9) == ["a", "b", "c"]
    assert evenly_spaced("abc", 1) == ["a"]
    assert evenly_spaced([], 5) == []
    assert set(evenly_spaced(range(97), 5)) <= set(evenly_spaced(range(97), 20))


@pytest.mark.parametrize("patterns", [("*.jpg", "*.jpeg"), ("*.jpg", "*.png"), ("*.{jpeg,jpg}",), ("*.*",)])
def test_an_image_that_is_there_as_png_is_listed_once(tmp_path, patterns):
    for name in ("a.png", "b.png"):
        noise_image((8, 8), 1).save(tmp_path / name)
    files = list_images(replace(DATA_SETS["folder"], images={"train": patterns}), tmp_path, "--source")
    assert [files.image_file(name).name for name in files.images] == ["a.png", "b.png"]
