"""Mixing, pseudo-labels, augmentation and samples of DDB against the published code's numbers.

Every `uda/ddb_*.npz` of the golden folder that belongs to the first step is tested (`PROCST_GOLDEN_DIR` overrides it),
here or in `test_ddb_golden_training.py`; all sizes and settings come from the file's `meta`.
"""

import numpy as np
import pytest
import torch

from data_handlers.classes import IGNORE
from uda.ddb_losses import feature_distance, majority_label, pseudo_labels, weight_map
from uda.ddb_samples import balanced_offset, bilinear, distorted, fitted_size, top_left
from uda.mixing import AREA, VALUES, class_masks, cut_box, cut_mask
from uda.strong_augmentation import blurred, jittered, published_taps
from uda_golden import check_close, load, over


def tensor(data, name):
    return torch.from_numpy(data[name])


def keys(name):
    """Items for `over`: the keys of the entries of `meta[name]`."""
    return lambda data, meta: [case["key"] for case in meta[name]]


def case_of(meta, name, key):
    (case,) = (case for case in meta[name] if case["key"] == key)
    return case


# --- mixing ----------------------------------------------------------------------------------------------------------


@over("ddb_mix", keys("cases"))
def test_mixing(path, item):
    data, meta = load(path)
    case = case_of(meta, "cases", item)
    size = case["h"], case["w"]
    assert meta["area"] == AREA
    if case["kind"] == "class":
        order = torch.ones(1, VALUES).index_fill_(1, tensor(data, f"{item}/chosen"), 0.0)
        mask = class_masks(tensor(data, f"{item}/label"), order, reference=True)
    elif case["kind"] == "zero_img":
        mask = torch.zeros(1, *size, dtype=torch.bool)
    else:
        mask = cut_mask(cut_box(data[f"{item}/u"], *size), torch.zeros(size))[None]
    assert torch.equal(mask, tensor(data, f"{item}/mask").bool())
    if f"{item}/mix" in data:
        mix = torch.where(mask, *(tensor(data, f"{item}/{name}") for name in ("src", "tgt")))
        assert torch.equal(mix, tensor(data, f"{item}/mix"))


@over("ddb_mix")
def test_boxes(path):
    data, meta = load(path)
    for row in data["cut_table"]:
        values = dict(zip(meta["cut_table_columns"], row, strict=True))
        draws = np.array([values[name] for name in ("u", "u1", "u2")])
        y0, x0, y1, x1 = cut_box(draws, int(values["h"]), int(values["w"]))
        assert (y1 - y0) * (x1 - x0) == values["area"]
        if values["area"]:
            assert [y0, x0, y1, x1] == [values[name] for name in ("y0", "x0", "y1", "x1")]


# --- labels ----------------------------------------------------------------------------------------------------------


@over("ddb_pseudo", keys("cases"))
def test_pseudo_labels(path, item):
    data, meta = load(path)
    case = case_of(meta, "cases", item)
    label, confidence = pseudo_labels(tensor(data, f"{item}/teacher_logits"))
    assert torch.equal(label, tensor(data, f"{item}/pseudo_label").long())
    check_close(confidence, data[f"{item}/confidence"], 1e-6)
    share = (confidence >= case["threshold"]).double().mean()
    check_close(share, data[f"{item}/q"], 1e-6)
    weight = weight_map(share, confidence, case["ignore_top"], case["ignore_bottom"])
    check_close(weight, data[f"{item}/pseudo_weight"], 1e-6)
    mask = tensor(data, f"{item}/mask")[:, 0].bool()
    mixed = torch.where(mask, tensor(data, f"{item}/gt")[:, 0].long(), label)
    assert torch.equal(mixed, tensor(data, f"{item}/mixed_label")[:, 0].long())
    check_close(torch.where(mask, 1.0, weight), data[f"{item}/mixed_weight"], 1e-6)


@over("ddb_fdist", lambda data, meta: list(range(len(meta["cases"]))))
def test_feature_distance(path, item):
    data, meta = load(path)
    case, item = meta["cases"][item], f"case{item}"
    label = tensor(data, f"{item}/label")[:, 0]
    small = majority_label(label, case["num_classes"], case["scale"], case["min_ratio"])
    assert torch.equal(small, tensor(data, f"{item}/label_down")[:, 0].long())
    student = tensor(data, f"{item}/feat_student").requires_grad_(True)
    distance, counts = feature_distance(
        student, tensor(data, f"{item}/feat_imagenet"), label, num_classes=case["num_classes"],
        classes=case["classes"] or (), min_ratio=case["min_ratio"],
    )  # fmt: skip
    loss = case["lam"] * (distance * counts).sum() / counts.sum()
    expected = float(data[f"{item}/loss"])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    if np.isfinite(expected):
        loss.backward()
        check_close(student.grad, data[f"{item}/grad"], 1e-5)
    else:
        assert not counts.any()


# --- augmentation ----------------------------------------------------------------------------------------------------


@over("ddb_strongaug", keys("cases"))
def test_strong_augmentation(path, item):
    data, meta = load(path)
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))

    def levels(name):
        return (tensor(data, f"{item}/{name}") * std + mean) / 255.0

    names = ("brightness", "contrast", "saturation", "hue")
    factors = [float(data[f"{item}/{name}_factor"][0]) for name in names]
    ours = jittered(levels("input"), tuple(data[f"{item}/order"].tolist()), factors)
    check_close((255.0 * ours - mean) / std, data[f"{item}/jittered"], 1e-4)
    sigma, taps = float(data[f"{item}/sigma"]), published_taps(ours.shape[1])
    check_close(blurred(tensor(data, f"{item}/jittered"), sigma, taps), data[f"{item}/blurred"], 1e-5)
    check_close((255.0 * blurred(ours, sigma, taps) - mean) / std, data[f"{item}/blurred"], 1e-4)
    impulse = torch.zeros(ours.shape)
    middle = ours.shape[1] // 2, ours.shape[2] // 2
    impulse[:, middle[0], middle[1]] = 1.0
    found = blurred(impulse, sigma, taps)[0]
    assert int((found != 0).any(dim=1).sum()) == data[f"{item}/impulse_rows_nonzero"]
    check_close(found[middle[0]], data[f"{item}/impulse_row"], 1e-5)


class Legacy:
    """NumPy's old generator, which the published code draws from, with the names of the new one."""

    def __init__(self, seed):
        self.state = np.random.RandomState(seed)
        self.uniform = self.state.uniform
        self.drawn = 0

    def integers(self, *bounds):
        self.drawn += 1
        return self.state.randint(*bounds)


@over("ddb_srcaug", keys("crops"))
def test_crops(path, item):
    data, meta = load(path)
    case, rng = case_of(meta, "crops", item), Legacy(case_of(meta, "crops", item)["numpy_seed"])
    height, width = case["crop"]
    x, y = balanced_offset(data[f"{item}/label"], (width, height), case["cat_max_ratio"], rng.integers)
    assert [y, x] == case["offset"]
    assert rng.drawn == 2 * case["boxes_drawn"] == len(data[f"{item}/draws"])


@over("ddb_srcaug", keys("pmd"))
def test_photometric_distortion(path, item):
    data, meta = load(path)
    rng = Legacy(case_of(meta, "pmd", item)["numpy_seed"])
    ours = distorted(data[f"{item}/rgb"], rng)
    differences = np.abs(ours.astype(int) - data[f"{item}/out_rgb"])
    assert (differences <= 2).mean() >= 0.99
    assert differences.max() <= 8


# --- sizes -----------------------------------------------------------------------------------------------------------


@over("ddb_resize", keys("cases"))
def test_resizing(path, item):
    data, meta = load(path)
    case = case_of(meta, "cases", item)
    image, label = data[f"{item}/image"], data[f"{item}/label"]
    size = fitted_size((case["w"], case["h"]), case["img_scale"], case["min_size"] or 0)
    assert list(size[::-1]) == case["out"]
    assert np.abs(bilinear(image, size).astype(int) - data[f"{item}/image_resized"]).max() <= 1
    np.testing.assert_array_equal(top_left(label, size), data[f"{item}/label_resized"])


@over("ddb_resize")
def test_sizes(path):
    data, _ = load(path)
    for height, width, *box, short_side, out_height, out_width in data["sizes"].tolist():
        assert fitted_size((width, height), box, short_side) == (out_width, out_height)


def test_the_clean_mode_takes_no_ignored_pixels_and_no_whole_image():
    label = torch.full((3, 4, 6), IGNORE, dtype=torch.uint8)
    label[0, :2], label[0, 2] = 3, 5
    label[1] = 7
    order = torch.rand(3, VALUES, generator=torch.Generator().manual_seed(0))
    order[:, IGNORE] = 0.0  # it would be the first
    clean, published = (class_masks(label, order, reference) for reference in (False, True))
    assert bool(clean[0].any())
    assert not bool(clean[0][label[0] == IGNORE].any())
    assert not bool(clean[1:].any())
    assert bool(published[0][label[0] == IGNORE].all())
    assert bool(published[1:].all())
