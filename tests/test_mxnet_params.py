"""The parser of MXNet's `.params` files: what MXNet wrote, files of all its versions, and files that are spoilt."""

import struct
import tracemalloc

import numpy as np
import pytest

from mxnet_files import array_bytes, list_bytes, write_params
from refusals import check_refused
from utils.errors import UserError
from utils.mxnet_params import is_mxnet_file, read_mxnet_index

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
        assert found[name].read().tobytes() == np.ascontiguousarray(values).tobytes(), name
        assert found[name].read().shape == values.shape, name


@pytest.mark.parametrize("version", [2, 3])
def test_what_mxnet_wrote(golden_dir, version):
    expected = np.load(golden_dir / "mxnet/expected.npz")
    arrays = {name: expected[name] for name in expected.files}
    if version == 2:  # has neither scalars nor empty arrays
        arrays = {name: values for name, values in arrays.items() if values.ndim and values.size}
    assert {values.dtype.name for values in arrays.values()} == {"float16", "float32", "float64"}
    check_equal(read_mxnet_index(golden_dir / f"mxnet/v{version}.params"), arrays)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sparse", "array 0 of 1: it is sparse"), ("integers", "values of type 4"), ("list", "1 arrays and 0 names")],
)
def test_what_mxnet_wrote_and_is_not_read(golden_dir, name, part):
    check_refused(lambda: read_mxnet_index(golden_dir / f"mxnet/{name}.params"), f"{name}.params", part)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_all_versions(tmp_path, version):
    arrays = {**ARRAYS, "arg:d": np.random.default_rng(0).random((1, 2, 3, 2))}
    check_equal(read_mxnet_index(write_params(tmp_path / "net.params", arrays, version)), arrays)


def changed(file, place, kind, value):
    data = bytearray(file.read_bytes())
    struct.pack_into(f"<{kind}", data, place, value)
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("place", "kind", "value", "part"),
    [
        (0, "Q", 0x113, "does not begin with the number 0x112"),
        (COUNT, "Q", 3, "array 2 of 3"),
        (COUNT, "Q", 1, "arrays and"),
        (COUNT, "Q", 2**63, "claims"),
        (FIRST, "I", 0xF993FACB, "unknown number 0xf993facb"),
        (STORAGE, "i", 1, "sparse"),
        (STORAGE, "i", -1, "sparse"),
        (DIMENSIONS, "i", -1, "-1 dimensions"),
        (DIMENSIONS, "i", 0, "0 dimensions"),
        (DIMENSIONS, "i", 2**31 - 1, "2147483647 dimensions"),
        (DIMENSIONS, "i", 30, "is needed"),
        (SIDES, "q", -2, "the shape (-2, 3)"),
        (SIDES, "q", 0, "the shape (0, 3)"),
        (SIDES, "q", 2**40, "more bytes than the file has"),
        (SIDES, "q", 2**62, "more bytes than the file has"),
        (TYPE, "i", 3, "values of type 3"),
        (TYPE, "i", 100, "values of type 100"),
    ],
)
def test_a_wrong_number(file, place, kind, value, part):
    changed(file, place, kind, value)
    check_refused(lambda: read_mxnet_index(file), "net.params", part)


def test_wrong_names(tmp_path):
    path, parts = tmp_path / "net.params", [array_bytes(values) for values in ARRAYS.values()]
    whole = list_bytes(parts, ["a", "b"])
    for content, part in (
        (list_bytes(parts, ["a", "a"]), "'a' comes twice"),
        (list_bytes(parts, ["a"]), "2 arrays and 1 names"),
        (list_bytes(parts, ["a", "b", "c"]), "2 arrays and 3 names"),
        (list_bytes(parts, ["a", "b" * 2000]), "a name of 2000 bytes"),
        (whole[:-1] + b"\xff", "can't decode"),
        (whole[:-9] + struct.pack("<Q", 2**64 - 1) + b"b", "a name of 18446744073709551615 bytes"),
        (whole + b"\0", "1 bytes follow"),
    ):
        path.write_bytes(content)
        check_refused(lambda: read_mxnet_index(path), "net.params", part)


def test_an_empty_array_with_a_huge_side(tmp_path):
    empty = np.zeros((0, 3), np.float32)
    path = write_params(tmp_path / "net.params", {"arg:e": empty}, 3)
    check_equal(read_mxnet_index(path), {"arg:e": empty})
    changed(path, SIDES + 8, "q", 2**62)
    check_refused(lambda: read_mxnet_index(path), "more bytes than the file has")


def test_every_cut_is_found(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        check_refused(lambda: read_mxnet_index(file), "net.params")


def test_a_flipped_bit_does_no_harm(file):
    """There are no checksums: other numbers may come out, but nothing else may happen."""
    data, refused = file.read_bytes(), 0
    for place, byte in enumerate(data):
        file.write_bytes(data[:place] + bytes([byte ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            sizes = [array.read().size for array in read_mxnet_index(file).values()]
            assert sum(sizes) <= len(data)
        except UserError:
            refused += 1
    assert refused > len(data) // 2


def test_values_are_read_when_they_are_wanted(tmp_path):
    """The index of half a gigabyte, a hole of the disk, is small."""
    path, size = tmp_path / "large.params", 1 << 29
    empty = list_bytes([array_bytes(np.zeros((1, 1), np.float32))], ["arg:w"])
    with open(path, "wb") as file:
        file.write(empty[:SIDES] + struct.pack("<qq", size // 4096, 1024) + empty[SIDES + 16 : TYPE + 4])
        file.seek(size, 1)
        file.write(empty[TYPE + 8 :])
    tracemalloc.start()
    found = read_mxnet_index(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["arg:w"].shape == (size // 4096, 1024)
    assert peak < 1 << 20
    with open(path, "r+b") as file:
        file.truncate(100)
    check_refused(found["arg:w"].read, "large.params", "cut while it was read")
    path.unlink()
    check_refused(found["arg:w"].read, "large.params", "No such file")


def test_which_files_are_of_mxnet(file, tmp_path):
    assert is_mxnet_file(file)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("neither picture nor weights")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "empty", tmp_path / "text"):
        assert not is_mxnet_file(path)
        check_refused(lambda: read_mxnet_index(path), path.name)  # noqa: B023
