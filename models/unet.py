"""A small U-Net (Ronneberger, Fischer, Brox, 2015) with group norm, for small pictures and CPUs, with one head or two.

0.5 million parameters: what the demo and the measurements on 160x80 pictures train. Group norm, because batch norm's
running statistics carry the source's brightness into the target.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.restitution import IDLE_HEAD, Restituted, Restitution

WIDTHS = (16, 32, 64, 128)
NORM_GROUPS = 8


def _two_convs(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        conv = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.GroupNorm(NORM_GROUPS, outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNetEncoder(nn.Module):
    """Pairs of convolutions with 2x2 max pools between them.

    Args:
        restitutes: a `Restitution` follows each stage but the coarsest.
    """

    def __init__(self, restitutes: bool = False) -> None:
        super().__init__()
        inputs = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList([_two_convs(i, o) for i, o in zip(inputs, WIDTHS, strict=True)])
        self.stage_channels = WIDTHS[:-1]
        self.snr = nn.ModuleList(Restitution(channels) for channels in self.stage_channels if restitutes)

    def forward(self, image: Tensor, parts: list[Restituted] | None = None) -> list[Tensor]:
        """(B,3,h,w) -> features from fine to coarse, the sides halved and rounded up at each.

        Args:
            parts: what the restitution of each stage makes is appended to it, for the dual loss.
        """
        features = []
        x = image
        for number, stage in enumerate(self.stages):
            x = stage(x if not features else F.max_pool2d(x, 2, ceil_mode=True))
            if number < len(self.snr):
                x = self.snr[number].restore(x, parts)
            features.append(x)
        return features


class UNetDecoder(nn.Module):
    """From coarse to fine: upsample, concatenate with the encoder's features, two convolutions; then classify."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        fine_to_coarse = list(pairwise(WIDTHS))
        self.stages = nn.ModuleList([_two_convs(fine + coarse, fine) for fine, coarse in reversed(fine_to_coarse)])
        self.classify = nn.Conv2d(WIDTHS[0], num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features of `UNetEncoder` -> logits (B,num_classes,h,w)."""
        return self.classify(self.hidden(features))

    def hidden(self, features: list[Tensor]) -> Tensor:
        """Features of `UNetEncoder` -> those of the last hidden layer (B,16,h,w)."""
        *skips, x = features
        for stage, skip in zip(self.stages, reversed(skips), strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = stage(torch.cat([skip, x], dim=1))
        return x


class UNet(nn.Module):
    """Encoder-decoder with skips."""

    # On a CPU its group norms of few channels lose more by channels last than its convolutions gain.
    prefers_channels_last = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = UNetEncoder()
        self.head = UNetDecoder(num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) in [-1,1] -> logits (B,num_classes,h,w)."""
        # Its group norms of few channels are slow on images laid out channels last.
        return self.head(self.backbone(image.contiguous()))

    def features_and_logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,h,w) -> features (B,16,h,w) and logits (B,num_classes,h,w)."""
        features = self.head.hidden(self.backbone(image.contiguous()))
        return features, self.head.classify(features)


class UNetMulti(nn.Module):
    """U-Net with an auxiliary head, which reads the second coarsest stage (docs/uda.md, section MaxSquare).

    Args:
        restitutes: see `UNetEncoder`.
    """

    prefers_channels_last = False

    def __init__(self, num_classes: int, restitutes: bool) -> None:
        super().__init__()
        self.backbone = UNetEncoder(restitutes)
        aux = nn.Sequential(_two_convs(WIDTHS[-2], WIDTHS[-2]), nn.Conv2d(WIDTHS[-2], num_classes, 1))
        self.head = nn.ModuleDict({"main": UNetDecoder(num_classes), "aux": aux})

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) in [-1,1] -> logits of the main head (B,num_classes,h,w)."""
        return self.head["main"](self.backbone(image.contiguous()))

    def both_logits(self, image: Tensor, parts: list[Restituted] | None = None) -> tuple[Tensor, Tensor]:
        """(B,3,h,w) -> logits of the main and of the auxiliary head; `parts`: see `UNetEncoder.forward`."""
        features = self.backbone(image.contiguous(), parts)
        aux = F.interpolate(self.head["aux"](features[-2]), size=image.shape[2:], mode="bilinear", align_corners=False)
        return self.head["main"](features), aux

    def idle(self, both: bool) -> dict[str, str]:
        """See `models.deeplab_multi.DeepLabMulti.idle`."""
        return {} if both else {"head.aux.*": IDLE_HEAD}
