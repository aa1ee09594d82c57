"""The segmentation nets by name, their starting weights and their parameter groups.

Every net maps images (B,3,h,w) to logits (B,num_classes,h,w). Its attribute `network_input` turns uint8 pixels into
these images. A net has a `backbone`, which may start from ImageNet weights, and a `head`, which learns ten times as
fast.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD

from data_handlers.images import IMAGENET_INPUT, PROCST_INPUT
from models.deeplab import AdapterHead, DeepLab, DeepLabDDB, DilatedSumHead, FiveBranchHead
from models.deeplab_multi import CAFFE_INPUT, DeepLabMulti
from models.deeplab_multi_files import load_two_headed_backbone
from models.fcn8s import FCN8s
from models.resnet import DEEP_STEM, DDBResNet, ResNet
from models.resnet38 import ResNet38
from models.resnet38_files import load_resnet38_backbone
from models.shapes import DDB_MODEL, RESTITUTED, SMP_MODELS, TWO_HEADED_DEEPLAB, TWO_HEADED_UNET, SegmentationShape
from models.smp import SmpNet
from models.unet import UNet, UNetMulti
from models.vgg import starting_weights
from utils.errors import UserError
from utils.mxnet_params import is_mxnet_file
from utils.tensor_files import load_network

HEAD_RATE = 10.0


def build_segmentation_net(shape: SegmentationShape) -> nn.Module:
    """A net with random weights.

    Its attributes `network_input`, which makes its input from pixels, and `start`, a line about the weights it starts
    from for the description of a run, are set; `start` is ''.
    """
    if shape.model == "UNet":
        net = UNet(shape.num_classes)
    elif shape.model == "VGG":
        net = FCN8s(shape.num_classes)
    elif shape.model == "ResNet38":
        net = ResNet38(shape.num_classes)
    elif shape.model in SMP_MODELS:
        net = SmpNet(shape)
    elif shape.model == DDB_MODEL:
        backbone = DDBResNet(shape.backbone)
        net = DeepLabDDB(backbone, AdapterHead(backbone.out_channels, shape.num_classes))
    elif shape.model in TWO_HEADED_UNET:
        net = UNetMulti(shape.num_classes, restitutes=shape.model in RESTITUTED)
    elif shape.model in TWO_HEADED_DEEPLAB:
        net = DeepLabMulti(
            backbone=shape.backbone, num_classes=shape.num_classes, restitutes=shape.model in RESTITUTED,
            aspp_branches=shape.aspp_branches,
        )  # fmt: skip
    else:
        backbone = ResNet(shape.backbone, frozen_norm_affine=shape.model == "DeepLab")
        head = FiveBranchHead if shape.model == "DeepLabV2" else DilatedSumHead
        net = DeepLab(backbone, head(backbone.out_channels, shape.num_classes))
    net.start = ""
    if shape.model not in SMP_MODELS:
        inputs = dict.fromkeys(("ResNet38", DDB_MODEL), IMAGENET_INPUT)
        inputs |= dict.fromkeys(TWO_HEADED_DEEPLAB, CAFFE_INPUT)
        net.network_input = inputs.get(shape.model, PROCST_INPUT)
    return net


def parameter_groups(net: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Optimiser groups: the trainable tensors of the backbone at `rate`, those of the head at ten times the rate."""
    groups = ((net.backbone, rate), (net.head, HEAD_RATE * rate))
    return [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for part, lr in groups]


def segmentation_optimizer(net: nn.Module, lr_semseg: float, weight_decay: float, momentum: float) -> SGD:
    """SGD with the backbone at `lr_semseg` and the head at ten times that."""
    groups = parameter_groups(net, lr_semseg)
    return SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)


def load_backbone(net: nn.Module, backbone: str, weights: str) -> str:
    """Start the backbone from ImageNet weights. Raises `UserError`.

    Args:
        net: as `build_segmentation_net` made it on `backbone`.
        weights: `imagenet` (torchvision, or segmentation_models_pytorch for its nets, downloads and caches them) or
            the path of a state dict with the package's names; of `resnet38` the path of the authors' `.params` file.

    Returns:
        A line about the net's start for the description of a run; '' where the weights are torchvision's.
    """
    if backbone == "none":
        raise UserError("--backbone_weights: this model has no ImageNet weights; use --no_pretrained_backbone")
    if backbone == "resnet38":
        if weights == "imagenet":
            raise UserError(
                "--backbone_weights imagenet: torchvision has no weights of ResNet-38; give the authors' ImageNet "
                "classifier (--backbone_weights FILE.params), or --no_pretrained_backbone"
            )
        return load_resnet38_backbone(net, Path(weights), "--backbone_weights")
    if backbone.endswith(DEEP_STEM) and weights == "imagenet":
        raise UserError(
            f"--backbone_weights imagenet: torchvision has no weights of {backbone}; give mmsegmentation's file of it "
            f"(--backbone_weights FILE), --backbone {backbone.removesuffix(DEEP_STEM)}, or --no_pretrained_backbone"
        )
    if isinstance(net, SmpNet) and weights == "imagenet":
        return net.load_imagenet()
    if is_mxnet_file(Path(weights)):
        raise UserError(f"--backbone_weights {weights}: a file of MXNet, from which --model ResNet38 alone starts")
    origin = f"torchvision's {backbone}" if weights == "imagenet" else f"--backbone_weights {weights}"
    found = starting_weights(weights, backbone, "--backbone_weights", "--no_pretrained_backbone")
    if isinstance(net, DeepLabMulti):
        return load_two_headed_backbone(net, found, origin)
    own, state = net.backbone.state_dict(), {}
    for name, value in found.items():
        ours = name.replace("classifier.0.", "fc6.").replace("classifier.3.", "fc7.")
        if ours in ("fc6.weight", "fc7.weight") and ours in own and value.numel() == own[ours].numel():
            value = value.reshape(own[ours].shape)  # the weights of a fully connected layer as those of a convolution
        if not ours.startswith(("fc.", "classifier.")):  # the classifier of ImageNet's classes
            state[ours] = value
    # Older files of torchvision do not hold the counters of batch norm, which nothing reads.
    counters = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")}
    load_network(net.backbone, counters | state, origin)
    return ""


def require_features(net: nn.Module, origin: str) -> None:
    """Raise `UserError`, which begins with `origin`, unless the net has features for prototypes.

    Such a net has a method `features_and_logits`: images (B,3,h,w) to features (B,D,h',w') and logits (B,C,h,w).
    """
    if not hasattr(net, "features_and_logits"):
        raise UserError(f"{origin}: a net without features for prototypes; {DDB_MODEL} and UNet have them")


def require_classes(num_classes: int, data_set: str, id_map: Mapping[int, int], origin: str = "") -> None:
    """Check that a net can predict every class of a data set. Raises `UserError`.

    Args:
        origin: the net's file, for the message; '' if `--num_classes` says it.
    """
    largest = max(id_map.values(), default=0)
    if largest >= num_classes:
        raise UserError(
            f"{f'{origin} has {num_classes} classes' if origin else f'--num_classes is {num_classes}'}, but the labels "
            f"of {data_set} have trainIds 0..{largest}; {largest + 1} classes are needed"
        )
