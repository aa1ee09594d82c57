"""Files that are damaged, or made to harm the program that reads them. Each function spoils the file at a path."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image

from worlds import noise_image, write_png16

BAIT = "executed"  # made in the working folder by whoever executes what a file names


class Command:
    """Unpickling this runs a command that creates a file."""

    def __reduce__(self):
        return os.system, (f"touch {BAIT}",)


# --- files of weights ---------------------------------------------------------------------------------------------


def records(path):
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def write_archive(path, content, compression=zipfile.ZIP_STORED):
    """Write (name, data) pairs as they are; a name may come twice."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", compression) as archive:
        warnings.simplefilter("ignore")
        for name, data in content:
            archive.writestr(name, data)


def write_pickle(path, payload):
    """Write a file of `torch.save` with this pickle and no tensors."""
    write_archive(path, [("archive/data.pkl", payload), ("archive/version", "3")])


def flip_a_bit(path):
    """In the middle of the largest record, where only a checksum can tell."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda record: record.file_size)
    data[largest.header_offset + 30 + len(largest.filename) + largest.file_size // 2 + 64] ^= 4
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("neither picture nor weights")


def execute(path):
    write_pickle(path, pickle.dumps({"w": Command()}, protocol=2))


def execute_without_archive(path):
    path.write_bytes(pickle.dumps(Command(), protocol=2))


def compress(path):
    """A bomb: megabytes of zeros in a few kilobytes."""
    content = [*records(path).items(), ("archive/data/999", bytes(1 << 24))]
    write_archive(path, content, zipfile.ZIP_DEFLATED)


def claim_more(path):
    """The directory says that every record has 2 GB, and so do the records' own headers."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = [record.header_offset for record in archive.infolist()]
        directory = archive.start_dir
    for offset in offsets:
        data[offset + 18 : offset + 26] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
        data[directory + 20 : directory + 28] = struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)
        directory += 46 + sum(struct.unpack("<HHH", data[directory + 28 : directory + 34]))
    path.write_bytes(data)


def claim_terabytes(path):
    """A file as PyTorch wrote them before 1.6, whose one storage claims 4 TB."""
    torch.save({"w": torch.arange(4.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    place = data.index(b"K\x04", data.index(b"X\x03\0\0\0cpu"))
    path.write_bytes(data[:place] + b"\x8a\x06" + struct.pack("<Q", 1 << 40)[:6] + data[place + 2 :])


WEIGHTS = {
    flip_a_bit: "is damaged",
    truncate: "is damaged or cut short",
    empty: "",
    text: "",
    execute: "",
    execute_without_archive: "",
    compress: "compressed",
    claim_more: "is damaged",
    claim_terabytes: "more memory than there is",
}


# --- pictures and folders -----------------------------------------------------------------------------------------


def loop(path):
    """A symbolic link to itself."""
    _remove(path)
    path.symlink_to(path.name)


def folder(path):
    """A folder where a file should be."""
    _remove(path)
    path.mkdir()


def _remove(path):
    path.rename(path.with_name(f".{path.name}.was"))


def deep(path):
    write_png16(path, np.full((44, 60, 3), 0x1234, dtype=np.uint16))


def jpeg(path):
    noise_image((60, 44), 0).save(path, format="JPEG")


def colours(path):
    noise_image((60, 44), 0).save(path)


def grow(path):
    Image.fromarray(np.zeros((44, 61), np.uint8)).save(path)


def unknown_id(path):
    """A palette label with an index that is no label id."""
    label = Image.fromarray(np.full((44, 60), 200, np.uint8)).convert("P")
    label.save(path)


def not_utf8(path):
    """A name as older systems wrote it: Latin-1."""
    os.rename(path, os.fsencode(path.parent) + b"/caf\xe9.png")


IMAGES = {empty: "", text: "not an image", truncate: "truncated", loop: "", folder: "folder", deep: "8 bits"}
LABELS = {empty: "not a PNG", text: "not a PNG", loop: "", jpeg: "not a PNG", grow: "61x44", colours: "8-bit grey"}
