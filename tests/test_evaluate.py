"""evaluate.py on tiny worlds: its predictions, and what it refuses; its scores are in test_evaluate_scores.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as script
from evaluations import CITY_ALL, evaluation_flags, save_unet, truth, write_train_ids, write_world
from refusals import check_refusal, tree
from scoring import COLOURS, LABEL_IDS, SUBSETS
from training.confidence_maps import confidence_map
from training.segmentation_files import load_segmentation_net
from training.validation import in_windows
from worlds import write_cityscapes, write_gta5


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


@pytest.mark.parametrize("flags", [{"long_side": 30, "flip": ()}, {"long_side": 96}, {"window": (32, 24)}])
def test_predictions_of_resized_images_and_in_windows(run_script, world, flags):
    saved = {"save_predictions": world / "saved", "prediction_format": "trainids", "error_maps": ()}
    result = run_script(script, *evaluation_flags(world, **flags, **saved))
    assert result.code == 0, result.err
    _, net = load_segmentation_net(world / "net.pth", "net")
    for image in CITY_ALL:
        pixels = np.array(Image.open(world / "cityscapes" / image))
        if "window" in flags:
            image_input = net.network_input(torch.from_numpy(pixels)[None])
            expected = in_windows(net, image_input, (32, 24))[0]
        else:
            expected = confidence_map(
                lambda x: net(x).softmax(1), pixels, longer_side=flags["long_side"], stride=1,
                normalise=net.network_input, flip="flip" in flags,
            )  # fmt: skip
        prediction = np.asarray(Image.open(world / "saved" / image))
        assert np.array_equal(prediction, expected.argmax(0).numpy())
        label = truth(world, image)
        errors = np.asarray(Image.open(world / "saved" / image.replace(".png", "_errors.png")))
        for row in range(32):
            for column in range(48):
                t, p = label[row, column], prediction[row, column]
                assert errors[row, column].tobytes().hex() == ("ffffff" if t in (p, 255) else COLOURS[p])
    report = json.loads((world / "scores.json").read_text())
    assert report["long_side"] == flags.get("long_side")
    assert 0 < report["label_free"] < 1


def test_pictures_without_labels_are_predicted_and_not_scored(run_script, world):
    flags = {"data_set": "folder", "data_dir": world / "gta5/images", "save_predictions": world / "saved"}
    result = run_script(script, *evaluation_flags(world, **flags))
    assert result.code == 0, result.err
    assert "folder has no labels, so there are no scores; label-free score 0." in result.out
    assert len(list((world / "saved").glob("*.png"))) == 6
    report = json.loads((world / "scores.json").read_text())
    assert (report["miou"], report["iou"]) == (None, {})
    check_refusal(run_script(script, *evaluation_flags(world, **flags, error_maps=())), "--error_maps", "no labels")
    check_refusal(run_script(script, *evaluation_flags(world, **flags, classes=16)), "--classes", "no labels")
    check_refusal(run_script(script, *evaluation_flags(world, **flags, absent_classes="zero")), "--absent_classes")
    (world / "gta5/images/00001.jpg").write_bytes((world / "gta5/images/00001.png").read_bytes())
    flags["save_predictions"] = world / "other"
    check_refusal(run_script(script, *evaluation_flags(world, **flags)), "--save_predictions", "ending")


@pytest.mark.parametrize("classes", [19, 16])
def test_prediction_formats_hold_the_same_classes(run_script, world, classes):
    of_net = sorted(SUBSETS[classes])
    for name in ("trainids", "labelids", "colour", ""):
        chosen = {"prediction_format": name} if name else {}
        weights = world / ("net.pth" if classes == 19 else "net16.pth")
        flags = evaluation_flags(world, weights=weights, save_predictions=world / f"saved{name}", **chosen)
        assert run_script(script, *flags).code == 0
    for image in CITY_ALL:
        train_ids = np.asarray(Image.open(world / "savedtrainids" / image))
        assert set(train_ids.flat) <= set(of_net)
        colours = np.asarray(Image.open(world / "savedcolour" / image))
        assert colours.shape == (32, 48, 3)
        assert [[COLOURS.index(bytes(pixel).hex()) for pixel in row] for row in colours] == train_ids.tolist()
        for folder in ("savedlabelids", "saved"):
            label_ids = np.asarray(Image.open(world / folder / image))
            assert [[LABEL_IDS.index(value) for value in row] for row in label_ids] == train_ids.tolist()


def test_labels_that_hold_train_ids(run_script, world):
    """Road is scored where the files hold 0, which as a label id would be ignored. A net of 16 maps those of 19."""
    write_train_ids(world / "trainids")
    labels = [np.asarray(Image.open(path)) for path in (world / "trainids").rglob("*_labelIds.png")]
    counted = np.bincount(np.concatenate(labels).ravel(), minlength=256)
    for net, kept in (("net.pth", range(19)), ("net16.pth", sorted(SUBSETS[16]))):
        flags = {"weights": world / net, "data_dir": world / "trainids"}
        check_refusal(run_script(script, *evaluation_flags(world, **flags)), "look like trainIds", "--labels trainids")
        result = run_script(script, *evaluation_flags(world, **flags, labels="trainids"))
        assert result.code == 0, result.err
        report = json.loads((world / "scores.json").read_text())
        assert [sum(row) for row in report["confusion"]] == counted[list(kept)].tolist()


@pytest.mark.parametrize("classes", [4, 16, 25])
def test_a_net_of_any_number_of_classes(run_script, world, classes):
    """Its classes are those of a description with as many; of pictures without labels they have no names."""
    save_unet(world / "own.pth", classes)
    names = [f"class {k}" for k in range(classes)]
    ids = ", ".join(f"{label_id} = {k}" for k, label_id in enumerate((7, 8, 11, 21)))
    (world / "own.toml").write_text(
        f"classes = {json.dumps(names)}\n[images]\ntrain = ['images/*.png']\n"
        f"[labels]\nreplace = [['images/', 'labels/']]\nmap = {{ {ids} }}\n"
    )
    flags = {"weights": world / "own.pth", "data_set": world / "own.toml", "data_dir": world / "gta5", "val_count": 2}
    assert run_script(script, *evaluation_flags(world, **flags)).code == 0
    report = json.loads((world / "scores.json").read_text())
    assert (list(report["iou"]), np.shape(report["confusion"])) == (names, (classes, classes))
    assert all(report["iou"][name] is not None for name in names[:4])
    check_refusal(run_script(script, *evaluation_flags(world, **flags, classes=16)), "--classes 16", "own")
    pictures = {**flags, "data_set": world / "gta5/images", "data_dir": "", "val_count": 0}
    flags = evaluation_flags(world, **pictures, save_predictions=world / "saved")
    result = run_script(script, *flags)
    assert result.code == 0, result.err
    saved = [np.asarray(Image.open(path)) for path in (world / "saved").glob("*.png")]
    of_ids = {*np.array(LABEL_IDS)[sorted(SUBSETS[16])].tolist()}  # a net of 16 is taken for one of SYNTHIA's
    assert set(np.unique(saved).tolist()) <= (of_ids if classes == 16 else set(range(classes)))


def test_the_default_device_is_named(run_script, world, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run_script(script, *evaluation_flags(world, gpus=None))
    assert result.code == 0, result.err
    assert "computing on cpu (choose with --gpus)" in result.out


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"weights": "WORLD/missing.pth"}, ("missing.pth", "no such file")),
        ({"weights": "WORLD/other.pth"}, ("--weights", "other.pth")),
        ({"weights": "WORLD/text.pth"}, ("text.pth",)),
        ({"weights": "WORLD/cityscapes"}, ("--weights", "no run folder")),
        ({"weights": "WORLD/few.pth"}, ("few.pth has 7 classes", "19 classes are needed")),
        ({"weights": "WORLD/many.pth"}, ("--weights", "many.pth", "20 classes")),
        ({"scales": 0}, ("--scales 0.0",)),
        ({"scales": "nan"}, ("--scales nan",)),
        ({"scales": (1, 9)}, ("--scales 9.0",)),
        ({"scales": (1, "1.0")}, ("--scales", "twice")),
        ({"prediction_format": "colour"}, ("--prediction_format", "--save_predictions")),
        ({"prediction_format": "jpeg"}, ("--prediction_format", "jpeg")),
        ({"save_predictions": "WORLD/gta5"}, ("--save_predictions", "not empty")),
        ({"save_predictions": "WORLD/text.pth"}, ("--save_predictions", "text.pth")),
        ({"json": "WORLD/gta5"}, ("--json", "is a folder")),
        ({"list": "WORLD/gta5.txt", "val_count": 2}, ("--list", "--val_count")),
        ({"list": "WORLD/gta5.txt"}, ("gta5.txt line 1", "00004.png")),
        ({"val_count": -1}, ("--val_count is -1",)),
        ({"num_workers": -1}, ("--num_workers is -1",)),
        ({"classes": 5}, ("--classes", "5")),
        ({"gpus": ("0", "1")}, ("--gpus 0 1",)),
        ({"labels": "colours"}, ("--labels", "colours")),
        ({"data_dir": "WORLD/trainids"}, ("trainids hold", "look like trainIds", "--labels trainids")),
        ({"weights": ""}, ("--weights is required",)),
        ({"data_set": "folder", "data_dir": "WORLD/empty"}, ("--data_dir", "no images", "folder")),
        ({"long_side": 0}, ("--long_side is 0",)),
        ({"long_side": 64, "scales": (0.5, 1)}, ("--long_side", "--scales")),
        ({"window": (32, 0)}, ("--window is 32 0",)),
        ({"split": "test"}, ("--split", "test")),
        ({"split": "train", "val_count": 2}, ("--split train", "--val_count")),
        ({"error_maps": ()}, ("--error_maps", "--save_predictions")),
        ({"data_dir": "WORLD/nowhere"}, ("--data_dir", "nowhere", "no such folder")),
        ({"data_dir": "WORLD/gta5"}, ("--data_dir", "no images", "leftImg8bit/val")),  # no val split in it
        ({"data_dir": "WORLD/empty"}, ("--data_dir", "no images", "leftImg8bit/val")),
        ({"data_dir": "WORLD/unlabelled"}, ("--data_dir", "2 of 2", "gtFine/val/town")),
        ({"data_set": "gta5", "data_dir": "WORLD/gta5"}, ("--val_count 500", "6 images")),
        ({"data_set": "synthia", "data_dir": "WORLD/synthia"}, ("--val_count 300", "4 images")),
        ({"data_set": "gta5", "data_dir": "WORLD/gta5", "val_count": 7}, ("--val_count 7", "6 images")),
        ({"data_set": "gta5", "data_dir": "WORLD/bad", "val_count": 1}, ("labels/00002.png", "id 77", "gta5")),
    ],
)
def test_bad_input(run_script, world, changes, parts):
    torch.save({"conv.weight": torch.zeros(3)}, world / "other.pth")
    (world / "text.pth").write_text("no weights")
    save_unet(world / "few.pth", 7)
    save_unet(world / "many.pth", 20)
    (world / "empty/leftImg8bit/val/town").mkdir(parents=True)
    write_cityscapes(world / "unlabelled", count=2, split="val", labels=False)
    write_train_ids(world / "trainids")
    write_gta5(world / "bad", count=2)
    Image.fromarray(np.full((32, 48), 77, np.uint8)).save(world / "bad/labels/00002.png")
    before = tree(world)
    check_refusal(run_script(script, *evaluation_flags(world, **changes)), *parts)
    assert tree(world) == before
