"""Scoring segmentation nets: confusion matrix, prediction, statistics, and evaluate.py on tiny worlds."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import evaluate as script
from commands import command
from data_handlers.datasets import DATA_SETS
from data_handlers.images import IMAGENET_INPUT, NetworkInput, read_image
from data_handlers.lists import list_images
from models.resnet38 import ResNet38
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from refusals import check_refusal, tree
from training.confidence_maps import confidence_map
from training.distributed import Rank
from training.metrics import PredictionStatistics, confusion_matrix, scores_of
from training.segmentation_files import load_segmentation_net
from training.validation import Validator, in_windows, predict
from worlds import index_label, noise_image, save_net, write_cityscapes, write_gta5, write_synthia

NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
COLOURS = [
    "804080", "f423e8", "464646", "66669c", "be9999", "999999", "faaa1e", "dcdc00", "6b8e23", "98fb98", "4682b4",
    "dc143c", "ff0000", "00008e", "000046", "003c64", "005064", "0000e6", "770b20",
]  # fmt: skip
ALL = set(range(19))
SUBSETS = {19: ALL, 16: ALL - {9, 14, 16}, 13: ALL - {9, 14, 16, 3, 4, 5}}


def slow_scores(predictions, labels, classes):
    """Pixel by pixel: IoU by class (of the labelled classes only), their mean, pixel accuracy, and all counts."""
    counts = Counter()
    for prediction, label in zip(predictions, labels, strict=True):
        counts.update(zip(label.flatten().tolist(), prediction.flatten().tolist(), strict=True))
    counted = {(t, p): n for (t, p), n in counts.items() if t in classes}
    iou = {}
    for c in sorted({t for t, _ in counted}):
        either = sum(n for (t, p), n in counted.items() if c in (t, p))
        iou[c] = counted.get((c, c), 0) / either
    right = sum(n for (t, p), n in counted.items() if t == p)
    return iou, sum(iou.values()) / len(iou), right / sum(counted.values()), counts


@pytest.mark.parametrize(
    ("label", "prediction", "matrix", "iou", "accuracy"),
    [
        ((0, 0, 1, 1, 2, 255), (0, 1, 1, 1, 0, 0), [[1, 1, 0], [0, 2, 0], [1, 0, 0]], (1 / 3, 2 / 3, 0), 3 / 5),
        (
            ((0, 0, 1, 255), (1, 2, 2, 2)), ((0, 1, 1, 2), (1, 2, 0, 2)), [[1, 1, 0], [0, 2, 0], [1, 0, 2]],
            (1 / 3, 2 / 3, 2 / 3), 5 / 7,
        ),
    ],
)  # fmt: skip
def test_hand_cases(label, prediction, matrix, iou, accuracy):
    for kind in (torch.uint8, torch.int64):
        found = confusion_matrix(torch.tensor(prediction), torch.tensor(label, dtype=kind), 3)
        assert found.tolist() == matrix
        assert found.dtype == torch.int64
    scores = scores_of(found, range(3))
    assert scores.iou == pytest.approx(iou)
    assert scores.mean_iou == pytest.approx(sum(iou) / 3)
    assert scores.pixel_accuracy == pytest.approx(accuracy)
    assert scores.absent == ()


def test_subsets_ignored_pixels_and_absent_classes_against_a_slow_loop():
    rng = np.random.default_rng(0)
    predictions = [rng.integers(0, 19, (9, 13)) for _ in range(3)]
    labels = [rng.choice([0, 1, 3, 9, 10, 13, 16, 255], (9, 13)) for _ in range(3)]  # 2, 4, ... are predicted, absent
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    for prediction, label in zip(predictions, labels, strict=True):
        right = (rng.random(label.shape) < 0.4) & (label != 255)
        prediction[right] = label[right]
        matrix += confusion_matrix(torch.tensor(prediction), torch.tensor(label), 19)
    for subset in (range(19), sorted(SUBSETS[16]), sorted(SUBSETS[13]), (13, 2, 0)):
        iou, mean, accuracy, counts = slow_scores(predictions, labels, set(subset))
        assert all(matrix[t, p] == n for (t, p), n in counts.items() if t != 255)
        assert matrix.sum() == sum(n for (t, _), n in counts.items() if t != 255)
        scores = scores_of(matrix, subset)
        assert scores.classes == tuple(subset)
        assert scores.absent == tuple(c for c in subset if c not in iou)
        assert {c: v for c, v in zip(subset, scores.iou, strict=True) if v is not None} == pytest.approx(iou)
        assert (scores.mean_iou, scores.pixel_accuracy) == pytest.approx((mean, accuracy))


def test_predictions_outside_the_subset_are_errors_of_the_labelled_class():
    label, prediction = torch.tensor([0, 0, 0, 2, 2, 1]), torch.tensor([0, 2, 1, 0, 2, 2])
    scores = scores_of(confusion_matrix(prediction, label, 3), (0, 1))
    # Class 0: one right, two called 2 and 1. Class 1: one pixel, called 2. Pixels labelled 2 do not count for 0.
    assert scores.iou == (pytest.approx(1 / 3), 0.0)
    assert scores.pixel_accuracy == pytest.approx(1 / 4)


def test_absent_classes_that_were_predicted_count_as_0_in_the_second_mean():
    # Class 1 is absent and predicted, class 3 is absent and never predicted.
    scores = scores_of(confusion_matrix(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 2, 2]), 4), range(4))
    assert scores.iou == (0.5, None, 1.0, None)
    assert (scores.mean_iou, scores.mean_iou_with_absent) == (0.75, 0.5)


def test_no_labelled_pixel_gives_no_score():
    matrix = confusion_matrix(torch.tensor([0, 2]), torch.tensor([255, 3]), 3)
    scores = scores_of(matrix, (0, 1))
    assert (scores.iou, scores.mean_iou, scores.pixel_accuracy, scores.absent) == ((None, None), None, None, (0, 1))


@torch.no_grad()
@pytest.mark.parametrize("window", [(9, 7), (5, 40), (100, 100), (23, 17)])
def test_windows_are_averaged_as_logits(window):
    net, image, seen = conv_net(3), torch.randn(2, 3, 17, 23), []
    net.register_forward_hook(lambda _net, inputs, _output: seen.append(inputs[0]))
    found = in_windows(net, image, window)
    width, height = min(window[0], 23), min(window[1], 17)
    assert {tuple(part.shape[2:]) for part in seen} == {(height, width)}
    total, count = torch.zeros(2, 4, 17, 23), torch.zeros(17, 23)
    step_x, step_y = round(width * 2 / 3), round(height * 2 / 3)
    tops = sorted({min(y, 17 - height) for y in range(0, 17, step_y)})
    lefts = sorted({min(x, 23 - width) for x in range(0, 23, step_x)})
    assert len(seen) == len(tops) * len(lefts)
    for y in tops:
        for x in lefts:
            total[..., y : y + height, x : x + width] += net(image[..., y : y + height, x : x + width])
            count[y : y + height, x : x + width] += 1
    torch.testing.assert_close(found, total / count)
    if (height, width) == (17, 23):
        assert torch.equal(found, net(image))


def conv_net(kernel, classes=4):
    torch.manual_seed(kernel)
    return nn.Conv2d(3, classes, kernel, padding=kernel // 2).eval()


@torch.no_grad()
def test_plain_and_flipped_predictions():
    image = torch.randn(1, 3, 17, 23)
    pointwise, sided = conv_net(1), conv_net(3)
    torch.testing.assert_close(predict(pointwise, image, flip=True), predict(pointwise, image))
    torch.testing.assert_close(predict(sided, image), sided(image).softmax(1)[0], rtol=0, atol=0)
    plain, mirrored = sided(image).softmax(1), sided(image[..., range(22, -1, -1)]).softmax(1)[..., range(22, -1, -1)]
    assert not torch.allclose(plain, mirrored, atol=0.05)
    torch.testing.assert_close(predict(sided, image, flip=True), ((plain + mirrored) / 2)[0])


@torch.no_grad()
def test_scales_are_averaged_as_probabilities():
    net, image, sizes = conv_net(3), torch.randn(1, 3, 31, 47), []
    net.register_forward_hook(lambda _net, inputs, _output: sizes.append(tuple(inputs[0].shape[2:])))
    found = predict(net, image, (0.75, 1.0, 1.5), flip=True)
    assert sizes == [(23, 35), (23, 35), (31, 47), (31, 47), (46, 70), (46, 70)]
    parts = []
    for size in ((23, 35), (31, 47), (46, 70)):
        x = F.interpolate(image, size, mode="bilinear", antialias=True)
        for p in (net(x).softmax(1), net(x.flip(3)).softmax(1).flip(3)):
            parts.append(F.interpolate(p, (31, 47), mode="bilinear"))
    torch.testing.assert_close(found, torch.stack(parts).mean(0)[0])
    torch.testing.assert_close(found.sum(0), torch.ones(31, 47))
    flat = torch.full((1, 3, 31, 47), 0.3)  # all scales and sides see the same picture
    pointwise = conv_net(1)
    torch.testing.assert_close(predict(pointwise, flat, (0.5, 2.0), flip=True), predict(pointwise, flat))


def statistics_of(*probabilities):
    statistics = PredictionStatistics(len(probabilities[0]), torch.device("cpu"))
    for probability in probabilities:
        statistics.add(torch.as_tensor(probability, dtype=torch.float32))
    return statistics


def test_mutual_information():
    one_hot = torch.eye(4)[:, torch.arange(24) % 4].reshape(4, 4, 6)
    assert statistics_of(one_hot).mutual_information() == pytest.approx(1)
    road = torch.zeros(4, 4, 6)
    road[0] = 1
    assert statistics_of(road, road).mutual_information() == pytest.approx(0, abs=1e-6)
    unsure = torch.full((4, 4, 6), 0.25)
    assert statistics_of(unsure).mutual_information() == pytest.approx(0, abs=1e-6)
    # Two images of one pixel each, (1/2, 1/2) and (1, 0): the mean prediction is (3/4, 1/4).
    hand = statistics_of([[[0.5]], [[0.5]]], [[[1.0]], [[0.0]]])
    of_mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert hand.mutual_information() == pytest.approx((of_mean - math.log(2) / 2) / math.log(2))
    assert hand.mean_confidence() == pytest.approx(0.75)
    histogram = [0] * 20
    histogram[10] = histogram[19] = 1
    assert hand.confidence_histogram.tolist() == histogram


def test_statistics_add_up_over_images():
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(5, h, w, generator=generator).softmax(0) for h, w in ((7, 9), (4, 11), (1, 1))]
    statistics, pixels = statistics_of(*images), torch.cat([p.flatten(1) for p in images], 1).double().numpy()
    entropy = -(pixels * np.log(pixels)).sum(0).mean()
    mean = pixels.mean(1)
    assert statistics.pixels == int(statistics.confidence_histogram.sum()) == 7 * 9 + 4 * 11 + 1
    expected = (-(mean * np.log(mean)).sum() - entropy) / np.log(5)
    assert statistics.mutual_information() == pytest.approx(expected, rel=1e-4)
    assert statistics.mean_confidence() == pytest.approx(pixels.max(0).mean(), rel=1e-5)
    assert statistics.confidence_histogram.tolist() == np.histogram(pixels.max(0), 20, (0, 1))[0].tolist()


def norm_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout2d(0.5), nn.Conv2d(8, 3, 1))
    net.network_input = NetworkInput(mean=(10.0, 20.0, 30.0), std=(40.0, 50.0, 60.0))
    return net


def validator(files, rank=None, **changes):
    settings = {"with_labels": True, "classes": range(3), "num_classes": 3, "num_workers": 0, "rank": rank or Rank()}
    return Validator(files=files, **{**settings, **changes})


@pytest.fixture
def pictures(tmp_path):
    """Four images of different heights with labels of three classes and void."""
    write_gta5(tmp_path / "few", count=4)
    for k, path in enumerate(sorted((tmp_path / "few").rglob("*.png"))):
        picture = noise_image((12, 8 + k % 4), k) if path.parent.name == "images" else None
        (picture or Image.fromarray(index_label((12, 8 + k % 4), k, (7, 8, 11, 0)))).save(path)
    return list_images(DATA_SETS["gta5"], tmp_path / "few", "--data_dir")


@pytest.mark.parametrize("training", [True, False])
def test_validating_leaves_the_net_as_it_was_and_streams(pictures, monkeypatch, training):
    net, read, seen = norm_net().train(training), [], []
    before = {name: value.clone() for name, value in net.state_dict().items()}
    monkeypatch.setattr("data_handlers.labelled.read_image", lambda path: read.append(path) or read_image(path))

    def on_prediction(image, prediction):
        seen.append((image, prediction))
        assert len(read) == len(seen)  # nothing is read ahead
        assert not net.training

    found = validator(pictures)(net, on_prediction)
    assert net.training is training
    assert net[1].training is training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(p.grad is not None for p in net.parameters())
    expected = torch.zeros(3, 3, dtype=torch.int64)
    for image, prediction in seen:
        with torch.no_grad():
            rgb = (image.pixels.float() - torch.tensor([10.0, 20.0, 30.0])) / torch.tensor([40.0, 50.0, 60.0])
            image_input = rgb.permute(2, 0, 1)[None].contiguous()
            assert torch.equal(prediction.long(), net.eval()(image_input).argmax(1)[0])
        assert prediction.dtype == torch.uint8
        for t, p in zip(image.label.flatten().tolist(), prediction.flatten().tolist(), strict=True):
            if t < 3:
                expected[t, p] += 1
    assert expected.sum() > 0
    assert torch.equal(found.confusion, expected)
    assert found.scores == scores_of(expected, range(3))
    assert found.statistics.pixels == sum((8 + k) * 12 for k in range(4))  # pixels without a label, too


def test_without_labels_nothing_is_scored(pictures):
    with_labels, without = validator(pictures)(norm_net()), validator(pictures, with_labels=False)(norm_net())
    assert without.scores is None
    assert without.confusion.sum() == 0
    assert without.statistics.mutual_information() == with_labels.statistics.mutual_information() > 0


def test_an_error_while_validating_gives_the_training_mode_back(pictures):
    net = norm_net().train()
    with pytest.raises(KeyError):
        validator(pictures)(net, lambda image, prediction: {}["key"])
    assert net.training


def save_unet(path, num_classes=19):
    """A random UNet that uses many classes: its logits have the mean 0 on a picture."""
    torch.manual_seed(5)
    shape = SegmentationShape("UNet", "none", num_classes)
    net = build_segmentation_net(shape).eval()
    with torch.no_grad():
        net.head.classify.weight *= 4
        picture = (torch.from_numpy(np.array(noise_image((48, 32), 0))).permute(2, 0, 1)[None] - 128.0) / 128.0
        net.head.classify.bias -= net(picture).mean(dim=(0, 2, 3))
    return save_net(path, shape, net.state_dict())


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


def check_report(out, report, predictions, labels, subset):
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
    matrix = [[counts.get((t, p), 0) for p in range(19)] for t in range(19)]
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
    ],
)
def test_scores_are_those_of_the_saved_predictions(run_script, world, data_set, flags, images, subset):
    flags = {"data_set": data_set, "data_dir": world / data_set, **flags}
    saved = {"save_predictions": world / "new/saved", "prediction_format": "trainids"}
    result = run_script(script, *evaluation_flags(world, **flags, **saved))
    assert result.code == 0, result.err
    _, net = load_segmentation_net(world / "net.pth", "net")
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
    assert (report["flip"], report["net"]) == ("flip" in flags, "UNet with 19 classes")
    check_report(result.out, report, predictions, [truth(world, image) for image in images], SUBSETS[subset])


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


def test_a_resnet38_is_tested_as_published(pictures, monkeypatch):
    """Its probabilities are averaged with the mirror image's before they are upsampled by 8."""
    torch.manual_seed(0)
    net = ResNet38(3, width=4).eval()
    net.network_input = IMAGENET_INPUT
    seen = []
    validator(pictures, long_side=24, flip=True)(net, lambda image, prediction: seen.append((image, prediction)))
    for image, prediction in seen:
        expected = confidence_map(
            lambda x: net.coarse_logits(x).softmax(1), image.pixels.numpy(), longer_side=24, stride=8,
            normalise=IMAGENET_INPUT,
        )  # fmt: skip
        assert torch.equal(prediction.long(), expected.argmax(0))


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


def test_prediction_formats_hold_the_same_classes(run_script, world):
    for name in ("trainids", "labelids", "colour", ""):
        chosen = {"prediction_format": name} if name else {}
        flags = evaluation_flags(world, save_predictions=world / f"saved{name}", **chosen)
        assert run_script(script, *flags).code == 0
    for image in CITY_ALL:
        train_ids = np.asarray(Image.open(world / "savedtrainids" / image))
        colours = np.asarray(Image.open(world / "savedcolour" / image))
        assert colours.shape == (32, 48, 3)
        assert [[COLOURS.index(bytes(pixel).hex()) for pixel in row] for row in colours] == train_ids.tolist()
        for folder in ("savedlabelids", "saved"):
            label_ids = np.asarray(Image.open(world / folder / image))
            assert [[LABEL_IDS.index(value) for value in row] for row in label_ids] == train_ids.tolist()


def test_labels_that_hold_train_ids(run_script, world):
    """Road is scored where the files hold 0, which as a label id would be ignored."""
    write_train_ids(world / "trainids")
    result = run_script(script, *evaluation_flags(world, data_dir=world / "trainids", labels="trainids"))
    assert result.code == 0, result.err
    report = json.loads((world / "scores.json").read_text())
    labels = [np.asarray(Image.open(path)) for path in (world / "trainids").rglob("*_labelIds.png")]
    counted = np.bincount(np.concatenate(labels).ravel(), minlength=256)[:19]
    assert [sum(row) for row in report["confusion"]] == counted.tolist()


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
