"""One whole training step at every scale, in float64, against the published method's reference numbers.

Every `step_*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it); all sizes come from the file's
`meta`. The tolerances are those published with the numbers, for any CPU, thread count and memory layout.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from benchmarks.literal_step import collect_gradients, literal_step
from conftest import GOLDEN_DIR
from core.cascade import translate_pyramid
from steps import GOLDEN_FILES, GoldenStep, is_batch_norm, meta_of, training_step


def test_golden_folder_holds_step_files():
    assert GOLDEN_FILES, f"no step_*.npz in {GOLDEN_DIR}"


def with_all_gradients(**arguments):
    """The yardstick, in which frozen networks collect gradients that nobody uses."""
    nets = arguments["segmentation"]
    collect_gradients(arguments["perceptual"], *([nets.seg_source] if nets else []))
    return literal_step(**arguments)


WAYS = {
    "plain": {},
    "recompute": {"recompute": True},
    "micro_batch": {"micro_batch": 1},
    "micro_batch_recompute": {"micro_batch": 1, "recompute": True},
    "literal": {"step": with_all_gradients},
}
CASES = [
    (path, scale, way)
    for way in WAYS
    for path in GOLDEN_FILES
    for scale in meta_of(path)["scales"]
    # Batch norm mixes the samples of a batch, so it is not taken in micro-batches.
    if not (way.startswith("micro_batch") and is_batch_norm(path))
]


@cache
def golden_step(path, scale, way):
    step = GoldenStep(path, scale)
    step.take(**WAYS[way])
    step.way = way
    return step


@pytest.fixture(params=CASES, ids=[f"{path.stem}-scale{scale}-{way}" for path, scale, way in CASES])
def golden(request):
    return golden_step(*request.param)


@pytest.mark.parametrize("path", GOLDEN_FILES, ids=lambda path: path.stem)
def test_pyramids_are_exact(path):
    for scale in meta_of(path)["scales"]:
        step = GoldenStep(path, scale)
        for domain in ("source", "target"):
            for i, level in enumerate(step.pyramid(domain)):
                np.testing.assert_array_equal(level.numpy(), step.data[f"{step.prefix}{domain}_pyramid_{i}"])


def test_optimizer_order(golden):
    golden.check_order()


def test_losses(golden):
    golden.check_losses()


def test_gradients(golden):
    golden.check_gradients()


def test_weights_after_the_step(golden):
    golden.check_weights()


def test_images(golden):
    golden.check_images()


def test_translation_in_eval_mode(golden):
    if golden.meta["images_per_gpu"] >= 16:
        pytest.skip("running statistics depend on how many forwards are made, which is no part of the method")
    generators = [*golden.scale_networks.lower_Gst, golden.nets["Gst"].eval()]
    with torch.no_grad():
        sit = translate_pyramid(generators, golden.batch.source, golden.scale_factor)
    golden.nets["Gst"].train()
    expected = torch.from_numpy(golden.data[f"{golden.prefix}sit_eval"])
    torch.testing.assert_close(sit, expected, rtol=0, atol=1e-11)


def test_frozen_networks_take_no_gradients_and_do_not_change(golden):
    if golden.way == "literal":
        pytest.skip("the yardstick lets them collect gradients")
    trained = {*golden.nets, "semseg_cs"}
    for net_name, net in golden.all_networks().items():
        if net_name in trained:
            continue
        assert len(list(net.parameters())) > 0
        for name, parameter in net.named_parameters():
            assert parameter.grad is None, f"{net_name} {name}"
            assert not parameter.requires_grad
        if net_name != "perceptual":
            for name, value in golden.tensors(f"init/{net_name}").items():
                assert torch.equal(net.state_dict()[name], value.to(net.state_dict()[name].dtype)), f"{net_name} {name}"


BATCH_NORM = [(path, scale) for path in GOLDEN_FILES if is_batch_norm(path) for scale in meta_of(path)["scales"]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("path", "scale"), BATCH_NORM, ids=[f"{path.stem}-scale{scale}" for path, scale in BATCH_NORM])
def test_running_statistics_are_those_of_the_four_forwards_of_the_reference(path, scale, recompute):
    """The yardstick makes all forwards of the reference, in its order, where the step makes two of them."""
    ours, literal = GoldenStep(path, scale), GoldenStep(path, scale)
    ours.take(training_step, recompute=recompute)
    literal.take(literal_step)
    for net_name, net in ours.nets.items():
        before, expected = ours.tensors(f"init/{net_name}"), dict(literal.nets[net_name].named_buffers())
        for name, value in net.named_buffers():
            if not name.endswith("num_batches_tracked"):
                assert not torch.equal(value, before[name])
                torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=f"{net_name} {name}")
