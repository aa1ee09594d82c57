"""evaluate.py on tiny worlds: its scores, its predictions, what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as script
from commands import command
from data_handlers.datasets import DATA_SETS
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from nets import checkpoint_of
from refusals import check_refusal, tree
from scoring import COLOURS, LABEL_IDS, NAMES, SUBSETS, slow_scores
from training.confidence_maps import confidence_map
from training.segmentation_files import load_segmentation_net
from training.validation import in_windows, predict
from worlds import index_label, noise_image, write_cityscapes, write_gta5, write_synthia


def save_unet(path, num_classes=19):
    """A random UNet that uses many classes: its logits have the mean 0 on a picture."""
    torch.manual_seed(5)
    shape = SegmentationShape("UNet", "none", num_classes)
    net = build_segmentation_net(shape).eval()
    with torch.no_grad():
        net.head.classify.weight *= 4
        picture = (torch.from_numpy(np.array(noise_image((48, 32), 0))).permute(2, 0, 1)[None] - 128.0) / 128.0
        net.head.classify.bias -= net(picture).mean(dim=(0, 2, 3))
    checkpoint_of(shape, net.state_dict()).save(path)


@pytest.fixture
def world(tmp_path):
    write_cityscapes(tmp_path / "cityscapes", count=3, split="val")
    for k, path in enumerate(sorted((tmp_path / "cityscapes").rglob("*_labelIds.png"))):
        Image.fromarray(index_label((48, 32), k, (0, 7, 8, 11, 12, 17, 22, 26, 31, 33))).save(path)
    write_gta5(tmp_path / "gta5", count=6)
    write_synthia(tmp_path / "synthia", count=4)
    (tmp_path / "cityscapes.txt").write_text("town/town_000002_000019_leftImg8bit.png\n" + CITY.format(0))
    (tmp_path / "gta5.txt").write_text("00004.png\n")
    save_unet(tmp_path / "net.pth")
    save_unet(tmp_path / "net16.pth", 16)
    return tmp_path


def write_train_ids(root):
    """Labels that hold trainIds."""
    write_cityscapes(root, count=2, split="val")
    for k, path in enumerate(sorted(root.rglob("*_labelIds.png"))):
        Image.fromarray(index_label((48, 32), k, (0, 2, 8, 10, 13, 255))).save(path)


CITY = "leftImg8bit/val/town/town_{:06d}_000019_leftImg8bit.png"
CITY_ALL = tuple(CITY.format(k) for k in range(3))


def evaluation_flags(world, **changes):
    flags = {
        "gpus": "cpu", "num_workers": 0, "weights": world / "net.pth", "data_dir": world / "cityscapes",
        "json": world / "scores.json", **changes,
    }  # fmt: skip
    return [str(word).replace("WORLD", str(world)) for word in command(flags)]


def truth(world, image):
    """TrainIds of an image's label, by our own tables."""
    if image.startswith("RGB"):
        ids = index_label((48, 32), int(image[4:-4]), (1, 2, 3, 8, 22, 0))
        return np.select([ids == 1, ids == 2, ids == 3, ids == 8], [10, 2, 0, 13], 255)
    data_set = "gta5" if image.startswith("images") else "cityscapes"
    label = (
        image.replace("images", "labels").replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.", "gtFine_labelIds.")
    )
    ids = np.asarray(Image.open(world / data_set / label))
    return np.select([ids == label_id for label_id in LABEL_IDS], range(19), 255)


def check_report(out, report, predictions, labels, subset, of_net):
    """The IoUs of the 13 classes are those of the 16, and the pixels of the other 3 count."""
    iou, mean, accuracy, counts = slow_scores(predictions, labels, SUBSETS[16] if len(subset) == 13 else subset)
    iou = {c: value for c, value in iou.items() if c in subset}
    mean = sum(iou.values()) / len(iou)
    counted = SUBSETS[16] if len(subset) == 13 else subset
    predicted = {p for (t, p), _ in counts.items() if t in counted} & (subset - set(iou))
    with_absent = sum(iou.values()) / (len(iou) + len(predicted))
    assert predicted
    assert report["miou_with_absent"] == pytest.approx(with_absent)
    assert re.search(rf"^ +{100 * with_absent:.2f}  where absent classes that were predicted count as 0$", out, re.M)
    assert (report["miou"], report["pixel_accuracy"]) == pytest.approx((mean, accuracy))
    assert list(report["iou"]) == [NAMES[c] for c in sorted(subset)]
    assert [NAMES[c] for c in sorted(subset) if c not in iou] == report["absent"]
    matrix = [[counts.get((t, p), 0) for p in of_net] for t in of_net]
    assert report["confusion"] == matrix
    for c in sorted(subset):
        assert report["iou"][NAMES[c]] == (pytest.approx(iou[c]) if c in iou else None)
        shown = f" {100 * iou[c]:.2f}" if c in iou else "absent"
        assert re.search(rf"^{NAMES[c]} +{shown}$", out, re.MULTILINE), out
    assert re.search(rf"^mIoU +{100 * mean:.2f}  over {len(iou)} of {len(subset)} classes$", out, re.MULTILINE), out
    assert re.search(rf"^pixel accuracy +{100 * accuracy:.2f}$", out, re.MULTILINE), out
    assert f"\nabsent: {', '.join(report['absent'])}\n" in out
    assert report["convention"] in out
    assert "do not count in the mean" in report["convention"]


@pytest.mark.parametrize(
    ("data_set", "flags", "images", "subset"),
    [
        ("cityscapes", {}, CITY_ALL, 19),
        ("cityscapes", {"classes": 16, "flip": ()}, CITY_ALL, 16),
        ("cityscapes", {"classes": 13, "scales": (0.5, 1), "flip": ()}, CITY_ALL, 13),
        ("cityscapes", {"list": "WORLD/cityscapes.txt"}, (CITY_ALL[2], CITY_ALL[0]), 19),
        ("gta5", {"val_count": 2, "scales": 1.3}, ("images/00005.png", "images/00006.png"), 19),
        ("gta5", {"list": "WORLD/gta5.txt", "num_workers": 1}, ("images/00004.png",), 19),
        ("synthia", {"val_count": 3}, ("RGB/0000001.png", "RGB/0000002.png", "RGB/0000003.png"), 16),
        ("synthia", {"val_count": 1, "classes": 19}, ("RGB/0000003.png",), 19),
        ("cityscapes", {"weights": "WORLD/net16.pth"}, CITY_ALL, 16),
        ("cityscapes", {"weights": "WORLD/net16.pth", "classes": 13}, CITY_ALL, 13),
        ("synthia", {"weights": "WORLD/net16.pth", "val_count": 2}, ("RGB/0000002.png", "RGB/0000003.png"), 16),
        ("gta5", {"weights": "WORLD/net16.pth", "val_count": 1, "classes": 16}, ("images/00006.png",), 16),
    ],
)
def test_scores_are_those_of_the_saved_predictions(run_script, world, data_set, flags, images, subset):
    flags = {"data_set": data_set, "data_dir": world / data_set, **flags}
    saved = {"save_predictions": world / "new/saved", "prediction_format": "trainids"}
    result = run_script(script, *evaluation_flags(world, **flags, **saved))
    assert result.code == 0, result.err
    of_net = sorted(SUBSETS[16 if "weights" in flags else 19])
    _, net = load_segmentation_net(world / ("net16.pth" if "weights" in flags else "net.pth"), "net")
    scales, predictions = np.atleast_1d(flags.get("scales", 1)).tolist(), []
    for image in images:
        pixels = torch.from_numpy(np.array(Image.open(world / data_set / image))).permute(2, 0, 1)[None]
        predictions.append(np.asarray(Image.open(world / "new/saved" / image)))
        expected = predict(net, (pixels - 128.0) / 128.0, scales, "flip" in flags).argmax(0)
        assert predictions[-1].dtype == np.uint8
        assert (predictions[-1] == expected.numpy()).mean() > 0.999
    assert len(np.unique(predictions)) > 4
    assert len([path for path in (world / "new/saved").rglob("*") if path.is_file()]) == len(images)
    report = json.loads((world / "scores.json").read_text())
    assert (report["images"], report["data_set"], report["scales"]) == (len(images), data_set, scales)
    assert (report["flip"], report["net"]) == ("flip" in flags, f"UNet with {len(of_net)} classes")
    predictions = [np.array(of_net)[prediction] for prediction in predictions]
    labels = [truth(world, image) for image in images]
    check_report(result.out, report, predictions, labels, SUBSETS[subset], of_net)


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


def test_the_train_split_is_scored(run_script, world):
    flags = {"data_set": "gta5", "data_dir": world / "gta5", "split": "train"}
    assert run_script(script, *evaluation_flags(world, **flags)).code == 0
    assert json.loads((world / "scores.json").read_text())["images"] == 6


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
    (world / "gta5/images/00001.jpg").write_bytes((world / "gta5/images/00001.png").read_bytes())
    flags["save_predictions"] = world / "other"
    check_refusal(run_script(script, *evaluation_flags(world, **flags)), "--save_predictions", "ending")


def test_categories_are_merged_rows_and_columns(run_script, world):
    assert run_script(script, *evaluation_flags(world)).code == 0
    classes = json.loads((world / "scores.json").read_text())
    result = run_script(script, *evaluation_flags(world, classes="categories"))
    assert result.code == 0, result.err
    report = json.loads((world / "scores.json").read_text())
    names = ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    groups = ([0, 1], [2, 3, 4], [5, 6, 7], [8, 9], [10], [11, 12], [13, 14, 15, 16, 17, 18])
    matrix = np.array(classes["confusion"])
    merged = np.array([[matrix[np.ix_(rows, columns)].sum() for columns in groups] for rows in groups])
    assert report["confusion"] == merged.tolist()
    for k, name in enumerate(names):
        labelled = merged[k].sum()
        union = labelled + merged[:, k].sum() - merged[k, k]
        assert report["iou"][name] == (pytest.approx(merged[k, k] / union) if labelled else None)
    assert list(report["iou"]) == list(names)
    assert report["pixel_accuracy"] > classes["pixel_accuracy"]
    assert re.search(r"^mIoU .* of 7 categories$", result.out, re.MULTILINE), result.out


def test_a_data_set_without_categories(run_script, world, monkeypatch):
    bare = replace(DATA_SETS["cityscapes"], categories={})
    monkeypatch.setitem(DATA_SETS, "cityscapes", bare)
    result = run_script(script, *evaluation_flags(world, classes="categories"))
    check_refusal(result, "--classes categories", "cityscapes")


@pytest.mark.parametrize("classes", [19, 16])
def test_prediction_formats_hold_the_same_classes(run_script, world, classes):
    of_net = sorted(SUBSETS[classes])
    for name in ("trainids", "labelids", "colour", ""):
        chosen = {"prediction_format": name} if name else {}
        weights = world / ("net.pth" if classes == 19 else "net16.pth")
        flags = evaluation_flags(world, weights=weights, save_predictions=world / f"saved{name}", **chosen)
        assert run_script(script, *flags).code == 0
    for image in CITY_ALL:
        train_ids = np.array(of_net)[np.asarray(Image.open(world / "savedtrainids" / image))]
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
