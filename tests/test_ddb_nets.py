"""DDB's net against the published code's numbers, the files it comes in, and the features of the nets.

Every `uda/ddb_{head,backbone}*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it); all sizes and
settings come from the file's `meta`.
"""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_handlers.images import IMAGENET_INPUT
from models.deeplab import AdapterHead
from models.mmseg_files import our_name
from models.resnet import DDBResNet
from models.segmentation import build_segmentation_net, load_backbone, require_features
from models.shapes import DDB_MODEL, MODEL_BACKBONES, SegmentationShape
from nets import randomise
from refusals import check_refused
from training.segmentation_files import load_segmentation_net
from uda_golden import load, over

SMALL = "resnet18_v1c"


def tensor(data, name):
    return torch.from_numpy(data[name])


def assert_near(found, expected, tolerance, name=""):
    """Differences are relative to the largest magnitude of the tensor."""
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


# --- golden numbers --------------------------------------------------------------------------------------------------


def input_of(*shape):
    """The inputs of `meta.input_formula`."""
    i = np.arange(9973, dtype=np.int64)  # a period
    values = np.maximum(2 * ((11 * i * i + 3001 * i) % 9973) / 9973 - 1, 0)
    return torch.from_numpy(np.resize(values.astype(np.float32), shape))


def fill(net, bias):
    """The parameters of `meta.parameter_formula`; `bias` is the factor of the norms' biases and means."""
    i = np.arange(10007, dtype=np.int64)  # a period
    c = 2 * ((7 * i * i + 7919 * i) % 10007) / 10007 - 1
    for name, value in net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        kind = name.rpartition(".")[2]
        if name.startswith("classify."):
            values = 0.5 * c if kind == "weight" else 0.1 * c
        elif value.ndim == 4:
            values = np.sqrt(6 / np.prod(value.shape[1:])) * c
        elif kind == "running_var":
            values = 1 + 0.5 * c
        elif kind == "weight":
            values = (1 + 0.2 * c) * (0.25 if "bn3." in name else 1)
        else:
            values = bias * c
        value.copy_(torch.from_numpy(np.resize(values.astype(np.float32), value.shape)))
    return net


@over("ddb_head", lambda data, meta: [case["key"] for case in meta["cases"]])
@torch.no_grad()
def test_head(path, item):
    data, meta = load(path)
    case = next(case for case in meta["cases"] if case["key"] == item)
    head = AdapterHead(case["in_channels"], case["num_classes"], case["channels"], case["dilations"])
    assert sum(p.numel() for p in head.parameters()) == case["n_params"]
    ours = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert ours == {our_name(f"decode_head.{n}").removeprefix("head."): s for n, s in case["state_dict"].items()}
    fill(head, 0.2)
    image = input_of(case["n"], case["in_channels"], case["h"], case["w"])
    for mode in ("eval", "bn_batch"):
        head.train(mode == "bn_batch")
        head.dropout.eval()
        feature = head.features(image)
        expected = tensor(data, f"{item}/feature_{mode}")
        assert_near(feature[:, :: feature.shape[1] // expected.shape[1]], expected, 1e-5, mode)
        assert_near(head(image) if mode == "eval" else head.classify(feature), tensor(data, f"{item}/logits_{mode}"),
                    1e-5, mode)  # fmt: skip
        if mode == "eval":
            up = F.interpolate(head(image), size=case["up"], mode="bilinear", align_corners=False)
            expected = tensor(data, f"{item}/logits_up")
            assert_near(up[:1, : expected.shape[1]], expected, 1e-5)
    after = {name: data[name] for name in data if name.startswith(f"{item}/after_bn_batch/")}
    assert after
    for name, expected in after.items():
        ours = our_name(f"decode_head.{name.split('/')[2]}").removeprefix("head.")
        assert_near(head.state_dict()[ours], torch.from_numpy(expected), 1e-5, name)


@over("ddb_backbone")
@torch.no_grad()
def test_backbone(path):
    data, meta = load(path)
    with torch.device("meta"):
        net = DDBResNet("resnet101_v1c")
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    assert {n: list(v.shape) for n, v in net.state_dict().items()} == dict(meta["state_dict"])
    fill(net.to_empty(device="cpu"), 0.1)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.num_batches_tracked.zero_()
    image, found = 4 * (input_of(meta["n"], 3, meta["h"], meta["w"]) - 0.25), {}
    for k in range(1, 5):
        getattr(net, f"layer{k}")[-1].register_forward_hook(lambda m, i, o, k=k: found.update({k: o}))
    for mode, tolerance in (("eval", 1e-5), ("bn_batch", 1e-4)):
        net.train(mode == "bn_batch")(image)
        for k, step in enumerate(meta["channel_step"], start=1):
            assert list(found[k].shape) == meta["stage_shapes"][k - 1]
            assert_near(found[k][:, ::step], tensor(data, f"{mode}/stage{k}"), tolerance, f"{mode} {k}")
    (statistics,) = (name for name in data if "running_mean" in name)
    expected, ours = tensor(data, statistics), net.state_dict()[statistics.removeprefix("bn_batch/")]
    assert_near(ours[:: len(ours) // len(expected)], expected, 1e-4)


# --- nets and files --------------------------------------------------------------------------------------------------


def a_net(backbone=SMALL, classes=7):
    torch.manual_seed(0)
    return randomise(build_segmentation_net(SegmentationShape(DDB_MODEL, backbone, classes)))


def theirs_of(net, prefix):
    """A net's state dict by mmseg's names."""
    pairs = (
        (r"^head\.branches\.(\d)\.0\.", r"decode_head.aspp_modules.\1.conv."),
        (r"^head\.adapter\.0\.", "decode_head.bottleneck.conv."),
        (r"^head\.branches\.(\d)\.1\.", r"decode_head.aspp_modules.\1.bn."),
        (r"^head\.adapter\.1\.", "decode_head.bottleneck.bn."),
        (r"^head\.classify\.", "decode_head.conv_seg."),
    )  # fmt: skip
    found = {}
    for name, value in net.state_dict().items():
        for ours, theirs in pairs:
            name = re.sub(ours, theirs, name)
        found[prefix + name] = value
    return found


def test_the_published_net():
    with torch.device("meta"):
        net = build_segmentation_net(SegmentationShape(DDB_MODEL, MODEL_BACKBONES[DDB_MODEL][0], 19))
    counts = [sum(p.numel() for p in part.parameters()) for part in (net.backbone, net.head)]
    assert counts == [42_519_392, 5_314_323]
    assert net.network_input == IMAGENET_INPUT
    image = torch.empty(1, 3, 512, 512, device="meta")
    features, logits = net.eval().features_and_logits(image)
    assert features.shape == (1, 256, 64, 64)
    assert logits.shape == net(image).shape == (1, 19, 512, 512)
    theirs = set(theirs_of(net, ""))
    assert {our_name(name) for name in theirs} == set(net.state_dict())
    assert "decode_head.aspp_modules.1.bn.running_mean" in theirs
    assert "decode_head.aspp_modules.1.conv.weight" in theirs
    assert "decode_head.bottleneck.bn.bias" in theirs


@pytest.mark.parametrize("prefix", ["", "model.", "stu_model.", "ema_model."])
def test_files_of_mmseg(tmp_path, prefix):
    net, path = a_net(), tmp_path / "iter_40000.pth"
    state = theirs_of(net, prefix)
    others = {"model.": ("ema_model.",), "stu_model.": ("cu_model.", "ca_model.")}.get(prefix, ())
    for other in others:
        state[f"{other}decode_head.conv_seg.weight"] = torch.zeros(7, 256, 1, 1)
    torch.save({"meta": {"epoch": 1, "iter": 40000, "CLASSES": ("road",)}, "state_dict": state}, path)
    shape, found = load_segmentation_net(path, "--weights")
    assert shape == SegmentationShape(DDB_MODEL, SMALL, 7)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in found.state_dict().items())


def test_files_that_are_nearly_one(tmp_path):
    path, state = tmp_path / "net.pth", theirs_of(a_net(), "model.")
    torch.save({n: v for n, v in state.items() if "bottleneck" not in n}, path)
    check_refused(lambda: load_segmentation_net(path, "--weights"), "net.pth", "head.adapter.0.weight is missing there")
    torch.save({n: v for n, v in state.items() if "layer3.1" not in n}, path)
    check_refused(lambda: load_segmentation_net(path, "--weights"), "net.pth", "its backbone of (2, 2, 1, 2) blocks")
    torch.save({n: v for n, v in state.items() if "conv_seg" not in n}, path)
    check_refused(lambda: load_segmentation_net(path, "--weights"), "net.pth", "mmsegmentation's net of the DDB")


@pytest.mark.parametrize("wrapped", [False, True])
def test_imagenet_weights_of_mmseg(tmp_path, wrapped):
    theirs, net, path = a_net().backbone.state_dict(), a_net(), tmp_path / "resnet18_v1c.pth"
    theirs = {name: value + 1 for name, value in theirs.items()}
    state = {**theirs, "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save({"state_dict": state} if wrapped else state, path)
    assert load_backbone(net, SMALL, str(path)) == ""
    assert all(torch.equal(value, theirs[name]) for name, value in net.backbone.state_dict().items())
    check_refused(
        lambda: load_backbone(net, SMALL, "imagenet"), "no weights of resnet18_v1c", "--backbone resnet18,"
    )


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_without_a_deep_stem_the_weights_are_torchvisions(tmp_path, backbone):
    import torchvision

    dilated = [False, True, True] if backbone == "resnet50" else None
    torch.manual_seed(3)
    theirs = randomise(torchvision.models.get_model(backbone, weights=None, replace_stride_with_dilation=dilated))
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    net = build_segmentation_net(SegmentationShape(DDB_MODEL, backbone, 5)).eval()
    assert load_backbone(net, backbone, str(tmp_path / "file.pth")) == ""
    if dilated:
        image = torch.rand(1, 3, 64, 48)
        parts = nn.Sequential(*list(theirs.children())[:-2])
        with torch.no_grad():
            torch.testing.assert_close(net.backbone(image), parts(image))


@pytest.mark.parametrize("shape", [(DDB_MODEL, SMALL), ("UNet", "none")])
def test_features(shape):
    torch.manual_seed(0)
    net = randomise(build_segmentation_net(SegmentationShape(*shape, 5)))
    require_features(net, "it")
    with torch.no_grad():
        image = torch.rand(2, 3, 33, 41)
        features, logits = net.features_and_logits(image)
        assert torch.equal(logits, net(image))
        low = net.head.classify(features)
        assert_near(F.interpolate(low, logits.shape[2:], mode="bilinear", align_corners=False), logits, 1e-6)


def test_nets_without_features():
    with torch.device("meta"):
        net = build_segmentation_net(SegmentationShape("DeepLab", "resnet18", 5))
    check_refused(lambda: require_features(net, "--weights net.pth"), "--weights net.pth", "DeepLabV2DDB and UNet")
