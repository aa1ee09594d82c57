"""Our step against the literal one in float64: the same sums, however the work is cut up and laid out.

The golden numbers are float32 of one memory layout. In another, a norm's sums round otherwise, and a single LeakyReLU
that changes side moves a gradient by more than their tolerance; in float64 nothing changes side.
"""

import json

import numpy as np
import pytest
import torch
from core.objectives import pieces

from benchmarks.literal_step import literal_step
from core.networks import published_norm
from core.step import Batch
from data_handlers.label_maps import IGNORE
from test_golden_steps import FILES, GoldenStep, relative_l2, zero_gradient_biases
from test_step import LOSSES, Step

CASES = [
    (path, scale, mode)
    for path in FILES
    for meta in [json.loads(str(np.load(path)["meta"]))]
    for scale in meta["scales"]
    for mode in ("plain", "channels_first", "recompute", "micro_batch")
    # Batch norm mixes samples, so a batch in pieces is another batch.
    if mode != "micro_batch" or (published_norm(meta["images_per_gpu"]) == "group" and meta["batch"] > 1)
]


class DoubleStep(GoldenStep):
    """A golden step's inputs in float64, channels first as the trainer has them."""

    def network(self, kind, name, scale):
        return super().network(kind, name, scale).double()

    def perceptual_net(self):
        return super().perceptual_net().double()

    def label_networks(self):
        networks = super().label_networks()
        if networks:
            networks.source_net.double()
            networks.target_net.double()
        return networks

    def pyramids(self, domain):
        return [level.double().contiguous() for level in super().pyramids(domain)]

    def _take_noise_from_reference(self, optimizer, args, kwargs):
        pass


@pytest.fixture(scope="module")
def literal_steps():
    return {}


@pytest.mark.parametrize(("path", "scale", "mode"), CASES, ids=[f"{p.stem}-scale{s}-{m}" for p, s, m in CASES])
def test_step_is_the_literal_one(path, scale, mode, literal_steps, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)  # what the step lifts to float32 stays as it is
    if (path, scale) not in literal_steps:
        literal_steps[path, scale] = DoubleStep(path, scale, "literal")
    theirs, ours = literal_steps[path, scale], DoubleStep(path, scale, mode)
    assert ours.order == theirs.order
    assert ours.result.losses.keys() == theirs.result.losses.keys()
    for name, value in theirs.result.losses.items():
        assert value.dtype == torch.float64
        assert float(ours.result.losses[name]) == pytest.approx(float(value), rel=1e-11), name
    for name, image in theirs.result.images.items():
        torch.testing.assert_close(ours.result.images[name], image, rtol=0, atol=1e-11)
    for step, gradients in theirs.gradients.items():
        net = ours.nets.get(step.split("#")[0])
        noise = zero_gradient_biases(net) if net else set()
        assert gradients.keys() == ours.gradients[step].keys()
        for name in gradients.keys() - noise:
            assert relative_l2(ours.gradients[step][name], gradients[name]) < 1e-9, f"{step} {name}"


BATCH_NORM = sorted({(path, scale) for path, scale, _ in CASES if "batchnorm" in path.stem})


@pytest.mark.parametrize(("path", "scale"), BATCH_NORM)
def test_recomputing_leaves_the_running_statistics_alone(path, scale, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    plain, recomputed = (DoubleStep(path, scale, mode) for mode in ("plain", "recompute"))
    for name, net in plain.nets.items():
        for key, value in net.named_buffers():
            torch.testing.assert_close(dict(recomputed.nets[name].named_buffers())[key], value, msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("batch", "micro_batch", "sizes"), [(5, None, [5]), (5, 2, [1, 2, 2]), (3, 1, [1] * 3), (4, 9, [4])]
)
def test_pieces_cover_the_batch(batch, micro_batch, sizes):
    found = pieces(batch, micro_batch)
    assert [k for piece in found for k in range(batch)[piece.samples]] == list(range(batch))
    assert [piece.weight * batch for piece in found] == pytest.approx(sizes)


class UnevenStep(Step):
    """Five samples in float64, of which one is void, one half void and none alike."""

    def __init__(self, norm):
        torch.manual_seed(0)
        super().__init__(norm=norm, labels=True)
        lower = (*self.scale_networks.lower_Gst, *self.scale_networks.lower_Gts)
        for net in (*self.nets.values(), *lower, self.perceptual, self.labels.source_net, self.labels.target_net):
            net.double()
        fade = torch.linspace(0.5, 1.0, 5, dtype=torch.float64)[:, None, None, None]

        def five(level):
            return torch.cat([level.double()] * 3)[:5] * fade

        label = torch.cat([self.batch.label] * 3)[:5].clone()
        label[0] = IGNORE
        label[1, : label.shape[1] // 2] = IGNORE
        self.batch = Batch(
            source=[five(level) for level in self.batch.source],
            target=[five(level) for level in self.batch.target],
            alphas=self.batch.alphas.double(),
            label=label,
        )
        self.gradients = []
        for name, net in self.nets.items():
            optimizer = getattr(self.optimizers, name)
            optimizer.register_step_pre_hook(lambda *_, net=net: self.gradients.append(gradients_of(net)))

    def literal(self, **changes):
        return literal_step(
            self.scale_networks, self.optimizers, self.perceptual, self.batch, LOSSES, 0.5, self.labels, **changes
        )


def gradients_of(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize(
    ("norm", "way"),
    [
        ("group", {}),
        ("group", {"recompute": True}),
        ("group", {"micro_batch": 2}),
        ("group", {"micro_batch": 2, "recompute": True}),
        ("batch", {"recompute": True}),
    ],
)
def test_uneven_pieces_sum_up_to_the_batch(norm, way, warmup, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    theirs, ours = UnevenStep(norm), UnevenStep(norm)
    expected, found = theirs.literal(warmup=warmup), ours.run(warmup=warmup, **way)
    for name, value in expected.losses.items():
        # A share of labelled pixels is a float32 number.
        assert float(found.losses[name]) == pytest.approx(float(value), rel=1e-7), name
    assert len(theirs.gradients) == len(ours.gradients) > 3
    for ours_at, theirs_at in zip(ours.gradients, theirs.gradients, strict=True):
        assert relative_l2(ours_at, theirs_at) < 1e-7
    for name, image in expected.images.items():
        torch.testing.assert_close(found.images[name], image, rtol=0, atol=1e-7)
