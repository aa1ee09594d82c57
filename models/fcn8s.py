"""FCN8s on VGG16 (Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation, 2015).

Every convolution keeps its size (the 7x7 one is padded by 3), instead of padding the image by 100 pixels and cropping
the score maps, and scores are upsampled by fixed bilinear interpolation to the size of the map they are added to. Any
image of at least 32x32 works.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.shapes import VGG16_CONVS, VGG16_POOLINGS
from models.vgg import outputs_at, vgg_layers

FC_CHANNELS = 4096
POOL3, POOL4, POOL5 = VGG16_POOLINGS[2:]


class VGG16Backbone(nn.Module):
    """VGG16 made convolutional: `features`, and its two fully connected layers as convolutions `fc6` and `fc7`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg_layers(VGG16_CONVS, POOL5, ceil_mode=True)
        self.fc6 = nn.Conv2d(VGG16_CONVS[28][1], FC_CHANNELS, 7, padding=3)
        self.fc7 = nn.Conv2d(FC_CHANNELS, FC_CHANNELS, 1)
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,3,h,w) -> pool3 (B,256,h/8,w/8), pool4 (B,512,h/16,w/16), fc7 (B,4096,h/32,w/32), rounded up."""
        outputs = outputs_at(self.features, image, (POOL3, POOL4, POOL5))
        x = self.dropout(F.relu(self.fc6(outputs[POOL5]), inplace=True))
        x = self.dropout(F.relu(self.fc7(x), inplace=True))
        return outputs[POOL3], outputs[POOL4], x


class FCN8sHead(nn.Module):
    """Score layers of the three depths, summed from coarse to fine."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.score_pool3 = nn.Conv2d(VGG16_CONVS[14][1], num_classes, 1)
        self.score_pool4 = nn.Conv2d(VGG16_CONVS[21][1], num_classes, 1)
        self.score_fc7 = nn.Conv2d(FC_CHANNELS, num_classes, 1)
        for layer in (self.score_pool3, self.score_pool4, self.score_fc7):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, pool3: Tensor, pool4: Tensor, fc7: Tensor) -> Tensor:
        """Features of `VGG16Backbone` -> logits (B,num_classes,h/8,w/8)."""
        logits = self.score_pool4(pool4) + _upsample(self.score_fc7(fc7), pool4)
        return self.score_pool3(pool3) + _upsample(logits, pool3)


def _upsample(scores: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(scores, size=like.shape[2:], mode="bilinear", align_corners=False)


class FCN8s(nn.Module):
    """Fully convolutional VGG16 with skips from pool3 and pool4."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.backbone = VGG16Backbone()
        self.head = FCN8sHead(num_classes)

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) in [-1,1] -> logits (B,num_classes,h,w)."""
        return _upsample(self.head(*self.backbone(image)), image)
