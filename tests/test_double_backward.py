"""The discriminator's blocks for the gradient penalty: PyTorch's gradients in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.meters import Meter
from benchmarks.training_step import Variant, count_step
from core.config import ProCSTConfig
from core.double_backward import RECOMPUTES, has_double_backward
from core.losses import gradient_penalty
from core.networks import Discriminator
from steps import build
from training.synchronised_norm import synchronise_batch_norms

NORMS = ("group", "batch")


def strong_discriminator(norm, channels=16):
    """One whose gradients are not tiny, with norms whose weights and biases are no ones and zeros."""
    net = build(Discriminator, 2, 2, channels, norm, seed=3).double().train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.mul_(3) if "conv" in name else parameter.add_(torch.randn_like(parameter) / 3)
    return net


def penalty_and_gradients(net, differentiable_twice, size=(3, 20, 24)):
    generator = torch.Generator().manual_seed(1)
    real, fake = (torch.rand(size[0], 3, *size[1:], generator=generator).double() * 2 - 1 for _ in range(2))
    penalty = gradient_penalty(lambda x: net(x, differentiable_twice), real, fake, torch.tensor(0.4))
    weights = dict(net.named_parameters())
    gradients = torch.autograd.grad(penalty, weights.values(), allow_unused=True)
    return {"penalty": penalty.detach()} | dict(zip(weights, gradients, strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_autograd(norm, recompute, monkeypatch):
    monkeypatch.setitem(RECOMPUTES, "cpu", recompute)
    net = strong_discriminator(norm)
    plain, ours = (penalty_and_gradients(copy.deepcopy(net), flag) for flag in (False, True))
    assert plain["penalty"] > 0.01
    for name, value in plain.items():
        if value is None or not value.any():  # the bias of the score
            assert ours[name] is None or not ours[name].any(), name
        elif norm == "batch" and name.endswith("conv.bias"):  # the next block's batch norm takes it away again
            assert float(ours[name].abs().max()) < 1e-12
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_running_statistics_see_the_batch_once():
    plain, ours = (strong_discriminator("batch") for _ in range(2))
    penalty_and_gradients(plain, False)
    penalty_and_gradients(ours, True)
    before = dict(strong_discriminator("batch").named_buffers())
    for name, value in plain.named_buffers():
        assert not torch.equal(value, before[name]), name
        assert torch.equal(dict(ours.named_buffers())[name], value), name


@pytest.mark.parametrize("norm", NORMS)
def test_a_plain_backward_gives_gradients_to_everything(norm):
    """Of the image it is the same tensor as without a double backward, and so are those of the weights."""
    found = []
    for flag in (False, True):
        net = strong_discriminator(norm)
        image = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(1)).double().requires_grad_(True)
        net(image, flag).square().sum().backward()
        found.append({"image": image.grad} | {name: p.grad for name, p in net.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_gradients_to_weights_are_not_given_half():
    """Asked for with `create_graph`, which only the image's knows, they fail instead of being left out."""
    net = strong_discriminator("group")
    image = torch.rand(2, 3, 20, 24).double().requires_grad_(True)
    with pytest.raises(RuntimeError, match="to not have been used"):
        torch.autograd.grad(net(image, True).sum(), [image, net.body[0].conv.weight], create_graph=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_is_walked_back_once(recompute, monkeypatch):
    """What the first walk has overwritten is not taken for what it was."""
    monkeypatch.setitem(RECOMPUTES, "cpu", recompute)
    net = strong_discriminator("group")
    image = torch.rand(2, 3, 20, 24).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(image, True).sum(), image, create_graph=True)
    loss = gradient.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_to_the_image_must_stay_as_it_is():
    net = strong_discriminator("batch")
    image = torch.rand(2, 3, 20, 24).double().requires_grad_(True)
    (gradient,) = torch.autograd.grad(net(image, True).sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient.mul_(2).square().sum().backward()


def test_other_norms_are_left_to_autograd():
    x = torch.rand(2, 8, 4, 4)
    synchronised = synchronise_batch_norms(nn.Sequential(nn.BatchNorm2d(8)))[0]
    assert type(synchronised) is not nn.BatchNorm2d
    assert has_double_backward(nn.BatchNorm2d(8), x)
    assert not has_double_backward(synchronised, x)
    assert not has_double_backward(nn.BatchNorm2d(8).eval(), x)
    with torch.no_grad():
        assert not has_double_backward(nn.BatchNorm2d(8), x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not has_double_backward(nn.BatchNorm2d(8), x)


def test_the_meter_counts_what_is_read_and_written():
    a, b, out = torch.ones(3, 10).unbind()
    backward = torch.ops.aten.leaky_relu_backward.grad_input
    for moved, operator in (
        (120, lambda: a + b),
        (120, lambda: torch.sub(a, b, out=out)),
        (120, lambda: backward(a, b, 0.2, True, grad_input=a)),
        (80, lambda: torch.split_copy(a, 5, out=(out[:5], out[5:]))),
        (80, lambda: a.relu_()),
        (0, lambda: a.view(2, 5)),
        (0, lambda: torch.empty(10)),
    ):
        with Meter() as meter:
            operator()
        assert (meter.moved, meter.operators) == (moved, int(moved > 0))


@pytest.mark.parametrize("norm", NORMS)
def test_the_penalty_takes_less_memory(norm, monkeypatch):
    monkeypatch.setitem(RECOMPUTES, "cpu", True)
    peaks = []
    for flag in (False, True):
        net = strong_discriminator(norm, channels=32)
        with Meter() as meter:
            penalty_and_gradients(net, flag, size=(4, 40, 48))
        peaks.append(meter.peak)
    assert peaks[1] < 0.6 * peaks[0]


@pytest.mark.slow
def test_a_step_takes_half_of_the_literal_steps_memory():
    """At the published setting's scale 0, whose batch norm needs the whole batch at once, as a GPU computes it."""
    config = ProCSTConfig.from_flags({"vgg_weights": "random", "no_semseg": True})
    assert config.network.shape(0).norm == "batch"
    literal, ours = (count_step(config, 0, Variant(name, "fp32")).peak for name in ("literal", "fp32"))
    assert ours < 0.5 * literal
