"""Samples, rounds, prior and optimisation of class-balanced self-training: properties and what is mended."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch import nn

from data_handlers.classes import CITYSCAPES_16_IDS, CITYSCAPES_IDS, IGNORE, SYNTHIA_13, SYNTHIA_16, SYNTHIA_16_IDS
from data_handlers.label_maps import ids_of_train_ids, to_data_set_ids, to_train_ids
from data_handlers.spatial_prior import SpatialPriorBuilder, read_spatial_prior, write_spatial_prior
from refusals import check_refused
from uda.cbst_optimisation import (
    freeze_statistics,
    mean_cross_entropy,
    parameter_groups,
    self_training_optimizer,
)
from uda.cbst_schedule import (
    Portion,
    last_epoch_of_round,
    rate_of_round,
    rounded,
    source_count,
    source_seed,
    source_subset,
)
from uda.mining import (
    IMAGENET_FILL,
    Crop,
    Cropping,
    Draws,
    Geometry,
    MinedClasses,
    draw,
    make_sample,
    mined_classes,
    mined_crop,
    random_crop,
    window,
)

# --- mining and samples ----------------------------------------------------------------------------------------------


def cropping(**changes):
    given = {
        "nominal": (64, 128), "origin_size": 128, "scale_range": (0.7, 1.3), "crop_size": 36, "stride": 8,
        "mine_port": 0.5, "mined": MinedClasses((7, 3), (5,)), **changes,
    }  # fmt: skip
    return Cropping(**given)


def draws(**changes):
    given = {
        "target_size": 128, "mine": 1.0, "class_unit": 0.0, "pixel_unit": 0.0, "row_unit": 0.5, "column_unit": 0.5,
        "mirror": False, **changes,
    }  # fmt: skip
    return Draws(**given)


def test_the_rarest_classes_are_in_a_stable_order():
    sizes = np.array([50, 0, 3, 0, 3, 944])
    mined = mined_classes(sizes, number=4, share=0.003)
    assert mined == MinedClasses((1, 3, 2, 4), (1, 3))
    assert mined_classes(sizes, number=1, share=0.0031).priority == (1, 2, 3, 4)
    assert mined_classes(np.full(19, 7), number=3, share=0.001) == MinedClasses((0, 1, 2), ())
    assert mined_classes(np.zeros(3), number=2, share=0.001).rarest == (0, 1)


def test_sizes_of_the_published_crops():
    ours = cropping(nominal=(1024, 2048), origin_size=2048, crop_size=500)
    assert ours.side == 504
    assert (ours.target_sizes()[0], ours.target_sizes()[-1]) == (1433, 2662)
    assert Geometry.of(ours, 2662).side == 387
    assert Geometry.of(ours, 1433).side == 720
    assert cropping(nominal=(760, 1280), origin_size=1280).target_sizes() == range(896, 1665)


@pytest.mark.parametrize("stride", [1, 4, 8, 16])
def test_random_crops_lie_where_the_canvas_does(stride):
    rng = np.random.default_rng(stride)
    for _ in range(300):
        size = tuple(rng.integers(1, 150, 2).tolist())
        ours = cropping(stride=stride)
        drawn = draw(rng, ours)
        assert drawn.target_size in ours.target_sizes()
        geometry = Geometry.of(ours, drawn.target_size)
        crop = random_crop(size, geometry, drawn)
        for start, length in zip((crop.top, crop.left), size, strict=True):
            assert -geometry.border <= start < max(1, geometry.cell, length - geometry.side + 1)


def test_mined_crops_lie_in_the_image_around_a_pixel_of_a_candidate():
    rng, mined = np.random.default_rng(0), 0
    for _ in range(300):
        label = rng.choice([0, 3, 5, 7, IGNORE], tuple(rng.integers(1, 110, 2)), p=[0.9, 0.03, 0.01, 0.03, 0.03])
        label = label.astype(np.uint8)
        ours = cropping()
        drawn = draw(rng, ours)
        crop = mined_crop(label, ours.mined, Geometry.of(ours, drawn.target_size), drawn)
        if crop is None:
            continue
        mined += 1
        assert label[crop.centre] in crop.candidates
        assert crop.candidates in [(5,), (7, 3), (7,), (3,)]
        assert min(crop.top, crop.left) >= 0
        assert crop.top + crop.side <= label.shape[0]
        assert crop.left + crop.side <= label.shape[1]
    assert mined > 50


def test_candidates_and_their_pixels():
    geometry = Geometry(side=3, cell=8.0, border=4)
    label = np.zeros((10, 10), np.uint8)
    label[0, 0] = 5  # no crop fits around it
    label[4, 2:5] = 3
    label[6, 6] = 7
    mined = MinedClasses((7, 3), (5,))
    crop = mined_crop(label, mined, geometry, draws())
    assert crop == Crop(top=5, left=5, side=3, centre=(6, 6), candidates=(7, 3))
    crop = mined_crop(label, mined, geometry, draws(class_unit=0.5, pixel_unit=0.7))
    assert crop == Crop(top=3, left=3, side=3, centre=(4, 4), candidates=(7, 3))
    label[7, 7] = 5  # the last centres are at row and column 7
    assert mined_crop(label, mined, geometry, draws()).candidates == (5,)
    label[7, 7], label[7, 8], label[8, 7] = 0, 5, 5
    assert mined_crop(label, mined, geometry, draws()).candidates == (7, 3)
    assert mined_crop(np.zeros((10, 10), np.uint8), mined, geometry, draws()) is None
    assert mined_crop(label[:2], mined, geometry, draws()) is None


def test_mining_is_tried_below_its_probability_and_falls_back():
    rng = np.random.default_rng(1)
    pixels, label = rng.integers(0, 256, (64, 128, 3), dtype=np.uint8), np.full((64, 128), 3, np.uint8)
    for mine, port, mined in [(0.49, 0.5, True), (0.5, 0.5, False), (0.0, 0.0, False), (0.999, 1.0, True)]:
        sample = make_sample(pixels, label, draws(mine=mine), cropping(mine_port=port))
        assert (sample.crop.centre is not None) == mined
    assert make_sample(pixels, label * 0, draws(mine=0.0), cropping()).crop.centre is None


def test_an_image_smaller_than_the_crop_is_filled_up():
    pixels, label = np.zeros((8, 16, 3), np.uint8), np.zeros((8, 16), np.uint8)
    sample = make_sample(pixels, label, draws(mine=0.0), cropping(fill=(250, 251, 252)))
    assert sample.pixels[-1, -1].tolist() == [250, 251, 252]
    assert sample.label[-1, -1] == IGNORE


def test_outside_of_the_image_is_the_mean_colour_and_ignored():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    ours = window(values, Crop(top=-1, left=2, side=5), IGNORE)
    expected = np.full((5, 5), IGNORE)
    expected[1:4, :2] = values[:, 2:]
    np.testing.assert_array_equal(ours, expected)
    for crop in (Crop(top=9, left=0, side=2), Crop(top=0, left=-5, side=2)):
        colours = window(np.zeros((3, 4, 3), np.uint8), crop, IMAGENET_FILL)
        assert (colours == IMAGENET_FILL).all()


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 4, 8])
def test_a_cell_has_the_label_of_its_middle_pixel(stride, mirror):
    """The red level of the image is its label, and the crop is not resized."""
    label = np.random.default_rng(stride).integers(0, 19, (64, 128), dtype=np.uint8)
    pixels = np.repeat(label[..., None], 3, axis=2)
    ours = cropping(stride=stride, crop_size=24, mine_port=0.0)
    sample = make_sample(pixels, label, draws(mirror=mirror), ours)
    middle = stride // 2
    assert sample.crop.side == ours.side
    assert sample.label.shape == (ours.side // stride,) * 2
    np.testing.assert_array_equal(sample.label, sample.pixels[middle::stride, middle::stride, 0])

    old = make_sample(pixels, label, draws(mirror=mirror), cropping(stride=stride, crop_size=24, mine_port=0.0,
                                                                    reference=True))  # fmt: skip
    off_by_one = mirror and stride % 2 == 0
    column = middle - 1 if off_by_one else middle
    np.testing.assert_array_equal(old.label, old.pixels[middle::stride, column::stride, 0])


def test_draws_follow_from_the_seed_and_are_spread():
    ours = cropping()
    first, again = (draw(np.random.default_rng(3), ours) for _ in range(2))
    assert first == again
    rng = np.random.default_rng(4)
    many = [draw(rng, ours) for _ in range(2000)]
    assert 0.45 < np.mean([d.mirror for d in many]) < 0.55
    assert {d.target_size for d in many} == set(ours.target_sizes())
    for name in ("mine", "class_unit", "pixel_unit", "row_unit", "column_unit"):
        units = np.array([getattr(d, name) for d in many])
        assert units.min() >= 0
        assert units.max() < 1
        assert abs(units.mean() - 0.5) < 0.05


# --- rounds ----------------------------------------------------------------------------------------------------------


def test_portions_end_at_the_maximum():
    ours = Portion(0.15, 0.05, 0.5)
    assert [ours.of_round(r) for r in range(10)] == [0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5, 0.5]
    assert [ours.of_round(r, reference=True) for r in range(7, 11)] == [0.5, 0.55, 0.55, 0.55]
    assert Portion(0.3, 0.05, 0.32).of_round(1) == 0.32
    assert Portion(0.03, 0.0025, 0.06).of_round(20) == Portion(0.03, 0.0025, 0.06).of_round(20, reference=True) == 0.06


def test_portions_have_12_digits():
    total = 0.15
    for _ in range(5):
        total += 0.05
    assert total == 0.39999999999999997
    assert rounded(total) == 0.4
    assert [int(size * total) for size in (5, 10, 15)] != [2, 4, 6]
    assert [int(size * Portion(0.15, 0.05, 0.5).of_round(5)) for size in (5, 10, 15)] == [2, 4, 6]


def test_other_values_of_a_round():
    assert [rate_of_round(1e-4, r) for r in (0, 2, 4)] == [1e-4, 5e-5, 2.5e-5]
    assert [last_epoch_of_round(2, r) for r in range(3)] == [2, 4, 6]
    assert [source_seed("cumulative", 9, r) for r in range(3)] == [9, 9, 9]
    assert [source_seed("random", 9, r) for r in range(3)] == [0, 1, 2]
    assert source_count(24966, 0.03) == 748


def test_larger_subsets_of_the_source_contain_smaller_ones():
    small, large = source_subset(24966, 748, 0), source_subset(24966, 811, 0)
    np.testing.assert_array_equal(large[:748], small)
    assert len(set(large.tolist())) == 811
    assert source_subset(10, 10, 1).tolist() != source_subset(10, 10, 2).tolist()
    assert len(source_subset(10, 0, 0)) == 0
    with pytest.raises(ValueError, match="larger"):
        source_subset(10, 11, 0)


# --- spatial prior ---------------------------------------------------------------------------------------------------


def test_files_that_are_no_prior(tmp_path):
    path = tmp_path / "prior_array.mat"
    check_refused(lambda: read_spatial_prior(path), path, "does not exist")
    write_spatial_prior(path, np.ones((3, 4, 5)))
    whole = path.read_bytes()
    check_refused(lambda: read_spatial_prior(path, (3, 5, 4)), path, "(3, 4, 5)", "(3, 5, 4)")
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n".ljust(400, b"\0"))
    check_refused(lambda: read_spatial_prior(path), path, "7.3", "-v7")
    noise = np.random.default_rng(0).bytes(3000)
    for content in (b"", b"no such file", noise, whole[:100], whole[:150], whole[: len(whole) - 20]):
        path.write_bytes(content)
        check_refused(lambda: read_spatial_prior(path), path, "damaged or no MATLAB file")
    check_refused(lambda: read_spatial_prior(tmp_path), tmp_path, "directory")
    savemat(path, {"prior": np.ones((3, 4, 5)), "other": 1})
    check_refused(lambda: read_spatial_prior(path), path, "no variable prior_array", "prior, other")
    negative, undefined = -np.ones((3, 4, 5)), np.full((3, 4, 5), np.nan)
    for values, said in [
        (np.ones((4, 5)), "(classes, height, width)"), ("text", "real numbers"), (1j * np.ones((3, 4, 5)), "real"),
        (np.array([1, "a"], dtype=object), "real numbers"), (negative, "negative"), (undefined, "undefined"),
    ]:  # fmt: skip
        savemat(path, {"prior_array": values})
        check_refused(lambda: read_spatial_prior(path), path, said)


def test_built_prior():
    builder = SpatialPriorBuilder(3, (2, 3))
    builder.add(np.array([[0, 0, 1], [2, 1, IGNORE]], np.uint8))
    builder.add(np.array([[0, 1, 1], [2, IGNORE, IGNORE]], np.uint8))
    plain = builder.prior(0.0)
    assert plain.dtype == np.float32
    # The last pixel is labelled in no map; its neighbours are of class 1.
    expected = [[[1, 0.5, 0], [0, 0, 0]], [[0, 0.5, 1], [0, 1, 1]], [[0, 0, 0], [1, 0, 0]]]
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-6)
    smooth = builder.prior(100.0)
    np.testing.assert_allclose(smooth.sum(axis=0), 1, rtol=0, atol=1e-6)
    assert np.ptp(smooth, axis=(1, 2)).max() < 0.01 < np.ptp(builder.prior(0.5), axis=(1, 2)).min()


def test_label_maps_of_another_size_are_resized_to_the_nearest_pixel():
    label = np.random.default_rng(0).integers(0, 3, (14, 15), dtype=np.uint8)
    builder = SpatialPriorBuilder(3, (7, 5))
    builder.add(label)
    resized = np.array(Image.fromarray(label).resize((5, 7), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(builder.counts.argmax(axis=0), resized)


def test_label_maps_that_make_no_prior():
    builder = SpatialPriorBuilder(3, (2, 2))
    with pytest.raises(ValueError, match="trainId 7"):
        builder.add(np.array([[0, 7], [1, IGNORE]], np.uint8))
    builder.add(np.full((2, 2), IGNORE, np.uint8))
    with pytest.raises(ValueError, match="labelled"):
        builder.prior(1.0)


# --- optimisation ----------------------------------------------------------------------------------------------------


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1))
    net[1].running_mean.uniform_(-1, 1)
    return net


def test_parameter_groups():
    net = small_net()
    weights, biases = parameter_groups(net, rate=0.1, weight_decay=5e-4)
    assert [id(p) for p in weights["params"]] == [id(net[0].weight), id(net[1].weight), id(net[3].weight)]
    assert [id(p) for p in biases["params"]] == [id(net[1].bias), id(net[3].bias)]
    assert (weights["lr"], weights["weight_decay"]) == (0.1, 5e-4)
    assert (biases["lr"], biases["weight_decay"]) == (0.2, 0.0)
    net[0].requires_grad_(False)
    assert len(parameter_groups(net, rate=0.1, weight_decay=5e-4)[0]["params"]) == 2
    assert len(parameter_groups(net[0].requires_grad_(), rate=0.1, weight_decay=0.0)) == 1


def test_batch_norms_use_and_keep_their_statistics_and_learn():
    net, image = small_net(), torch.randn(4, 3, 6, 6)
    expected = net.eval()(image)
    before = {name: value.clone() for name, value in net.named_buffers()}
    net.train()
    freeze_statistics(net)
    assert net.training
    output = net(image)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.square().mean().backward()
    assert net[1].weight.grad.abs().sum() > 0
    assert net[1].bias.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_the_loss_is_a_mean_over_parts_of_means_over_valid_cells():
    logits = torch.randn(4, 5, 2, 2)
    label = torch.randint(0, 5, (4, 2, 2))
    label[0], label[1, 0] = IGNORE, IGNORE
    losses = torch.nn.functional.cross_entropy(logits, label, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(mean_cross_entropy(logits, label), losses.sum() / 10)
    halves = (losses[:2].sum() / 2 + losses[2:].sum() / 8) / 2
    torch.testing.assert_close(mean_cross_entropy(logits, label, 2), halves)
    with pytest.raises(ValueError, match="equal parts"):
        mean_cross_entropy(logits, label, 3)


def test_a_batch_without_valid_cells_lets_weights_decay_and_nothing_else():
    net = small_net()
    optimizer = self_training_optimizer(net, rate=0.1, weight_decay=0.01, momentum=0.9)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    net.train()
    freeze_statistics(net)
    loss = mean_cross_entropy(net(torch.randn(2, 3, 4, 4)), torch.full((2, 2, 2), IGNORE))
    loss.backward()
    optimizer.step()
    assert float(loss.detach()) == 0
    for name, parameter in net.named_parameters():
        factor = 1.0 if name.endswith("bias") else 1 - 0.1 * 0.01
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


# --- ids --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_map", [CITYSCAPES_IDS, CITYSCAPES_16_IDS, SYNTHIA_16_IDS])
def test_ids_there_and_back(id_map):
    turned_round = dict(reversed(id_map.items()))
    ids = ids_of_train_ids(id_map)
    np.testing.assert_array_equal(ids, ids_of_train_ids(turned_round))
    np.testing.assert_array_equal(to_train_ids(ids, id_map), np.arange(len(id_map)))
    train_ids = np.array([0, 3, len(id_map) - 1, len(id_map), IGNORE], np.uint8)
    assert to_data_set_ids(train_ids, id_map).tolist() == [*ids[train_ids[:3]], 0, 0]


def test_the_16_classes_are_those_of_synthia_in_their_order():
    known = {i: t for i, t in CITYSCAPES_IDS.items() if t in SYNTHIA_16}
    assert {i: SYNTHIA_16[t] for i, t in CITYSCAPES_16_IDS.items()} == known
    assert [SYNTHIA_16.index(c) for c in SYNTHIA_16 if c not in SYNTHIA_13] == [3, 4, 5]
