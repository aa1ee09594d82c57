"""Nets of the package segmentation_models_pytorch (`--model smp:ARCHITECTURE --backbone ENCODER`).

The package takes seconds to import, so that it is imported where such a net is made.
"""

import logging
import warnings
from types import ModuleType

import torch.nn.functional as F
from torch import Tensor, nn

from data_handlers.images import IMAGENET_INPUT, NetworkInput
from models.shapes import SMP, TIMM, SegmentationShape
from utils.errors import UserError

# Encoders whose ImageNet weights expect other pixels than `IMAGENET_INPUT`, by the beginnings of their names.
_CENTRED = NetworkInput(mean=(127.5,) * 3, std=(127.5,) * 3)
_INPUTS = {
    "dpn": NetworkInput(mean=(124.0, 117.0, 104.0), std=(1 / 0.0167,) * 3),
    "inception": _CENTRED, "xception": _CENTRED, "timm-tf_efficientnet_lite": _CENTRED,
}  # fmt: skip
# The sides become multiples of this: the encoders' output stride, and what PAN's pyramid needs.
_MULTIPLE, _MULTIPLE_OF_PAN = 32, 128


class SmpNet(nn.Module):
    """A net of the package with random weights, for images of any size.

    Raises `UserError` if the package is not installed, or refuses the encoder in this architecture.
    """

    def __init__(self, shape: SegmentationShape) -> None:
        super().__init__()
        self.shape = shape
        self.multiple = _MULTIPLE_OF_PAN if shape.model == f"{SMP}PAN" else _MULTIPLE
        self.model = self._made(None)
        self.network_input = _network_input(shape.backbone)

    @property
    def backbone(self) -> nn.Module:
        """The encoder."""
        return self.model.encoder

    @property
    def head(self) -> nn.Module:
        """The decoder and the classifier."""
        return nn.ModuleList([self.model.decoder, self.model.segmentation_head])

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w), made by `network_input` -> logits (B,num_classes,h,w)."""
        height, width = image.shape[2:]
        padded = F.pad(image, (0, -width % self.multiple, 0, -height % self.multiple))
        try:
            logits = self.model(padded)
        except ValueError as error:  # a batch norm of one value
            raise UserError(f"--batch_size: {self.shape} cannot train on this batch ({error}); raise it") from None
        if logits.shape[2:] != padded.shape[2:]:
            logits = F.interpolate(logits, size=padded.shape[2:], mode="bilinear", align_corners=False)
        return logits[:, :, :height, :width]

    def load_imagenet(self) -> str:
        """Load the package's own ImageNet weights of the encoder, downloaded and cached by it; a line that names them.

        Raises `UserError` for a failed download.
        """
        name, package = self.shape.backbone, _package()
        known = () if name.startswith(TIMM) else tuple(package.encoders.encoders[name]["pretrained_settings"])
        weights = "imagenet" if "imagenet" in known or not known else known[0]  # timm's have one name alone
        self.backbone.load_state_dict(self._made(weights).encoder.state_dict())
        return f"the backbone starts from segmentation_models_pytorch's {name} ({weights})"

    def _made(self, weights: str | None) -> nn.Module:
        """A new net of the package, its encoder with the named weights or, for None, random ones."""
        shape, package = self.shape, _package()
        more = {"dynamic_img_size": True} if shape.model == f"{SMP}DPT" else {}
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every attempt to download
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about names that the package will replace
                return package.create_model(
                    shape.model.removeprefix(SMP), encoder_name=shape.backbone, encoder_weights=weights,
                    classes=shape.num_classes, **more,
                )  # fmt: skip
        except Exception as error:  # the package and the download fail in many ways
            reason = " ".join(str(error).split())[:300]
            if weights is not None:
                raise UserError(
                    f"segmentation_models_pytorch could not load its {shape.backbone} weights ({reason}); connect "
                    "once, or give a file with --backbone_weights PATH, or --no_pretrained_backbone"
                ) from None
            raise UserError(f"--model {shape.model} --backbone {shape.backbone}: no such net ({reason})") from None


def _package() -> ModuleType:
    try:
        import segmentation_models_pytorch
    except ModuleNotFoundError as error:
        raise UserError(f"--model smp:...: {error.name} is not installed; `make env` installs it") from None
    return segmentation_models_pytorch


def _network_input(encoder: str) -> NetworkInput:
    if not encoder.startswith(TIMM):
        return next((found for start, found in _INPUTS.items() if encoder.startswith(start)), IMAGENET_INPUT)
    import timm

    config = timm.get_pretrained_cfg(encoder.removeprefix(TIMM))
    if config is None:
        return IMAGENET_INPUT
    mean, std = (tuple(255.0 * value for value in values) for values in (config.mean, config.std))
    return NetworkInput(mean=mean, std=std)
