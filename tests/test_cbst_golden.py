"""Pseudo-labels of class-balanced self-training against the published code's numbers (docs/uda.md, section CBST).

Every `uda/cbst_*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it), here or in
`test_cbst_golden_training.py`; all sizes and parameters come from the file's `meta`. Everything is the reference mode.
"""

import numpy as np
import pytest
import torch

from data_handlers.classes import CITYSCAPES_16_IDS, CITYSCAPES_IDS
from data_handlers.label_maps import to_data_set_ids
from data_handlers.spatial_prior import SpatialPriorBuilder, read_spatial_prior, write_spatial_prior
from training.confidence_maps import confidence_map, input_size, network_input, padded_size
from uda.mining import mined_classes
from uda.pseudo_labels import predicted, select, with_prior
from uda_golden import UDA_DIR, imagenet_input, indices, load, over, search

KINDS = (
    "confidence_maps", "iou", "luts", "mining", "prior", "pseudo_labels", "schedule", "source_lists", "step",
    "thresholds",
)  # fmt: skip
FILES = sorted(UDA_DIR.glob("cbst_*.npz"))


def test_there_are_files():
    assert FILES, f"no cbst_*.npz in {UDA_DIR}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_of_a_kind_that_is_tested(path):
    assert any(path.stem == f"cbst_{kind}" or path.stem.startswith(f"cbst_{kind}_") for kind in KINDS)


# --- confidence maps -------------------------------------------------------------------------------------------------


@over("cbst_confidence_maps", indices("cases"))
def test_confidence_maps(path, item):
    data, meta = load(path)
    case, stride, normalise = meta["cases"][item], meta["feature_stride"], imagenet_input(meta)
    pixels, expected = data[f"case{item}/image"], data[f"case{item}/net_input"]
    resized = input_size(pixels.shape[:2], case["test_scale"])
    assert list(resized) == case["resized"]
    assert list(padded_size(resized, stride)) == case["padded"]
    reading = {"longer_side": case["test_scale"], "stride": stride, "normalise": normalise}
    np.testing.assert_allclose(network_input(pixels, **reading).numpy(), expected, rtol=0, atol=1e-5)

    seen = []
    outputs = [torch.from_numpy(data[f"case{item}/{name}"]) for name in ("softmax", "softmax_of_flipped_input")]

    def net(image):
        seen.append(image[0].numpy())
        return outputs[len(seen) - 1][None]

    ours = confidence_map(net, pixels, **reading)
    np.testing.assert_allclose(seen[1], expected[..., ::-1], rtol=0, atol=1e-5)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), data[f"case{item}/P"], rtol=0, atol=1e-6)


# --- thresholds and selection ----------------------------------------------------------------------------------------


def check_mined(run, ours, sizes, data, prefix):
    """The order of equal sizes is that of an unstable sort in the published code."""
    theirs = data[f"{prefix}/mine_id"]
    np.testing.assert_array_equal(sizes[list(ours.rarest)], sizes[theirs])
    if run["mine_id_set_unique"]:
        assert set(ours.rarest) == set(theirs.tolist())
    if run["mine_id_order_unique"]:
        assert list(ours.rarest) == theirs.tolist()
    assert list(ours.priority) == data[f"{prefix}/mine_id_priority"].tolist()


def mined_of(run, sizes):
    return mined_classes(sizes, number=run["mine_id_number"], share=run["mine_thresh"])


@over("cbst_thresholds", indices("runs"))
def test_thresholds(path, item):
    data, meta = load(path)
    run, prefix, maps = meta["runs"][item], f"run{item:02}", torch.from_numpy(data["P"])
    plan, thresholds = search(maps, run)
    np.testing.assert_array_equal(thresholds.double().numpy(), data[f"{prefix}/thresh"])
    np.testing.assert_array_equal(plan.sizes(), data[f"{prefix}/cls_size"])
    labels = torch.stack([select(P, thresholds).labels for P in maps])
    np.testing.assert_array_equal(labels.numpy(), data[f"{prefix}/pseudo"])
    check_mined(run, mined_of(run, plan.sizes()), plan.sizes(), data, prefix)


def whole_maps(data, meta, prior):
    """Confidence maps from a net's outputs, as many as there are images."""
    size = (meta["height"], meta["width"])
    maps = []
    for outputs in zip(data["maps"], data["maps_flipped_input"], strict=True):
        answers = iter([torch.from_numpy(output)[None] for output in outputs])
        P = confidence_map(
            lambda image, answers=answers: next(answers), np.zeros((*size, 3), np.uint8),
            longer_side=meta["test_scale"], stride=meta["feature_stride"], normalise=imagenet_input(meta),
        )  # fmt: skip
        maps.append(with_prior(P, prior))
    return torch.stack(maps)


def check_labels(ours, theirs, ratios, allowed):
    """At most so many pixels differ, and only where a class just reaches its threshold."""
    differ = ours != theirs
    assert differ.sum() <= allowed
    assert (np.abs(ratios[differ] - 1) < 1e-5).all()


@over("cbst_pseudo_labels", indices("runs"))
def test_pseudo_labels(path, item, tmp_path):
    data, meta = load(path)
    run, prefix = meta["runs"][item], f"run{item:02}"
    (tmp_path / "prior.mat").write_bytes(data["prior_mat"].tobytes())
    shape = (meta["classes"], meta["height"], meta["width"])
    prior = read_spatial_prior(tmp_path / "prior.mat", shape)
    np.testing.assert_array_equal(prior, data["prior"])

    maps = whole_maps(data, meta, torch.from_numpy(prior) if run["prior"] else None)
    if not run["prior"]:
        np.testing.assert_array_equal(torch.stack([predicted(P) for P in maps]), data["plain_prediction"])
    if f"{prefix}/prior_prediction" in data:
        np.testing.assert_array_equal(torch.stack([predicted(P) for P in maps]), data[f"{prefix}/prior_prediction"])
    plan, thresholds = search(maps, run)
    np.testing.assert_allclose(thresholds.double(), data[f"{prefix}/thresh"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(plan.sizes(), data[f"{prefix}/cls_size"])
    check_mined(run, mined_of(run, plan.sizes()), plan.sizes(), data, prefix)

    selections = [select(P, thresholds) for P in maps]
    labels = torch.stack([s.labels for s in selections]).numpy()
    divisors = torch.where(thresholds == 0, 1.0, thresholds)
    ratios = (maps / divisors[:, None, None]).amax(dim=1).numpy()
    check_labels(labels, data[f"{prefix}/pseudo"], ratios, 2)
    id_map = CITYSCAPES_IDS if meta["classes"] == len(CITYSCAPES_IDS) else CITYSCAPES_16_IDS
    check_labels(to_data_set_ids(labels, id_map), data[f"{prefix}/pseudo_labelIds"], ratios, 2)
    if f"{prefix}/reweighted" in data:
        np.testing.assert_array_equal(torch.stack([s.reweighted for s in selections]), data[f"{prefix}/reweighted"])


# --- spatial prior ---------------------------------------------------------------------------------------------------


@over("cbst_prior", indices("cases"))
def test_prior(path, item, tmp_path):
    data, meta = load(path)
    case, prefix = meta["cases"][item], f"case{item}"
    (tmp_path / "prior.mat").write_bytes(data[f"{prefix}/prior_mat"].tobytes())
    prior = read_spatial_prior(tmp_path / "prior.mat", (case["classes"], case["height"], case["width"]))
    assert prior.dtype == np.float32
    plain = torch.from_numpy(data[f"{prefix}/P_np"])
    P = with_prior(plain, torch.from_numpy(prior))
    np.testing.assert_array_equal(P, data[f"{prefix}/P"])
    np.testing.assert_array_equal(predicted(plain), data[f"{prefix}/plain_prediction"])
    np.testing.assert_array_equal(predicted(P), data[f"{prefix}/prediction"])
    plan, thresholds = search(P[None], case)
    np.testing.assert_array_equal(thresholds.double(), data[f"{prefix}/thresh"])
    np.testing.assert_array_equal(plan.sizes(), data[f"{prefix}/cls_size"])
    np.testing.assert_array_equal(select(P, thresholds).labels, data[f"{prefix}/pseudo"])


@pytest.mark.parametrize("sigma", [0.0, 1.5, 70.0])
@over("cbst_prior")
def test_built_prior(path, sigma, tmp_path):
    data, meta = load(path)
    maps, count = data["build/label_maps"], data["build/count"]
    builder = SpatialPriorBuilder(meta["build"]["classes"], maps.shape[1:])
    for label in maps:
        builder.add(label)
    np.testing.assert_array_equal(builder.counts, count)
    prior = builder.prior(sigma)
    assert prior.shape == count.shape
    assert prior.min() >= 0
    np.testing.assert_allclose(prior.sum(axis=0), 1.0, rtol=0, atol=1e-6)
    write_spatial_prior(tmp_path / "prior.mat", prior)
    np.testing.assert_array_equal(read_spatial_prior(tmp_path / "prior.mat", count.shape), prior)
    if sigma == 0:
        labelled = count.sum(axis=0) > 0
        expected = (count / np.maximum(count.sum(axis=0), 1))[:, labelled]
        np.testing.assert_allclose(prior[:, labelled], expected, rtol=0, atol=1e-6)
