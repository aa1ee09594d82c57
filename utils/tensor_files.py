"""Files of tensors and the networks they fill: reading without executing anything, loading strictly, fingerprints."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError


class DamagedFileError(UserError):
    """A file is not as it was written."""


def read_tensor_file(path: Path) -> Any:
    """`torch.load` with `weights_only=True` on the CPU; None if the file names anything but tensors and plain values.

    Raises:
        UserError: missing.
        DamagedFileError: not a file that `torch.save` wrote, or damaged since.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None
    # A damaged file can make the reader fail in any way, and each means the same.
    except Exception as error:
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise DamagedFileError(f"{path} is damaged or not a checkpoint ({reason})") from None


def weights_fingerprint(*networks: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_network(network: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Load a state dict strictly.

    Raises:
        UserError: names `origin` and the first tensor that is missing, unexpected or of another shape.
    """
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise UserError(f"{origin} is no state dict: it must hold names and tensors alone")
    own = network.state_dict()
    problems = [
        f"{name} is {tuple(state[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [f"{name} is missing there" for name in own if name not in state]
    problems += [f"{name} is unknown here" for name in state if name not in own]
    if problems:
        raise UserError(f"{origin} does not fit the configured network: {problems[0]} ({len(problems)} differences)")
    network.load_state_dict(state)


def read_state_dict(path: Path, flag: str, alternatives: str) -> Mapping[str, Any]:
    """A state dict that `flag` names.

    Args:
        alternatives: what else the flag accepts, for the message about a missing file.

    Raises:
        UserError: missing, damaged, or anything else than names and plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file (give a file, {alternatives})")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{flag} {path}: not a state dict of plain tensors; nothing else is loaded") from None
    # A damaged file can make the reader fail in any way, and each means the same.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{flag} {path}: not a readable state dict ({reason})") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{flag} {path}: holds a {type(state).__name__}, not a state dict")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UserError(f"{flag} {path}: no state dict, it must hold names and tensors alone")
    return state
