"""ResNet-38: its architecture by its published numbers and by plain functions, and the authors' files of it."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
import train_procst
import train_semseg_on_source
from commands import command, label_flags, source_flags
from data_handlers.images import IMAGENET_INPUT, PROCST_INPUT
from models.resnet38 import ResNet38
from models.resnet38_files import load_resnet38, load_resnet38_backbone
from models.segmentation import build_segmentation_net, load_backbone
from models.shapes import SegmentationShape
from mxnet_files import write_params
from refusals import check_refusal, check_refused
from steps import RandomStep
from training.segmentation_files import load_segmentation_net

WIDTH = 8  # with fewer channels, oneDNN corrupts memory in the backward of strided 1x1 convolutions on some CPUs
# Blocks: stride, and of each unit its channels as multiples of the width, its kernel and its dilation.
TABLE = {
    "2a": (2, ((2, 3, 1), (2, 3, 1))), "2b1": (1, ((2, 3, 1), (2, 3, 1))), "2b2": (1, ((2, 3, 1), (2, 3, 1))),
    "3a": (2, ((4, 3, 1), (4, 3, 1))), "3b1": (1, ((4, 3, 1), (4, 3, 1))), "3b2": (1, ((4, 3, 1), (4, 3, 1))),
    "4a": (2, ((8, 3, 1), (8, 3, 1))), "4b1": (1, ((8, 3, 1), (8, 3, 1))), "4b2": (1, ((8, 3, 1), (8, 3, 1))),
    "4b3": (1, ((8, 3, 1), (8, 3, 1))), "4b4": (1, ((8, 3, 1), (8, 3, 1))), "4b5": (1, ((8, 3, 1), (8, 3, 1))),
    "5a": (1, ((8, 3, 1), (16, 3, 2))), "5b1": (1, ((8, 3, 2), (16, 3, 2))), "5b2": (1, ((8, 3, 2), (16, 3, 2))),
    "6a": (1, ((8, 1, 1), (16, 3, 4), (32, 1, 1))), "7a": (1, ((16, 1, 1), (32, 3, 4), (64, 1, 1))),
}  # fmt: skip
UNITS = ("branch2a", "branch2b1", "branch2b2")


def published(classes=19, classifier=False):
    """Random arrays under the names, and in the shapes, of a published file; narrower."""
    random = np.random.default_rng(0)
    arrays = {}

    def conv(name, outputs, inputs, kernel, bias=False):
        scale = (2 / (inputs * kernel**2)) ** 0.5
        arrays[f"arg:{name}_weight"] = random.normal(0, scale, (outputs, inputs, kernel, kernel))
        if bias:
            arrays[f"arg:{name}_bias"] = random.normal(0, 0.1, outputs)

    def norm(name, channels):
        for kind, low in (("arg:{}_gamma", 0.5), ("arg:{}_beta", -0.5), ("aux:{}_moving_mean", -0.5)):
            arrays[kind.format(name)] = random.uniform(low, low + 1, channels)
        arrays[f"aux:{name}_moving_var"] = random.uniform(0.5, 1.5, channels)

    conv("conv1a", WIDTH, 3, 3)
    inputs = WIDTH
    for block, (_, units) in TABLE.items():
        if block.endswith("a"):
            conv(f"res{block}_branch1", units[-1][0] * WIDTH, inputs, 1)
        for unit, (channels, kernel, _) in zip(UNITS, units, strict=False):
            norm(f"bn{block}_{unit}", inputs)
            conv(f"res{block}_{unit}", channels * WIDTH, inputs, kernel)
            inputs = channels * WIDTH
    norm("bn7", inputs)
    if classifier:
        arrays["arg:linear1000_weight"] = random.normal(size=(1000, inputs))
        arrays["arg:linear1000_bias"] = random.normal(size=1000)
    else:
        conv("conv6a", 8 * WIDTH, inputs, 3, bias=True)
        conv(f"linear{classes}", classes, 8 * WIDTH, 3, bias=True)
    return {name: values.astype(np.float32) for name, values in arrays.items()}


def by_plain_functions(arrays, image, classes=19):
    """Logits at stride 8, from arrays by the authors' names."""
    w = {name.split(":")[1]: torch.from_numpy(values) for name, values in arrays.items()}

    def activate(x, name):
        moments = (w[f"{name}_moving_mean"], w[f"{name}_moving_var"])
        return F.relu(F.batch_norm(x, *moments, w[f"{name}_gamma"], w[f"{name}_beta"], False, 0.0, 1.001e-5))

    x = F.conv2d(image, w["conv1a_weight"], padding=1)
    for block, (stride, units) in TABLE.items():
        y, shortcut = x, x
        for unit, (_, kernel, dilation) in zip(UNITS, units, strict=False):
            y = activate(y, f"bn{block}_{unit}")
            step, pad = stride if unit == "branch2a" else 1, dilation if kernel == 3 else 0
            if unit == "branch2a" and block.endswith("a"):
                shortcut = F.conv2d(y, w[f"res{block}_branch1_weight"], stride=stride)
            y = F.conv2d(y, w[f"res{block}_{unit}_weight"], stride=step, padding=pad, dilation=dilation)
        x = shortcut + y
    x = F.relu(F.conv2d(activate(x, "bn7"), w["conv6a_weight"], w["conv6a_bias"], padding=12, dilation=12))
    return F.conv2d(x, w[f"linear{classes}_weight"], w[f"linear{classes}_bias"], padding=12, dilation=12)


def meta_net(classes=19):
    with torch.device("meta"):
        return ResNet38(classes).eval()


def a_picture(height=64, width=48):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def narrow(monkeypatch):
    """Every net that is built by its shape is a narrow one."""
    monkeypatch.setattr("models.segmentation.ResNet38", functools.partial(ResNet38, width=WIDTH))


@pytest.fixture
def files(tmp_path):
    """A published segmentation net and the classifier, narrow."""
    write_params(tmp_path / "gta_rna-a1_cls19_s8_ep-0000.params", published())
    write_params(tmp_path / "ilsvrc-cls_rna-a1_cls1000_ep-0001.params", published(classifier=True), 0)
    return sorted(tmp_path.glob("*.params"))


# --- the net ---------------------------------------------------------------------------------------------------------


def test_published_numbers():
    for classes, count in ((19, 124_033_363), (16, 124_019_536)):
        assert sum(p.numel() for p in meta_net(classes).parameters()) == count
    backbone = meta_net().backbone
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 105_070_912
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 37
    assert sum(p.numel() for norm in norms for p in norm.parameters()) == 47_744
    assert {norm.eps for norm in norms} == {1.001e-5}
    assert {name: m.p for name, m in meta_net().named_modules() if isinstance(m, nn.Dropout) and m.p} == {
        "backbone.blocks.6a.units.branch2b2.dropout": 0.3, "backbone.blocks.7a.units.branch2b2.dropout": 0.5,
    }  # fmt: skip


def test_sizes():
    net = meta_net()
    for size, coarse in (((504, 504), (63, 63)), ((65, 129), (9, 17)), ((16, 20), (2, 3))):
        image = torch.empty(1, 3, *size, device="meta")
        assert net.coarse_logits(image).shape == (1, 19, *coarse)
        assert net(image).shape == (1, 19, *size)


def test_random_start():
    torch.manual_seed(0)
    net = ResNet38(5, width=8)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            fan_in = module.weight[0].numel()
            assert float(module.weight.detach().std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05), name
    assert not net.head.conv6a.bias.any()
    assert not net.head.linear.bias.any()
    assert net.backbone.conv1a.bias is None


@pytest.mark.parametrize("version", [0, 2])
def test_logits_of_a_file_are_those_of_plain_functions(tmp_path, version):
    arrays, image = published(), a_picture()
    net = ResNet38(19, width=WIDTH).eval()
    load_resnet38(net, write_params(tmp_path / "net.params", arrays, version))
    with torch.no_grad():
        expected = by_plain_functions(arrays, image)
        torch.testing.assert_close(net.coarse_logits(image), expected, rtol=1e-4, atol=1e-4)
        whole = F.interpolate(expected, (64, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(net(image), whole, rtol=1e-4, atol=1e-4)
        padded = F.pad(a_picture(57, 45), (0, 3, 0, 7))  # to multiples of 8, with what the mean becomes
        cropped = F.interpolate(by_plain_functions(arrays, padded), (64, 48), mode="bilinear", align_corners=False)
        torch.testing.assert_close(net(a_picture(57, 45)), cropped[:, :, :57, :45], rtol=1e-4, atol=1e-4)


def test_batch_norms_keep_their_statistics_while_training(tmp_path):
    net = ResNet38(19, width=WIDTH)
    load_resnet38(net, write_params(tmp_path / "net.params", published()))
    before = {name: value.clone() for name, value in net.named_buffers()}
    image = a_picture()
    expected = net.eval()(image)
    torch.manual_seed(0)
    assert not torch.allclose(net.train()(image), expected)  # dropout acts
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(net(image), expected)
    net(image).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in net.named_buffers())


def test_input_is_what_the_net_was_trained_on():
    pixels = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.device("meta"):
        net = build_segmentation_net(SegmentationShape("ResNet38", "resnet38"))
    found = net.network_input(pixels)
    torch.testing.assert_close(found, ((pixels / 255 - mean) / std).permute(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    theirs = PROCST_INPUT(pixels)
    assert PROCST_INPUT.converted(theirs, PROCST_INPUT) is theirs
    torch.testing.assert_close(IMAGENET_INPUT.converted(theirs, PROCST_INPUT), found, rtol=1e-5, atol=1e-5)


def test_a_step_gives_segmentation_nets_the_input_they_are_trained_on():
    plain, other = RandomStep(labels=True), RandomStep(labels=True)
    for net in (other.segmentation.seg_source, other.segmentation.seg_sit):
        net.network_input = IMAGENET_INPUT
        net.register_forward_pre_hook(lambda _, inputs: PROCST_INPUT.converted(inputs[0], IMAGENET_INPUT))
    losses = [{name: float(value) for name, value in step.take().losses.items()} for step in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_segmentation_file_loads(files, narrow):
    shape, net = load_segmentation_net(files[0], "--weights")
    assert shape == SegmentationShape("ResNet38", "resnet38", 19)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    arrays, state = published(), net.state_dict()
    for ours, theirs in (
        ("backbone.conv1a.weight", "arg:conv1a_weight"),
        ("backbone.blocks.4b5.units.branch2b1.norm.weight", "arg:bn4b5_branch2b1_gamma"),
        ("backbone.blocks.4b5.units.branch2b1.norm.running_var", "aux:bn4b5_branch2b1_moving_var"),
        ("backbone.blocks.7a.branch1.weight", "arg:res7a_branch1_weight"),
        ("head.linear.bias", "arg:linear19_bias"),
    ):
        assert torch.equal(state[ours], torch.from_numpy(arrays[theirs])), ours
    stored = [name for name in state if not name.endswith("num_batches_tracked")]
    assert len(stored) == len(arrays) == 1 + 36 + 6 + 37 * 4 + 4
    assert sum(state[name].numel() for name in stored) == sum(values.size for values in arrays.values())


def test_halves_load(tmp_path):
    arrays = {name: values.astype(np.float16) for name, values in published(16).items()}
    net = ResNet38(16, width=WIDTH)
    load_resnet38(net, write_params(tmp_path / "net.params", arrays))
    assert torch.equal(net.head.linear.weight, torch.from_numpy(arrays["arg:linear16_weight"]).float())


@pytest.mark.parametrize("index", [0, 1])
def test_the_backbone_of_either_file_loads_and_the_head_stays(files, index):
    net = ResNet38(7, width=WIDTH)
    head = {name: value.clone() for name, value in net.head.state_dict().items()}
    line = load_resnet38_backbone(net, files[index], "--backbone_weights")
    assert "\n" not in line
    assert "new tensors: head.conv6a.weight, head.conv6a.bias, head.linear.weight, head.linear.bias" in line
    assert line.count("head.linear.weight") == 2
    assert all(torch.equal(value, head[name]) for name, value in net.head.state_dict().items())
    expected = published(classifier=index == 1)["aux:bn7_moving_mean"]
    assert torch.equal(net.backbone.bn7.running_mean, torch.from_numpy(expected))


def test_files_of_other_nets(tmp_path, narrow):
    path, arrays = tmp_path / "net.params", published()

    def check(changes, *parts, load=lambda: load_segmentation_net(path, "--weights")):
        write_params(path, {name: values for name, values in {**arrays, **changes}.items() if values is not None})
        check_refused(load, "net.params", *parts)

    one = np.ones(1, np.float32)
    check({"arg:extra": one}, "arg:extra is unknown here", "1 differences")
    check({"arg:bn7_gamma": None}, "backbone.bn7.weight is missing there")
    check({"arg:bn7_gamma": one}, "backbone.bn7.weight is (1,) there and (512,) here")
    check({"arg:linear19_weight": None}, "holds no ResNet-38")
    check({"arg:linear16_weight": arrays["arg:linear19_weight"]}, "holds no ResNet-38")
    check({"arg:conv6a_weight": None}, "holds a classifier", "--backbone_weights")
    check({"aux:bn7_moving_mean": arrays["aux:bn7_moving_mean"] * np.nan}, "not finite")
    linear = {"arg:linear19_weight": None, "arg:linear300_weight": one}
    check(linear, "--num_classes is 300; it must be 2 to 255")
    net = build_segmentation_net(SegmentationShape("ResNet38", "resnet38"))
    backbone = functools.partial(load_backbone, net, "resnet38", str(path))
    check({"arg:bn7_gamma": None}, "--backbone_weights", "bn7.weight is missing", load=backbone)


def test_backbone_weights_that_cannot_be_used(files, tmp_path):
    def check(weights, *parts, model="ResNet38", backbone="resnet38"):
        with torch.device("meta"):
            net = build_segmentation_net(SegmentationShape(model, backbone))
        check_refused(lambda: load_backbone(net, backbone, str(weights)), "--backbone_weights", *parts)

    torch.save({"w": torch.zeros(1)}, tmp_path / "net.pth")
    check("imagenet", "torchvision has no weights of ResNet-38", "--no_pretrained_backbone")
    check(tmp_path / "net.pth", "net.pth", "no .params file of MXNet")
    check(tmp_path / "missing.params", "missing.params", "no such file")
    check(files[1], "of MXNet", "ResNet38", model="DeepLab", backbone="resnet18")


# --- scripts ---------------------------------------------------------------------------------------------------------


def evaluation(world, weights):
    return command({"gpus": "cpu", "num_workers": 0, "weights": weights, "data_dir": world / "cityscapes"})


def test_scoring_a_published_net(world, files, narrow, run_script):
    result = run_script(evaluate, *evaluation(world, files[0]))
    assert result.code == 0, result.err
    assert "ResNet38 on resnet38 with 19 classes" in result.out
    assert "mIoU" in result.out
    check_refusal(run_script(evaluate, *evaluation(world, files[1])), files[1].name, "holds a classifier")
    files[0].write_bytes(files[0].read_bytes()[:-1])
    check_refusal(run_script(evaluate, *evaluation(world, files[0])), files[0].name, "is damaged")


def test_training_from_the_classifier(world, tmp_path, files, narrow, run_script):
    flags = {"model": "ResNet38", "backbone_weights": files[1], "num_steps": 2, "lr_semseg": 1e-4}
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, **flags))
    assert result.code == 0, result.err
    line = next(line for line in result.out.splitlines() if "new tensors: head.conv6a.weight" in line)
    assert str(files[1]) in line
    result = run_script(evaluate, *evaluation(world, tmp_path / "source.pth"))
    assert result.code == 0, result.err
    refused = run_script(train_semseg_on_source, *source_flags(world, tmp_path, model="ResNet38", output=""))
    check_refusal(refused, "--backbone_weights imagenet", "no weights of ResNet-38")


@pytest.mark.slow
def test_procst_with_a_published_net(world, tmp_path, files, narrow, run_script):
    changes = {"model": "ResNet38", "backbone_weights": files[1], "num_scales": 0, "batch_size_list": 2,
               "steps_per_scale": 2, "lr_semseg": 1e-4}  # fmt: skip
    result = run_script(train_procst, *label_flags(world, tmp_path, files[0], **changes))
    assert result.code == 0, result.err
    assert "ResNet38 on resnet38 with 19 classes" in result.out
    assert "new tensors: head.conv6a.weight" in result.out
