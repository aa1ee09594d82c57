"""The check of a file of weights before it is loaded: damage anywhere is found, sound files of all ages pass."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch

from hostile_files import records, write_archive
from utils.errors import UserError
from utils.tensor_files import check_archive, read_state_dict, read_tensor_file

CONTENT = {"a": torch.arange(40.0), "b": {"c": torch.ones(3, 3, dtype=torch.bfloat16)}}


@pytest.fixture
def file(tmp_path):
    torch.save(CONTENT, tmp_path / "file.pth")
    return tmp_path / "file.pth"


def outcome(path):
    """What a file holds, or the message that refuses it."""
    try:
        return read_tensor_file(path), ""
    except UserError as error:
        return None, str(error)


def test_a_flipped_bit_is_found_wherever_it_is(file):
    good = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        data = [(r.header_offset, r.file_size, len(r.filename)) for r in archive.infolist()]
    held = set()
    for offset, size, name in data:
        start = offset + 30 + name + int.from_bytes(good[offset + 28 : offset + 30], "little")
        held.update(range(start, start + size))
    refused = 0
    # Between the records is padding, of which samples do; what follows the last one is the directory.
    for place in sorted({*held, *range(0, len(good), 5), *range(data[-1][0], len(good))}):
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << place % 8)]) + good[place + 1 :])
        content, message = outcome(file)
        if message:
            assert place not in held or "is damaged" in message
            refused += 1
            continue
        # Padding, times and the like: whoever reads the file does not see the difference.
        assert place not in held
        assert torch.equal(content["a"], CONTENT["a"])
        assert torch.equal(content["b"]["c"], CONTENT["b"]["c"])
    assert refused > len(held) > 250


def test_a_record_marked_as_a_folder_is_refused(file):
    """PyTorch's reader believes the mark and hands out memory as it finds it."""
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        data[archive.start_dir + 38] |= 0x10
    file.write_bytes(data)
    with pytest.raises(UserError, match="is a folder"):
        read_tensor_file(file)


def test_every_cut_is_found(file):
    good = file.read_bytes()
    for length in range(0, len(good), 13):
        file.write_bytes(good[:length])
        assert outcome(file)[0] is None
        if length > 4:
            with pytest.raises(UserError, match="damaged or cut short"):
                check_archive(file)


@pytest.mark.parametrize("archive", [False, True])
def test_files_of_older_and_newer_pytorch_load(tmp_path, archive):
    torch.save({"w": torch.arange(3.0)}, tmp_path / "vgg.pth", _use_new_zipfile_serialization=archive)
    assert torch.equal(read_tensor_file(tmp_path / "vgg.pth")["w"], torch.arange(3.0))
    assert torch.equal(read_state_dict(tmp_path / "vgg.pth", "--vgg_weights", "")["w"], torch.arange(3.0))


def test_old_data_that_looks_like_the_end_of_an_archive_loads(tmp_path):
    marks = torch.frombuffer(bytearray(b"PK\x05\x06" * 32), dtype=torch.int32)
    torch.save({"w": marks}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_tensor_file(tmp_path / "old.pth")["w"], marks)


def test_the_names_torch_takes_from_a_path_are_sound(tmp_path):
    for name in ("a..b.pth", "wörld 日本.pth", "..pth", "v1.2.pth"):
        torch.save(CONTENT, tmp_path / name)
        check_archive(tmp_path / name)


def test_sizes_are_checked_before_anything_is_read(file, monkeypatch):
    write_archive(file, [*records(file).items(), ("archive/zeros", bytes(1 << 22))], zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_: pytest.fail("a record was read"))
    with pytest.raises(UserError, match="compressed"):
        check_archive(file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes have names on Unix alone")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="no such file"):
        read_tensor_file(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
        check_archive(tmp_path)
    with pytest.raises(UserError, match=r"missing\.pth"):
        check_archive(tmp_path / "missing.pth")
