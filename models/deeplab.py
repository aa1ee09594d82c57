"""DeepLabV2 with the two heads the method knows (docs/method.md, section 4), and with that of DDB (docs/uda.md)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DILATIONS = (6, 12, 18, 24)
BRANCH_CHANNELS = 256
NORM_GROUPS = 32
SQUEEZE_REDUCTION = 16


def _branch(inputs: int, kernel: int, dilation: int) -> nn.Sequential:
    padding = dilation if kernel == 3 else 0
    return nn.Sequential(
        nn.Conv2d(inputs, BRANCH_CHANNELS, kernel, padding=padding, dilation=dilation),
        nn.GroupNorm(NORM_GROUPS, BRANCH_CHANNELS),
        nn.ReLU(inplace=True),
    )


class SqueezeExcitation(nn.Module):
    """Scales each channel by a factor in (0,1) computed from the global averages of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // SQUEEZE_REDUCTION)
        self.expand = nn.Linear(channels // SQUEEZE_REDUCTION, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same shape."""
        factors = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean(dim=(2, 3))))))
        return x * factors[:, :, None, None]


class FiveBranchHead(nn.Module):
    """The head of `DeepLabV2`: a 1x1 and four dilated 3x3 branches, concatenated, reweighted, fused, classified."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_branch(inputs, 1, 1), *(_branch(inputs, 3, d) for d in DILATIONS)])
        channels = BRANCH_CHANNELS * len(self.branches)
        self.squeeze = SqueezeExcitation(channels)
        self.fuse = nn.Conv2d(channels, BRANCH_CHANNELS, 3, padding=1)
        self.fuse_norm = nn.GroupNorm(NORM_GROUPS, BRANCH_CHANNELS)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(BRANCH_CHANNELS, num_classes, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> logits (B,num_classes,h,w)."""
        x = self.squeeze(torch.cat([branch(x) for branch in self.branches], dim=1))
        return self.classify(self.dropout(self.fuse_norm(self.fuse(x))))


class DilatedSumHead(nn.Module):
    """The head of `DeepLab`: the sum of four dilated 3x3 convolutions."""

    def __init__(self, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(inputs, num_classes, 3, padding=d, dilation=d) for d in DILATIONS])
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> logits (B,num_classes,h,w)."""
        return torch.stack([branch(x) for branch in self.branches]).sum(dim=0)


def _conv_norm(inputs: int, outputs: int, dilation: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class AdapterHead(nn.Module):
    """The head of `DeepLabV2DDB`: dilated 3x3 branches, concatenated, an adapter, whose output is the feature of the
    prototypes, and a classifier.

    Args:
        channels: of the feature.
    """

    def __init__(
        self, inputs: int, num_classes: int, channels: int = BRANCH_CHANNELS, dilations: Sequence[int] = (6, 12)
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList([_conv_norm(inputs, channels // len(dilations), d) for d in dilations])
        self.adapter = _conv_norm(channels, channels, 1)
        self.dropout = nn.Dropout2d(0.1)
        self.classify = nn.Conv2d(channels, num_classes, 1)
        for branch in self.branches:
            nn.init.normal_(branch[0].weight, std=0.01)
        nn.init.kaiming_normal_(self.adapter[0].weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> features (B,channels,h,w)."""
        return self.dropout(self.adapter(torch.cat([branch(x) for branch in self.branches], dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> logits (B,num_classes,h,w)."""
        return self.classify(self.features(x))


class DeepLab(nn.Module):
    """A backbone and a head; logits are upsampled bilinearly, corners aligned, to the size of the image."""

    align_corners = True

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) in [-1,1] -> logits (B,num_classes,h,w)."""
        return self.with_features(image)[0]

    def with_features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,h,w) -> the logits, and the features of the backbone's last stage (B,C,h',w')."""
        features = self.backbone(image)
        return self._upsampled(self.head(features), image), features

    def _upsampled(self, logits: Tensor, image: Tensor) -> Tensor:
        return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=self.align_corners)


class DeepLabDDB(DeepLab):
    """A `DDBResNet` with an `AdapterHead`; corners are not aligned."""

    align_corners = False

    def features_and_logits(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,h,w), made by `network_input` -> features (B,256,h',w'), h' about h/8, and logits (B,C,h,w)."""
        features = self.head.features(self.backbone(image))
        return features, self._upsampled(self.head.classify(features), image)
