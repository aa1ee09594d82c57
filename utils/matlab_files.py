"""MATLAB files."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from scipy.io import loadmat, whosmat
from scipy.io.matlab import MatReadError

from utils.errors import UserError

# What scipy raises for files that are damaged or no MATLAB files.
_UNREADABLE = (
    MatReadError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, OSError, struct.error,
    zlib.error,
)  # fmt: skip


def read_matlab_variable(path: Path, name: str) -> np.ndarray:
    """A variable as it is stored. Compressed files hold checksums; scipy does not survive all damage to others.

    Raises `UserError`: missing, no MATLAB file, one of version 7.3, or without the variable.
    """
    try:
        with open(path, "rb") as file:
            return _variable_of(file, path, name)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except NotImplementedError:
        raise UserError(
            f"{path} is a MATLAB file of version 7.3, which cannot be read; save it with -v7 or with scipy.io.savemat"
        ) from None
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is damaged or no MATLAB file ({reason}); replace it") from None


def _variable_of(file: BinaryIO, path: Path, name: str) -> np.ndarray:
    content = loadmat(file, variable_names=[name])
    if name not in content:
        file.seek(0)
        names = ", ".join(held for held, _, _ in whosmat(file)) or "none"
        raise UserError(f"{path} holds no variable {name}; its variables: {names}")
    return content[name]
