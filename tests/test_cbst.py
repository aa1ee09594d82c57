"""Pseudo-labels of class-balanced self-training: a worked example, brute force, and what is mended (docs/uda.md)."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from data_handlers.classes import IGNORE
from data_handlers.images import NetworkInput
from data_handlers.resampling import filter_of_sizes, resize_by_rule, upsample
from training.confidence_maps import confidence_map, flip_average, input_size, network_input, padded_size
from uda.mining import mined_classes
from uda.pseudo_labels import predicted, select, with_prior
from uda.thresholds import LowerCounts, UpperCounts, ascending_keys, ranks_of, value_of_key
from uda_golden import search

INF = math.inf
Filter = Image.Resampling

# --- a worked example ------------------------------------------------------------------------------------------------

# Two images of 2x6 pixels, four classes of which the last is never predicted.
PIXELS = (
    "970201 920602 524800 603901 900802 851005 752005 702505 653005 206218 305812 404515",
    "990100 950302 801505 550243 881002 108010 157015 206515 256015 354718 455005 283042",
)
EXAMPLE = torch.tensor([
    [[int(pixel[2 * c : 2 * c + 2]) / 100 for pixel in image.split()] for c in range(3)] + [[0.0] * 12]
    for image in PIXELS
]).reshape(2, 4, 2, 6)  # fmt: skip
# Name: policy, reference mode; thresholds, sizes, mined classes and their priority; labels, x = ignored.
WORKED = {
    "cb-reference": ("cb", True, [0.90, 0.62, 0.42, 0], [6, 4, 2, 0], [3], [2, 3], "00xx0xxxx1xx 00x2x111xxx2"),
    "cb-clean": ("cb", False, [0.97, 0.80, INF, INF], [5, 3, 1, 0], [3], [2, 3], "0xxxxxxxxxxx 0xxxx1xxxxxx"),
    "global-reference": ("global", True, [0.62] * 4, [14] * 4, [0], [], "00xx000001xx 000x0111xxxx"),
    "global-clean": ("global", False, [0.88] * 4, [5, 3, 1, 0], [3], [2, 3], "00xx0xxxxxxx 00xx0xxxxxxx"),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_example(name):
    policy, reference, thresholds, sizes, rarest, priority, labels = WORKED[name]
    plan, ours = search(EXAMPLE, {"portion": 0.5, "policy": policy, "stride": 4}, reference)
    torch.testing.assert_close(ours, torch.tensor(thresholds), rtol=0, atol=0)
    assert plan.sizes().tolist() == sizes
    mined = mined_classes(plan.sizes(), number=1, share=0.2)
    assert (list(mined.rarest), list(mined.priority)) == (rarest, priority)
    expected = [[IGNORE if letter == "x" else int(letter) for letter in image] for image in labels.split()]
    assert [select(P, ours).labels.flatten().tolist() for P in EXAMPLE] == expected


# --- thresholds ------------------------------------------------------------------------------------------------------


def sampled_lists(maps, stride):
    """The values of each class, by loops over pixels."""
    lists = [[] for _ in range(maps.shape[1])]
    for P in maps.flatten(2).numpy():
        seen = [0] * len(P)
        for pixel in P.T:
            c = int(pixel.argmax())
            if seen[c] % stride == 0:
                lists[c].append(float(pixel[c]))
            seen[c] += 1
    return lists


def brute_force(lists, portion, policy, reference):
    """Thresholds by a full sort of all values, with the zeros of the reference as values."""
    if policy == "global":
        everything = [value for values in lists for value in values] + [0.0] * (reference * (len(lists) + 1))
        everything.sort(reverse=True)
        k = math.floor(len(everything) * portion)
        if k == 0:
            return [everything[-1] if reference else INF] * len(lists)
        return [everything[k - 1] if reference or everything[k - 1] > 0 else INF] * len(lists)
    thresholds = []
    for values in lists:
        ordered = sorted(values + [0.0] * (reference and len(values) > 0), reverse=True)
        k = math.floor(len(ordered) * portion)
        value = ordered[k - 1] if k else 0.0
        thresholds.append(value if reference or value > 0 else INF)
    return thresholds


def random_maps(rng, kind):
    """Confidences (N,C,H,W) with ties, absent classes and values below 0."""
    classes, height, width = int(rng.integers(2, 9)), int(rng.integers(1, 12)), int(rng.integers(1, 12))
    maps = rng.random((3, classes, height, width)).astype(np.float32)
    maps[:, 0] -= 2.0  # never predicted
    if kind == "ties":
        maps = np.round(maps * 8) / 8
    if kind == "undershoot":
        maps -= rng.random((3, 1, height, width)).astype(np.float32) * 1.5
    if kind == "close":
        maps = (0.5 + maps * 1e-6).astype(np.float32)
    return torch.from_numpy(maps)


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("policy", ["cb", "global"])
@pytest.mark.parametrize("kind", ["plain", "ties", "undershoot", "close"])
def test_thresholds_are_those_of_a_full_sort(kind, policy, reference):
    rng = np.random.default_rng(3)
    for stride, portion in product((1, 4), (0.0, 1e-6, 0.1, 0.2, 0.35, 0.5, 0.9, 1.0)):
        maps = random_maps(rng, kind)
        plan, ours = search(maps, {"portion": portion, "policy": policy, "stride": stride}, reference)
        lists = sampled_lists(maps, stride)
        assert ours.tolist() == brute_force(lists, portion, policy, reference)
        assert plan.counts.tolist() == [len(values) for values in lists]


def test_counters_of_several_processes_are_summed():
    maps = random_maps(np.random.default_rng(5), "ties")
    run = {"portion": 0.3, "policy": "cb", "stride": 4}
    _, expected = search(maps, run, reference=False)
    uppers = [UpperCounts(maps.shape[1]) for _ in range(2)]
    uppers[0].add(maps[0])
    uppers[1].add(maps[1])
    uppers[1].add(maps[2])
    uppers[0].counters += uppers[1].counters
    lowers = [LowerCounts(uppers[0].plan(portion=0.3, policy="cb")) for _ in range(2)]
    lowers[1].add(maps[0])
    lowers[1].add(maps[1])
    lowers[0].add(maps[2])
    lowers[0].counters += lowers[1].counters
    assert uppers[0].counters.dtype == lowers[0].counters.dtype == torch.int64
    assert uppers[0].counters.shape == lowers[0].counters.shape == (maps.shape[1], 65536)
    assert torch.equal(lowers[0].thresholds(), expected)


def test_keys_ascend_with_the_values():
    tiny = np.finfo(np.float32).smallest_subnormal
    values = [-3.4e38, -1.0, -1e-3, -float(tiny), -0.0, 0.0, float(tiny), 1e-3, 0.5, float(np.nextafter(1, 2)), 3.4e38]
    values = torch.tensor(values, dtype=torch.float32)
    keys = ascending_keys(values).tolist()
    assert keys == sorted(set(keys))
    assert min(keys) >= 0
    assert max(keys) < 1 << 32
    assert [value_of_key(key) for key in keys] == values.tolist()


@pytest.mark.parametrize("wrong", [math.nan, INF])
def test_confidences_that_are_no_numbers_are_refused(wrong):
    maps = EXAMPLE.clone()
    maps[0, 1, 0, 0] = wrong
    with pytest.raises(ValueError, match="not a number"):
        search(maps, {"portion": 0.5, "policy": "cb", "stride": 1})


def test_other_maps_in_the_second_pass_are_noticed():
    upper = UpperCounts(4)
    upper.add(EXAMPLE[0])
    lower = LowerCounts(upper.plan(portion=0.5, policy="cb"))
    lower.add(EXAMPLE[1] * 0.25)
    with pytest.raises(ValueError, match="second pass"):
        lower.thresholds()


def test_portions_outside_of_0_and_1():
    for portion, same in ((1.5, 1.0), (-0.5, 0.0)):
        given, expected = (search(EXAMPLE, {"portion": p, "policy": "cb", "stride": 4}, False) for p in (portion, same))
        assert torch.equal(given[1], expected[1])
        with pytest.raises(ValueError, match="portion"):
            search(EXAMPLE, {"portion": portion, "policy": "cb", "stride": 4})


def test_the_whole_portion_takes_an_artificial_zero_in_the_reference_only():
    run = {"portion": 1.0, "policy": "cb", "stride": 1}
    _, reference = search(EXAMPLE, run)
    _, clean = search(EXAMPLE, run, reference=False)
    assert reference.tolist() == [0, 0, 0, 0]
    assert all((select(P, reference).labels == IGNORE).all() for P in EXAMPLE)
    labels = torch.stack([select(P, clean).labels for P in EXAMPLE])
    assert (labels != IGNORE).all()


def test_ranks_are_rounded_down():
    sizes = np.array([5, 10, 15, 19, 0])
    assert ranks_of(sizes, portion=0.4, policy="cb", reference=False) == [2, 4, 6, 7, 0]
    assert ranks_of(sizes, portion=0.39999999999999997, policy="cb", reference=False) == [1, 3, 5, 7, 0]
    assert ranks_of(sizes, portion=0.1, policy="global", reference=False) == [4] * 5
    assert ranks_of(sizes, portion=0.01, policy="global", reference=True) == [49] * 5


# --- selection -------------------------------------------------------------------------------------------------------


def one_pixel(*confidences):
    return torch.tensor(confidences).reshape(-1, 1, 1)


def test_selection():
    thresholds = torch.tensor([0.8, 0.4, 0.2])
    below = float(np.nextafter(np.float32(0.8), np.float32(0)))
    for confidences, label, reweighted in [
        ((0.8, 0.1, 0.0), 0, 0),  # at the threshold
        ((below, 0.1, 0.0), IGNORE, 0),
        ((0.6, 0.1, 0.3), 2, 2),  # not the class of the largest confidence
        ((0.4, 0.2, 0.1), IGNORE, 0),  # equal ratios: the lowest class
        ((0.0, 0.8, 0.4), 1, 1),
        ((1.6, 0.8, 0.4), 0, 0),
    ]:
        selection = select(one_pixel(*confidences), thresholds)
        assert (int(selection.labels), int(selection.reweighted)) == (label, reweighted)
        assert selection.labels.dtype == selection.reweighted.dtype == torch.uint8


def test_a_class_without_a_threshold_is_never_selected_by_a_value_above_1():
    overshoot = one_pixel(1.001, -0.001)
    assert int(select(overshoot, torch.tensor([0.0, 0.5])).labels) == 0  # the reference's 0 becomes 1
    assert int(select(overshoot, torch.tensor([INF, 0.5])).labels) == IGNORE
    assert int(select(overshoot, torch.tensor([INF, INF])).labels) == IGNORE


def test_the_ratio_of_1_is_that_of_float32_numbers():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.random((1, 300, 1)).astype(np.float32))
    for threshold in values.flatten()[:40]:
        labels = select(values, threshold.reshape(1)).labels
        assert torch.equal(labels == 0, (values >= threshold)[0])


def test_prior_is_a_factor():
    prior = torch.rand(4, 2, 6, dtype=torch.float64)
    ours = with_prior(EXAMPLE[0], prior)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, prior.float() * EXAMPLE[0])
    assert with_prior(ours, None) is ours
    assert predicted(EXAMPLE[0]).flatten().tolist() == [0] * 9 + [1, 1, 1]
    with pytest.raises(ValueError, match="prior is"):
        with_prior(EXAMPLE[0], prior[:, :1])


# --- confidence maps -------------------------------------------------------------------------------------------------

def test_the_filter_follows_from_the_sizes():
    for target, kind in {
        (9, 9): Filter.LANCZOS, (11, 11): Filter.BICUBIC, (9, 11): Filter.BILINEAR, (11, 9): Filter.BILINEAR,
        (10, 11): Filter.BILINEAR, (9, 10): Filter.BILINEAR,
    }.items():  # fmt: skip
        assert filter_of_sizes((10, 10), target) == kind
    pixels = np.random.default_rng(2).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    assert resize_by_rule(pixels, (10, 12)) is pixels
    expected = Image.fromarray(pixels).resize((10, 8), Filter.LANCZOS)
    np.testing.assert_array_equal(resize_by_rule(pixels, (8, 10)), expected)


@pytest.mark.parametrize("stride", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [(20, 33), (47, 61), (31, 50), (30, 50)], ids=str)
def test_upsampling_is_that_of_pillow(stride, size):
    used = (31, 50)
    height, width = padded_size(used, stride)
    maps = torch.rand(3, height // stride, width // stride).softmax(0)
    ours = upsample(maps, stride=stride, used=used, size=size)
    for P, source in zip(ours.numpy(), maps.numpy(), strict=True):
        image = Image.fromarray(source).resize((width, height), Filter.BICUBIC).crop((0, 0, *used[::-1]))
        expected = image if used == size else image.resize(size[::-1], filter_of_sizes(used, size))
        np.testing.assert_allclose(P, np.array(expected), rtol=0, atol=1e-6)


def test_sizes_of_the_network_input():
    assert input_size((1024, 2048), 1850) == (925, 1850)
    assert padded_size((925, 1850), 8) == (928, 1856)
    assert input_size((2048, 1024), 1850) == (1850, 925)
    assert input_size((1052, 1914), None) == (1052, 1914)
    assert input_size((30, 30), 20) == (20, 20)
    # Halves go to the even number: 2.5 and 3.5.
    assert input_size((5, 20), 10) == (2, 10)
    assert input_size((7, 20), 10) == (4, 10)


def test_the_padding_is_that_of_the_normalised_image():
    pixels = np.zeros((5, 7, 3), np.uint8)
    ours = network_input(pixels, longer_side=None, stride=4, normalise=NetworkInput(mean=(9.0,) * 3, std=(2.0,) * 3))
    assert ours.shape == (3, 8, 8)
    assert (ours[:, :5, :7] == -4.5).all()
    assert ours.abs().sum() == 3 * 5 * 7 * 4.5


def test_a_net_that_sees_no_mirror_gives_a_map_that_can_be_mirrored():
    pixels = np.random.default_rng(4).integers(0, 256, (16, 24, 3), dtype=np.uint8)

    def net(image):
        return torch.nn.functional.avg_pool2d(image, 4).softmax(1)

    reading = {"longer_side": None, "stride": 4, "normalise": NetworkInput(mean=(128.0,) * 3, std=(64.0,) * 3)}
    straight = confidence_map(net, pixels, **reading)
    mirrored = confidence_map(net, np.ascontiguousarray(pixels[:, ::-1]), **reading)
    torch.testing.assert_close(mirrored.flip(-1), straight, rtol=0, atol=1e-6)
    maps = torch.rand(2, 3, 4)
    assert torch.equal(flip_average(maps, maps.flip(-1)), maps)
