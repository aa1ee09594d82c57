"""Cross-City and its 13 classes, from the training on Cityscapes to the score; the randomly scaled crops."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import evaluate
import train_semseg_on_source
import train_uda
from commands import command, only_run
from data_handlers.classes import CLASS_NAMES, IGNORE, SYNTHIA_13
from data_handlers.datasets import DATA_SETS, find_data_set, for_net_of, with_split
from data_handlers.domain import Domain
from data_handlers.images import read_label
from data_handlers.labelled import check_samples
from data_handlers.lists import list_images
from data_handlers.splits import train_and_validation, validation_images
from refusals import check_refused
from uda.maxsquare_config import MaxSquareConfig
from uda.maxsquare_samples import MaxSquareSamples
from utils.errors import UserError
from worlds import noise_image, write_cityscapes, write_crosscity

SIZE = (40, 32)
NAMES_13 = (
    "road", "sidewalk", "building", "traffic light", "traffic sign", "vegetation", "sky", "person", "rider", "car",
    "bus", "motorcycle", "bicycle",
)  # fmt: skip
CROSSCITY = DATA_SETS["crosscity"]


# --- 13 classes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cityscapes", "gta5", "synthia", "crosscity"])
def test_a_net_of_13_classes_sees_those_of_crosscity(name):
    whole, found = DATA_SETS[name], for_net_of(DATA_SETS[name], 13)
    assert found.class_names == NAMES_13
    assert found.colours == tuple(whole.colours[CLASS_NAMES.index(n)] for n in NAMES_13)
    assert found.classes == tuple(range(13))
    assert {i: CLASS_NAMES.index(NAMES_13[c]) for i, c in found.id_map.items()} == {
        i: c for i, c in whole.id_map.items() if CLASS_NAMES[c] in NAMES_13
    }
    assert found.void_ids | found.id_map.keys() == whole.void_ids | whole.id_map.keys()
    assert {NAMES_13[c] for c in found.categories["vehicle"]} == {"car", "bus", "motorcycle", "bicycle"}
    assert for_net_of(CROSSCITY, 19).classes == SYNTHIA_13


def test_train_ids_that_a_net_of_13_classes_would_read_as_ids_are_refused(tmp_path):
    city = write_crosscity(tmp_path, size=SIZE)
    for path in (city / "Labels/Test").iterdir():
        Image.fromarray(np.resize(np.uint8([0, 7, 12, IGNORE]), SIZE[::-1])).save(path)
    files = list_images(for_net_of(CROSSCITY, 13), city, "--data_dir", split="val")
    check_refused(lambda: check_samples(files, flag="--labels"), "these look like trainIds", "--labels trainids")


# --- lists and splits ------------------------------------------------------------------------------------------------


def test_the_files_of_a_city(tmp_path):
    city, lists = write_crosscity(tmp_path, size=SIZE), tmp_path / "NTHU_list/Rio/List"
    train = list_images(CROSSCITY, city, "--trg_data_dir")
    val = validation_images(CROSSCITY, city, "--data_dir")
    assert (len(train), len(val)) == (4, 2)
    listed = list_images(CROSSCITY, city, "--trg_data_dir", list_file=str(lists / "train.txt"))
    assert sorted(listed.images) == list(train.images)
    tested = validation_images(CROSSCITY, city, "--data_dir", val_list=str(lists / "test.txt"))
    assert sorted(tested.images) == list(val.images)
    assert "Images/Train/pano_shared.jpg" in listed.images  # a stem of both lists is that of the split's own folder
    assert "Images/Test/pano_shared.jpg" in tested.images
    for name in tested.images:
        label = read_label(tested.label_file(name), for_net_of(CROSSCITY, 13), SIZE)
        assert set(np.unique(label)) == {*range(13), IGNORE}


def test_a_city_of_jpeg_and_png_images(tmp_path):
    city, lists = write_crosscity(tmp_path, size=SIZE), tmp_path / "NTHU_list/Rio/List"
    noise_image(SIZE, 0).save(city / "Images/Test/pano_shared.png")
    (city / "Images/Test/pano_shared.jpg").unlink()
    for tested in (
        list_images(CROSSCITY, city, "--data_dir", split="val"),
        list_images(CROSSCITY, city, "--data_dir", split="val", list_file=str(lists / "test.txt")),
    ):
        (shared,) = (name for name in tested.images if "shared" in name)
        assert tested.image_file(shared) == city / "Images/Test/pano_shared.png"
        assert tested.label_file(shared) == city / "Labels/Test/pano_shared_eval.png"
    (lists / "more.txt").write_text("pano_shared\npano_9\n")
    with pytest.raises(UserError, match=r"more\.txt line 2: no image pano_9 in"):
        list_images(CROSSCITY, city, "--data_dir", list_file=str(lists / "more.txt"))


def test_the_finely_labelled_images_of_cityscapes_are_a_source(tmp_path):
    root = write_cityscapes(tmp_path, count=3, size=SIZE)
    write_cityscapes(root, count=2, size=SIZE, split="val", city="valtown")
    write_cityscapes(root, count=2, size=SIZE, split="train_extra", city="other", labels=False)
    with pytest.raises(UserError, match="2 of 5 images have no label"):
        train_and_validation(DATA_SETS["cityscapes"], root, "--src_data_dir")
    train, val = train_and_validation(with_split(DATA_SETS["cityscapes"], "fine"), root, "--src_data_dir")
    assert (len(train), len(val)) == (3, 2)
    assert set(with_split(DATA_SETS["cityscapes"], "val").images) == {"train", "fine"}


# --- randomly scaled crops -------------------------------------------------------------------------------------------


def samples_of(files, **changes):
    fields = {"name": "source", "seed": 3, "resize": (40, 20), "crop": (32, 24), "labels": True, "flip": True}
    domain = Domain(files=files, **{**fields, **changes})
    return MaxSquareSamples(domain=domain, stage=0, per_epoch=9, epoch_length=9, blurs=False, scales=True)


def test_scaled_crops_of_an_image_and_its_label_fit_together(tmp_path):
    """The label's trainId is told by the colour; outside of the image both are empty; each position has its own."""
    city = write_crosscity(tmp_path, size=(96, 48))
    for path in (city / "Labels/Test").iterdir():
        ids = np.full((48, 96), 7, np.uint8)
        ids[:, 60:] = 26
        Image.fromarray(ids).save(path)
        image = Image.fromarray(np.where(ids[..., None] == 7, np.uint8([200, 40, 40]), np.uint8([40, 200, 40])))
        image.save((city / "Images/Test" / path.name.removesuffix("_eval.png")).with_suffix(".jpg"), quality=100)
    files = list_images(for_net_of(CROSSCITY, 13), city, "--data_dir", split="val")
    samples, seen = samples_of(files), set()
    for position in range(30):
        (pixels,), label = samples.read(position % 2, position)
        assert (pixels.shape, label.shape) == ((24, 32, 3), (24, 32))
        assert set(np.unique(label)) <= {0, NAMES_13.index("car"), IGNORE}
        assert not pixels[label == IGNORE].any()
        told = np.where(pixels[..., 0].astype(int) > pixels[..., 1], 0, NAMES_13.index("car"))
        assert (told == label)[label != IGNORE].mean() > 0.9  # edges are smooth
        columns = (label[0] == 0).sum()
        seen.add((bool((label == IGNORE).any()), columns not in (0, 32) and label[0, 0] != 0))
        (again,), label_again = samples.read(position % 2, position)
        assert np.array_equal(again, pixels)
        assert np.array_equal(label_again, label)
    assert seen == {(padded, mirrored) for padded in (False, True) for mirrored in (False, True)}
    bare = samples_of(files, labels=False)
    assert bare.read(0, 4)[1] is None
    assert np.array_equal(bare.read(0, 4)[0][0], samples.read(0, 4)[0][0])
    blurring = replace(samples, blurs=True)
    changed = [not np.array_equal(blurring.read(0, k)[0][0], samples.read(0, k)[0][0]) for k in range(30)]
    assert 5 < sum(changed) < 25


def test_what_contradicts_a_scaled_crop_is_refused():
    flags = {"method": "maxsquare", "random_crop": True}
    check_refused(lambda: MaxSquareConfig.from_flags(flags), "--random_crop needs --crop_size")
    cached = {**flags, "crop_size": (32, 32), "cache_dir": "cache"}
    check_refused(lambda: MaxSquareConfig.from_flags(cached), "--cache_dir: --random_crop reads images at their own")
    wide = MaxSquareConfig.from_flags({**flags, "src_resize": (30, 20), "crop_size": (32, 32)}).target
    assert (wide.src_resize, wide.crop_size) == ((30, 20), (32, 32))


# --- from source to score --------------------------------------------------------------------------------------------


def test_from_cityscapes_to_a_city(tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cityscapes(tmp_path / "cityscapes", count=3, size=SIZE)
    write_cityscapes(tmp_path / "cityscapes", count=1, size=SIZE, split="val", city="valtown")
    city, lists = write_crosscity(tmp_path, size=SIZE), tmp_path / "NTHU_list/Rio/List"
    common = {
        "gpus": "cpu", "num_workers": 0, "src_data_dir": "cityscapes", "src_resize": SIZE, "precision": "fp32",
        "tb_logs_dir": "logs",
    }  # fmt: skip
    trained = run_script(train_semseg_on_source, *command({
        **common, "source": "cityscapes", "src_split": "fine", "num_classes": 13, "model": "UNet", "crop_size": SIZE,
        "num_steps": 2, "batch_size": 2, "output": "source.pth", "checkpoints_dir": "models",
    }))  # fmt: skip
    assert trained.code == 0, trained.err
    assert "UNet with 13 classes" in trained.out
    assert scored_in(only_run(tmp_path)) <= set(NAMES_13)
    adapted = run_script(train_uda, *command({
        "preset": "cityscapes-crosscity-maxsquare", **common, "init": "source.pth", "trg_data_dir": city,
        "trg_list": lists / "train.txt", "trg_resize": SIZE, "random_crop": (), "crop_size": (32, 24),
        "epoch_each_round": 1, "batch_size": 2, "run_dir": "run",
    }))  # fmt: skip
    assert adapted.code == 0, adapted.err
    assert "crosscity: 4 images" in adapted.out
    assert "validating on crosscity: 2 images" in adapted.out
    assert scored_in(tmp_path / "run") == set(NAMES_13)
    scored = run_script(evaluate, *command({
        "gpus": "cpu", "num_workers": 0, "weights": "run", "data_set": "crosscity", "data_dir": city,
        "list": lists / "test.txt", "json": "scores.json", "save_predictions": "predicted",
        "prediction_format": "colour",
    }))  # fmt: skip
    assert scored.code == 0, scored.err
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert tuple(scores["iou"]) == NAMES_13
    assert np.shape(scores["confusion"]) == (13, 13)
    drawn = sorted((tmp_path / "predicted").rglob("*.png"))
    assert [path.stem for path in drawn] == ["pano_00001_Test", "pano_shared"]
    colours = {tuple(pixel) for path in drawn for pixel in np.asarray(Image.open(path)).reshape(-1, 3).tolist()}
    assert colours <= set(for_net_of(find_data_set("crosscity", "--data_set"), 13).colours)


def scored_in(run):
    """The names of the classes in the validations of a run."""
    return {name for entry in json.loads((run / "validations.json").read_text()) for name in entry["iou"]}
