"""DeepLabV2 with two heads, as MaxSquare trains it, and with style normalisation and restitution (SNR) on request.

The auxiliary head reads stage 3 of the backbone, the main head stage 4 (docs/uda.md, section MaxSquare).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handlers.images import NetworkInput
from models.deeplab import DilatedSumHead
from models.losses import at_least_float32
from models.resnet import ResNet

REDUCTION = 16
RESTITUTED_STAGES = 3
# The published nets are given levels less the mean of Caffe's ImageNet nets, and are not divided by any deviation.
CAFFE_INPUT = NetworkInput(mean=(122.67891434, 116.66876762, 104.00698793), std=(1.0, 1.0, 1.0))


class Restituted(NamedTuple):
    """What restitution makes of features (B,C,h,w): the normalised ones, these with what of the style is relevant
    for the task, which go on through the net, and with the rest of it, which only the dual loss reads."""

    normalised: Tensor
    restored: Tensor
    contaminated: Tensor


class Restitution(nn.Module):
    """Instance normalisation whose residual is restored to the share a of a channel gate, in (0,1).

    With the normalised features n = s x + t the restored ones are a x + (1-a) n, an affine map of x in each channel.
    The mean of the residual, which the gate reads, is that of x less the bias of the normalisation.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=True)
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)
        for layer in (self.reduce, self.expand):
            nn.init.normal_(layer.weight, std=0.01)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,C,h,w) -> scale s and offset t of the normalisation, and the gate a, each (B,C,1,1)."""
        variance, mean = torch.var_mean(at_least_float32(x), dim=(2, 3), correction=0, keepdim=True)
        weight, bias = (p[None, :, None, None] for p in (self.norm.weight, self.norm.bias))
        scale = weight * (variance + self.norm.eps).rsqrt()
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(mean - bias))))
        return scale, bias - mean * scale, gate.to(scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the restored features, of the same shape."""
        scale, offset, gate = self.factors(x)
        return x * (gate + (1 - gate) * scale).to(x.dtype) + ((1 - gate) * offset).to(x.dtype)

    def parts(self, x: Tensor) -> Restituted:
        """(B,C,h,w) -> all that restitution makes of it."""
        scale, offset, gate = self.factors(x)
        normalised = x * scale + offset
        residual = x - normalised
        return Restituted(normalised, normalised + gate * residual, normalised + (1 - gate) * residual)


class StagedResNet(ResNet):
    """ResNet that returns its last two stages; the weights and biases of its first batch norm are not trained.

    Args:
        name: one of `models.resnet.RESNETS`.
        restitutes: a `Restitution` follows each of stages 1 to 3.
    """

    def __init__(self, name: str, restitutes: bool) -> None:
        super().__init__(name)
        self.bn1.requires_grad_(False)
        self.stage_channels = tuple(self.out_channels // 2**k for k in (3, 2, 1))
        self.snr = nn.ModuleList(Restitution(channels) for channels in self.stage_channels if restitutes)

    def forward(self, x: Tensor, parts: list[Restituted] | None = None) -> tuple[Tensor, Tensor]:
        """(B,3,h,w) -> features of stages 3 and 4, (B,out_channels/2,h',w') and (B,out_channels,h',w').

        Args:
            parts: what the restitution of each stage makes is appended to it, for the dual loss.
        """
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        third = x
        for number, stage in enumerate(stages):
            third = x
            x = stage(x)
            if number < len(self.snr):
                if parts is None:
                    x = self.snr[number](x)
                else:
                    parts.append(self.snr[number].parts(x))
                    x = parts[-1].restored
        return third, x


class PartialSumHead(DilatedSumHead):
    """The sum of the first of four dilated convolutions; the published nets compute two and carry the others along."""

    def __init__(self, inputs: int, num_classes: int, computed: int) -> None:
        super().__init__(inputs, num_classes)
        self.computed = computed

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> logits (B,num_classes,h,w)."""
        return torch.stack([branch(x) for branch in self.branches[: self.computed]]).sum(dim=0)


class DeepLabMulti(nn.Module):
    """A backbone with a main and an auxiliary head; logits are upsampled bilinearly to the size of the image.

    Args:
        backbone: name of a ResNet.
        restitutes: see `StagedResNet`.
        aspp_branches: 2 or 4 branches of each head that are computed; all four have weights.
    """

    def __init__(self, *, backbone: str, num_classes: int, restitutes: bool, aspp_branches: int) -> None:
        super().__init__()
        self.backbone = StagedResNet(backbone, restitutes)
        channels = self.backbone.out_channels
        self.head = nn.ModuleDict({
            "main": PartialSumHead(channels, num_classes, aspp_branches),
            "aux": PartialSumHead(channels // 2, num_classes, aspp_branches),
        })  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w), made by `network_input` -> logits of the main head (B,num_classes,h,w)."""
        return _upsampled(self.head["main"](self.backbone(image)[1]), image)

    def both_logits(self, image: Tensor, parts: list[Restituted] | None = None) -> tuple[Tensor, Tensor]:
        """(B,3,h,w) -> logits of the main and of the auxiliary head; `parts`: see `StagedResNet.forward`."""
        third, fourth = self.backbone(image, parts)
        return _upsampled(self.head["main"](fourth), image), _upsampled(self.head["aux"](third), image)

    def idle(self, both: bool) -> dict[str, str]:
        """Trainable tensors that do not act, by name (which may end in `*`), with the reason.

        Args:
            both: the auxiliary head is trained, too.
        """
        computed = self.head["main"].computed
        heads = ("main", "aux") if both else ("main",)
        found = {
            f"head.{head}.branches.{k}.*": f"--aspp_branches {computed} computes the first branches of a head alone"
            for head in heads for k in range(computed, len(self.head[head].branches))
        }  # fmt: skip
        return found if both else {**found, "head.aux.*": "the auxiliary head is trained with --multi alone"}


def _upsampled(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True)
