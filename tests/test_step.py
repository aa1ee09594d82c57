"""Properties of the step and its parts that the reference numbers do not cover."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from core.batches import penalty_alphas
from torch import nn

from core.cascade import cascade, generated_pyramid
from core.config import LossConfig
from core.losses import gradient_penalty, gram_matrix, total_variation
from core.networks import Discriminator, Generator, NetworkShape, freeze, init_weights, layers_at_scale, published_norm
from core.step import Batch, LabelNetworks, ScaleNetworks, ScaleOptimizers, training_step
from data_handlers.images import normalise
from data_handlers.pyramid import image_pyramid, level_size
from models.losses import cross_entropy
from models.shapes import VGG16_CONVS
from models.vgg import VGGFeatures, build_vgg
from worlds import noise_image

LOSSES = LossConfig(content_layers=(6,), style_layers=(3, 6))
CLASSES = 5


def build(kind, scale, num_scales, channels, norm, seed):
    shape = NetworkShape(scale, channels, layers_at_scale(scale, num_scales, 5), norm)
    network = kind(shape)
    init_weights(network, torch.Generator().manual_seed(seed))
    return network


class Step:
    """Random networks and data at one scale."""

    def __init__(self, scale=2, num_scales=2, size=(40, 32), channels=8, norm="group", labels=False):
        kinds = {"Dst": Discriminator, "Gst": Generator, "Dts": Discriminator, "Gts": Generator}
        self.nets = {
            name: build(kind, scale, num_scales, channels, norm, seed).train()
            for seed, (name, kind) in enumerate(kinds.items())
        }
        lower = {
            f"lower_{name}": [
                freeze(build(Generator, k, num_scales, channels, norm, 10 * k + len(name))) for k in range(scale)
            ]
            for name in ("Gst", "Gts")
        }
        self.scale_networks = ScaleNetworks(**self.nets, **lower)
        self.optimizers = ScaleOptimizers(
            **{name: torch.optim.Adam(net.parameters(), lr=1e-3) for name, net in self.nets.items()}
        )
        convs = {index: (min(i, 4) if i != 3 else 3, min(o, 4)) for index, (i, o) in VGG16_CONVS.items()}
        torch.manual_seed(0)
        self.perceptual = VGGFeatures(convs, (3, 6))
        pyramids = []
        for seed in (1, 2):
            levels = zip(
                *(image_pyramid(noise_image(size, seed + 10 * b), num_scales, 0.5, scale) for b in range(2)),
                strict=True,
            )
            pyramids.append([normalise(torch.from_numpy(np.stack(level))).permute(0, 3, 1, 2) for level in levels])
        height, width = pyramids[0][-1].shape[-2:]
        label = torch.from_numpy(np.random.default_rng(3).integers(0, CLASSES, (2, height, width), dtype=np.uint8))
        self.batch = Batch(pyramids[0], pyramids[1], torch.tensor([0.3, 0.6]), label if labels else None)
        self.labels = None
        if labels:
            target_net = nn.Conv2d(3, CLASSES, 3, padding=1)
            sgd = torch.optim.SGD(target_net.parameters(), lr=1e-2)
            self.labels = LabelNetworks(freeze(nn.Conv2d(3, CLASSES, 3, padding=1)), target_net, sgd)

    def run(self, **changes):
        labels = changes.pop("labels", self.labels)
        return training_step(
            self.scale_networks, self.optimizers, self.perceptual, self.batch, LOSSES, 0.5, labels, **changes
        )


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def test_network_sizes_of_the_published_pyramid():
    # Parameter counts of the reference: generators 115k/191k/191k, discriminators 114k/188k/188k.
    for scale, (generator, discriminator) in enumerate(((115, 114), (191, 188), (191, 188))):
        shape = NetworkShape(scale, 64, layers_at_scale(scale, 2, 5), "group")
        assert round(sum(p.numel() for p in Generator(shape).parameters()) / 1000) == generator
        assert round(sum(p.numel() for p in Discriminator(shape).parameters()) / 1000) == discriminator


def test_the_published_norm_rule():
    assert [published_norm(images) for images in (32, 16, 15, 3)] == ["batch", "batch", "group", "group"]
    batch = Generator(NetworkShape(1, 64, 7, "batch"))
    assert isinstance(batch.head.norm, nn.BatchNorm2d)
    assert batch.head.norm.num_features == 6
    group = Generator(NetworkShape(1, 64, 7, "group"))
    assert group.head.norm is None
    assert group.body.block1.norm.num_groups == 8
    assert Generator(NetworkShape(1, 12, 7, "group")).body.block1.norm is None


def test_initial_weights():
    network = build(Generator, 1, 2, 64, "group", seed=0)
    convs = torch.cat([m.weight.detach().flatten() for m in network.modules() if isinstance(m, nn.Conv2d)])
    assert float(convs.mean()) == pytest.approx(0, abs=1e-3)
    assert float(convs.std()) == pytest.approx(0.02, rel=0.02)
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert float(torch.cat([m.weight.detach() for m in norms]).mean()) == pytest.approx(1, abs=5e-3)
    assert all(float(m.bias.detach().abs().max()) == 0 for m in norms)
    assert torch.equal(weights(network), weights(build(Generator, 1, 2, 64, "group", seed=0)))


def test_level_sizes_round_up():
    assert level_size((1914, 1052), 2, 0.5) == (479, 263)
    assert level_size((161, 90), 1, 0.5) == (81, 45)
    sizes = [tuple(level.shape[-2:]) for level in generated_pyramid(torch.zeros(1, 3, 45, 81), 2, 0.5)]
    assert sizes == [(12, 21), (23, 41), (45, 81)]


def test_normalisation_is_that_of_the_method():
    assert normalise(torch.tensor([0, 128, 255], dtype=torch.uint8)).tolist() == [-1.0, 0.0, 127 / 128]


@pytest.mark.parametrize("channels", [8, 12])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_odd_sizes_and_four_scales(channels, norm):
    for scale in range(4):
        step = Step(scale=scale, num_scales=3, size=(83, 69), channels=channels, norm=norm)
        before = {name: weights(net) for name, net in step.nets.items()}
        result = step.run()
        assert all(torch.isfinite(value) for value in result.losses.values())
        assert all(image.shape == step.batch.source[-1].shape for image in result.images.values())
        assert all(not torch.equal(before[name], weights(net)) for name, net in step.nets.items())


def test_the_cascade_takes_no_gradient_and_starts_with_nothing():
    step = Step(scale=2)
    assert cascade([], step.batch.source, 0.5) is None
    coarser = cascade(step.scale_networks.lower_Gst, step.batch.source, 0.5)
    assert coarser.shape == step.batch.source[-1].shape
    assert not coarser.requires_grad


def test_gradient_penalty_against_finite_differences():
    torch.manual_seed(0)
    discriminator = build(Discriminator, 0, 2, 8, "group", 0).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.mul_(5)
    real, fake = torch.rand(2, 3, 9, 8).double(), torch.rand(2, 3, 9, 8).double()
    alpha = torch.tensor(0.3).double()
    penalty = gradient_penalty(discriminator, real, fake, alpha)
    x, step = 0.3 * real + 0.7 * fake, 1e-6
    slopes = torch.zeros_like(x)
    with torch.no_grad():
        for index in np.ndindex(*x.shape):
            up, down = x.clone(), x.clone()
            up[index] += step
            down[index] -= step
            slopes[index] = (discriminator(up).sum() - discriminator(down).sum()) / (2 * step)
    expected = ((slopes.square().sum(1).sqrt() - 1) ** 2).mean()
    assert float(penalty.detach()) == pytest.approx(float(expected), rel=1e-5)
    penalty.backward()
    convs = [m.weight.grad for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert all(float(gradient.abs().sum()) > 0 for gradient in convs)


def test_losses_by_hand():
    x = torch.tensor([[[[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]]]])
    assert float(total_variation(x)) == pytest.approx((1 + 2 + 0 + 0) / 4 + (2 + 1 + 1) / 3)
    features = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    assert gram_matrix(features)[0].tolist() == [[2.5, 5.5], [5.5, 12.5]]
    logits = torch.tensor([[[[2.0, 0.0, 9.0]], [[0.0, 0.0, 0.0]]]])
    label = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    expected = (np.log(1 + np.exp(-2.0)) + np.log(2.0)) / 2
    assert float(cross_entropy(logits, label)) == pytest.approx(expected, rel=1e-6)


def test_warm_up_leaves_out_the_label_loss_and_gst_s_second_step():
    warm, full, without = (Step(labels=True) for _ in range(3))
    warm_result, full_result, _ = warm.run(warmup=True), full.run(), without.run(labels=None)
    assert "Cyclic/SourceLabelLoss" not in warm_result.losses
    assert "Cyclic/SourceLabelLoss" in full_result.losses
    assert "Semseg/SemsegLoss" in warm_result.losses
    for name in warm.nets:
        assert torch.equal(weights(warm.nets[name]), weights(without.nets[name])), name
    assert not torch.equal(weights(full.nets["Gst"]), weights(without.nets["Gst"]))
    untouched = copy.deepcopy(Step(labels=True).labels.source_net)
    for step in (warm, full):
        assert torch.equal(weights(step.labels.source_net), weights(untouched))
        assert all(parameter.grad is None for parameter in step.labels.source_net.parameters())
    steps = [step.optimizers.Gst.state[next(iter(step.nets["Gst"].parameters()))]["step"] for step in (warm, full)]
    assert [int(count) for count in steps] == [1, 2]


def test_all_four_networks_can_train_again_after_a_step():
    step = Step(labels=True)
    step.run()
    for net in step.nets.values():
        assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in step.perceptual.parameters())


def test_alphas_depend_on_seed_scale_and_step_alone():
    alphas = {key: penalty_alphas(*key).tolist() for key in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))}
    assert len({tuple(values) for values in alphas.values()}) == 4
    assert all(0 <= value <= 1 for values in alphas.values() for value in values)
    assert penalty_alphas(1, 0, 0).tolist() == alphas[1, 0, 0]


def test_random_vgg_is_seeded_and_keeps_the_scale_of_activations():
    image = normalise(torch.from_numpy(np.array(noise_image((64, 48), 0)))).permute(2, 0, 1)[None]
    first, again, other = (build_vgg("random", (3, 15), seed)(image) for seed in (1, 1, 2))
    assert torch.equal(first[15], again[15])
    assert not torch.equal(first[15], other[15])
    assert 0.05 < float(first[15].std() / first[3].std()) < 20
    assert first[15].shape == (1, 256, 12, 16)
