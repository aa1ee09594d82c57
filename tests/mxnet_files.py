"""A writer of MXNet's `.params` files; MXNet 1.9.1 reads what it writes (tests/golden/mxnet/README.md)."""

import struct

import numpy as np

LIST = 0x112
MAGICS = {1: 0xF993FAC8, 2: 0xF993FAC9, 3: 0xF993FACA}
TYPES = {"float32": 0, "float64": 1, "float16": 2, "int32": 4}


def array_bytes(values, version=2, storage=0):
    """An array as MXNet writes it; version 0 is that of its first releases."""
    shape, kind = values.shape, TYPES[values.dtype.name]
    if version == 0:
        head = struct.pack(f"<I{len(shape)}I", len(shape), *shape)
    else:
        dense = b"" if version == 1 else struct.pack("<i", storage)
        head = struct.pack("<I", MAGICS[version]) + dense + struct.pack(f"<i{len(shape)}q", len(shape), *shape)
    return head + struct.pack("<iii", 1, 0, kind) + np.ascontiguousarray(values).tobytes()


def list_bytes(arrays, names):
    """A file of written arrays and names."""
    texts = b"".join(struct.pack("<Q", len(name.encode())) + name.encode() for name in names)
    return struct.pack("<QQQ", LIST, 0, len(arrays)) + b"".join(arrays) + struct.pack("<Q", len(names)) + texts


def write_params(path, arrays, version=2):
    """Write arrays by name; returns the path."""
    path.write_bytes(list_bytes([array_bytes(values, version) for values in arrays.values()], list(arrays)))
    return path
