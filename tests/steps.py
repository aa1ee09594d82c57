"""Training steps for the tests: on the reference's numbers, and on random networks and images."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from conftest import GOLDEN_DIR
from core.config import LossConfig, NetworkShape, layers_at_scale, published_norm
from core.networks import Discriminator, Generator, freeze, init_weights
from core.step import Batch, ScaleNetworks, SegmentationNets, TrainingStep
from data_handlers.images import PROCST_INPUT, image_pyramid
from models.segmentation import HEAD_RATE, parameter_groups
from models.vgg import VGG16_CONVS, VGGFeatures, vgg_from_state_dict
from worlds import noise_image

GOLDEN_FILES = sorted(GOLDEN_DIR.glob("step_*.npz"))
IMAGE_NAMES = {
    "source": "source",
    "source_in_traget": "SiT",
    "source_in_traget_in_source": "SiTiS",
    "target": "target",
    "target_in_source": "TiS",
    "target_in_source_in_target": "TiSiT",
}
KINDS = {"Dst": Discriminator, "Gst": Generator, "Dts": Discriminator, "Gts": Generator}


def meta_of(path):
    return json.loads(str(np.load(path)["meta"]))


def is_batch_norm(path):
    return published_norm(meta_of(path)["images_per_gpu"]) == "batch"


def relative_l2(ours, theirs):
    scale = theirs.double().norm()
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def zero_gradient_biases(net):
    """Names of biases whose true gradient is zero: those of a convolution right before a norm that takes out the mean
    of each channel. Both sides hold rounding noise for them."""
    blocks = [("head", net.head), *((f"body.{n}", m) for n, m in net.body.named_children()), ("tail.0", net.tail[0])]
    names = set()
    for (name, block), (_, following) in pairwise(blocks):
        norm = following.norm
        per_channel = isinstance(norm, nn.BatchNorm2d) or (norm is not None and norm.num_groups == norm.num_channels)
        if block.norm is not None and per_channel:
            names.add(f"{name}.conv.bias")
    return names


class StandInSegmentation(nn.Module):
    """The reference numbers' stand-in: conv 3x3, ReLU, conv 1x1."""

    def __init__(self, state):
        super().__init__()
        hidden, channels = state["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, state["conv2.weight"].shape[0], 1)
        self.load_state_dict(state)
        self.network_input = PROCST_INPUT

    @property
    def backbone(self):
        return self.conv1

    @property
    def head(self):
        return self.conv2

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x)))


def training_step(**arguments):
    """Takes the arguments of the yardstick, `literal_step`."""
    return TrainingStep(**arguments).take()


class RecordedStep:
    """Networks and a batch whose step records the gradients that every optimiser sees.

    `order` holds `NAME#K` for the K-th step of an optimiser, `gradients` the gradients of that step by parameter.
    """

    def record(self):
        self.order, self.gradients = [], {}
        watched = {name: (self.optimizers[name], net) for name, net in self.nets.items()}
        if self.segmentation:
            watched["semseg"] = (self.segmentation.optimizer, self.segmentation.seg_sit)
        for name, (optimizer, net) in watched.items():
            optimizer.register_step_pre_hook(self._recorder(name, net))

    def _recorder(self, name, net):
        def record(optimizer, args, kwargs):
            count = sum(step.startswith(f"{name}#") for step in self.order) + 1
            self.order.append(f"{name}#{count}")
            self.gradients[f"{name}#{count}"] = {
                key: parameter.grad.clone() for key, parameter in net.named_parameters() if parameter.grad is not None
            }

        return record

    def all_networks(self):
        """By name; the frozen ones are those that are not in `nets`, but for seg_sit."""
        found = {"perceptual": self.perceptual, **self.nets}
        for name in ("Gst", "Gts"):
            lower = getattr(self.scale_networks, f"lower_{name}")
            found |= {f"{name}_frozen{k}": net for k, net in enumerate(lower)}
        if self.segmentation:
            found |= {"semseg_source": self.segmentation.seg_source, "semseg_cs": self.segmentation.seg_sit}
        return found

    def take(self, step=training_step, **changes):
        """Take the step once and return its result; `changes` replace arguments."""
        arguments = {
            "nets": self.scale_networks, "optimizers": self.optimizers, "perceptual": self.perceptual,
            "batch": self.batch, "loss": self.loss, "scale_factor": self.scale_factor,
            "segmentation": self.segmentation,
        }  # fmt: skip
        self.result = step(**arguments | changes)
        return self.result


class GoldenStep(RecordedStep):
    """The networks and the batch of a reference file at one scale."""

    def __init__(self, path, scale, dtype=torch.float64):
        self.data, self.meta = np.load(path), meta_of(path)
        self.scale, self.prefix = scale, f"s{scale}/"
        self.scale_factor = self.meta["scale_factor"]
        fields = {name: self.meta[name] for name in LossConfig.__dataclass_fields__ if name != "vgg_weights"}
        self.loss = LossConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        self.nets = {name: self.network(kind, name, scale).train() for name, kind in KINDS.items()}
        lower = {
            f"lower_{name}": [freeze(self.network(Generator, f"{name}_frozen{k}", k)) for k in range(scale)]
            for name in ("Gst", "Gts")
        }
        self.scale_networks = ScaleNetworks(**self.nets, **lower)
        self.perceptual = vgg_from_state_dict(self.tensors("vgg"), self.loss.perceptual_layers, "the golden file")
        self.segmentation = self.segmentation_nets()
        for net in self.all_networks().values():
            net.to(dtype)
        self.optimizers = {name: self.adam(name, net) for name, net in self.nets.items()}
        label = torch.from_numpy(self.data[f"{self.prefix}label"]) if self.segmentation else None
        self.batch = Batch(
            [level.to(dtype) for level in self.pyramid("source")],
            [level.to(dtype) for level in self.pyramid("target")],
            torch.from_numpy(self.data[f"{self.prefix}alphas"]).to(dtype),
            label,
        )
        self.record()

    def tensors(self, group):
        start = f"{self.prefix}{group}/"
        keys = [key for key in self.data.files if key.startswith(start)]
        return {key[len(start) :]: torch.from_numpy(np.array(self.data[key])) for key in keys}

    def network(self, kind, name, scale):
        meta = self.meta
        shape = NetworkShape(
            scale=scale,
            channels=meta["base_channels"],
            layers=layers_at_scale(scale, meta["num_scales"], meta["body_layers"]),
            norm=published_norm(meta["images_per_gpu"]),
            groups=meta["groups_num"],
        )
        network = kind(shape)
        network.load_state_dict(self.tensors(f"init/{name}"))
        return network

    def pyramid(self, domain):
        """Levels 0..scale, float32 (B,3,h,w), from the base images."""
        meta, levels = self.meta, []
        for b in range(meta["batch"]):
            pixels = self.data[f"{self.prefix}{domain}_rgb_{b}"]
            levels.append(image_pyramid(pixels, meta["num_scales"], meta["scale_factor"], self.scale))
        stacked = [torch.from_numpy(np.stack(level)) for level in zip(*levels, strict=True)]
        return [PROCST_INPUT(level) for level in stacked]

    def segmentation_nets(self):
        meta = self.meta
        if meta["no_semseg"] or self.scale != meta["num_scales"]:
            return None
        assert meta["semseg_classifier_lr_factor"] == HEAD_RATE
        seg_source, seg_sit = (StandInSegmentation(self.tensors(f"init/semseg_{name}")) for name in ("source", "cs"))
        groups = parameter_groups(seg_sit, meta["lr_semseg"])
        sgd = torch.optim.SGD(groups, momentum=meta["momentum"], weight_decay=meta["weight_decay"], fused=True)
        return SegmentationNets(freeze(seg_source), seg_sit, sgd)

    def adam(self, name, net):
        rate = self.meta["lr_d" if name.startswith("D") else "lr_g"]
        return torch.optim.Adam(net.parameters(), lr=rate, betas=(self.meta["beta1"], 0.999), fused=True)

    def expected_steps(self):
        """(our name, the reference's name) of every optimiser step, in order.

        The reference's second SGD of Q, `semseg#1`, never has a gradient and is left out.
        """
        names, counts = [], {}
        for step in map(str, self.data[f"{self.prefix}optimizer_order"]):
            if step != "semseg#1":
                name = step.split("#")[0]
                counts[name] = counts.get(name, 0) + 1
                names.append((f"{name}#{counts[name]}", step))
        return names

    # Checks against the reference, with the tolerances of golden/README.md for any CPU, thread count and layout.

    def check_order(self):
        assert self.order == [ours for ours, _ in self.expected_steps()]

    def check_losses(self):
        expected, losses = self.tensors("loss"), self.result.losses
        ours = {name if name.startswith("Semseg/") else f"Scale{self.scale}/{name}": losses[name] for name in losses}
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            assert ours[name].dtype == torch.float64, name
            assert float(ours[name]) == pytest.approx(float(value), rel=1e-10), name

    def check_gradients(self):
        for ours, theirs in self.expected_steps():
            expected = self.tensors(f"grad/{theirs}")
            assert expected
            assert self.gradients[ours].keys() == expected.keys()
            net = self.nets.get(ours.split("#")[0])
            noise = zero_gradient_biases(net) if net else set()
            whole = float(torch.cat([gradient.flatten() for gradient in expected.values()]).norm())
            for name, value in expected.items():
                gradient = self.gradients[ours][name]
                if name in noise:
                    assert float(gradient.norm()) < 1e-12 * whole, f"{theirs} {name}"
                else:
                    assert relative_l2(gradient, value) < 1e-10, f"{theirs} {name}"

    def check_weights(self):
        trained = dict(self.nets)
        if self.segmentation:
            trained["semseg_cs"] = self.segmentation.seg_sit
        for net_name, net in trained.items():
            expected, before = self.tensors(f"after/{net_name}"), self.tensors(f"init/{net_name}")
            noise = zero_gradient_biases(net) if net_name in self.nets else set()
            for name, parameter in net.named_parameters():
                after = parameter.detach()
                torch.testing.assert_close(after, expected[name], rtol=0, atol=1e-8, msg=f"{net_name} {name}")
                if name not in noise:
                    assert relative_l2(after - before[name], expected[name] - before[name]) < 1e-8, f"{net_name} {name}"

    def check_images(self):
        for theirs, ours in IMAGE_NAMES.items():
            image = ((self.result.images[ours][0] + 1.0) / 2.0).clamp(0.0, 1.0)
            expected = torch.from_numpy(self.data[f"{self.prefix}image/{theirs}"])
            torch.testing.assert_close(image, expected, rtol=0, atol=1e-11)


def check_same(ours, theirs):
    """Same losses, images and gradients of two steps in float64."""
    assert ours.order == theirs.order
    assert ours.result.losses.keys() == theirs.result.losses.keys()
    for name, value in theirs.result.losses.items():
        assert ours.result.losses[name].dtype == torch.float64, name
        assert float(ours.result.losses[name]) == pytest.approx(float(value), rel=1e-11), name
    for name, image in theirs.result.images.items():
        torch.testing.assert_close(ours.result.images[name], image, rtol=0, atol=1e-11)
    for step, gradients in theirs.gradients.items():
        net = ours.nets.get(step.split("#")[0])
        assert ours.gradients[step].keys() == gradients.keys()
        for name in gradients.keys() - (zero_gradient_biases(net) if net else set()):
            assert relative_l2(ours.gradients[step][name], gradients[name]) < 1e-9, f"{step} {name}"


LOSSES = LossConfig(content_layers=(6,), style_layers=(3, 6))
CLASSES = 5


def build(kind, scale, num_scales, channels, norm, seed):
    shape = NetworkShape(scale, channels, layers_at_scale(scale, num_scales, 5), norm)
    network = kind(shape)
    init_weights(network, torch.Generator().manual_seed(seed))
    return network


class RandomStep(RecordedStep):
    """Random networks and two random images of each domain at one scale, in float32."""

    def __init__(self, scale=2, num_scales=2, size=(40, 32), channels=8, norm="group", labels=False):
        self.loss, self.scale_factor = LOSSES, 0.5
        self.nets = {
            name: build(kind, scale, num_scales, channels, norm, seed).train()
            for seed, (name, kind) in enumerate(KINDS.items())
        }
        lower = {
            f"lower_{name}": [
                freeze(build(Generator, k, num_scales, channels, norm, 10 * k + len(name))) for k in range(scale)
            ]
            for name in ("Gst", "Gts")
        }
        self.scale_networks = ScaleNetworks(**self.nets, **lower)
        self.optimizers = {name: torch.optim.Adam(net.parameters(), lr=1e-3) for name, net in self.nets.items()}
        convs = {index: (min(i, 4) if i != 3 else 3, min(o, 4)) for index, (i, o) in VGG16_CONVS.items()}
        torch.manual_seed(0)
        self.perceptual = VGGFeatures(convs, (3, 6))
        pyramids = []
        for seed in (1, 2):
            levels = zip(
                *(image_pyramid(np.asarray(noise_image(size, seed + 10 * b)), num_scales, 0.5, scale) for b in (0, 1)),
                strict=True,
            )
            pyramids.append([PROCST_INPUT(torch.from_numpy(np.stack(level))) for level in levels])
        height, width = pyramids[0][-1].shape[-2:]
        label = torch.from_numpy(np.random.default_rng(3).integers(0, CLASSES, (2, height, width), dtype=np.uint8))
        self.batch = Batch(pyramids[0], pyramids[1], torch.tensor([0.3, 0.6]), label if labels else None)
        self.segmentation = None
        if labels:
            seg_source, seg_sit = (nn.Conv2d(3, CLASSES, 3, padding=1) for _ in range(2))
            seg_source.network_input = seg_sit.network_input = PROCST_INPUT
            sgd = torch.optim.SGD(seg_sit.parameters(), lr=1e-2)
            self.segmentation = SegmentationNets(freeze(seg_source), seg_sit, sgd)
        self.record()
