"""Which segmentation nets there are, and the layers of VGG16; plain values, importable without PyTorch."""

from dataclasses import dataclass

from utils.errors import UserError

SMALLEST_CROP = 16  # pixels; below this nothing is left to train on at output stride 8

_RESNETS = ("resnet101", "resnet50", "resnet34", "resnet18")
# Backbones of each model, the published one first.
MODEL_BACKBONES = {
    "DeepLabV2": _RESNETS, "DeepLab": _RESNETS, "VGG": ("vgg16",), "UNet": ("none",), "ResNet38": ("resnet38",),
}  # fmt: skip
BACKBONES = tuple(dict.fromkeys(name for backbones in MODEL_BACKBONES.values() for name in backbones))

# (in, out) channels of each convolution of VGG16 by its position in torchvision's `features`; every one is followed by
# a ReLU, and the positions left over are the 2x2 max pools.
VGG16_CONVS = {
    0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256),
    17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512),
}  # fmt: skip
VGG16_POOLINGS = (4, 9, 16, 23, 30)
VGG16_RELUS = tuple(index + 1 for index in VGG16_CONVS)


@dataclass(frozen=True)
class SegmentationShape:
    """Which net, on which backbone, with how many classes. Raises `UserError` for what cannot be built."""

    model: str = "DeepLabV2"
    backbone: str = "resnet101"
    num_classes: int = 19

    def __post_init__(self) -> None:
        if self.model not in MODEL_BACKBONES:
            raise UserError(f"--model {self.model}: no such net; there are {', '.join(MODEL_BACKBONES)}")
        backbones = MODEL_BACKBONES[self.model]
        if self.backbone not in backbones:
            raise UserError(f"--backbone {self.backbone}: {self.model} is built on {', '.join(backbones)}")
        if not isinstance(self.num_classes, int) or not 2 <= self.num_classes <= 255:
            raise UserError(f"--num_classes is {self.num_classes}; it must be 2 to 255")

    def flags(self) -> list[str]:
        """The command line flags that ask for this shape; those at their defaults are omitted."""
        words = ["--model", self.model]
        if self.backbone != default_backbone(self.model):
            words += ["--backbone", self.backbone]
        return words if self.num_classes == 19 else [*words, "--num_classes", str(self.num_classes)]

    def __str__(self) -> str:
        backbone = "" if self.backbone == "none" else f" on {self.backbone}"
        return f"{self.model}{backbone} with {self.num_classes} classes"


def default_backbone(model: str) -> str:
    """The published backbone of a model, '' if there is no such model."""
    return MODEL_BACKBONES.get(model, ("",))[0]
