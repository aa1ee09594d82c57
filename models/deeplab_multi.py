"""DeepLabV2 with two heads, as MaxSquare trains it, and with style normalisation and restitution (SNR) on request.

The auxiliary head reads stage 3 of the backbone, the main head stage 4 (docs/uda.md, section MaxSquare).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handlers.images import NetworkInput
from models.deeplab import DilatedSumHead
from models.resnet import ResNet
from models.restitution import IDLE_HEAD, Restituted, Restitution

# The published nets are given levels less the mean of Caffe's ImageNet nets, and are not divided by any deviation.
CAFFE_INPUT = NetworkInput(mean=(122.67891434, 116.66876762, 104.00698793), std=(1.0, 1.0, 1.0))


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
                x = self.snr[number].restore(x, parts)
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
        return found if both else {**found, "head.aux.*": IDLE_HEAD}


def _upsampled(logits: Tensor, image: Tensor) -> Tensor:
    return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=True)
