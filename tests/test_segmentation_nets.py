"""Segmentation nets: their exact architecture and their ImageNet weights."""

from __future__ import annotations

from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models.resnet import ResNet
from models.segmentation import build_segmentation_net, load_backbone, parameter_groups
from models.shapes import DDB_MODEL, MODEL_BACKBONES, TWO_HEADED_DEEPLAB, TWO_HEADED_UNET, SegmentationShape
from nets import randomise
from refusals import check_refused

DILATIONS = (6, 12, 18, 24)
# Parameters as torchvision publishes them, less its classifier; the last layer of its VGG16 is 4096 -> 1000, too.
RESNET_COUNTS = {
    "resnet18": 11_689_512 - 513_000, "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000, "resnet101": 44_549_160 - 2_049_000,
}  # fmt: skip
VGG16_COUNT = 138_357_544 - 4_097_000
NETS = [(model, backbone) for model in ("DeepLabV2", "DeepLab") for backbone in RESNET_COUNTS]
NETS += [("VGG", "vgg16"), ("UNet", "none"), ("ResNet38", "resnet38")]
NETS += [(model, "none") for model in TWO_HEADED_UNET]
NETS += [(model, backbone) for model in TWO_HEADED_DEEPLAB for backbone in RESNET_COUNTS]
NETS += [(DDB_MODEL, name) for backbone in RESNET_COUNTS for name in (backbone, f"{backbone}_v1c")]


def meta_net(model, backbone, num_classes=19):
    """A net without memory: for counting and for shapes."""
    with torch.device("meta"):
        return build_segmentation_net(SegmentationShape(model, backbone, num_classes)).eval()


def conv(inputs, outputs, kernel, bias=True):
    return inputs * outputs * kernel**2 + (outputs if bias else 0)


def expected_count(model, backbone, classes):
    if model == "VGG":
        return VGG16_COUNT + sum(conv(channels, classes, 1) for channels in (256, 512, 4096))
    if model == "UNet":
        pairs = ((3, 16), (16, 32), (32, 64), (64, 128), (64 + 128, 64), (32 + 64, 32), (16 + 32, 16))
        return sum(conv(i, o, 3, False) + conv(o, o, 3, False) + 4 * o for i, o in pairs) + conv(16, classes, 1)
    if model in TWO_HEADED_UNET:
        aux = 2 * conv(64, 64, 3, False) + 4 * 64 + conv(64, classes, 1)
        gates = sum(2 * c + conv(c, c // 16, 1) + conv(c // 16, c, 1) for c in (16, 32, 64))
        return expected_count("UNet", backbone, classes) + aux + (gates if model == TWO_HEADED_UNET[1] else 0)
    if model == "ResNet38":
        return 105_070_912 + conv(4096, 512, 3) + conv(512, classes, 3)
    features = 2048 if backbone.startswith(("resnet50", "resnet101")) else 512
    if model == DDB_MODEL:
        resnet, _, deep = backbone.partition("_")
        stem = conv(3, 32, 3, False) + conv(32, 32, 3, False) + conv(32, 64, 3, False) + 2 * (32 + 32 + 64)
        head = 2 * conv(features, 128, 3, False) + conv(256, 256, 3, False) + 4 * 256 + conv(256, classes, 1)
        return RESNET_COUNTS[resnet] + head + (stem - conv(3, 64, 7, False) - 2 * 64 if deep else 0)
    if model in TWO_HEADED_DEEPLAB:
        heads = 4 * (conv(features, classes, 3) + conv(features // 2, classes, 3))
        gates = sum(2 * c + conv(c, c // 16, 1) + conv(c // 16, c, 1) for c in (features // 2**k for k in (3, 2, 1)))
        return RESNET_COUNTS[backbone] + heads + (gates if model == TWO_HEADED_DEEPLAB[1] else 0)
    if model == "DeepLab":
        return RESNET_COUNTS[backbone] + 4 * conv(features, classes, 3)
    branches = conv(features, 256, 1) + 4 * conv(features, 256, 3) + 5 * 2 * 256
    rest = conv(1280, 80, 1) + conv(80, 1280, 1) + conv(1280, 256, 3) + 2 * 256 + conv(256, classes, 1, False)
    return RESNET_COUNTS[backbone] + branches + rest


def test_known_parameter_counts():
    assert sorted(NETS) == sorted((name, backbone) for name, names in MODEL_BACKBONES.items() for backbone in names)
    known = {("DeepLabV2", "resnet101"): 65_063_568, ("DeepLab", "resnet101"): 43_901_068}
    known |= {("VGG", "vgg16"): 134_353_017, ("UNet", "none"): 488_307, ("ResNet38", "resnet38"): 124_033_363}
    known |= {(TWO_HEADED_DEEPLAB[0], "resnet101"): 44_601_560, (TWO_HEADED_DEEPLAB[1], "resnet101"): 44_779_080}
    assert {net: expected_count(*net, 19) for net in known} == known


@pytest.mark.parametrize(("model", "backbone"), NETS)
def test_parameter_counts_and_output_sizes(model, backbone):
    for classes, *size in ((19, 65, 129), (7, 98, 33)):
        net = meta_net(model, backbone, classes)
        assert sum(p.numel() for p in net.parameters()) == expected_count(model, backbone, classes)
        assert net(torch.empty(2, 3, *size, device="meta")).shape == (2, classes, *size)


@pytest.mark.parametrize("backbone", RESNET_COUNTS)
def test_output_stride_8(backbone):
    net = meta_net("DeepLabV2", backbone).backbone
    # 7x7 conv, max pool with ceil mode, stage 2: 65 -> 33 -> 17 -> 9; 64 -> 32 -> 17 (floor mode: 16) -> 9.
    for size, features in (((65, 129), (9, 17)), ((64, 128), (9, 17)), ((513, 321), (65, 41))):
        assert net(torch.empty(1, 3, *size, device="meta")).shape[2:] == features
    assert net.maxpool.ceil_mode
    assert (net.maxpool.kernel_size, net.maxpool.stride, net.maxpool.padding) == (3, 2, 1)


@pytest.mark.parametrize("backbone", RESNET_COUNTS)
def test_strides_and_dilations_of_the_backbone(backbone):
    convs = {n: m for n, m in meta_net("DeepLabV2", backbone).backbone.named_modules() if isinstance(m, nn.Conv2d)}
    strided = {name for name, module in convs.items() if module.stride != (1, 1)}
    assert strided == {"conv1", "layer2.0.conv1", "layer2.0.downsample.0"}
    for name, module in convs.items():
        dilation = {"layer3": 2, "layer4": 4}.get(name.split(".")[0], 1) if module.kernel_size == (3, 3) else 1
        padding = {1: 0, 3: dilation, 7: 3}[module.kernel_size[0]]
        assert (module.dilation, module.padding) == (2 * (dilation,), 2 * (padding,)), name
        assert module.bias is None, name
    if backbone in ("resnet50", "resnet101"):
        assert convs["layer2.0.conv1"].kernel_size == (1, 1)
        assert all(f"layer{stage}.0.downsample.0" in convs for stage in range(1, 5))


def test_head_of_deeplab_v2():
    head = meta_net("DeepLabV2", "resnet101").head
    convs = [branch[0] for branch in head.branches]
    layout = [(c.kernel_size[0], c.dilation[0], c.padding[0]) for c in convs]
    assert layout == [(1, 1, 0), (3, 6, 6), (3, 12, 12), (3, 18, 18), (3, 24, 24)]
    assert all(c.bias is not None and (c.in_channels, c.out_channels) == (2048, 256) for c in convs)
    assert [tuple(layer.weight.shape) for layer in head.squeeze.children()] == [(80, 1280), (1280, 80)]
    assert isinstance(head.dropout, nn.Dropout2d)
    assert head.dropout.p == 0.1
    assert head.classify.bias is None


def test_deeplab_v2_against_plain_functions():
    net = randomise(build_segmentation_net(SegmentationShape("DeepLabV2", "resnet18", 5)))
    image = torch.randn(2, 3, 65, 49, generator=torch.Generator().manual_seed(1))
    head = net.head
    with torch.no_grad():
        features, branches = net.backbone(image), []
        for (layer, norm, _), dilation in zip(head.branches, (1, *DILATIONS), strict=True):
            padding = dilation if layer.kernel_size == (3, 3) else 0
            x = F.conv2d(features, layer.weight, layer.bias, padding=padding, dilation=dilation)
            branches.append(F.relu(F.group_norm(x, 32, norm.weight, norm.bias)))
        x = torch.cat(branches, 1)
        reduce, expand = head.squeeze.reduce, head.squeeze.expand
        squeezed = F.relu(F.adaptive_avg_pool2d(x, 1).flatten(1) @ reduce.weight.T + reduce.bias)
        x = x * torch.sigmoid(squeezed @ expand.weight.T + expand.bias).view(2, 1280, 1, 1)
        x = F.conv2d(x, head.fuse.weight, head.fuse.bias, padding=1)
        x = F.conv2d(F.group_norm(x, 32, head.fuse_norm.weight, head.fuse_norm.bias), head.classify.weight)
        expected = F.interpolate(x, (65, 49), mode="bilinear", align_corners=True)
        torch.testing.assert_close(net(image), expected, rtol=1e-4, atol=1e-5)
        torch.manual_seed(0)
        assert not torch.allclose(net.train().head(features), x)  # dropout acts while training


def test_deeplab_sums_its_four_convolutions():
    net = randomise(build_segmentation_net(SegmentationShape("DeepLab", "resnet18", 5)))
    image = torch.randn(1, 3, 41, 57, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = net.backbone(image)
        logits = torch.zeros(1, 5, *features.shape[2:])
        for branch, dilation in zip(net.head.branches, DILATIONS, strict=True):
            logits += F.conv2d(features, branch.weight, branch.bias, padding=dilation, dilation=dilation)
        expected = F.interpolate(logits, (41, 57), mode="bilinear", align_corners=True)
        torch.testing.assert_close(net(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "backbone"), NETS)
def test_parameter_groups(model, backbone):
    net = meta_net(model, backbone)
    slow, fast = parameter_groups(net, 3e-4)
    assert (slow["lr"], fast["lr"]) == (3e-4, pytest.approx(3e-3))
    grouped = [id(p) for group in (slow, fast) for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in slow["params"]} <= {id(p) for p in net.backbone.parameters()}
    assert {id(p) for p in fast["params"]} == {id(p) for p in net.head.parameters()}
    norms = [p for m in net.backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert bool(norms) == backbone.startswith("resnet")
    expected = norms[:2] if model in TWO_HEADED_DEEPLAB else norms if model == "DeepLab" else []
    assert {id(p) for p in net.parameters() if not p.requires_grad} == {id(p) for p in expected}


def test_impossible_shapes():
    check_refused(lambda: SegmentationShape("PSPNet", "resnet101"), "--model PSPNet")
    check_refused(lambda: SegmentationShape("DeepLabV2", "vgg16"), "--backbone vgg16")
    check_refused(lambda: SegmentationShape("UNet", "resnet18"), "--backbone resnet18")
    for classes in (-3, 1, 256):
        check_refused(lambda: SegmentationShape("UNet", "none", classes), f"--num_classes is {classes}")  # noqa: B023


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_resnet_weights_and_features_are_torchvisions(tmp_path, backbone):
    torch.manual_seed(3)
    theirs = randomise(torchvision.models.get_model(backbone, weights=None))
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    net = build_segmentation_net(SegmentationShape("DeepLab", backbone)).eval()
    load_backbone(net, backbone, str(tmp_path / "file.pth"))
    own = net.backbone.state_dict()
    assert list(own) == [name for name in theirs.state_dict() if not name.startswith("fc.")]
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in own.items())
    assert not any(p.requires_grad for n, p in net.backbone.named_parameters() if "bn" in n)  # loading thaws nothing
    old = {name: value for name, value in theirs.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(old, tmp_path / "old.pth")  # as torchvision published them before these counters existed
    load_backbone(build_segmentation_net(SegmentationShape("DeepLab", backbone)), backbone, str(tmp_path / "old.pth"))
    # torchvision's net with what differs here: ceil mode, the stride on the first 1x1, and dilation instead of stride.
    theirs.maxpool.ceil_mode = True
    if backbone == "resnet50":
        theirs.layer2[0].conv1.stride, theirs.layer2[0].conv2.stride = (2, 2), (1, 1)
    for stage, dilation in ((theirs.layer3, 2), (theirs.layer4, 4)):
        for module in (m for m in stage.modules() if isinstance(m, nn.Conv2d)):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (dilation, dilation)
    theirs.avgpool = theirs.fc = nn.Identity()
    image = torch.randn(1, 3, 50, 66, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        features = net.backbone(image)
        assert features.shape[2:] == (7, 9)
        torch.testing.assert_close(features.flatten(1), theirs(image), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backbone", RESNET_COUNTS)
def test_names_and_shapes_are_torchvisions(backbone):
    with torch.device("meta"):
        theirs, ours = torchvision.models.get_model(backbone, weights=None), ResNet(backbone)
    expected = {name: value.shape for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected


def test_vgg16_weights_reach_their_convolutions(tmp_path):
    with torch.device("meta"):
        theirs, net = torchvision.models.vgg16(weights=None), build_segmentation_net(SegmentationShape("VGG", "vgg16"))
    # Every output channel holds the same random numbers: the shapes of VGG16 in a small file.
    state = {name: torch.randn(1, *value.shape[1:]).expand(value.shape) for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "vgg16.pth")
    load_backbone(net.to_empty(device="cpu"), "vgg16", str(tmp_path / "vgg16.pth"))
    fc6, fc7 = net.backbone.fc6, net.backbone.fc7
    own = {name: value for name, value in net.backbone.state_dict().items() if name.startswith("features.")}
    assert set(own) == {name for name in state if name.startswith("features.")}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    pooled, hidden = torch.randn(2, 512, 7, 7), torch.randn(2, 4096)
    with torch.no_grad():
        centre = F.conv2d(pooled, fc6.weight[-3:], fc6.bias[-3:], padding=3)[:, :, 3, 3]
        expected = F.linear(pooled.flatten(1), state["classifier.0.weight"][-3:], state["classifier.0.bias"][-3:])
        torch.testing.assert_close(centre, expected, rtol=1e-4, atol=1e-3)
        expected = F.linear(hidden, state["classifier.3.weight"], state["classifier.3.bias"])
        torch.testing.assert_close(fc7(hidden[:, :, None, None])[:, :, 0, 0], expected, rtol=1e-4, atol=1e-3)


def test_backbone_weights_that_cannot_be_used(tmp_path):
    def check(name, *parts, model="DeepLabV2", backbone="resnet18"):
        net = meta_net(model, backbone)
        check_refused(lambda: load_backbone(net, backbone, str(tmp_path / name)), "--backbone_weights", name, *parts)

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.resnet18().state_dict().items()}
    torch.save({name: torch.tensor(0.0).expand(shape) for name, shape in shapes.items()}, tmp_path / "resnet18.pth")
    check("resnet18.pth", "layer1.2.conv1.weight", backbone="resnet34")
    check("resnet18.pth", "layer1.0.conv1.weight", "(64, 64, 3, 3)", backbone="resnet50")
    check("resnet18.pth", "features.0.weight", model="VGG", backbone="vgg16")
    torch.save({"classifier.0.weight": torch.zeros(3, 100)}, tmp_path / "vgg_small.pth")
    check("vgg_small.pth", "fc6.weight is (3, 100) there", model="VGG", backbone="vgg16")
    torch.save({"model": {"conv1.weight": torch.zeros(1)}}, tmp_path / "nested.pth")
    check("nested.pth", "names and tensors alone")
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("module.pth", "list.pth", "text.pth", "missing.pth"):
        check(name)
    check("", "this model has no ImageNet weights", model="UNet", backbone="none")


def test_imagenet_weights_come_from_torchvision(monkeypatch):
    asked, theirs = [], torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(torchvision.models, "get_model", lambda *a, **k: asked.append((a, k)) or theirs)
    net = build_segmentation_net(SegmentationShape("DeepLabV2", "resnet18"))
    load_backbone(net, "resnet18", "imagenet")
    assert asked == [(("resnet18",), {"weights": "IMAGENET1K_V1"})]
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in net.backbone.state_dict().items())
    for error in (OSError("disk"), URLError("no route"), RuntimeError("invalid hash value")):
        monkeypatch.setattr(torchvision.models, "get_model", Mock(side_effect=error))
        parts = ("resnet18", error, "--backbone_weights", "--no_pretrained_backbone")
        check_refused(lambda: load_backbone(net, "resnet18", "imagenet"), *parts)
