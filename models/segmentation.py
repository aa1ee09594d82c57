"""The segmentation nets by name, their starting weights and their parameter groups.

Every net maps images (B,3,h,w) to logits (B,num_classes,h,w). Its attribute `network_input` turns uint8 pixels into
these images. A net has a `backbone`, which may start from ImageNet weights, and a `head`, which learns ten times as
fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torch.optim import SGD

from data_handlers.images import PROCST_INPUT
from models.deeplab import DeepLab, DilatedSumHead, FiveBranchHead
from models.fcn8s import FCN8s
from models.resnet import RESNETS, ResNet
from models.shapes import SegmentationShape
from models.unet import UNet
from utils.errors import UserError
from utils.tensor_files import load_network, read_state_dict

HEAD_RATE = 10.0


def build_segmentation_net(shape: SegmentationShape) -> nn.Module:
    """A net with PyTorch's default random weights, and with its `network_input`, which makes its input from pixels."""
    if shape.model == "UNet":
        net = UNet(shape.num_classes)
    elif shape.model == "VGG":
        net = FCN8s(shape.num_classes)
    else:
        backbone = ResNet(RESNETS[shape.backbone], frozen_norm_affine=shape.model == "DeepLab")
        head = FiveBranchHead if shape.model == "DeepLabV2" else DilatedSumHead
        net = DeepLab(backbone, head(backbone.out_channels, shape.num_classes))
    net.network_input = PROCST_INPUT
    return net


def parameter_groups(net: nn.Module, rate: float) -> list[dict[str, Any]]:
    """Optimiser groups: the trainable tensors of the backbone at `rate`, those of the head at ten times the rate."""
    groups = ((net.backbone, rate), (net.head, HEAD_RATE * rate))
    return [{"params": [p for p in part.parameters() if p.requires_grad], "lr": lr} for part, lr in groups]


def segmentation_optimizer(net: nn.Module, lr_semseg: float, weight_decay: float, momentum: float) -> SGD:
    """SGD with the backbone at `lr_semseg` and the head at ten times that."""
    groups = parameter_groups(net, lr_semseg)
    return SGD(groups, momentum=momentum, weight_decay=weight_decay, fused=True)


def load_backbone(net: nn.Module, backbone: str, weights: str) -> None:
    """Start the backbone from ImageNet weights.

    Args:
        net: as `build_segmentation_net` made it on `backbone`.
        weights: `imagenet` (torchvision downloads and caches them) or the path of a state dict with torchvision's
            names.

    Raises:
        UserError: a failed download, an unreadable file, weights of another network, or a net without ImageNet weights.
    """
    if backbone == "none":
        raise UserError("--backbone_weights: this model has no ImageNet weights; use --no_pretrained_backbone")
    if weights == "imagenet":
        origin, state = f"torchvision's {backbone}", _download_imagenet_weights(backbone)
    else:
        origin = f"--backbone_weights {weights}"
        state = read_state_dict(Path(weights), "--backbone_weights", "or imagenet")
    if backbone == "vgg16":
        state = _convolutional_vgg16(state, origin)
    else:
        state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    # Older files of torchvision do not hold the counters of batch norm, which nothing reads.
    own = net.backbone.state_dict()
    counters = {name: value for name, value in own.items() if name.endswith(".num_batches_tracked")}
    load_network(net.backbone, counters | state, origin)


def _download_imagenet_weights(backbone: str) -> Mapping[str, Tensor]:
    try:
        return torchvision.models.get_model(backbone, weights="IMAGENET1K_V1").state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision could not load its ImageNet {backbone} weights ({error}); connect once, or give a file with "
            "--backbone_weights PATH (a state dict with torchvision's names), or --no_pretrained_backbone"
        ) from None


def _convolutional_vgg16(state: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """torchvision's VGG16 with its first two fully connected layers as convolutions, without the third."""
    renamed = {"classifier.0": ("fc6", (-1, 512, 7, 7)), "classifier.3": ("fc7", (-1, 4096, 1, 1))}
    converted = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        if layer == "classifier.6":
            continue
        if layer in renamed:
            layer, shape = renamed[layer]
            try:
                value = value.reshape(shape) if kind == "weight" else value
            except RuntimeError:
                raise UserError(f"{origin}: {name} has the shape {tuple(value.shape)}, not VGG16's") from None
        converted[f"{layer}.{kind}"] = value
    return converted


def require_classes(num_classes: int, data_set: str, id_map: Mapping[int, int], origin: str = "") -> None:
    """Check that a net can predict every class of a data set.

    Args:
        origin: the net's file, for the message; '' if `--num_classes` says it.

    Raises:
        UserError: `num_classes` is too small for the trainIds in `id_map`.
    """
    largest = max(id_map.values(), default=0)
    if largest >= num_classes:
        raise UserError(
            f"{f'{origin} has {num_classes} classes' if origin else f'--num_classes is {num_classes}'}, but the labels "
            f"of {data_set} have trainIds 0..{largest}; {largest + 1} classes are needed"
        )
