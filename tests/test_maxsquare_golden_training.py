"""Schedule, steps, repeated entries and scores of MaxSquare against the published code's numbers.

See `test_maxsquare_golden.py`.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD

import uda.maxsquare
from data_handlers.classes import IGNORE
from data_handlers.datasets import DATA_SETS, for_net_of
from data_handlers.domain import DomainBatch, PairBatch
from data_handlers.images import label_values_to_train_ids, resized
from data_handlers.label_maps import to_train_ids
from data_handlers.labelled import LabelledImage
from data_handlers.lists import FileList
from models.deeplab_multi import CAFFE_INPUT
from steps import relative_l2
from training.distributed import ALONE, Rank
from training.metrics import scores_of
from training.validation import Validator, predict
from uda.maxsquare import NET, MaxSquareTraining, schedule_of
from uda.maxsquare_config import MaxSquareConfig
from uda.maxsquare_samples import blurred, random_crop
from uda.repeated_sgd import RepeatedSGD, repeats_of
from uda.source import poly_rate
from uda_golden import indices, load, over


def tensor(data, name):
    return torch.from_numpy(data[name])


def with_ignored(label):
    """A published label, in which -1 is ignored."""
    return torch.where(label < 0, IGNORE, label).long()


# --- schedule --------------------------------------------------------------------------------------------------------


@over("maxsquare_schedule", indices("poly"))
def test_poly_schedule(path, item):
    data, meta = load(path)
    poly = meta["poly"][item]
    for step, expected in zip(data[f"poly{item}/iteration"], data[f"poly{item}/lr"], strict=True):
        rate = poly["lr"] * poly_rate(int(step), poly["iter_max"], poly["power"])
        np.testing.assert_allclose((rate, 10 * rate), expected, rtol=1e-12)


@over("maxsquare_schedule", indices("rounds"))
def test_rounds(path, item):
    case = load(path)[1]["rounds"][item]
    config = MaxSquareConfig.from_flags({
        "method": "maxsquare", "round_num": case["round_num"], "epoch_each_round": case["epoch_each_round"],
        "batch_size": case["batch"],
    }).schedule  # fmt: skip
    images = case["target_images"]
    steps, horizon = schedule_of(config, 10 * images, images, reference=True)
    assert (steps, horizon) == (images // case["batch"], case["iter_max"])
    assert horizon == config.epochs * case["num_iterations"]
    # A round that is skipped makes the first that is run the longer: all run the same number of epochs.
    assert sum(run["epochs_run"] for run in case["rounds_run"]) == config.epochs
    assert schedule_of(config, 10, images, reference=False) == (steps, steps * config.epochs)


# --- steps -----------------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The files' small net with two heads."""

    def __init__(self, meta):
        super().__init__()
        width = meta["width"]
        norm = [nn.BatchNorm2d(width)] if meta.get("batch_norm") else []
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *norm, nn.ReLU())
        self.head = nn.ModuleDict({name: nn.Conv2d(width, meta["num_classes"], 1) for name in ("main", "aux")})
        self.start = ""

    def network_input(self, image, dtype):
        return image

    def forward(self, image):
        return self.head["main"](self.backbone(image))

    def both_logits(self, image, parts=None):
        features = self.backbone(image)
        return self.head["main"](features), self.head["aux"](features)


def our_name(name):
    layer, _, kind = name.partition(".")
    ours = {"conv": "backbone.0", "bn": "backbone.1", "head_a": "head.main", "head_b": "head.aux"}
    return f"{ours[layer]}.{kind}"


def tensors(data, prefix):
    """Arrays of a file below a prefix, by our names."""
    names = (name for name in data if name.startswith(f"{prefix}/"))
    return {our_name(name.removeprefix(f"{prefix}/")): tensor(data, name) for name in names}


def method_of(data, meta, mode, multi):
    """The method of a run of a file, ready for its first step."""
    hyper = meta["hyper"]
    flags = {name: hyper[name] for name in ("lambda_seg", "lambda_target", "threshold", "IW_ratio", "freeze_bn",
                                            "momentum", "weight_decay")}  # fmt: skip
    config = MaxSquareConfig.from_flags({
        **flags, "method": mode.lower(), "multi": multi, "lr_semseg": hyper["lr"], "power": hyper["poly_power"],
        "batch_size": meta["batch"], "mode": "reference", "precision": "fp32",
    })  # fmt: skip
    net = StandIn(meta)
    method = MaxSquareTraining(
        config=config, rank=ALONE, source=range(9), target=range(9), net=net, shape=None
    )  # fmt: skip
    method.horizon = hyper["iter_max"]
    net.load_state_dict(tensors(data, "init"), strict=False)
    method.begin_stage(0, resumed=False)
    return method


def runs(data, meta):
    return sorted(meta["runs"])


@over("maxsquare_step", runs)
def test_steps(path, item, monkeypatch):
    data, meta = load(path)
    mode, _, multi = item.rpartition("_multi")
    method = method_of(data, meta, mode, multi == "1")
    net, init, labels = method.net, tensors(data, "init"), {}
    for kind in ("ensemble_label", "confident_label"):
        function = getattr(uda.maxsquare, kind)
        monkeypatch.setattr(uda.maxsquare, kind, lambda *a, f=function, k=kind: labels.setdefault(k, f(*a)))
    learn_target, after_source = method.learn_target, {}

    def recording(image):
        after_source.update({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        return learn_target(image)

    method.learn_target = recording
    bias = {"backbone.0.bias"} if meta["batch_norm"] else set()  # has no gradient but rounding before a batch norm
    for k in range(meta["steps"]):
        after_source.clear()
        labels.clear()
        source = DomainBatch([tensor(data, f"source_{k}/image")], with_ignored(tensor(data, f"source_{k}/label")))
        batch = PairBatch(source, DomainBatch([tensor(data, f"target_{k}/image")], None))
        losses = method.step(batch, 0, meta["first_iteration"] + k)
        expected = {name.rpartition("/")[2]: data[name] for name in data if name.startswith(f"{item}/step{k}/")}
        rates = [group["lr"] for group in method.optimizers[NET].param_groups]
        np.testing.assert_allclose(rates, expected["lr"], rtol=1e-12)
        for ours, theirs in (
            ("Source/Main", "loss_source_main"), ("Source/Auxiliary", "loss_source_aux"),
            ("Target/Main", "loss_target_main"), ("Target/Auxiliary", "loss_target_aux"),
        ):  # fmt: skip
            assert (ours in losses) == (theirs in expected)
            if ours in losses:
                assert float(losses[ours]) == pytest.approx(float(expected[theirs]), rel=1e-4, abs=1e-9), theirs
        for ours, theirs in (("ensemble_label", "guidance_label"), ("confident_label", "hard_label")):
            if theirs in expected:
                assert torch.equal(labels[ours], with_ignored(torch.from_numpy(expected[theirs]))), theirs
        found = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
        for kind, gradients in ((f"grad_source{'' if k == 0 else k}", after_source),
                                ("grad" if k == 0 else f"grad_step{k}", found)):  # fmt: skip
            for name, value in (wanted := tensors(data, f"{item}/{kind}")).items():
                if name not in bias:
                    assert relative_l2(gradients[name], value) <= 1e-4, (kind, name)
            assert not wanted or wanted.keys() == gradients.keys()
        for name, value in tensors(data, f"{item}/after{k + 1}").items():
            ours = net.state_dict()[name]
            assert relative_l2(ours, value) <= 1e-6 or name in bias, name
            if value.is_floating_point() and name not in bias:
                change = value.double() - init[name].double() if name in init else None
                if change is not None and change.norm() > 0:
                    assert relative_l2(ours.double() - init[name].double(), change) <= 1e-2, name
    for name in meta["runs"][item]["no_gradient"]:
        assert torch.equal(net.state_dict()[our_name(name)], init[our_name(name)])


@over("maxsquare_duplicate_entries")
def test_repeated_entries(path):
    data, meta = load(path)
    hyper, names = meta["hyper"], sorted(meta["group_of"])
    root = nn.Module()
    for name in names:
        module, parts = root, name.split(".")
        for part in parts[:-1]:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_parameter(parts[-1], nn.Parameter(tensor(data, f"init/{name}")))
    parameters = dict(root.named_parameters())
    repeats = repeats_of(root)
    assert all(repeats[parameters[n]] == times for n, times in meta["appearances"].items() if meta["group_of"][n] == 0)
    rates = (hyper["lr"], meta["group1_lr"])
    groups = [
        {"params": [parameters[n] for n in names if meta["group_of"][n] == k], "lr": rate}
        for k, rate in enumerate(rates)
    ]
    settings = {"momentum": hyper["momentum"], "weight_decay": hyper["weight_decay"]}
    heads = {parameters[n] for n in names if meta["group_of"][n] == 1}
    optimizer = RepeatedSGD(groups, {p: n for p, n in repeats.items() if p not in heads}, **settings)
    for k in range(3):
        for name in names:
            parameters[name].grad = tensor(data, f"grad{k}/{name}") if f"grad{k}/{name}" in data else None
        optimizer.step()
        for name in names:
            assert relative_l2(parameters[name].detach(), tensor(data, f"after{k + 1}/{name}")) <= 1e-5, (k, name)


def test_without_repeats_it_is_sgd():
    weights = [nn.Parameter(torch.arange(3.0)) for _ in range(2)]
    one = SGD([{"params": weights[:1]}], lr=0.1, momentum=0.9, weight_decay=0.01)
    other = RepeatedSGD([{"params": weights[1:]}], {}, lr=0.1, momentum=0.9, weight_decay=0.01)
    for k in range(3):
        for weight, optimizer in zip(weights, (one, other), strict=True):
            weight.grad = torch.full((3,), float(k + 1))
            optimizer.step()
    assert torch.equal(*weights)


# --- samples ---------------------------------------------------------------------------------------------------------

NAMES = {"nthu": "crosscity"}


def data_set_of(name, classes):
    """A data set of the files as a net of 19, 16 or 13 classes sees it."""
    return for_net_of(DATA_SETS[NAMES.get(name, name)], classes)


@over("maxsquare_transforms", lambda data, meta: sorted(name for name in data if name.startswith("lut/")))
def test_classes(path, item):
    name, _, classes = item.removeprefix("lut/").partition("_")
    data_set = data_set_of(name, int(classes))
    assert len(data_set.class_names) == len(data_set.colours) == int(classes)
    expected = with_ignored(tensor(load(path)[0], item).long()).numpy()
    np.testing.assert_array_equal(to_train_ids(np.arange(256), data_set.value_map), expected)
    assert all(expected[value] == IGNORE for value in data_set.ignored_values)


@over("maxsquare_transforms", lambda data, meta: sorted(meta["cases"]))
def test_samples(path, item):
    """The steps of `MaxSquareSamples` in its order with the draws of the file. A validation crops nothing here: the
    published one takes the middle of the scaled picture, which is put together here of the same functions."""
    data, meta = load(path)
    case = meta["cases"][item]
    step, base, crop = -1 if case.get("mirror") else 1, case["base_size_wh"], tuple(case["crop_size_wh"])
    classes = 16 if case.get("class_16") else 13 if case.get("class_13") else 19
    data_set = data_set_of(case["picture"], classes)
    pixels, ids = (np.ascontiguousarray(data[f"{case['picture']}/{kind}"][:, ::step]) for kind in ("image", "label"))
    label = label_values_to_train_ids(ids, item, replace(data_set, void_ids=None))  # noise: any id may occur
    draws = [draw[1:] for draw in case.get("draws_in_order", ()) if draw[0] == "randint"]

    def draw(*bounds):
        *expected, value = draws.pop(0)
        assert list(bounds) == expected
        return value

    width, height = size = pixels.shape[1::-1]
    if case["random_crop"] and case["split"] == "train":
        pixels, label = random_crop(pixels, label, base=base, crop=crop, draw=draw)
        assert not draws
    else:
        size, corner = crop, (0, 0)
        if case["random_crop"]:
            size = (width * base[1] // height, base[1])
            corner = tuple(round((whole - part) / 2) for whole, part in zip(size, crop, strict=True))
        window = np.s_[corner[1] : corner[1] + crop[1], corner[0] : corner[0] + crop[0]]
        pixels = resized(pixels, size, "exact")[window]
        label = np.array(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))[window]
    if case.get("blur_radius") is not None:
        pixels = blurred(pixels, case["blur_radius"])
    ours = CAFFE_INPUT(torch.from_numpy(pixels)).flip(0).numpy()  # theirs is blue, green and red
    assert np.abs(ours - data[f"{item}/image"]).max() <= 1e-4
    if f"{item}/label" in data:
        np.testing.assert_array_equal(label, with_ignored(tensor(data, f"{item}/label").long()))


# --- scores ----------------------------------------------------------------------------------------------------------


@over("snr_evaluate", lambda data, meta: [int(n[4]) for n in data if n.startswith("flip") and "confusion" in n])
def test_evaluation(path, item, monkeypatch):
    """What evaluate.py does to the images that it has read, with and without `--flip`."""
    data, meta = load(path)
    net, classes = StandIn(meta).eval(), meta["num_classes"]
    net.load_state_dict(tensors(data, "init"))
    images = []
    for k in range(sum(name.startswith("image_") for name in data)):
        image, scores = tensor(data, f"image_{k}"), tensor(data, f"flip{item}/scores_{k}")
        assert relative_l2(predict(net, image, flip=bool(item))[None], scores if item else scores.softmax(1)) <= 1e-5
        images.append(LabelledImage(str(k), image, with_ignored(tensor(data, f"label_{k}"))[0]))
    monkeypatch.setattr("training.validation.open_labelled", lambda *arguments: images)
    monkeypatch.setattr(net, "network_input", lambda pixels, dtype: pixels[0])
    monkeypatch.setattr("training.validation._picture", lambda *arguments: None)
    files = FileList(DATA_SETS["cityscapes"], path.parent, tuple(image.name for image in images))
    validator = Validator(
        files=files, with_labels=True, classes=range(classes), num_classes=classes, num_workers=0, rank=Rank(),
        flip=bool(item),
    )  # fmt: skip
    predictions = []
    found = validator(net, lambda image, prediction: predictions.append(prediction))
    for k, prediction in enumerate(predictions):
        assert torch.equal(prediction[None], tensor(data, f"flip{item}/argmax_{k}").to(torch.uint8))
    assert len(predictions) == len(images) > 0
    np.testing.assert_array_equal(found.confusion.numpy(), data[f"flip{item}/confusion"])
    means = scores_of(found.confusion, range(classes), absent="zero_if_predicted").means
    ours = [means[name] for name in ("pixel_accuracy", "mean_accuracy", "miou", "frequency_weighted_iou")]
    np.testing.assert_allclose(ours, data[f"flip{item}/PA_MPA_mIoU_FWIoU"], rtol=0, atol=1e-9)
