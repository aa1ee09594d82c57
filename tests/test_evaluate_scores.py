"""The scores of evaluate.py on tiny worlds, as it prints, stores and draws them.

Those of `uda/maxsquare_metrics.npz` of the golden folder come from `evaluate.py`, too (`PROCST_GOLDEN_DIR`
overrides the folder).
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.io import decode_image

import evaluate as script
from data_handlers.choices import ABSENT_CLASSES
from data_handlers.datasets import DATA_SETS
from data_handlers.images import read_image
from data_handlers.labelled import open_labelled
from data_handlers.lists import FileList
from evaluations import CITY_ALL, evaluation_flags, save_unet, truth, write_world
from models.deeplab_multi import CAFFE_INPUT
from refusals import check_refusal
from scoring import COLOURS, LABEL_IDS, NAMES, SUBSETS, slow_scores
from training.metrics import scores_of
from training.score_table import score_table
from training.segmentation_files import load_segmentation_net
from training.validation import predict
from uda_golden import load, over


@pytest.fixture
def world(tmp_path):
    return write_world(tmp_path)


def check_report(out, report, predictions, labels, subset, of_net):
    """The IoUs of the 13 classes are those of the 16, and the pixels of the other 3 count."""
    iou, mean, accuracy, counts = slow_scores(predictions, labels, SUBSETS[16] if len(subset) == 13 else subset)
    iou = {c: value for c, value in iou.items() if c in subset}
    mean = sum(iou.values()) / len(iou)
    counted = SUBSETS[16] if len(subset) == 13 else subset
    predicted = {p for (t, p), _ in counts.items() if t in counted} & (subset - set(iou))
    with_absent = sum(iou.values()) / (len(iou) + len(predicted))
    assert predicted
    assert report["miou_by_convention"]["zero_if_predicted"] == pytest.approx(with_absent)
    assert report["miou_by_convention"]["zero"] == pytest.approx(sum(iou.values()) / len(subset))
    assert re.search(rf"^ +{100 * with_absent:.2f}  if absent classes count as 0 where they were predicted$", out, re.M)
    assert (report["miou"], report["pixel_accuracy"]) == pytest.approx((mean, accuracy))
    assert list(report["iou"]) == [NAMES[c] for c in sorted(subset)]
    assert [NAMES[c] for c in sorted(subset) if c not in iou] == report["absent"]
    matrix = [[counts.get((t, p), 0) for p in of_net] for t in of_net]
    assert report["confusion"] == matrix
    for c in sorted(subset):
        assert report["iou"][NAMES[c]] == (pytest.approx(iou[c]) if c in iou else None)
        shown = f" {100 * iou[c]:.2f}" if c in iou else "absent"
        assert re.search(rf"^{NAMES[c]} +{shown} ", out, re.MULTILINE), out
    assert re.search(rf"^mIoU +{100 * mean:.2f}  over {len(iou)} of {len(subset)} classes$", out, re.MULTILINE), out
    assert re.search(rf"^pixel accuracy +{100 * accuracy:.2f}$", out, re.MULTILINE), out
    assert f"\nabsent: {', '.join(report['absent'])}\n" in out
    assert report["convention"] in out
    assert "absent and do not count in the means" in report["convention"]
    assert "at native size" in report["convention"]


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
        predictions.append(np.asarray(Image.open(world / "new/saved" / image)))  # trainIds of the 19 classes
        expected = predict(net, (pixels - 128.0) / 128.0, scales, "flip" in flags).argmax(0)
        assert predictions[-1].dtype == np.uint8
        assert (predictions[-1] == np.array(of_net)[expected.numpy()]).mean() > 0.999
    assert len(np.unique(predictions)) > 4
    assert len([path for path in (world / "new/saved").rglob("*") if path.is_file()]) == len(images)
    report = json.loads((world / "scores.json").read_text())
    assert (report["images"], report["data_set"], report["scales"]) == (len(images), data_set, scales)
    assert (report["flip"], report["net"]) == ("flip" in flags, f"UNet with {len(of_net)} classes")
    labels = [truth(world, image) for image in images]
    check_report(result.out, report, predictions, labels, SUBSETS[subset], of_net)


def test_the_train_split_is_scored(run_script, world):
    flags = {"data_set": "gta5", "data_dir": world / "gta5", "split": "train"}
    assert run_script(script, *evaluation_flags(world, **flags)).code == 0
    assert json.loads((world / "scores.json").read_text())["images"] == 6


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


# --- the published scores --------------------------------------------------------------------------------------------

MEANS = {
    "MPA": "mean_accuracy", "mIoU": "miou", "FWIoU": "frequency_weighted_iou", "MPC": "mean_precision",
    "PA": "pixel_accuracy",
}  # fmt: skip


def write_pairs(root, labels, classes):
    """A data set with these labels, of the 19 classes, 16 of them, or its own; returns the flags that score it."""
    of_19 = classes in (16, 19)
    images, targets, ends = ("leftImg8bit/train/a", "gtFine/train/a", ("_leftImg8bit", "_gtFine_labelIds"))
    if not of_19:
        images, targets, ends = "images", "labels", ("", "")
    (root / images).mkdir(parents=True)
    (root / targets).mkdir(parents=True)
    kept = np.array(sorted(SUBSETS[classes]) if of_19 else range(classes))
    for k, label in enumerate(labels):
        known = (label >= 0) & (label < classes)
        train_ids = np.where(known, kept[np.where(known, label, 0)], 255).astype(np.uint8)
        Image.fromarray(train_ids).save(root / targets / f"{k}{ends[1]}.png")
        Image.new("RGB", label.shape[::-1]).save(root / images / f"{k}{ends[0]}.png")
    flags = {"data_dir": root, "labels": "trainids", "split": "train", "data_set": "cityscapes"}
    if not of_19:
        (root / "own.toml").write_text(
            f"classes = {json.dumps([f'class {k}' for k in range(classes)])}\n[images]\ntrain = ['images/*.png']\n"
            "[labels]\nreplace = [['images/', 'labels/']]\nencoding = 'trainids'\n"
        )
        flags |= {"data_set": root / "own.toml", "labels": None}
    return flags


def evaluated(run_script, monkeypatch, folder, labels, predictions, classes, **changes):
    """Output and JSON of evaluate.py for label maps and a net that predicts these maps."""
    flags = write_pairs(folder / "pairs", labels, classes)
    save_unet(folder / "net.pth", classes)
    maps = iter(torch.nn.functional.one_hot(torch.from_numpy(predictions).long(), classes).permute(0, 3, 1, 2).float())
    monkeypatch.setattr("training.validation.predict", lambda *arguments: next(maps))
    result = run_script(script, *evaluation_flags(folder, **flags, **changes))
    assert result.code == 0, result.err
    return result.out, json.loads((folder / "scores.json").read_text())


@over("maxsquare_metrics", lambda data, meta: sorted(meta["cases"]))
def test_published_scores(run_script, tmp_path, monkeypatch, path, item):
    data, meta = load(path)
    classes = meta["cases"][item]["K"]
    out, report = evaluated(
        run_script, monkeypatch, tmp_path, data[f"{item}/gt"], data[f"{item}/pred"], classes,
        absent_classes="zero_if_predicted",
    )  # fmt: skip
    assert report["confusion"] == data[f"{item}/confusion"].tolist()
    compared = 0
    for name in data:
        case, _, key = name.partition("/")
        kind, _, subset = key.partition("_")
        if case == item and kind in MEANS:
            number = subset.removeprefix("on")
            found = report["subsets"][number] if subset else report
            assert found[MEANS[kind]] == pytest.approx(float(data[name]), abs=1e-9), key
            if subset and kind.endswith("IoU"):
                assert re.search(rf"over {number} of {classes} .*{kind} {100 * data[name]:.2f}\b", out), out
            compared += 1
    assert compared == len([name for name in data if name.startswith(f"{item}/")]) - 4
    columns = ("accuracy", "iou", "precision", "label_share", "predicted_share")
    stored = [[row[column] for column in columns] for row in report["classes"].values()]
    expected = data[f"{item}/per_class_printed"]
    np.testing.assert_allclose(100 * np.array(stored, float), expected, rtol=0, atol=0.011)
    order = [1, 0, 2, 3, 4]  # of the printed columns
    for name, row in zip(report["classes"], expected, strict=True):
        (cells,) = re.findall(rf"^{name}((?:  +[-.0-9a-z]+){{5}})$", out, re.MULTILINE)
        printed = [np.nan if cell in ("-", "absent") else float(cell) for cell in cells.split()]
        np.testing.assert_allclose(printed, row[order], rtol=0, atol=0.011)


@pytest.mark.parametrize(
    ("absent", "mean", "other"),
    [
        ("", 0.75, r"^ +50.00  if absent classes count as 0 where they were predicted$"),
        ("left_out", 0.75, r"^ +50.00  if absent classes count as 0 where they were predicted$"),
        ("zero_if_predicted", 0.5, r"^ +75.00  if absent classes do not count in the means$"),
        ("zero", 0.375, r"^ +75.00  if absent classes do not count in the means$"),
    ],
)
def test_absent_classes(run_script, tmp_path, monkeypatch, absent, mean, other):
    """Class 1 is predicted and never labelled, class 3 neither."""
    labels, predictions = np.array([[[0, 0, 2, 2, -1]]]), np.array([[[0, 1, 2, 2, 3]]])
    flags = {"absent_classes": absent} if absent else {}
    out, report = evaluated(run_script, monkeypatch, tmp_path, labels, predictions, 4, **flags)
    assert report["miou"] == mean
    assert report["miou_by_convention"] == {"left_out": 0.75, "zero_if_predicted": 0.5, "zero": 0.375}
    assert len(re.findall(r"if absent classes", out)) == 1
    assert re.search(other, out, re.MULTILINE), out
    assert report["absent"] == ["class 1", "class 3"]
    assert report["subsets"] == {}
    if not absent or absent == "left_out":
        assert report["classes"]["class 1"] == {
            "iou": None, "accuracy": None, "precision": None, "label_share": 0, "predicted_share": 0.25
        }  # fmt: skip


def test_the_other_mean_is_printed_where_it_differs():
    names, table = ("road", "sky"), "if absent classes "
    alone = torch.tensor([[3, 0], [0, 0]])
    assert table not in score_table(scores_of(alone, range(2)), names)
    assert f"100.00  {table}do not count in the means" in score_table(scores_of(alone, range(2), absent="zero"), names)
    for absent in ABSENT_CLASSES:
        nothing = score_table(scores_of(torch.zeros(2, 2), range(2), absent=absent), names)
        assert nothing.endswith("\nno pixel of the scored classes is labelled: there are no means")


@pytest.mark.parametrize("classes", [16, 19])
def test_the_subsets_are_means_of_the_whole_matrix(run_script, world, classes):
    """Whatever the headline mean goes over."""
    flags = {"weights": world / ("net16.pth" if classes == 16 else "net.pth"), "classes": 13}
    assert run_script(script, *evaluation_flags(world, **flags)).code == 0
    report = json.loads((world / "scores.json").read_text())
    matrix, of_net = np.array(report["confusion"]), sorted(SUBSETS[classes])
    assert list(report["subsets"]) == [str(n) for n in (19, 16, 13) if n <= classes]
    for name, means in report["subsets"].items():
        places = [of_net.index(c) for c in sorted(SUBSETS[int(name)])]
        iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in places if matrix[c].any()]
        assert means["miou"] == pytest.approx(np.mean(iou))
    assert list(report["iou"]) == [NAMES[c] for c in sorted(SUBSETS[13])]
    if classes == 19:  # the other three classes' pixels do not count there
        assert report["miou"] != report["subsets"]["13"]["miou"]


# --- scores at another size ------------------------------------------------------------------------------------------


PICTURES = {"nthu": "crosscity"}  # data sets that the files call otherwise


def resized_cases(data, meta):
    return sorted(n for n, c in meta["cases"].items() if c["split"] == "val" and not c["random_crop"])


@over("maxsquare_transforms", resized_cases)
def test_images_and_labels_are_resized_as_published(tmp_path, path, item):
    data, meta = load(path)
    case = meta["cases"][item]
    for name in ("image", "label"):
        (tmp_path / name).mkdir()
        Image.fromarray(data[f"{case['picture']}/{name}"]).save(tmp_path / name / "0.png")
    data_set = DATA_SETS[PICTURES.get(case["picture"], case["picture"])]
    data_set = replace(  # the file has the ids of all data sets in 8 bits
        data_set, void_ids=None, label_path=(("image/", "label/"),), label_suffix="", label_encoding="8-bit index"
    )
    files = FileList(data_set, tmp_path, ("image/0.png",))
    (sample,) = open_labelled(files, 0, torch.device("cpu"), True, None, tuple(case["crop_size_wh"]))
    ours = CAFFE_INPUT(sample.pixels).flip(0).numpy()  # theirs is blue, green and red
    assert np.abs(ours - data[f"{item}/image"]).max() <= 1e-4
    classes = 16 if case["class_16"] else 13 if case["class_13"] else 19
    places = np.full(256, -1)
    places[sorted(SUBSETS[classes])] = range(classes)
    assert np.array_equal(places[sample.label.numpy()], data[f"{item}/label"])


def test_scores_and_predictions_have_the_size_that_is_asked_for(run_script, world):
    size = (30, 18)
    flags = {"resize": size, "save_predictions": world / "saved", "prediction_format": "trainids", "error_maps": ()}
    result = run_script(script, *evaluation_flags(world, **flags))
    assert result.code == 0, result.err
    report = json.loads((world / "scores.json").read_text())
    assert report["resize"] == list(size)
    assert "over all images at 30 x 18." in report["convention"]
    assert report["convention"] in result.out
    _, net = load_segmentation_net(world / "net.pth", "net")
    predictions, labels = [], []
    for image in CITY_ALL:
        pixels = np.array(read_image(world / "cityscapes" / image).resize(size, Image.Resampling.BICUBIC))
        expected = predict(net, net.network_input(torch.from_numpy(pixels)[None])).argmax(0).numpy()
        predictions.append(np.asarray(Image.open(world / "saved" / image)))
        assert np.array_equal(predictions[-1], expected)
        assert Image.open(world / "saved" / image.replace(".png", "_errors.png")).size == size
        label = Image.fromarray(truth(world, image).astype(np.uint8))
        labels.append(np.array(label.resize(size, Image.Resampling.NEAREST)))
    _, mean, accuracy, _ = slow_scores(predictions, labels, set(range(19)))
    assert (report["miou"], report["pixel_accuracy"]) == pytest.approx((mean, accuracy))


# --- pictures --------------------------------------------------------------------------------------------------------


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


@pytest.mark.parametrize("classes", [19, 16, 13])
def test_pictures_show_image_label_and_prediction(run_script, world, classes):
    """In the colours of the net's classes; the 13 classes are those of a description with its own colours."""
    weights, of_net = world / f"net{classes}.pth", sorted(SUBSETS[classes])
    save_unet(weights, classes)
    flags = {"weights": weights, "image_summary": world / "pictures", "save_predictions": world / "saved"}
    if classes == 13:
        colours = [[*bytes.fromhex(COLOURS[c])] for c in of_net]
        ids = ", ".join(f"{LABEL_IDS[c]} = {k}" for k, c in enumerate(of_net))
        (world / "own.toml").write_text(
            f"classes = {[NAMES[c] for c in of_net]}\ncolours = {colours}\n"
            "[images]\ntrain = ['leftImg8bit/**/*.png']\n[labels]\nmap = { " + ids + " }\n"
            "replace = [['leftImg8bit/', 'gtFine/'], ['leftImg8bit.', 'gtFine_labelIds.']]\n"
        )
        flags |= {"data_set": world / "own.toml", "split": "train"}
    result = run_script(script, *evaluation_flags(world, **flags, prediction_format="trainids"))
    assert result.code == 0, result.err
    report, events = json.loads((world / "scores.json").read_text()), events_of(world / "pictures")
    tags = events.Tags()
    assert sorted(tags["images"]) == [f"Validation/Image-Label-Prediction/{image}" for image in CITY_ALL]
    palette = np.zeros((256, 3), np.uint8)
    palette[:classes] = [[*bytes.fromhex(COLOURS[c])] for c in of_net]
    places = np.full(256, 255)
    places[of_net] = range(classes)
    for image in CITY_ALL:
        (event,) = events.Images(f"Validation/Image-Label-Prediction/{image}")
        assert event.step == 0
        row = decode_image(torch.frombuffer(bytearray(event.encoded_image_string), dtype=torch.uint8))
        shown = np.split(row.permute(1, 2, 0).numpy(), 3, axis=1)
        assert np.array_equal(shown[0], np.array(read_image(world / "cityscapes" / image)))
        assert np.array_equal(shown[1], palette[places[truth(world, image)]])
        saved = np.asarray(Image.open(world / "saved" / image))  # trainIds of the data set's classes
        assert np.array_equal(shown[2], palette[places[saved] if classes == 16 else saved])
    for tag, key in (("mIoU", "miou"), ("FrequencyWeightedIoU", "frequency_weighted_iou")):
        assert events.Scalars(f"Validation/{tag}")[0].value == pytest.approx(report[key])


def test_pictures_are_of_evenly_spaced_images_and_the_last(run_script, world, monkeypatch):
    monkeypatch.setattr("training.evaluation.PICTURES", 3)
    monkeypatch.setattr("training.validation.PICTURE_WIDTH", 16)
    flags = {"data_set": world / "gta5/images", "data_dir": "", "image_summary": world / "pictures"}
    assert run_script(script, *evaluation_flags(world, **flags)).code == 0
    events = events_of(world / "pictures")
    shown = [tag.removeprefix("Validation/Image-Label-Prediction/") for tag in events.Tags()["images"]]
    assert sorted(shown) == ["00001.png", "00004.png", "00006.png"]
    (event,) = events.Images("Validation/Image-Label-Prediction/00001.png")
    assert (event.width, event.height) == (32, 11)  # without a label
