"""Files of weights of MXNet (`.params`), read with NumPy alone; they hold numbers and names, and nothing is executed.

Little-endian, as MXNet 1.9.1 writes it (`NDArray::Save` in src/ndarray/ndarray.cc):

* the number 0x112 and a reserved one (uint64 each), the number of arrays (uint64), and the arrays;
* the number of names (uint64), and each name's length in bytes (uint64) and text, `arg:` or `aux:` before it.

An array is the number of its version (uint32), its shape, kind and number of its device (int32 each), the type of its
values (int32), and the values in row-major order. In versions 2 and 3 the kind of storage (int32) stands before the
shape. A shape is the number of dimensions (int32), and the sides (int64). The oldest arrays have no number of version,
and sides of uint32.
"""

import math
import struct
from pathlib import Path

import numpy as np

from utils.errors import UserError

_LIST = 0x112
_VERSIONS = {0xF993FAC8: 1, 0xF993FAC9: 2, 0xF993FACA: 3}
_DENSE = 0
_TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f8"), 2: np.dtype("<f2")}


def is_mxnet_file(path: Path) -> bool:
    """Whether a file begins as MXNet's lists of arrays do; False for what is no file or cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(8) == struct.pack("<Q", _LIST)
    except OSError:
        return False


def read_mxnet_params(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a `.params` file by name (`arg:conv1a_weight`), in its order: read-only views of the mapped file.

    Raises:
        UserError: missing, unreadable, no such file, cut short or damaged; or it holds arrays that are sparse or of
            integers, or arrays without names.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        return _Reader(np.memmap(path, mode="r")).arrays()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, OverflowError, struct.error) as error:
        reason = f"is damaged, or no .params file of MXNet as is read here ({error})"
        raise UserError(f"{path} {reason}; use another file") from None


class _Reader:
    """Takes what a file holds, one after the other; `ValueError` or `struct.error` where that cannot be."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.place = data, 0

    def numbers(self, kinds: str) -> tuple:
        """The next little-endian values; `kinds` as for `struct`."""
        values = struct.unpack_from(f"<{kinds}", self.data, self.place)
        self.place += struct.calcsize(f"<{kinds}")
        return values

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        start, _, count = self.numbers("QQQ")
        if start != _LIST:
            raise ValueError(f"it does not begin with the number 0x{_LIST:x}")
        found: list[np.ndarray] = []
        while len(found) < count:
            found.append(self._array())
        (named,) = self.numbers("Q")
        if named != count:
            raise ValueError(f"it has {count} arrays and {named} names")
        names = [self.numbers(f"{self.numbers('Q')[0]}s")[0].decode() for _ in found]
        return dict(zip(names, found, strict=True))

    def _array(self) -> np.ndarray:
        (start,) = self.numbers("I")
        version = _VERSIONS.get(start, 0)
        if version >= 2 and self.numbers("i")[0] != _DENSE:
            raise ValueError("an array is sparse; only dense ones are read")
        dimensions = self.numbers("i")[0] if version else start
        shape = self.numbers(f"{dimensions}{'q' if version else 'I'}")
        *_, kind = self.numbers("iii")
        if kind not in _TYPES or min(shape, default=1) < 0:
            raise ValueError(f"an array has the shape {shape} and values of type {kind}; only floats (0 to 2) are read")
        values = np.frombuffer(self.data, _TYPES[kind], math.prod(shape), self.place)
        self.place += values.nbytes
        return values.reshape(shape)
