"""ResNet backbones with output stride 8 for DeepLab (docs/method.md, section 4).

Stages 3 and 4 keep the resolution of stage 2 and dilate their 3x3 convolutions by 2 and 4. In a bottleneck block the
stride sits on the first 1x1 convolution, as in the authors' networks; torchvision puts it on the 3x3. Parameter names
and shapes are torchvision's, so its ImageNet weights load unchanged. At output stride 8 only the first block of stage 2
has a stride at all, so that block alone computes with weights that were trained for the other placement.

`DDBResNet` has torchvision's placement, and in mmsegmentation's `v1c` variants three 3x3 convolutions as its stem.
"""

from torch import Tensor, nn

_STRIDES = (1, 2, 1, 1)
_DILATIONS = (1, 1, 2, 4)


def _conv3x3(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=dilation, dilation=dilation, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; with `ddb` the second is not dilated."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, ddb: bool = False) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride, dilation)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, 1, 1 if ddb else dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,width,h/stride,w/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution and a shortcut; the stride is on the first, with `ddb` on the second."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, dilation: int, ddb: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, 1 if ddb else stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride if ddb else 1, dilation)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B,inputs,h,w) -> (B,4*width,h/stride,w/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Projection where the shape changes: the first block of a stage (of stages 2 to 4 with basic blocks)."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


# The kind of block, and the number of blocks in each stage.
RESNETS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}
DEEP_STEM = "_v1c"


class ResNet(nn.Module):
    """ResNet without its classifier, output stride 8.

    Args:
        name: one of `RESNETS`.
        frozen_norm_affine: the batch norms' weights and biases are not trained; their statistics still are.

    Attributes:
        ddb: built as `DDBResNet`.
    """

    ddb = False

    def __init__(self, name: str, frozen_norm_affine: bool = False) -> None:
        super().__init__()
        block, counts = RESNETS[name.removesuffix(DEEP_STEM)]
        self.out_channels = 512 * block.expansion
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        inputs = 64
        for stage in range(4):
            blocks = []
            for index in range(counts[stage]):
                stride = _STRIDES[stage] if index == 0 else 1
                dilation = _DILATIONS[max(stage - 1, 0) if self.ddb and index == 0 else stage]
                blocks.append(block(inputs, 64 * 2**stage, stride, dilation, self.ddb))
                inputs = 64 * 2**stage * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(not frozen_norm_affine)

    def forward(self, x: Tensor) -> Tensor:
        """(B,3,h,w) -> (B,out_channels,h',w'), h' about h/8; ceil mode makes 9 of 64."""
        x = self.maxpool(self._stem(x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def _stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))


class DDBResNet(ResNet):
    """ResNet as DDB has it: the first block of a dilated stage has the dilation of the stage before it.

    Args:
        name: one of `RESNETS`, or one with `_v1c`: three 3x3 convolutions in place of the 7x7, under mmseg's names.
    """

    ddb = True

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.maxpool.ceil_mode = False
        if not name.endswith(DEEP_STEM):
            return
        del self.conv1, self.bn1
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*layers)

    def _stem(self, x: Tensor) -> Tensor:
        return self.stem(x) if hasattr(self, "stem") else super()._stem(x)
