"""Which segmentation nets there are, and the layers of VGG16; plain values, importable without PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from data_handlers.datasets import find_data_set
from utils.errors import UserError

SMALLEST_CROP = 16  # pixels; below this nothing is left to train on at output stride 8

_RESNETS = ("resnet101", "resnet50", "resnet34", "resnet18")
DDB_MODEL = "DeepLabV2DDB"
# Backbones of each model, the published one first.
MODEL_BACKBONES = {
    "DeepLabV2": _RESNETS, "DeepLab": _RESNETS, "VGG": ("vgg16",), "UNet": ("none",), "ResNet38": ("resnet38",),
    "DeepLabV2Multi": _RESNETS, "DeepLabV2MultiSNR": _RESNETS, "UNetMulti": ("none",), "UNetMultiSNR": ("none",),
    DDB_MODEL: (*(f"{name}_v1c" for name in _RESNETS), *_RESNETS),
}  # fmt: skip
TWO_HEADED_DEEPLAB, TWO_HEADED_UNET = ("DeepLabV2Multi", "DeepLabV2MultiSNR"), ("UNetMulti", "UNetMultiSNR")
TWO_HEADED = (*TWO_HEADED_DEEPLAB, *TWO_HEADED_UNET)
RESTITUTED = (TWO_HEADED_DEEPLAB[1], TWO_HEADED_UNET[1])
_PUBLISHED = dict(zip(("deeplabv2_multi", "deeplabv2_multi_snr"), TWO_HEADED_DEEPLAB, strict=True))

# The nets of segmentation_models_pytorch, each with the encoder that it gets by default, and the package's encoders;
# TIMM before a name of the package timm is an encoder as well.
SMP, TIMM = "smp:", "tu-"
SMP_MODELS = {
    **{SMP + name: "resnet34" for name in (
        "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet",
    )},
    SMP + "Segformer": "mit_b2", SMP + "DPT": "tu-vit_base_patch16_224.augreg_in21k",
}  # fmt: skip
SMP_ENCODERS = (
    *_RESNETS, "resnet152", "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_32x16d",
    "resnext101_32x32d", "resnext101_32x48d", "dpn68", "dpn68b", "dpn92", "dpn98", "dpn107", "dpn131",
    *(f"vgg{depth}{norm}" for depth in (11, 13, 16, 19) for norm in ("", "_bn")), "senet154", "se_resnet50",
    "se_resnet101", "se_resnet152", "se_resnext50_32x4d", "se_resnext101_32x4d", "densenet121", "densenet169",
    "densenet201", "densenet161", "inceptionresnetv2", "inceptionv4", "mobilenet_v2", "xception",
    *(f"efficientnet-b{k}" for k in range(8)), *(f"timm-efficientnet-b{k}" for k in range(9)), "timm-efficientnet-l2",
    *(f"timm-tf_efficientnet_lite{k}" for k in range(5)), "timm-skresnet18", "timm-skresnet34",
    "timm-skresnext50_32x4d", *(f"mit_b{k}" for k in range(6)), *(f"mobileone_s{k}" for k in range(5)),
)  # fmt: skip

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
    """Which net, on which backbone, with how many classes. Raises `UserError` for what cannot be built.

    Attributes:
        aspp_branches: 2 or 4, branches of the heads of a two-headed net that are computed; the published nets have 2.
    """

    model: str = "DeepLabV2"
    backbone: str = "resnet101"
    num_classes: int = 19
    aspp_branches: int = 2

    def __post_init__(self) -> None:
        models = (*MODEL_BACKBONES, *SMP_MODELS)
        if self.model not in models:
            raise UserError(f"--model {self.model}: no such net; there are {_closest_first(self.model, models)}")
        backbones = MODEL_BACKBONES.get(self.model, SMP_ENCODERS)
        of_timm = self.model in SMP_MODELS and self.backbone.startswith(TIMM)
        if self.backbone not in backbones and not of_timm:
            known = _closest_first(self.backbone, backbones)
            raise UserError(f"--backbone {self.backbone}: {self.model} is built on {known}")
        if not isinstance(self.num_classes, int) or not 2 <= self.num_classes <= 255:
            raise UserError(f"--num_classes is {self.num_classes}; it must be 2 to 255")
        if self.aspp_branches != 2 and (self.aspp_branches != 4 or self.model not in TWO_HEADED_DEEPLAB):
            of = " and ".join(TWO_HEADED_DEEPLAB)
            raise UserError(f"--aspp_branches {self.aspp_branches}: 2 or 4, the latter of {of}")

    def flags(self, source: str) -> list[str]:
        """The command line flags that ask for this shape beside `--source`; those at their defaults are omitted."""
        words = ["--model", self.model]
        if self.backbone != default_backbone(self.model):
            words += ["--backbone", self.backbone]
        if self.aspp_branches != 2:
            words += ["--aspp_branches", str(self.aspp_branches)]
        default = len(find_data_set(source, "--source").class_names)
        return words if self.num_classes == default else [*words, "--num_classes", str(self.num_classes)]

    def __str__(self) -> str:
        backbone = "" if self.backbone == "none" else f" on {self.backbone}"
        return f"{self.model}{backbone} with {self.num_classes} classes"


def default_backbone(model: str) -> str:
    """The backbone of a model where none is named, '' if there is no such model."""
    return SMP_MODELS.get(model) or MODEL_BACKBONES.get(model, ("",))[0]


def model_called(name: str) -> str:
    """Our name of a net that may be called by its published one."""
    return _PUBLISHED.get(name, name)


def _closest_first(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=5)
    return ", ".join(dict.fromkeys([*close, *known]))
