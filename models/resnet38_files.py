"""The authors' `.params` files of ResNet-38: segmentation nets, and the ImageNet classifier that they start from."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from models.resnet38 import ResNet38
from utils.errors import UserError
from utils.mxnet_params import read_mxnet_params
from utils.tensor_files import load_network

_LAST_LAYER = re.compile(r"arg:linear([0-9]{1,4})_weight")
_NAME = re.compile(r"(?:arg|aux):(bn|res)?([a-z0-9]+)(?:_(branch\w+?))?_(\w+?)")
# The ends of the authors' names, and what we call these tensors.
_TENSORS = {
    "weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean",
    "moving_var": "running_var",
}  # fmt: skip


def classes_in_file(path: Path) -> int:
    """The number of classes of the segmentation net in a `.params` file.

    Raises `UserError`: no sound `.params` file, or one without a segmentation net.
    """
    arrays = read_mxnet_params(path)
    found = [match for match in map(_LAST_LAYER.fullmatch, arrays) if match]
    if len(found) != 1 or "arg:conv1a_weight" not in arrays:
        raise UserError(f"{path}: holds no ResNet-38, the only net that is read from .params files")
    if "arg:conv6a_weight" not in arrays:
        raise UserError(
            f"{path} holds a classifier, no segmentation net; train one that starts from it with "
            "train_semseg_on_source.py --model ResNet38 --backbone_weights FILE"
        )
    return int(found[0][1])


def load_resnet38(net: ResNet38, path: Path) -> None:
    """Load a published segmentation net, strictly.

    Raises `UserError`: no sound `.params` file, or one of another net.
    """
    _load(net, {_our_name(name): array for name, array in read_mxnet_params(path).items()}, str(path))


def load_resnet38_backbone(net: ResNet38, path: Path, flag: str) -> str:
    """Load the backbone from the ImageNet classifier's file, or from a segmentation net's; the head stays as it is.

    Args:
        flag: names `path` in messages.

    Returns:
        A line that says which tensors are new.

    Raises:
        UserError: no sound `.params` file, or one of another net.
    """
    try:
        arrays = {_our_name(name): array for name, array in read_mxnet_params(path).items()}
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    origin = f"{flag} {path}"
    new, left = [list(filter(lambda name: name.startswith("head."), names)) for names in (net.state_dict(), arrays)]
    kept = {name.removeprefix("backbone."): array for name, array in arrays.items() if name not in left}
    _load(net.backbone, kept, origin)
    unused = f"; not used of the file: {', '.join(left)}" if left else ""
    return f"the net starts from {origin}, but for new tensors: {', '.join(new)}{unused}"


def _our_name(name: str) -> str:
    """The name in `ResNet38` of one of the authors' tensors, such as `arg:bn2a_branch2a_gamma`; else the same name."""
    match = _NAME.fullmatch(name)
    if match is None or match[4] not in _TENSORS:
        return name
    kind, layer, branch, tensor = match[1], match[2], match[3], _TENSORS[match[4]]
    if branch == "branch1":
        return f"backbone.blocks.{layer}.branch1.{tensor}"
    if branch:
        return f"backbone.blocks.{layer}.units.{branch}.{'norm' if kind == 'bn' else 'conv'}.{tensor}"
    part = {"conv6a": "head.conv6a", f"linear{layer[6:]}": "head.linear"}.get(layer, f"backbone.{kind or ''}{layer}")
    return f"{part}.{tensor}"


def _load(net: nn.Module, arrays: Mapping[str, np.ndarray], origin: str) -> None:
    """Load arrays by our names; MXNet's files do not hold the counters of batch norm, which nothing reads."""
    counters = {name: value for name, value in net.state_dict().items() if name.endswith(".num_batches_tracked")}
    load_network(net, counters | {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, origin)
