"""Files of tensors and the networks they fill: reading without executing anything, loading strictly, fingerprints."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from utils.errors import UserError, is_out_of_memory

_ARCHIVE_START = b"PK\x03\x04"
_OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that began a file before PyTorch 1.6
_ENCRYPTED = 1  # in the flags of a record
_FOLDER = 0x10  # in its attributes
_CHUNK = 1 << 20
_PASSING = {errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO}


class DamagedFileError(UserError):
    """A file is not as it was written."""


class UnavailableFileError(UserError):
    """A file cannot be read at the moment, and may be whole."""


def check_archive(path: Path) -> None:
    """Check a file of `torch.save` before `torch.load` sees it, which compares no checksum and believes every size.

    Every byte of every record is compared with its checksum. A file that is no zip archive passes: `torch.save` wrote
    one pickle after another before PyTorch 1.6, and such a file has no checksums.

    Raises:
        UserError: the file is missing or unreadable.
        DamagedFileError: it is damaged, or an archive as no `torch.save` makes one: records that are compressed,
            encrypted or larger than the file, that share a name or whose name leads out of the archive.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - what is wrong inside means something else than not getting inside
    except OSError as error:
        _raise_if_passing(error, path)
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    with file:
        try:
            oddity = _oddity_of_archive(file)
        # A damaged archive can make the reader fail in any way, and each means the same.
        except Exception as error:
            _raise_if_passing(error, path)
            reason = f"{path} is damaged or cut short ({_reason(error)}); use another copy of it"
            raise DamagedFileError(reason) from None
    if oddity:
        raise DamagedFileError(f"{path} is no file of torch.save: {oddity}; it is not loaded, use the original file")


def _oddity_of_archive(file: BinaryIO) -> str:
    """As `_oddity`; where there is none, every record is compared with its checksum."""
    if not _is_archive(file):
        return ""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if oddity := _oddity(records, os.fstat(file.fileno()).st_size):
            return oddity
        for record in records:
            with archive.open(record) as data:
                while data.read(_CHUNK):  # the last read compares the checksum
                    pass
    return ""


def _is_archive(file: BinaryIO) -> bool:
    start = file.read(len(_OLD_START))
    file.seek(0)
    # The second question is for an archive whose first bytes are damaged.
    return start.startswith(_ARCHIVE_START) or (start != _OLD_START and zipfile.is_zipfile(file))


def _oddity(records: list[zipfile.ZipInfo], file_size: int) -> str:
    """What shows that `torch.save` did not make the archive, '' if nothing does; decided before a record is read."""
    seen = set()
    for record in records:
        name = record.filename
        shown = repr(name[:100])
        if name in seen:
            return f"it holds {shown} twice"
        seen.add(name)
        # `orig_filename` still has what follows a null byte.
        if name.startswith("/") or ".." in name.split("/") or not {"\\", "\0"}.isdisjoint(record.orig_filename):
            return f"its record {shown} leads out of the archive"
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & _ENCRYPTED:
            return f"its record {shown} is compressed or encrypted"
        # For a folder, PyTorch's reader hands out memory that nothing was read into.
        if name.endswith("/") or record.external_attr & _FOLDER:
            return f"its record {shown} is a folder"
        if record.file_size != record.compress_size:
            return f"its record {shown} claims {record.file_size:,} bytes and has {record.compress_size:,}"
    if (claimed := sum(record.file_size for record in records)) > file_size:
        return f"its records claim {claimed:,} bytes, and the file has {file_size:,}"
    return ""


def _raise_if_passing(error: Exception, path: Path) -> None:
    """What fails for want of memory or of a file server may be as it was written: another file must not be used."""
    if is_out_of_memory(error):
        reason = "asks for more memory than there is; free some, or use another file"
        raise UnavailableFileError(f"{path} {reason}") from None
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise UnavailableFileError(f"cannot read {path}: {error.strerror}") from None


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "it asks for more memory than there is"
    return str(error).splitlines()[0][:150] if str(error) else type(error).__name__


def read_tensor_file(path: Path) -> Any:
    """`torch.load` with `weights_only=True` on the CPU; None if the file names anything but tensors and plain values.

    Raises:
        UserError: missing.
        DamagedFileError: damaged, or not a file that `torch.save` wrote; see `check_archive`.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return None
    # A damaged file can make the reader fail in any way, and each means the same.
    except Exception as error:
        _raise_if_passing(error, path)
        raise DamagedFileError(f"{path} is damaged or not a checkpoint ({_reason(error)})") from None


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
        check_archive(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{flag} {path}: not a state dict of plain tensors; nothing else is loaded") from None
    # A damaged file can make the reader fail in any way, and each means the same.
    except Exception as error:
        raise UserError(f"{flag} {path}: not a readable state dict ({_reason(error)})") from None
    if not isinstance(state, Mapping):
        raise UserError(f"{flag} {path}: holds a {type(state).__name__}, not a state dict")
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UserError(f"{flag} {path}: no state dict, it must hold names and tensors alone")
    return state
