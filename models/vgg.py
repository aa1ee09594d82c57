"""The perceptual network: VGG16's `features`, cut after the deepest layer asked for, frozen.

Images enter in [-1,1] without ImageNet mean and standard deviation, as the method feeds them (docs/method.md,
section 3). Layers are counted as positions in torchvision's `vgg16().features`.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from models.shapes import VGG16_CONVS, VGG16_RELUS
from utils.errors import UserError
from utils.tensor_files import read_state_dict


def vgg_layers(
    convs: Mapping[int, tuple[int, int]], last: int, *, kept: Sequence[int] = (), ceil_mode: bool = False
) -> nn.Sequential:
    """The positions 0..`last` of a VGG's `features`.

    Args:
        convs: (in, out) channels of each 3x3 convolution by position; ReLU follows at the next position and every
            other position is a max pool.
        kept: convolutions whose output the following ReLU must not overwrite.
    """
    layers: list[nn.Module] = []
    for position in range(last + 1):
        if position in convs:
            layers.append(nn.Conv2d(*convs[position], kernel_size=3, padding=1))
        elif position - 1 in convs:
            layers.append(nn.ReLU(inplace=position - 1 not in kept))
        else:
            layers.append(nn.MaxPool2d(2, ceil_mode=ceil_mode))
    return nn.Sequential(*layers)


def outputs_at(features: nn.Sequential, x: Tensor, positions: Collection[int]) -> dict[int, Tensor]:
    """The outputs of the modules at some positions of a stack, by position."""
    outputs = {}
    for position, module in enumerate(features):
        x = module(x)
        if position in positions:
            outputs[position] = x
    return outputs


class VGGFeatures(nn.Module):
    """A frozen VGG `features` stack that returns the outputs at the positions `layers` and ends at the deepest."""

    def __init__(self, convs: Mapping[int, tuple[int, int]], layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = frozenset(layers)
        self.features = vgg_layers(convs, max(layers), kept=layers)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> dict[int, Tensor]:
        """(B,3,h,w) in [-1,1] -> {layer: (B,C,h',w')}; gradients reach the image, never the weights."""
        return outputs_at(self.features, image, self.layers)


def build_vgg(weights: str, layers: Sequence[int], seed: int = 0) -> VGGFeatures:
    """VGG16 features with ImageNet weights from torchvision, weights from a file, or seeded random ones.

    Args:
        weights: `imagenet` (torchvision downloads and caches them), `random`, or the path of a state dict with
            torchvision's names (`features.0.weight` ... or `0.weight` ...), which may stop early.
        layers: positions wanted.
        seed: of the random weights.

    Raises:
        UserError: a layer VGG16 does not have or the file does not reach, an unreadable file, a failed download.
    """
    unknown = [layer for layer in layers if layer not in VGG16_RELUS]
    if unknown or not layers:
        raise UserError(
            f"layer {unknown} is no ReLU output of VGG16's features; choose from {list(VGG16_RELUS)} "
            "(--content_layers, --style_layers, --layer)"
        )
    if weights == "random":
        return _random_vgg(layers, seed)
    state = starting_weights(weights, "vgg16", "--vgg_weights", "--vgg_weights random")
    return vgg_from_state_dict(state, layers, f"--vgg_weights {weights}")


def starting_weights(weights: str, network: str, flag: str, otherwise: str) -> Mapping[str, Tensor]:
    """The ImageNet weights of a network of torchvision, or the state dict in a file. Raises `UserError`.

    Args:
        weights: `imagenet` (torchvision downloads and caches them) or a path, the value of `flag`.
        network: its name in `torchvision.models`.
        otherwise: the flag for random weights.
    """
    if weights != "imagenet":
        return read_state_dict(Path(weights), flag, f"imagenet, or {otherwise}")
    try:
        return torchvision.models.get_model(network, weights="IMAGENET1K_V1").state_dict()
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"torchvision could not load its ImageNet {network} weights ({error}); connect once, or give a file with "
            f"{flag} PATH (a state dict with torchvision's names), or {otherwise}"
        ) from None


def _random_vgg(layers: Sequence[int], seed: int) -> VGGFeatures:
    """He-initialised, so that activations keep their scale through the stack."""
    net = VGGFeatures(VGG16_CONVS, layers)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)
    return net


def vgg_from_state_dict(state: Mapping[str, Tensor], layers: Sequence[int], origin: str) -> VGGFeatures:
    """A stack whose channel counts follow the given weights (any widths), cut after the deepest of `layers`.

    Raises `UserError`: names `origin`; a layer is not reached, or the tensors do not form the stack.
    """
    tensors = {name.removeprefix("features."): value for name, value in state.items()}
    needed = [index for index in VGG16_CONVS if index < max(layers)]
    if missing := [index for index in needed if f"{index}.weight" not in tensors]:
        raise UserError(
            f"{origin} lacks features.{missing[0]}; choose --content_layers and --style_layers below, or fuller weights"
        )
    try:
        net = VGGFeatures({index: tensors[f"{index}.weight"].shape[1::-1] for index in needed}, layers)
        names = [f"{index}.{kind}" for index in needed for kind in ("weight", "bias")]
        net.features.load_state_dict({name: tensors[name] for name in names})
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{origin}: the tensors do not form VGG16's features ({reason})") from None
    return net
