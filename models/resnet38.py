"""ResNet-38 with output stride 8 (Wu, Shen, van den Hengel: Wider or Deeper, 2016), as CBST uses it (`rna-a1`).

A wide residual net of pre-activation units: batch norm, ReLU, dropout where there is one, convolution without bias.
Batch norms normalise by their running statistics in train mode, too, and never update them: the batches of its
published training are too small for statistics of their own. Their weights and biases are trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

OUTPUT_STRIDE = 8
WIDTH = 64  # channels of the first convolution of the published net
NORM_EPSILON = 1.001e-5
HEAD_DILATION = 12
HEAD_CHANNELS = 8  # multiples of the width


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A residual block.

    Attributes:
        channels: of each convolution, as multiples of the width.
        kernels: side of each convolution's kernel, 1 or 3; 1x1 kernels are not dilated.
        stride: of the first convolution, and of the projection.
        dilations: of each convolution.
        dropout: before the last convolution.
        projects: the shortcut is a 1x1 convolution of the first unit's activation, else the input itself.
    """

    channels: tuple[int, ...]
    kernels: tuple[int, ...] = (3, 3)
    stride: int = 1
    dilations: tuple[int, ...] = (1, 1)
    dropout: float = 0.0
    projects: bool = False


_STAGE_6 = {"kernels": (1, 3, 1), "dilations": (1, 4, 1), "projects": True}

# Blocks by their names in the authors' files, in order. The first digit is the stage.
BLOCKS = {
    "2a": BlockShape(channels=(2, 2), stride=2, projects=True),
    **{f"2b{k}": BlockShape(channels=(2, 2)) for k in (1, 2)},
    "3a": BlockShape(channels=(4, 4), stride=2, projects=True),
    **{f"3b{k}": BlockShape(channels=(4, 4)) for k in (1, 2)},
    "4a": BlockShape(channels=(8, 8), stride=2, projects=True),
    **{f"4b{k}": BlockShape(channels=(8, 8)) for k in range(1, 6)},
    "5a": BlockShape(channels=(8, 16), dilations=(1, 2), projects=True),
    **{f"5b{k}": BlockShape(channels=(8, 16), dilations=(2, 2)) for k in (1, 2)},
    "6a": BlockShape(channels=(8, 16, 32), dropout=0.3, **_STAGE_6),
    "7a": BlockShape(channels=(16, 32, 64), dropout=0.5, **_STAGE_6),
}


class RunningNorm2d(nn.BatchNorm2d):
    """Batch norm by its running statistics in any mode; they are never updated."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the same shape."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class Unit(nn.Module):
    """Batch norm, ReLU, dropout of single values, convolution."""

    def __init__(self, *, inputs: int, outputs: int, kernel: int, stride: int, dilation: int, dropout: float) -> None:
        super().__init__()
        padding = dilation if kernel == 3 else 0
        self.norm = RunningNorm2d(inputs)
        self.dropout = nn.Dropout(dropout)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=padding, dilation=dilation, bias=False)

    def activate(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> the same shape, at least 0."""
        return F.relu(self.norm(x), inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,outputs,h/stride,w/stride), rounded up."""
        return self.convolve(self.activate(x))

    def convolve(self, activated: Tensor) -> Tensor:
        """What `forward` does after `activate`."""
        return self.conv(self.dropout(activated))


class Block(nn.Module):
    """Units `branch2a`, `branch2b1`, ... added to a shortcut; `branch1` is the projection, or None."""

    def __init__(self, shape: BlockShape, inputs: int, width: int) -> None:
        super().__init__()
        outputs = [width * multiple for multiple in shape.channels]
        last = len(outputs) - 1
        names = ("branch2a", "branch2b1", "branch2b2")[: last + 1]
        self.units = nn.ModuleDict({
            name: Unit(
                inputs=inputs if k == 0 else outputs[k - 1], outputs=outputs[k], kernel=shape.kernels[k],
                stride=shape.stride if k == 0 else 1, dilation=shape.dilations[k],
                dropout=shape.dropout if k == last else 0.0,
            )
            for k, name in enumerate(names)
        })  # fmt: skip
        self.branch1 = nn.Conv2d(inputs, outputs[-1], 1, shape.stride, bias=False) if shape.projects else None

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,outputs,h/stride,w/stride), rounded up."""
        first, *others = self.units.values()
        activated = first.activate(x)
        shortcut = x if self.branch1 is None else self.branch1(activated)
        y = first.convolve(activated)
        for unit in others:
            y = unit(y)
        return shortcut + y


class ResNet38Backbone(nn.Module):
    """The net up to the last batch norm, `bn7`, and its ReLU; no pooling.

    Args:
        width: channels of the first convolution; all others are multiples of it.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.ModuleDict()
        inputs = width
        for name, shape in BLOCKS.items():
            self.blocks[name] = Block(shape, inputs, width)
            inputs = width * shape.channels[-1]
        self.bn7 = RunningNorm2d(inputs)
        self.out_channels = inputs

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) -> (B,out_channels,h/8,w/8), rounded up; at least 0."""
        x = self.conv1a(image)
        for block in self.blocks.values():
            x = block(x)
        return F.relu(self.bn7(x), inplace=True)


class ResNet38Head(nn.Module):
    """Two 3x3 convolutions dilated by 12, with a ReLU between them."""

    def __init__(self, inputs: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv6a = nn.Conv2d(inputs, channels, 3, padding=HEAD_DILATION, dilation=HEAD_DILATION)
        self.linear = nn.Conv2d(channels, num_classes, 3, padding=HEAD_DILATION, dilation=HEAD_DILATION)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> logits (B,num_classes,h,w)."""
        return self.linear(F.relu(self.conv6a(x), inplace=True))


class ResNet38(nn.Module):
    """Backbone and head; convolutions start He-normal (std sqrt(2 / fan_in)), biases at 0.

    The published net has no upsampling: its training, self-training and evaluation read `coarse_logits`.

    Args:
        width: see `ResNet38Backbone`.
    """

    def __init__(self, num_classes: int, width: int = WIDTH) -> None:
        super().__init__()
        self.backbone = ResNet38Backbone(width)
        self.head = ResNet38Head(self.backbone.out_channels, HEAD_CHANNELS * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def coarse_logits(self, image: Tensor) -> Tensor:
        """(B,3,h,w) -> logits (B,num_classes,h/8,w/8), rounded up: 504x504 becomes 63x63.

        Sides are filled up with zeros, on the right and at the bottom, to multiples of 8. Cell i of a row stands for
        pixels 8i to 8i+7.
        """
        return self.head(self.backbone(F.pad(image, _padding(image.shape[2:]))))

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w), made by `IMAGENET_INPUT` -> logits (B,num_classes,h,w), upsampled bilinearly."""
        height, width = image.shape[2:]
        logits = F.interpolate(
            self.coarse_logits(image), scale_factor=OUTPUT_STRIDE, mode="bilinear", align_corners=False
        )
        return logits[:, :, :height, :width]


def _padding(size: Sequence[int]) -> tuple[int, int, int, int]:
    """What `F.pad` needs to fill (h,w) up to multiples of the output stride."""
    height, width = (math.ceil(side / OUTPUT_STRIDE) * OUTPUT_STRIDE - side for side in size)
    return 0, width, 0, height
