"""Validating segmentation nets: windows, scales, statistics, and a list of pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from data_handlers.datasets import DATA_SETS
from data_handlers.images import IMAGENET_INPUT, NetworkInput, read_image
from data_handlers.lists import list_images
from models.resnet38 import ResNet38
from training.confidence_maps import confidence_map
from training.distributed import Rank
from training.metrics import PredictionStatistics, scores_of
from training.validation import Validator, in_windows, predict
from worlds import index_label, noise_image, write_gta5


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
