"""The authors' `.params` files of ResNet-38: segmentation nets, and the ImageNet classifier that they start from.

Names are the authors': `arg:bn2a_branch2a_gamma`, `arg:res2a_branch2a_weight`, `aux:bn2a_branch2a_moving_mean`, ...;
the last layer is `linear<classes>`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.resnet38 import ResNet38
from utils.errors import UserError
from utils.mxnet_params import StoredArray, read_mxnet_index

_LAST_LAYER = re.compile(r"arg:linear([0-9]{1,4})_weight")
_OF_A_HEAD = re.compile(r"arg:(conv6a|linear[0-9]{1,4})_(weight|bias)")


def classes_in_file(path: Path) -> int:
    """The number of classes of the segmentation net in a `.params` file.

    Raises:
        UserError: no sound `.params` file, or one without a segmentation net.
    """
    arrays = read_mxnet_index(path)
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

    Raises:
        UserError: no sound `.params` file, or one of another net.
    """
    _fill(_named(net), read_mxnet_index(path), str(path))


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
        arrays = read_mxnet_index(path)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None
    own, origin = _named(net), f"{flag} {path}"
    new = [name for name in own if _OF_A_HEAD.fullmatch(name)]
    left = [name for name in arrays if _OF_A_HEAD.fullmatch(name)]
    _fill(
        {name: tensor for name, tensor in own.items() if name not in new},
        {name: array for name, array in arrays.items() if name not in left}, origin,
    )  # fmt: skip
    unused = f"; not used of the file: {_list(left)}" if left else ""
    return f"the net starts from {origin}, but for new tensors: {_list(new)}{unused}"


def _list(names: list[str]) -> str:
    return ", ".join(name.removeprefix("arg:") for name in names)


def _named(net: ResNet38) -> dict[str, Tensor]:
    """The net's parameters and running statistics by the authors' names."""
    layers: dict[str, nn.Module] = {"conv1a": net.backbone.conv1a}
    for block_name, block in net.backbone.blocks.items():
        for branch, unit in block.units.items():
            layers |= {f"bn{block_name}_{branch}": unit.norm, f"res{block_name}_{branch}": unit.conv}
        if block.branch1 is not None:
            layers[f"res{block_name}_branch1"] = block.branch1
    layers |= {"bn7": net.backbone.bn7, "conv6a": net.head.conv6a}
    layers[f"linear{net.head.linear.out_channels}"] = net.head.linear
    tensors = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            tensors[f"arg:{name}_weight"] = layer.weight
            if layer.bias is not None:
                tensors[f"arg:{name}_bias"] = layer.bias
        else:
            tensors |= {f"arg:{name}_gamma": layer.weight, f"arg:{name}_beta": layer.bias}
            tensors |= {f"aux:{name}_moving_mean": layer.running_mean, f"aux:{name}_moving_var": layer.running_var}
    return tensors


@torch.no_grad()
def _fill(tensors: Mapping[str, Tensor], arrays: Mapping[str, StoredArray], origin: str) -> None:
    """Copy the arrays into the tensors of the same names, one after the other, once all names and shapes agree."""
    problems = [
        f"{name} is {arrays[name].shape} there and {tuple(tensor.shape)} here"
        for name, tensor in tensors.items()
        if name in arrays and arrays[name].shape != tuple(tensor.shape)
    ]
    problems += [f"{name} is missing there" for name in tensors if name not in arrays]
    problems += [f"{name!r} is unknown here" for name in arrays if name not in tensors]
    if problems:
        raise UserError(f"{origin} does not fit ResNet38: {problems[0]} ({len(problems)} differences)")
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(arrays[name].read()))
