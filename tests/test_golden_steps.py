"""One whole training step at every scale against the published method's reference numbers.

Every `step_*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it); all sizes come from the file.
Tolerances are those of golden/README.md: losses 1e-5 relative, gradients 1e-4 relative L2 per tensor (1e-3 in the
segmentation phase), pyramids exact.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.literal_step import collect_gradients, literal_step
from conftest import GOLDEN_DIR
from core.config import LossConfig, SGDConfig
from core.execution import Execution, channels_last
from core.label_networks import segmentation_optimizer
from core.networks import Discriminator, Generator, NetworkShape, freeze, layers_at_scale, published_norm
from core.progress import tag_of
from core.cascade import to_unit_range, translate_pyramid
from data_handlers.pyramid import image_pyramid
from core.step import Batch, LabelNetworks, ScaleNetworks, ScaleOptimizers, training_step
from data_handlers.images import PROCST_INPUT
from models.segmentation import HEAD_RATE
from models.vgg import vgg_from_state_dict

# Batch norm's float32 sums differ with the number of threads that share them, by more than the tolerances once a
# LeakyReLU changes side. The reference numbers come from two threads.
torch.set_num_threads(2)

FILES = sorted(GOLDEN_DIR.glob("step_*.npz"))
IMAGE_NAMES = {
    "source": "source",
    "source_in_traget": "sit",
    "source_in_traget_in_source": "sitis",
    "target": "target",
    "target_in_source": "tis",
    "target_in_source_in_target": "tisit",
}


def test_golden_folder_holds_step_files():
    assert FILES, f"no step_*.npz in {GOLDEN_DIR}"


class StandInSegmentation(nn.Module):
    """The reference numbers' stand-in: conv 3x3, ReLU, conv 1x1."""

    def __init__(self, state):
        super().__init__()
        hidden, channels = state["conv1.weight"].shape[:2]
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, state["conv2.weight"].shape[0], 1)
        self.load_state_dict(state)

    @property
    def backbone(self):
        return self.conv1

    @property
    def head(self):
        return self.conv2

    def forward(self, x):
        return self.conv2(torch.relu(self.conv1(x)))


class GoldenStep:
    """One file at one scale, and our step run on it once."""

    def __init__(self, path, scale, mode):
        self.mode = mode
        self.data = np.load(path)
        self.meta = json.loads(str(self.data["meta"]))
        self.scale = scale
        self.prefix = f"s{scale}/"
        self.run()

    def tensors(self, group):
        start = f"{self.prefix}{group}/"
        keys = [key for key in self.data.files if key.startswith(start)]
        return {key[len(start) :]: torch.from_numpy(np.array(self.data[key])) for key in keys}

    def shape(self, scale):
        meta = self.meta
        return NetworkShape(
            scale=scale,
            channels=meta["base_channels"],
            layers=layers_at_scale(scale, meta["num_scales"], meta["body_layers"]),
            norm=published_norm(meta["images_per_gpu"]),
            groups=meta["groups_num"],
        )

    def network(self, kind, name, scale):
        network = kind(self.shape(scale))
        network.load_state_dict(self.tensors(f"init/{name}"))
        return network

    def pyramids(self, domain):
        meta, levels = self.meta, []
        for b in range(meta["batch"]):
            image = Image.fromarray(self.data[f"{self.prefix}{domain}_rgb_{b}"])
            levels.append(image_pyramid(image, meta["num_scales"], meta["scale_factor"], self.scale))
        stacked = [torch.from_numpy(np.stack(level)) for level in zip(*levels, strict=True)]
        return [PROCST_INPUT(level) for level in stacked]

    def loss_config(self):
        fields = {name: self.meta[name] for name in LossConfig.__dataclass_fields__}
        return LossConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})

    def perceptual_net(self):
        return vgg_from_state_dict(self.tensors("vgg"), self.loss_config().perceptual_layers)

    def label_networks(self):
        meta = self.meta
        if meta["no_semseg"] or self.scale != meta["num_scales"]:
            return None
        target_net = StandInSegmentation(self.tensors("init/semseg_cs"))
        assert meta["semseg_classifier_lr_factor"] == HEAD_RATE
        sgd = segmentation_optimizer(
            target_net, SGDConfig(meta["lr_semseg"], meta["weight_decay"], meta["momentum"])
        )
        return LabelNetworks(freeze(StandInSegmentation(self.tensors("init/semseg_source"))), target_net, sgd)

    def run(self):
        meta = self.meta
        lower = {
            name: [freeze(self.network(Generator, f"{name}_frozen{k}", k)) for k in range(self.scale)]
            for name in ("Gst", "Gts")
        }
        self.nets = {
            name: self.network(kind, name, self.scale).train()
            for name, kind in (("Dst", Discriminator), ("Gst", Generator), ("Dts", Discriminator), ("Gts", Generator))
        }
        optimizers = {
            name: torch.optim.Adam(
                net.parameters(), lr=meta["lr_d" if name[0] == "D" else "lr_g"], betas=(meta["beta1"], 0.999),
                fused=self.mode != "literal",
            )
            for name, net in self.nets.items()
        }
        self.labels = self.label_networks()
        self.perceptual = self.perceptual_net()
        self.order, self.gradients = [], {}
        watched = {name: (optimizers[name], net) for name, net in self.nets.items()}
        if self.labels:
            watched["semseg"] = (self.labels.target_optimizer, self.labels.target_net)
        for name, (optimizer, net) in watched.items():
            optimizer.register_step_pre_hook(self._recorder(name, net))
        optimizers["Gst"].register_step_post_hook(self._take_noise_from_reference)
        label = self.data.get(f"{self.prefix}label")
        batch = Batch(
            source=self.pyramids("source"),
            target=self.pyramids("target"),
            alphas=torch.from_numpy(self.data[f"{self.prefix}alphas"]),
            label=torch.from_numpy(label) if self.labels else None,
        )
        self.batch = batch
        if self.mode == "channels_last":
            frozen = [net for nets in lower.values() for net in nets]
            segmentation = [self.labels.source_net, self.labels.target_net] if self.labels else []
            for net in (*self.nets.values(), *frozen, *segmentation, self.perceptual):
                channels_last(net)
            last = {"memory_format": torch.channels_last}
            batch = replace(
                batch,
                source=[level.contiguous(**last) for level in batch.source],
                target=[level.contiguous(**last) for level in batch.target],
            )
        self.scale_networks = ScaleNetworks(**self.nets, lower_Gst=lower["Gst"], lower_Gts=lower["Gts"])
        # Reference numbers come from images that lie channels last; a trainer on a CPU feeds them so where it pays.
        layout = None
        if self.mode not in ("literal", "channels_last", "channels_first"):

            def layout(shape, image):
                return torch.channels_last

            batch = replace(
                batch,
                source=[level.contiguous() for level in batch.source],
                target=[level.contiguous() for level in batch.target],
            )
        # The tracing is that of compiled code; what is generated from it would take minutes to make. On the CPU tf32 is
        # float32, but lets generators be compiled, too.
        compiled = self.mode == "compiled"
        execution = Execution("tf32" if compiled else "fp32", compiled, backend="aot_eager", layout=layout)
        micro_batch = 1 if self.mode == "micro_batch" else None
        recompute = self.mode in ("recompute", "micro_batch")
        step = partial(training_step, recompute=recompute, micro_batch=micro_batch, forward=execution)
        if self.mode == "literal":
            step = literal_step
            collect_gradients(self.perceptual, *([self.labels.source_net] if self.labels else []))
        self.result = self.take_step(
            step,
            self.scale_networks,
            ScaleOptimizers(**optimizers),
            self.perceptual,
            batch,
            self.loss_config(),
            meta["scale_factor"],
            self.labels,
        )

    def take_step(self, step, *arguments):
        return step(*arguments)

    def _take_noise_from_reference(self, optimizer, args, kwargs):
        """Give the biases without a true gradient the values that the reference's rounding noise gave them.

        Adam's first step is of full size for them, too, and though a norm takes them out again, what their rounding
        leaves moves the second gradient: a single LeakyReLU that changes side is more than the tolerance.
        """
        if self.order.count("Gst#1") != 1 or "Gst#2" in self.order:
            return
        net, gradients, before = self.nets["Gst"], self.tensors("grad/Gst#1"), self.tensors("init/Gst")
        noise = zero_gradient_biases(net)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name in noise:
                    gradient = gradients[name]
                    parameter.copy_(before[name] - self.meta["lr_g"] * gradient / (gradient.abs() + 1e-8))

    def _recorder(self, name, net):
        def record(optimizer, args, kwargs):
            count = sum(step.startswith(f"{name}#") for step in self.order) + 1
            self.order.append(f"{name}#{count}")
            self.gradients[f"{name}#{count}"] = {
                key: parameter.grad.clone() for key, parameter in net.named_parameters() if parameter.grad is not None
            }

        return record


@cache
def golden_step(path, scale, mode):
    return GoldenStep(path, scale, mode)


MODES = ("plain", "recompute", "channels_last", "compiled", "literal")
CASES = [
    (path, scale, mode)
    for mode in MODES
    for path in FILES
    for scale in json.loads(str(np.load(path)["meta"]))["scales"]
]


@pytest.fixture(params=CASES, ids=[f"{path.stem}-scale{scale}-{mode}" for path, scale, mode in CASES])
def golden(request):
    return golden_step(*request.param)


def relative_l2(ours, theirs):
    scale = theirs.double().norm()
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / scale) if scale > 0 else float(difference)


def expected_steps(golden):
    """The reference's order without its second segmentation SGD, whose step never has a gradient (semseg#1)."""
    names, counts = [], {}
    for step in golden.data[f"{golden.prefix}optimizer_order"]:
        if str(step) == "semseg#1":
            continue
        name = str(step).split("#")[0]
        counts[name] = counts.get(name, 0) + 1
        names.append((f"{name}#{counts[name]}", str(step)))
    return names


def test_pyramids_are_exact(golden):
    for domain, levels in (("source", golden.batch.source), ("target", golden.batch.target)):
        for i, level in enumerate(levels):
            expected = golden.data[f"{golden.prefix}{domain}_pyramid_{i}"]
            np.testing.assert_array_equal(level.numpy(), expected)


def test_optimizer_order(golden):
    assert golden.order == [ours for ours, _ in expected_steps(golden)]


def test_losses(golden):
    expected = golden.tensors("loss")
    ours = {tag_of(golden.scale, name): float(value) for name, value in golden.result.losses.items()}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert ours[name] == pytest.approx(float(value), rel=1e-5), name


def zero_gradient_biases(net):
    """Names of biases whose true gradient is zero: those of a convolution right before a norm that removes each
    channel's mean. What either side holds for them is rounding noise, and Adam turns that into steps of full size."""
    blocks = [("head", net.head), *((f"body.{n}", m) for n, m in net.body.named_children()), ("tail.0", net.tail[0])]
    names = set()
    for (name, block), (_, following) in pairwise(blocks):
        norm = following.norm
        per_channel = isinstance(norm, nn.BatchNorm2d) or (norm is not None and norm.num_groups == norm.num_channels)
        if block.norm is not None and per_channel:
            names.add(f"{name}.conv.bias")
    return names


def test_gradients(golden):
    for ours, theirs in expected_steps(golden):
        expected = golden.tensors(f"grad/{theirs}")
        assert expected
        assert golden.gradients[ours].keys() == expected.keys()
        bound = 1e-3 if theirs == "Gst#2" else 1e-4
        net = golden.nets.get(ours.split("#")[0])
        noise = zero_gradient_biases(net) if net else set()
        whole = float(torch.cat([g.flatten() for g in expected.values()]).norm())
        for name, value in expected.items():
            gradient = golden.gradients[ours][name]
            if name in noise:
                assert float(gradient.norm()) < 1e-5 * whole, f"{theirs} {name}"
            else:
                assert relative_l2(gradient, value) < bound, f"{theirs} {name}"


def test_weights_after_the_step(golden):
    meta = golden.meta
    rates = {"Gst": meta["lr_g"], "Gts": meta["lr_g"], "Dst": meta["lr_d"], "Dts": meta["lr_d"]}
    for net_name, net in golden.nets.items():
        expected, before = golden.tensors(f"after/{net_name}"), golden.tensors(f"init/{net_name}")
        noise = zero_gradient_biases(net)
        steps = sum(step.startswith(net_name) for step in golden.order)
        for name, parameter in net.named_parameters():
            moved, should = parameter.detach() - before[name], expected[name] - before[name]
            assert float(moved.abs().max()) > 0
            assert float(moved.abs().max()) <= 1.01 * steps * rates[net_name]
            if name not in noise:
                assert relative_l2(moved, should) < 2e-2, f"{net_name} {name}"


def test_segmentation_weights_after_the_step(golden):
    if golden.labels is None:
        pytest.skip("no label losses at this scale")
    expected, before = golden.tensors("after/semseg_cs"), golden.tensors("init/semseg_cs")
    for name, parameter in golden.labels.target_net.named_parameters():
        assert relative_l2(parameter.detach() - before[name], expected[name] - before[name]) < 1e-3, name


def test_images(golden):
    for theirs, ours in IMAGE_NAMES.items():
        image = to_unit_range(golden.result.images[ours][0])
        expected = torch.from_numpy(golden.data[f"{golden.prefix}image/{theirs}"])
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-6)


def test_translation_in_eval_mode(golden):
    if golden.meta["images_per_gpu"] >= 16:
        pytest.skip("running statistics depend on how many forwards are made, which is no part of the method")
    generators = [*golden.scale_networks.lower_Gst, golden.nets["Gst"].eval()]
    with torch.no_grad():
        sit = translate_pyramid(generators, golden.batch.source, golden.meta["scale_factor"])
    golden.nets["Gst"].train()
    expected = torch.from_numpy(golden.data[f"{golden.prefix}sit_eval"])
    assert relative_l2(sit, expected) < 1e-4


def test_frozen_networks_take_no_gradients_and_do_not_change(golden):
    if golden.mode == "literal":
        pytest.skip("the yardstick lets them collect gradients")
    frozen = {"perceptual": golden.perceptual}
    for name in ("Gst", "Gts"):
        for k, net in enumerate(getattr(golden.scale_networks, f"lower_{name}")):
            frozen[f"{name}_frozen{k}"] = net
    if golden.labels:
        frozen["semseg_source"] = golden.labels.source_net
    for net_name, net in frozen.items():
        for name, parameter in net.named_parameters():
            assert parameter.grad is None, f"{net_name} {name}"
            assert not parameter.requires_grad
        if net_name != "perceptual":
            for name, value in golden.tensors(f"init/{net_name}").items():
                torch.testing.assert_close(net.state_dict()[name], value, rtol=0, atol=0)
