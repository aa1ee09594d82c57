"""The two-headed DeepLabV2 and its restitution against the published code's numbers, and the files they come in.

Every `uda/snr_{block,head,deeplab}*.npz` of the golden folder is tested, see `test_cbst_golden.py`.
"""

import itertools
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from data_handlers.classes import IGNORE
from models.deeplab_multi import PartialSumHead
from models.deeplab_multi_files import our_name, read_published, traits_of, two_headed
from models.losses import cross_entropy
from models.resnet import RESNETS, Bottleneck
from models.restitution import Restitution
from models.segmentation import build_segmentation_net, load_backbone, parameter_groups
from models.shapes import MODEL_BACKBONES, SegmentationShape
from nets import randomise, save_net
from refusals import check_refused
from steps import relative_l2
from training.segmentation_files import load_segmentation_net, trainable_net
from uda_golden import load, over

PLAIN, SNR = "DeepLabV2Multi", "DeepLabV2MultiSNR"
cases = over("snr_block", lambda data, meta: sorted(meta["cases"]))


def tensor(data, name):
    return torch.from_numpy(data[name])


# --- restitution and heads -------------------------------------------------------------------------------------------


def block_of(data, meta, item):
    case = meta["cases"][item]
    block = Restitution(case["C"], case["reduction"])
    block.norm.eps = case["eps"]
    names = {"IN": "norm", "fc1": "reduce", "fc2": "expand"}
    state = {
        f"{ours}.{kind}": tensor(data, f"{item}/{theirs}.{kind}")
        for theirs, ours in names.items() for kind in ("weight", "bias")
    }  # fmt: skip
    block.load_state_dict(state)
    return block, names


@cases
@torch.no_grad()
def test_restitution(path, item):
    data, meta = load(path)
    block, _ = block_of(data, meta, item)
    image = tensor(data, f"{item}/input")
    parts = block.parts(image)
    for name, value in parts._asdict().items():
        assert relative_l2(value, tensor(data, f"{item}/{name}")) <= 1e-5, name
    assert relative_l2(block(image), tensor(data, f"{item}/restored")) <= 1e-5
    assert relative_l2(block.factors(image)[2], tensor(data, f"{item}/gate")) <= 1e-5


@cases
@pytest.mark.parametrize("kind", ["grad", "grad_both"])
def test_gradients_of_the_restitution(path, item, kind):
    data, meta = load(path)
    block, names = block_of(data, meta, item)
    image = tensor(data, f"{item}/input").requires_grad_(True)
    parts = block.parts(image)
    loss = (tensor(data, f"{item}/upstream_restored") * (block(image) if kind == "grad" else parts.restored)).sum()
    if kind == "grad_both":
        loss = loss + (tensor(data, f"{item}/upstream_contaminated") * parts.contaminated).sum()
    loss.backward()
    bound = 2e-3 if item == "flat_channel" else 1e-4
    found = {"input": image.grad} | {
        f"{theirs}.{kind_}": getattr(getattr(block, ours), kind_).grad
        for theirs, ours in names.items() for kind_ in ("weight", "bias")
    }  # fmt: skip
    for name, gradient in found.items():
        assert relative_l2(gradient, tensor(data, f"{item}/{kind}/{name}")) <= bound, name


@over("snr_head", lambda data, meta: sorted(meta["cases"]))
def test_head(path, item):
    data, meta = load(path)
    case = meta["cases"][item]
    head = PartialSumHead(case["in_channels"], case["num_classes"], 2)
    assert [branch.dilation[0] for branch in head.branches] == case["dilations"]
    names = {name: name.replace("branches", "conv2d_list") for name in head.state_dict()}
    head.load_state_dict({ours: tensor(data, f"{item}/{theirs}") for ours, theirs in names.items()})
    image = tensor(data, f"{item}/input").requires_grad_(True)
    output = head(image)
    assert relative_l2(output, tensor(data, f"{item}/output")) <= 1e-5
    (output * tensor(data, f"{item}/upstream")).sum().backward()
    assert relative_l2(image.grad, tensor(data, f"{item}/grad/input")) <= 1e-5
    for ours, parameter in head.named_parameters():
        if names[ours] in case["without_gradient"]:
            assert parameter.grad is None, ours
        else:
            assert relative_l2(parameter.grad, tensor(data, f"{item}/grad/{names[ours]}")) <= 1e-5, ours


# --- whole nets ------------------------------------------------------------------------------------------------------


def unit(name, count):
    """Numbers in [0,1) of a tensor's name, as the files' `meta.formula` says."""
    h = (np.uint64(2654435761) * np.arange(count, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        h ^= h >> np.uint64(shift)
        h = h * np.uint64(factor) % 2**32
    return h / 2**32


def weights_of(name, like):
    """The file's tensor of the authors' name."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros_like(like)
    u = unit(name, like.numel())
    if name.endswith((".running_mean", ".bias")):
        values = 0.1 * (2 * u - 1)
    elif name.endswith(".running_var"):
        values = 0.5 + u
    elif like.ndim == 1:
        values = 0.75 + 0.5 * u
    else:
        values = np.sqrt(3 / np.prod(like.shape[1:])) * (2 * u - 1)
    return torch.from_numpy(values.astype(np.float32)).reshape(like.shape)


@pytest.fixture
def net_of(monkeypatch):
    """A file's net with its weights, as the authors' state dict is loaded, and their names of its tensors."""

    def build(meta, item, with_weights=True):
        case = meta["cases"][item]
        layers = tuple(case["layers"])
        name = next((n for n, (block, counts) in RESNETS.items() if (block, counts) == (Bottleneck, layers)), "slim")
        monkeypatch.setitem(RESNETS, name, (Bottleneck, layers))
        model = SNR if case.get("extra_keys") else PLAIN
        monkeypatch.setitem(MODEL_BACKBONES, model, (name,))
        with torch.device("meta"):
            net = build_segmentation_net(SegmentationShape(model, name, case["num_classes"]))
        if not with_weights:
            return net
        own = net.state_dict()
        theirs = {key: weights_of(key, own[our_name(key)]) for key in case["state_dict_keys"]}
        for key, values in meta["formula_examples"].items():
            np.testing.assert_allclose(theirs[key].flatten()[:4], values, rtol=1e-6)
        theirs["conv1.weight"] = theirs["conv1.weight"].flip(1)
        net.load_state_dict({our_name(key): value for key, value in theirs.items()}, assign=True)
        for key in case["state_dict_keys"]:
            if "." in key and our_name(key) in dict(net.named_parameters()):
                net.get_parameter(our_name(key)).requires_grad_(key not in case["not_trainable"])
        return net

    return build


def image_of(case):
    shape = case["input_shape"]
    values = 100 * (2 * unit(case["input_name"], np.prod(shape)) - 1)
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def outputs_of(net, image):
    """Outputs of the stages before their restitution, low logits of both heads, and both logits; the image is BGR."""
    found = {}
    watched = {f"stage{k}": getattr(net.backbone, f"layer{k}")[-1] for k in range(1, 5)}
    watched |= {f"{name}_low": head for name, head in net.head.items()}
    hooks = [
        module.register_forward_hook(lambda m, i, o, name=name: found.update({name: o}))
        for name, module in watched.items()
    ]
    found["main"], found["aux"] = net.both_logits(image.flip(1))
    for hook in hooks:
        hook.remove()
    return found


def reversed_if_first(name, value):
    return value.flip(1) if name == "conv1.weight" else value


@over("snr_deeplab", lambda data, meta: sorted(meta["cases"]))
def test_outputs(path, item, net_of):
    data, meta = load(path)
    case, net = meta["cases"][item], net_of(meta, item).eval()
    with torch.no_grad():
        found = outputs_of(net, image_of(case))
    for k in range(1, 5):
        stage = found[f"stage{k}"]
        assert float(stage.abs().mean()) == pytest.approx(float(data[f"{item}/stage{k}_abs_mean"]), rel=1e-4)
        assert relative_l2(stage[:, 0], tensor(data, f"{item}/stage{k}_channel0")) <= 1e-4, k
    for name in ("main_low", "aux_low"):
        assert relative_l2(found[name], tensor(data, f"{item}/{name}")) <= 1e-4, name
    for name in ("main", "aux"):
        expected = tensor(data, f"{item}/{name}")
        assert relative_l2(found[name][:, : expected.shape[1]], expected) <= 1e-4, name


@over("snr_deeplab", lambda data, meta: sorted(meta["cases"]))
def test_parameters_and_groups(path, item, net_of):
    case, net = load(path)[1]["cases"][item], net_of(load(path)[1], item, with_weights=False)
    assert sum(p.numel() for p in net.parameters()) == case["parameters"]
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == case["trainable_parameters"]
    assert sorted(map(our_name, case["state_dict_keys"])) == sorted(net.state_dict())
    names = {id(p): name for name, p in net.named_parameters()}
    ours = [[names[id(p)] for p in group["params"]] for group in parameter_groups(net, 1.0)]
    published = [{our_name(name) for name in group["names"]} for group in case["optimiser_groups"]]
    # The published optimiser leaves the restitution out; ours trains it with the backbone.
    assert set(ours[0]) == published[0] | {our_name(name) for name in case.get("extra_keys", ())}
    assert set(ours[1]) == published[1]
    assert len(set(ours[0])) == len(ours[0])


AT_ZERO = 3e-6  # a ReLU's input this small, relative to the layer's mean, has either sign in float32


def trained(net, case, dtype):
    """A net after a backward pass, its outputs and its loss."""
    net = net.to(dtype).train()
    image, classes = image_of(case).to(dtype), case["num_classes"]
    label = torch.arange(image.numel() // 3).reshape(image.shape[0], *image.shape[2:])
    label = (7 * label % (classes + 1)) - 1
    label = torch.where(label < 0, IGNORE, label)
    found = outputs_of(net, image)
    loss = cross_entropy(found["main"], label) + 0.1 * cross_entropy(found["aux"], label)
    loss.backward()
    return net, found, float(loss)


def watch_relus(net, seen, flipped=None):
    """Collect (call, position) of the inputs near zero of a net's ReLUs; one of them gets the other sign."""
    calls = itertools.count()

    def hook(module, inputs):
        x, call = inputs[0], next(calls)
        size = x.detach().abs().flatten()
        seen.extend((call, int(at)) for at in (size < AT_ZERO * size.mean()).nonzero())
        if flipped and flipped[0] == call:
            sign = torch.ones_like(size)
            sign[flipped[1]] = -1
            return (x * sign.view_as(x),)
        return None

    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(hook)
    return net


def possible_gradients(net_of, case):
    """The gradients in float64 for every choice of the signs that float32 leaves open; their changes add up."""

    def gradients(seen, flipped=None):
        net = trained(watch_relus(net_of(), seen, flipped), case, torch.float64)[0]
        return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    seen = []
    exact = gradients(seen)
    changes = [{name: g - exact[name] for name, g in gradients([], flipped).items()} for flipped in seen]
    for chosen in itertools.product((0, 1), repeat=len(changes)):
        yield {
            name: g + sum(on * change[name] for on, change in zip(chosen, changes, strict=True))
            for name, g in exact.items()
        }  # fmt: skip


@over("snr_deeplab", lambda data, meta: [x for x in sorted(meta["cases"]) if f"{x}/train_loss" in data])
def test_training(path, item, net_of):
    data, meta = load(path)
    case = meta["cases"][item]
    net, found, loss = trained(net_of(meta, item), case, torch.float32)
    assert loss == pytest.approx(float(data[f"{item}/train_loss"]), rel=1e-4)
    for name in ("main_low", "aux_low"):
        assert relative_l2(found[name].detach(), tensor(data, f"{item}/train_{name}")) <= 1e-4, name
    without = {our_name(name) for name in case["train_without_gradient"]}
    assert {name for name, p in net.named_parameters() if p.grad is None} == without
    idle = tuple(name.removesuffix("*") for name in net.idle(both=True))
    assert all(name.startswith((*idle, "backbone.bn1.")) for name in without)
    for name in (name for name in data if name.startswith(f"{item}/train_after/")):
        theirs = name.removeprefix(f"{item}/train_after/")
        assert relative_l2(net.get_buffer(our_name(theirs)), tensor(data, name)) <= 1e-4, theirs
    heads = {name: tensor(data, name) for name in data if name.startswith(f"{item}/train_grad_head/")}
    assert heads

    def beyond(gradients):
        """The names of the gradients that are further from the file's than its tolerance."""
        wrong = []
        for name, head in heads.items():
            theirs = name.removeprefix(f"{item}/train_grad_head/")
            norm = float(data[f"{item}/train_grad_norm/{theirs}"])
            bound = 3e-2 if theirs.startswith("style_reid") else 1e-3
            ours = reversed_if_first(theirs, gradients[our_name(theirs)]).flatten()
            near = relative_l2(ours[: len(head)], head) <= bound
            wrong += [] if near and float(ours.norm()) == pytest.approx(norm, rel=bound) else [theirs]
        return wrong

    found = [beyond(gradients) for gradients in possible_gradients(lambda: net_of(meta, item), case)]
    assert len(found) <= 64, "too many open signs to mean anything"
    assert [] in found, found


# --- files -----------------------------------------------------------------------------------------------------------


def theirs_of(net, prefix="module."):
    """A net's state dict by the authors' names."""
    names = {}
    pairs = {"head.aux.branches.": "layer5.conv2d_list.", "head.main.branches.": "layer6.conv2d_list."}
    for k in range(3):
        pairs |= {f"backbone.snr.{k}.norm.": f"IN{k + 1}.", f"backbone.snr.{k}.reduce.": f"style_reid_laye{k + 1}.fc1.",
                  f"backbone.snr.{k}.expand.": f"style_reid_laye{k + 1}.fc2."}  # fmt: skip
    for ours in net.state_dict():
        old = next((old for old in pairs if ours.startswith(old)), "backbone.")
        names[ours] = prefix + pairs.get(old, "") + ours.removeprefix(old)
    state = {names[ours]: value for ours, value in net.state_dict().items()}
    state[f"{prefix}conv1.weight"] = state[f"{prefix}conv1.weight"].flip(1)
    return state


def a_net(model, backbone="resnet18", classes=7):
    torch.manual_seed(0)
    return randomise(build_segmentation_net(SegmentationShape(model, backbone, classes)))


@pytest.mark.parametrize("model", [PLAIN, SNR])
@pytest.mark.parametrize("kind", ["checkpoint", "bare"])
def test_files_of_the_authors(model, kind, tmp_path):
    net, path = a_net(model), tmp_path / "GTA5best.pth"
    state = theirs_of(net, "module." if kind == "checkpoint" else "")
    if kind == "checkpoint":
        # Their scores are numbers of NumPy, which are pickled as calls.
        content = {"epoch": 3, "iteration": 9, "state_dict": state, "optimizer": {}, "best_MIou": np.float64(0.4)}
    else:
        content = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(content, path)
    shape, found = load_segmentation_net(path, "--weights")
    assert shape == SegmentationShape(model, "resnet18", 7)
    image = torch.rand(1, 3, 33, 41)
    with torch.no_grad():
        assert torch.equal(found(image), net(image))
        assert torch.equal(net(image), net.both_logits(image)[0])


def test_a_net_without_restitution_gets_one(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save(theirs_of(a_net(PLAIN)), path)
    shape, net = trainable_net(path, model=SNR, aspp_branches=4)
    assert (shape.model, shape.aspp_branches, net.head["aux"].computed) == (SNR, 4, 4)
    assert "18 tensors (backbone.snr.0.norm.weight, " in net.start
    assert net.start.count("backbone.snr.") == 18
    assert trainable_net(path)[1].start == ""
    own = save_net(tmp_path / "ours.pth", SNR, "resnet18", 7)
    check_refused(lambda: trainable_net(own, model=PLAIN), "does not fit the configured network")
    check_refused(lambda: trainable_net(save_net(tmp_path / "unet.pth"), model=SNR), "is built on resnet101")


@pytest.mark.parametrize("model", [PLAIN, SNR])
def test_imagenet_weights(model, tmp_path):
    net = a_net(model)
    state = {f"Scale.{n}": v for n, v in theirs_of(a_net(PLAIN), "").items() if not n.startswith("layer6")}
    path = tmp_path / "DeepLab_resnet_pretrained_init-f81d91e8.pth"
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    line = load_backbone(net, "resnet18", str(path))
    assert line.count("snr.") == (18 if model == SNR else 0)
    assert torch.equal(net.backbone.conv1.weight.flip(1), state["Scale.conv1.weight"])
    assert torch.equal(net.backbone.layer4[1].conv2.weight, state["Scale.layer4.1.conv2.weight"])


def test_weights_of_torchvision_see_levels_that_are_not_divided(tmp_path):
    import torchvision

    theirs, path = torchvision.models.resnet18(), tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    net = a_net(PLAIN)
    assert load_backbone(net, "resnet18", str(path)) == ""
    pixels = torch.randint(0, 256, (1, 40, 40, 3), dtype=torch.uint8)
    image = pixels.movedim(-1, 1) / 255
    normalised = torchvision.transforms.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        ours, expected = net.backbone.conv1(net.network_input(pixels)), theirs.conv1(normalised)
    inside = (..., slice(2, -2), slice(2, -2))
    # The means of both differ by less than one level.
    assert float((ours[inside] - expected[inside]).abs().mean() / expected[inside].std()) < 0.05


def test_files_that_are_nearly_one(tmp_path):
    path, state = tmp_path / "net.pth", theirs_of(a_net(PLAIN))
    torch.save({n: v for n, v in state.items() if "layer6" not in n}, path)
    assert two_headed(read_published(path)) is None
    check_refused(lambda: load_segmentation_net(path, "--weights"), "AdaptSegNet")
    torch.save({n: v for n, v in state.items() if "layer3.1" not in n}, path)
    check_refused(lambda: load_segmentation_net(path, "--weights"), "its backbone of (2, 2, 1, 2) blocks")
    torch.save({n: v for n, v in state.items() if "layer5.conv2d_list.3" not in n}, path)
    check_refused(lambda: load_segmentation_net(path, "--weights"), "head.aux.branches.3.weight is missing there")


def test_traits_of_every_backbone():
    for name in MODEL_BACKBONES[PLAIN]:
        with torch.device("meta"):
            net = build_segmentation_net(SegmentationShape(SNR, name, 5))
        assert traits_of(net.state_dict(), "it") == (name, 5, True)
        assert isinstance(net.backbone.snr[2], nn.Module)


def test_names_and_branches():
    assert SegmentationShape(SNR, "resnet18", 5, 4).flags("gta5")[-4:] == ["--aspp_branches", "4", "--num_classes", "5"]
    check_refused(lambda: SegmentationShape(PLAIN, "resnet18", 5, 3), "--aspp_branches 3")
    check_refused(lambda: SegmentationShape("DeepLab", "resnet18", 5, 4), "--aspp_branches 4")
