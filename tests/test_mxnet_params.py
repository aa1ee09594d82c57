"""The parser of MXNet's `.params` files: what MXNet wrote, files of all its versions, and files that are spoilt."""

import struct

import numpy as np
import pytest

from mxnet_files import array_bytes, list_bytes, write_params
from refusals import check_refused
from utils.errors import UserError
from utils.mxnet_params import is_mxnet_file, read_mxnet_params

ARRAYS = {"arg:w": np.arange(6, dtype=np.float32).reshape(2, 3), "aux:v": np.ones(3, np.float16)}
# Places in a file of ARRAYS in version 2.
COUNT, FIRST = 16, 24
STORAGE, DIMENSIONS, SIDES, TYPE = FIRST + 4, FIRST + 8, FIRST + 12, FIRST + 36


@pytest.fixture
def file(tmp_path):
    return write_params(tmp_path / "net.params", ARRAYS)


def check_equal(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert (found[name].shape, found[name].dtype) == (values.shape, values.dtype), name
        assert found[name].tobytes() == np.ascontiguousarray(values).tobytes(), name
        assert found[name].shape == values.shape, name


@pytest.mark.parametrize("version", [2, 3])
def test_what_mxnet_wrote(golden_dir, version):
    expected = np.load(golden_dir / "mxnet/expected.npz")
    arrays = {name: expected[name] for name in expected.files}
    if version == 2:  # has neither scalars nor empty arrays
        arrays = {name: values for name, values in arrays.items() if values.ndim and values.size}
    assert {values.dtype.name for values in arrays.values()} == {"float16", "float32", "float64"}
    check_equal(read_mxnet_params(golden_dir / f"mxnet/v{version}.params"), arrays)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sparse", "an array is sparse"), ("integers", "values of type 4"), ("list", "1 arrays and 0 names")],
)
def test_what_mxnet_wrote_and_is_not_read(golden_dir, name, part):
    check_refused(lambda: read_mxnet_params(golden_dir / f"mxnet/{name}.params"), f"{name}.params", part)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_all_versions(tmp_path, version):
    arrays = {**ARRAYS, "arg:d": np.random.default_rng(0).random((1, 2, 3, 2))}
    check_equal(read_mxnet_params(write_params(tmp_path / "net.params", arrays, version)), arrays)


def changed(file, place, kind, value):
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{kind}", data, place, value)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "kind", "value", "part"),
    [
        (0, "Q", 0x113, "does not begin with the number 0x112"),
        (COUNT, "Q", 3, ""),
        (COUNT, "Q", 1, ""),
        (COUNT, "Q", 2**63, ""),
        (FIRST, "I", 0xF993FACB, ""),
        (STORAGE, "i", 1, "sparse"),
        (DIMENSIONS, "i", -1, ""),
        (DIMENSIONS, "i", 2**31 - 1, ""),
        (DIMENSIONS, "i", 30, ""),
        (SIDES, "q", -2, "the shape (-2, 3)"),
        (SIDES, "q", 2**40, ""),
        (SIDES, "q", 2**62, ""),
        (TYPE, "i", 3, "values of type 3"),
    ],
)
def test_a_wrong_number(file, place, kind, value, part):
    changed(file, place, kind, value)
    check_refused(lambda: read_mxnet_params(file), "net.params", part)


def test_wrong_names(tmp_path):
    path, parts = tmp_path / "net.params", [array_bytes(values) for values in ARRAYS.values()]
    whole = list_bytes(parts, ["a", "b"])
    for content, part in (
        (list_bytes(parts, ["a"]), "2 arrays and 1 names"),
        (list_bytes(parts, ["a", "b", "c"]), "2 arrays and 3 names"),
        (whole[:-1] + b"\xff", "can't decode"),
        (whole[:-9] + struct.pack("<Q", 2**64 - 1) + b"b", ""),
    ):
        path.write_bytes(content)
        check_refused(lambda: read_mxnet_params(path), "net.params", part)


def test_every_cut_is_found(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        check_refused(lambda: read_mxnet_params(file), "net.params")


def test_a_flipped_bit_does_no_harm(file):
    """There are no checksums: other numbers may come out, but nothing else may happen."""
    data, refused = file.read_bytes(), 0
    for place, byte in enumerate(data):
        file.write_bytes(data[:place] + bytes([byte ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            sizes = [array.size for array in read_mxnet_params(file).values()]
            assert sum(sizes) <= len(data)
        except UserError:
            refused += 1
    assert refused > len(data) // 2


def test_which_files_are_of_mxnet(file, tmp_path):
    assert is_mxnet_file(file)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("neither picture nor weights")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "empty", tmp_path / "text"):
        assert not is_mxnet_file(path)
        check_refused(lambda: read_mxnet_params(path), path.name)  # noqa: B023
