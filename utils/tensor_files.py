"""Files of tensors and the networks they fill: reading without executing anything, loading strictly, fingerprints."""

import errno
import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, is_out_of_memory

_OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that begins a file of PyTorch before 1.6
_FOLDER = 0x10  # attribute of a record


class DamagedFileError(UserError):
    """A file is damaged, or no file of `torch.save`."""


def check_archive(path: Path) -> None:
    """Compare the records of a file of `torch.save` with their checksums (CRC-32), which `torch.load` does not do.

    A file that is no zip archive passes: PyTorch before 1.6 wrote pickles without checksums.

    Raises:
        UserError: the file is missing or cannot be read.
        DamagedFileError: it is damaged, or its records are not stored as `torch.save` stores them.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(len(_OLD_START))
            if start == _OLD_START or not (start.startswith(b"PK\x03\x04") or zipfile.is_zipfile(file)):
                return
            with zipfile.ZipFile(file) as archive:
                # What is compressed may unpack to far more; for a folder `torch.load` returns uninitialised memory.
                if any(r.compress_type != zipfile.ZIP_STORED or r.external_attr & _FOLDER for r in archive.infolist()):
                    raise ValueError("its records are compressed, or one is a folder")
                if damaged := archive.testzip():
                    raise ValueError(f"its record {damaged[:100]!r} does not have its checksum")
    except Exception as error:  # a reader of a damaged archive can fail in any way
        raise _refusal(error, path) from None


def _refusal(error: Exception, path: Path) -> UserError:
    """What an error of a reader means: another kind than damage where memory, a file server or the path is at fault."""
    if is_out_of_memory(error):
        return UserError(f"{path} asks for more memory than there is; free some, or use another file")
    if isinstance(error, OSError) and error.errno is not None and error.errno != errno.EINVAL:
        return UserError(f"cannot read {path}: {error.strerror}")
    reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
    return DamagedFileError(f"{path} is damaged or cut short, or no file of weights ({reason}); use another copy of it")


def read_tensor_file(path: Path) -> Any:
    """`torch.load` with `weights_only=True` on the CPU; None if the file holds other than tensors and plain values.

    Raises:
        UserError: missing.
        DamagedFileError: damaged, or no file of `torch.save`; see `check_archive`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    check_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of another protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None
    except Exception as error:  # a reader of a damaged file can fail in any way
        raise _refusal(error, path) from None


def read_state_dict(path: Path, flag: str, alternatives: str) -> Mapping[str, Any]:
    """The state dict that `flag` names, bare or under `state_dict`. Raises `UserError`: missing, damaged, or none.

    Args:
        alternatives: what else the flag accepts, for the message.
    """
    try:
        state = read_tensor_file(path)
    except UserError as error:
        raise UserError(f"{flag} {error} (or give {alternatives})") from None
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not _is_state_dict(state):
        raise UserError(f"{flag} {path}: no state dict, it must hold names and tensors alone; nothing else is loaded")
    return state


def _is_state_dict(state: Any) -> bool:
    return isinstance(state, Mapping) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    )


def load_network(network: nn.Module, state: Mapping[str, Any], origin: str) -> None:
    """Load a state dict strictly.

    Raises `UserError`: names `origin` and the first tensor that is missing, unexpected or of another shape.
    """
    if not _is_state_dict(state):
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
    try:
        network.load_state_dict(state)
    except RuntimeError as error:  # a tensor without values, as of the meta device
        raise UserError(f"{origin} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def is_finite(network: nn.Module) -> bool:
    """Whether all weights and buffers are finite."""
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


def weights_fingerprint(*networks: nn.Module) -> str:
    """SHA-256 over names, shapes and values of all weights and buffers."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
