"""Files of weights of MXNet (`.params`), read with NumPy alone; they hold numbers and names, and nothing is executed.

Little-endian, as MXNet 1.9.1 writes it (`NDArray::Save` in src/ndarray/ndarray.cc):

* the number 0x112 and a reserved one (uint64 each), the number of arrays (uint64), and the arrays;
* the number of names (uint64), and each name's length in bytes (uint64) and text, `arg:` or `aux:` before it.

An array is the number of its version (uint32), its shape, kind and number of its device (int32 each), the type of its
values (int32), and the values in row-major order. In versions 2 and 3 the kind of storage (int32) stands before the
shape. A shape is the number of dimensions (int32), and the sides (int64). The oldest arrays have no number of version,
and sides of uint32. Only arrays of version 3 may be scalars or empty.
"""

import math
import os
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from utils.errors import UserError

_LIST = 0x112
_VERSIONS = {0xF993FAC8: 1, 0xF993FAC9: 2, 0xF993FACA: 3}
_DENSE = 0
_TYPES = {0: np.dtype("<f4"), 1: np.dtype("<f8"), 2: np.dtype("<f2")}
_MOST_ARRAYS = 1 << 16
_MOST_DIMENSIONS = 32
_LONGEST_NAME = 1024  # bytes


@dataclass(frozen=True)
class StoredArray:
    """An array in a file, which is read when it is wanted.

    Attributes:
        offset: of its first value, in bytes.
        dtype: float16, float32 or float64.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Its values, a new array.

        Raises:
            UserError: the file has become shorter, or cannot be read.
        """
        count = math.prod(self.shape)
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                values = np.fromfile(file, self.dtype, count)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        if values.size != count:
            raise _refusal(self.path, "it was cut while it was read")
        return values.reshape(self.shape)


def is_mxnet_file(path: Path) -> bool:
    """Whether a file begins as MXNet's lists of arrays do; False for what is no file or cannot be read."""
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(8) == struct.pack("<Q", _LIST)
    except OSError:
        return False


def read_mxnet_index(path: Path) -> dict[str, StoredArray]:
    """The arrays of a `.params` file by name (`arg:conv1a_weight`), in its order; their values are not read.

    Every length in the file is compared with its size before it is used.

    Raises:
        UserError: missing, unreadable, no such file, cut short or damaged; or it holds arrays that are sparse or of
            integers, or arrays without names.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            return _read_list(_Reader(file), path)
    except ValueError as error:
        raise _refusal(path, str(error)) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is damaged, or no .params file of MXNet as is read here ({reason}); use another file")


class _Reader:
    """Takes numbers, texts and places from a file; raises `ValueError` where the file is too short for them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.place = 0

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; returns where they begin."""
        start = self.place
        if count > self.size - start:
            raise ValueError(f"it ends at byte {self.size}, but byte {start + count} is needed")
        self.place += count
        return start

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        self.file.seek(self.skip(count))
        data = self.file.read(count)
        if len(data) != count:
            raise ValueError("it was cut while it was read")
        return data

    def numbers(self, kinds: str) -> tuple[int, ...]:
        """The next little-endian numbers; `kinds` as for `struct`."""
        return struct.unpack(f"<{kinds}", self.take(struct.calcsize(f"<{kinds}")))


def _read_list(reader: _Reader, path: Path) -> dict[str, StoredArray]:
    if reader.size < 8 or reader.numbers("Q")[0] != _LIST:
        raise ValueError(f"it does not begin with the number 0x{_LIST:x}")
    _, count = reader.numbers("QQ")
    if count > _MOST_ARRAYS:
        raise ValueError(f"it claims {count} arrays; {_MOST_ARRAYS} are the most")
    arrays = []
    for index in range(count):
        try:
            arrays.append(_read_array(reader, path))
        except ValueError as error:
            raise ValueError(f"array {index} of {count}: {error}") from None
    (named,) = reader.numbers("Q")
    if named != count:
        raise ValueError(f"it has {count} arrays and {named} names")
    names = [_read_name(reader) for _ in range(count)]
    if len(set(names)) < count:
        raise ValueError(f"the name {Counter(names).most_common(1)[0][0]!r} comes twice")
    if reader.place < reader.size:
        raise ValueError(f"{reader.size - reader.place} bytes follow its last name")
    return dict(zip(names, arrays, strict=True))


def _read_array(reader: _Reader, path: Path) -> StoredArray:
    (start,) = reader.numbers("I")
    version = 0 if start <= _MOST_DIMENSIONS else _VERSIONS.get(start)
    if version is None:
        raise ValueError(f"it begins with the unknown number 0x{start:x}")
    if version >= 2 and reader.numbers("i")[0] != _DENSE:
        raise ValueError("it is sparse; only dense arrays are read")
    dimensions = start if version == 0 else reader.numbers("i")[0]
    if not (0 if version == 3 else 1) <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"it has {dimensions} dimensions")
    shape = reader.numbers(f"{dimensions}{'I' if version == 0 else 'q'}")
    if min(shape, default=1) < (0 if version == 3 else 1):
        raise ValueError(f"it has the shape {shape}")
    *_, kind = reader.numbers("iii")
    if kind not in _TYPES:
        raise ValueError(f"it has values of type {kind}; only float32, float64 and float16 (0, 1, 2) are read")
    dtype = _TYPES[kind]
    # NumPy refuses some empty arrays with a huge side; these sides are compared with the file, too.
    if math.prod(max(1, side) for side in shape) * dtype.itemsize > reader.size:
        raise ValueError(f"its shape {shape} asks for more bytes than the file has")
    return StoredArray(path, reader.skip(math.prod(shape) * dtype.itemsize), shape, dtype)


def _read_name(reader: _Reader) -> str:
    (length,) = reader.numbers("Q")
    if length > _LONGEST_NAME:
        raise ValueError(f"a name of {length} bytes; {_LONGEST_NAME} are the most")
    return reader.take(length).decode()  # a `UnicodeDecodeError` is a `ValueError`
