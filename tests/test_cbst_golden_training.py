"""Schedule, samples and steps of class-balanced self-training against the published code's numbers, and its scores.

See `test_cbst_golden.py`.
"""

import numpy as np
import pytest
import torch
from torch import nn

from data_handlers.classes import CITYSCAPES_16_IDS, CITYSCAPES_IDS, IGNORE, SYNTHIA_16_IDS
from data_handlers.label_maps import ids_of_train_ids, to_train_ids
from steps import relative_l2
from training.metrics import confusion_matrix, scores_of
from uda.cbst_optimisation import freeze_statistics, mean_cross_entropy, self_training_optimizer
from uda.cbst_schedule import (
    Portion,
    last_epoch_of_round,
    rate_of_round,
    source_count,
    source_seed,
    source_subset,
)
from uda.mining import NOMINAL_SIZE, Cropping, Draws, Geometry, MinedClasses, make_sample
from uda_golden import imagenet_input, indices, load, over

ID_MAPS = {
    "cityscapes": CITYSCAPES_IDS, "cityscapes16": CITYSCAPES_16_IDS, "gta": CITYSCAPES_IDS, "synthia": SYNTHIA_16_IDS
}  # fmt: skip


# --- rounds ----------------------------------------------------------------------------------------------------------


@over("cbst_schedule", lambda data, meta: sorted(meta["commands"]))
def test_schedule(path, item):
    data, meta = load(path)
    command = meta["commands"][item]
    # What neither a command nor the file's `defaults` says is the published default.
    flags = {
        "num-round": 12, "init-tgt-port": 0.3, "init-src-port": 0.3, "seed-int": 0,
        "source-sample-policy": "cumulative", **meta["defaults"], **command["flags"],
    }  # fmt: skip
    target, source = (
        Portion(*(float(flags[f"{name}-{domain}-port"]) for name in ("init", "step", "max")))
        for domain in ("tgt", "src")
    )
    for r in range(int(flags["num-round"])):
        expected = {name.rpartition("/")[2]: data[name][r] for name in data if name.startswith(f"{item}/")}
        assert target.of_round(r, reference=True) == expected["target_portion"]
        assert source.of_round(r, reference=True) == expected["source_portion"]
        assert rate_of_round(float(flags["base-lr"]), r) == pytest.approx(expected["lr"], rel=1e-11, abs=0)
        assert last_epoch_of_round(int(flags["epoch-per-round"]), r) == expected["to_epoch"]
        assert source_seed(flags["source-sample-policy"], int(flags["seed-int"]), r) == expected["seed"]
        portion = source.of_round(r, reference=True)
        assert source_count(command["source_list_length"], portion) == expected["num_source"]


@over("cbst_source_lists", lambda data, meta: sorted(meta["cases"]))
def test_source_lists(path, item):
    data, meta = load(path)
    case = meta["cases"][item]
    for r, chosen in enumerate(case["rounds"]):
        ours = source_subset(case["num_source"], chosen["n"], chosen["seed"])
        np.testing.assert_array_equal(ours, data[f"{item}/round{r}"])


# --- samples ---------------------------------------------------------------------------------------------------------


def cropping_of(meta, domain):
    return Cropping(
        nominal=tuple(meta[f"nominal_shape_{domain}"]),
        origin_size=meta["origin_size" if domain == "source" else "origin_size_tgt"],
        scale_range=tuple(meta["scale_rate_range"]),
        crop_size=meta["crop_size"],
        stride=meta["label_stride"],
        mine_port=meta["mine_port"],
        mined=MinedClasses(tuple(meta["mine_id"]), tuple(meta["mine_id_priority"])),
        fill=tuple(meta["canvas_fill"]),
        reference=True,
    )


def unit(draws, number, count):
    """The middle of the units that choose an item; the file gives its number."""
    return (draws[number] + 0.5) / int(draws[count]) if number in draws else 0.0


@over("cbst_mining", indices("cases"))
def test_samples(path, item):
    data, meta = load(path)
    case, prefix = meta["cases"][item], f"case{item:02}"
    draws, cropping = case["draws"], cropping_of(meta, case["domain"])
    label = data[f"label_to_id_{case['domain']}"][data[f"label{case['image']}"]]
    assert cropping.side == meta["network_crop"]
    assert draws["target_size"] in cropping.target_sizes()
    geometry = Geometry.of(cropping, draws["target_size"])
    assert (geometry.side, geometry.border) == (case["crop_side"], case["border"])

    sample = make_sample(
        data[f"image{case['image']}"],
        label,
        Draws(
            target_size=draws["target_size"],
            mine=draws["mine"],
            class_unit=draws.get("class_unit", 0.0),
            pixel_unit=unit(draws, "pixel_index", "pixel_count"),
            row_unit=unit(draws, "row", "row_bound"),
            column_unit=unit(draws, "col", "col_bound"),
            mirror=draws["flip"] == 0,
        ),
        cropping,
    )
    crop = sample.crop
    assert (crop.top, crop.left) == (case["top"], case["left"])
    assert (crop.centre is not None) == case["mined"]
    if case["mined"]:
        assert list(crop.centre) == case["centre"]
        assert list(crop.candidates) == case["candidates"]
        assert label[crop.centre] == case["mined_class"]
    else:
        bounds = (int(draws["row_bound"]), int(draws["col_bound"]))
        assert tuple(geometry.starts(length) for length in label.shape) == bounds
    np.testing.assert_array_equal(sample.pixels, data[f"{prefix}/resized"])
    np.testing.assert_array_equal(sample.label, data[f"{prefix}/label_grid"])
    if f"{prefix}/input" in data:
        ours = imagenet_input(meta)(torch.from_numpy(sample.pixels)).numpy()
        np.testing.assert_allclose(ours, data[f"{prefix}/input"], rtol=0, atol=1e-5)


# --- steps -----------------------------------------------------------------------------------------------------------

NAMES = {
    "conv1_weight": "0.weight", "bn1_gamma": "1.weight", "bn1_beta": "1.bias", "bn1_moving_mean": "1.running_mean",
    "bn1_moving_var": "1.running_var", "linear_weight": "3.weight", "linear_bias": "3.bias",
}  # fmt: skip


def tensors(data, prefix):
    """Arrays of a file below a prefix, by our names."""
    return {ours: torch.from_numpy(data[f"{prefix}/{theirs}"]) for theirs, ours in NAMES.items()
            if f"{prefix}/{theirs}" in data}  # fmt: skip


def stand_in(data, meta):
    """The file's small net, with its weights before the first step."""
    channels = len(data["before/bn1_gamma"])
    net = nn.Sequential(
        nn.Conv2d(3, channels, 3, stride=meta["feature_stride"], padding=1, bias=False),
        nn.BatchNorm2d(channels, eps=meta["bn_eps"]),
        nn.ReLU(),
        nn.Conv2d(channels, meta["classes"], 1),
    )
    net.load_state_dict(tensors(data, "before"), strict=False)
    return net


@over("cbst_step")
def test_steps(path):
    data, meta = load(path)
    net = stand_in(data, meta)
    optimizer = self_training_optimizer(
        net, rate=meta["lr"], weight_decay=meta["weight_decay"], momentum=meta["momentum"]
    )
    before = tensors(data, "before")
    for k in range(1, meta["steps"] + 1):
        net.train()
        freeze_statistics(net)
        label = torch.from_numpy(data[f"step{k}/label"])
        logits = net(torch.from_numpy(data[f"step{k}/data"]))
        torch.testing.assert_close(logits.softmax(1), torch.from_numpy(data[f"step{k}/prob"]), rtol=0, atol=1e-6)
        losses = [
            float(mean_cross_entropy(x, y).detach())
            for x, y in zip(logits.chunk(meta["devices"]), label.chunk(meta["devices"]), strict=True)
        ]
        np.testing.assert_allclose(losses, data[f"step{k}/loss_per_device"], rtol=1e-6, atol=0)
        optimizer.zero_grad()
        mean_cross_entropy(logits, label, meta["devices"]).backward()
        gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
        expected = tensors(data, f"step{k}/grad")
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_l2(gradient, expected[name]) <= 1e-5, f"step {k}: {name}"
        optimizer.step()
        after, ours = tensors(data, f"step{k}/after"), net.state_dict()
        for name, value in after.items():
            change = value.double() - before[name].double()
            assert relative_l2(ours[name].double() - before[name].double(), change) <= 1e-4, f"step {k}: {name}"
        before = after
        # The next step starts from the file's numbers, so that it is compared alone.
        net.load_state_dict(after, strict=False)


# --- scores and ids --------------------------------------------------------------------------------------------------


@over("cbst_iou")
def test_scores(path):
    data, meta = load(path)
    id_map, order = ID_MAPS[meta["dataset"]], data["row_trainIds"].astype(int)
    np.testing.assert_array_equal(to_train_ids(np.arange(256), id_map), data["label_to_id"])
    np.testing.assert_array_equal(ids_of_train_ids(id_map)[order], data["row_labelIds"])
    total = torch.zeros(meta["classes"], meta["classes"], dtype=torch.int64)
    pairs = zip(data["gt_labelIds"], data["pred_labelIds"], strict=True)
    for (label, prediction), running in zip(pairs, data["running"], strict=True):
        total += confusion_matrix(*(torch.from_numpy(to_train_ids(x, id_map)) for x in (prediction, label)),
                                  meta["classes"])  # fmt: skip
        scores = scores_of(total, range(meta["classes"]), absent="zero")
        ours = [scores.means["pixel_accuracy"], scores.means["mean_accuracy"], scores.means["miou"]]
        np.testing.assert_allclose(ours, running, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(total.numpy()[np.ix_(order, order)], data["confusion"])
    np.testing.assert_array_equal(total.sum(dim=1).numpy()[order], data["class_pixels"])
    np.testing.assert_allclose(np.array(scores.by_class["iou"])[order], data["iou"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.array(scores.by_class["accuracy"])[order], data["class_acc"], rtol=0, atol=1e-12)
    final = [scores.means["pixel_accuracy"], scores.means["mean_accuracy"], scores.means["miou"]]
    np.testing.assert_allclose(final, [data[k] for k in ("pixel_acc", "mean_acc", "mean_iou")], rtol=0, atol=1e-12)
    if "derived/mean_iou_13" in data:
        thirteen = [c for c in range(meta["classes"]) if c not in (3, 4, 5)]
        of_13 = scores_of(total, thirteen, range(meta["classes"]), absent="zero")
        assert of_13.means["miou"] == pytest.approx(float(data["derived/mean_iou_13"]), abs=1e-12, rel=0)


@over("cbst_luts", lambda data, meta: sorted(data))
def test_id_tables(path, item):
    data, _ = load(path)
    group, _, name = item.partition("/")
    source, _, target = group.removeprefix("evaluate_").partition("_to_")
    data_set = target if name.endswith("_target") else source
    if name.startswith("max_shape"):
        expected = NOMINAL_SIZE["gta5" if data_set == "gta" else data_set]
    else:
        # SYNTHIA has 16 classes, and a target is labelled with those of its source.
        id_map = CITYSCAPES_16_IDS if target and source == "synthia" and data_set == target else ID_MAPS[data_set]
        by_train_id = ids_of_train_ids(id_map)
        whole = to_train_ids(np.arange(256), id_map)
        kind = name.removesuffix("_source").removesuffix("_target")
        expected = {"label_to_id": whole, "id_to_label": by_train_id, "valid_labels": np.sort(by_train_id)}[kind]
        assert whole[list(id_map)].max() < IGNORE
    np.testing.assert_array_equal(data[item], expected)
