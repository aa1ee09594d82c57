"""Files of the two-headed DeepLabV2: nets of the MaxSquare, SNR and AdaptSegNet authors, and their ImageNet weights.

The authors' nets are given blue, green and red, ours red, green and blue: the first convolution is reversed on loading.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_handlers.images import IMAGENET_INPUT
from models.deeplab_multi import DeepLabMulti
from models.resnet import RESNETS
from utils.errors import UserError
from utils.tensor_files import load_network, read_tensor_file

FIRST = "conv1.weight"
_NAMES = (
    (r"layer5\.conv2d_list\.", r"head.aux.branches."), (r"layer6\.conv2d_list\.", r"head.main.branches."),
    (r"IN1\.", "backbone.snr.0.norm."), (r"IN2\.", "backbone.snr.1.norm."), (r"IN3\.", "backbone.snr.2.norm."),
    (r"style_reid_laye1\.", "backbone.snr.0."), (r"style_reid_laye2\.", "backbone.snr.1."),
    (r"style_reid_laye3\.", "backbone.snr.2."), ("", "backbone."),
)  # fmt: skip
_GATE = {".fc1.": ".reduce.", ".fc2.": ".expand."}
_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode")


class _Skipped:
    """Stands for a number of NumPy, such as the best score, which is not read."""

    def __new__(cls, *_: Any) -> "_Skipped":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def our_name(name: str) -> str:
    """Our name of a tensor of the authors' nets."""
    pattern, ours = next((old, new) for old, new in _NAMES if re.match(old, name))
    named = re.sub(f"^{pattern}", ours, name, count=1)
    for theirs, gate in _GATE.items():
        named = named.replace(theirs, gate) if ".snr." in named else named
    return named


def read_published(path: Path) -> dict[str, Any]:
    """The state dict of a published net: bare, or as `state_dict` in a dictionary; without `module.` before its names.

    It is empty where the file holds another thing. Raises `UserError`: missing or damaged.
    """
    stubs = [(type(name, (_Skipped,), {}), name) for name in _NUMBERS]
    with torch.serialization.safe_globals(stubs):
        content = read_tensor_file(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    named = state.items() if isinstance(state, Mapping) else ()
    return {str(name).removeprefix("module."): value for name, value in named}


def two_headed(theirs: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of an authors' two-headed net by our names, None where the state dict is of another net."""
    if any(getattr(theirs.get(name), "ndim", 0) != 4 for name in (FIRST, "layer6.conv2d_list.0.weight")):
        return None
    theirs = {**theirs, FIRST: theirs[FIRST].flip(1)}
    return {our_name(name): value for name, value in theirs.items()}


def traits_of(state: Mapping[str, Tensor], origin: str) -> tuple[str, int, bool]:
    """Backbone, classes and whether it restitutes of a net by our names. Raises `UserError` for no known backbone."""
    classes = len(state["head.main.branches.0.weight"])
    return backbone_of(state, origin), classes, "backbone.snr.0.norm.weight" in state


def backbone_of(state: Mapping[str, Tensor], origin: str) -> str:
    """The ResNet of a net by our names. Raises `UserError`, which names `origin`, if it is none that is known."""
    blocks = tuple(len({n.split(".")[2] for n in state if n.startswith(f"backbone.layer{k}.")}) for k in range(1, 5))
    expansion = 4 if "backbone.layer1.0.conv3.weight" in state else 1
    found = [name for name, (block, counts) in RESNETS.items() if (block.expansion, counts) == (expansion, blocks)]
    if not found:
        raise UserError(f"{origin}: its backbone of {blocks} blocks is none of {', '.join(RESNETS)}")
    return found[0]


def fill(net: DeepLabMulti, state: Mapping[str, Tensor], origin: str) -> list[str]:
    """Load a state dict; a net that restitutes may be given that of one that does not.

    Returns:
        The names of the tensors of the restitution that stay as they are, as the state has none.

    Raises:
        UserError: see `load_network`.
    """
    new = _restitution(net, state)
    load_network(net, counters(net) | new | dict(state), origin)
    return list(new)


def new_tensors(names: list[str], origin: str) -> str:
    """A line that says which tensors a net does not have from a file, '' for none."""
    return f"new in the net, as {origin} has none: {len(names)} tensors ({', '.join(names)})" if names else ""


def load_two_headed_backbone(net: DeepLabMulti, weights: Mapping[str, Tensor], origin: str) -> str:
    """Start the backbone from ImageNet weights.

    Args:
        weights: of torchvision, or the authors' `DeepLab_resnet_pretrained_init-f81d91e8.pth` with `Scale.` before its
            names. Those of torchvision expect levels divided by their deviation: this goes into the first convolution.

    Returns:
        A line with the tensors of the restitution, which have no such weights; '' where there are none.

    Raises:
        UserError: see `load_network`.
    """
    if published := any(name.startswith("Scale.") for name in weights):
        weights = {name.removeprefix("Scale."): value for name, value in weights.items()}
    state = {name: value for name, value in weights.items() if not name.startswith(("layer5.", "fc."))}
    if isinstance(first := state.get(FIRST), Tensor) and first.ndim == 4 and first.shape[1] == 3:
        std = first.new_tensor(IMAGENET_INPUT.std)[:, None, None]
        state[FIRST] = first.flip(1) if published else first / std
    backbone = net.backbone
    new = _restitution(backbone, state)
    load_network(backbone, counters(backbone) | new | state, origin)
    return new_tensors(list(new), origin)


def counters(net: nn.Module) -> dict[str, Tensor]:
    """The counters of batch norm, which nothing reads and older files do not hold."""
    return {name: value for name, value in net.state_dict().items() if name.endswith(".num_batches_tracked")}


def _restitution(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The net's tensors of restitution, if the state has none of them."""
    own = {name: value for name, value in net.state_dict().items() if "snr." in name}
    return {} if own.keys() & state.keys() else own
