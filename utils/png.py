"""Structure of PNG files: header and completeness, without decoding pixels."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, RGBA = 0, 2, 3, 6
COLOUR_NAMES = {GREY: "grey", RGB: "RGB", PALETTE: "palette", 4: "grey with alpha", RGBA: "RGB with alpha"}


@dataclass(frozen=True)
class PngHeader:
    """Width and height in pixels, bits per channel and the PNG colour type."""

    width: int
    height: int
    bit_depth: int
    colour_type: int

    def __str__(self) -> str:
        return f"{self.bit_depth}-bit {COLOUR_NAMES.get(self.colour_type, 'unknown')} PNG"


def _parse_header(start: bytes) -> PngHeader | None:
    """The header in the first 33 bytes of a PNG file, or None if they are not one."""
    if len(start) < 33 or start[:8] != SIGNATURE or start[12:16] != b"IHDR":
        return None
    return PngHeader(*struct.unpack(">IIBB", start[16:26]))


def read_png_header(path: Path) -> PngHeader:
    """Read the header of a PNG file. Raises `UserError` if it is missing, unreadable, or no PNG."""
    try:
        with open(path, "rb") as file:
            header = _parse_header(file.read(33))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if header is None:
        raise UserError(f"{path} is not a PNG file (empty, cut short, or of another format); replace it")
    return header


def is_complete_rgb8(path: Path, size: tuple[int, int]) -> bool:
    """Whether `path` is a whole 8-bit RGB PNG of `size` (W,H): every chunk there, every checksum right."""
    try:
        data = Path(path).read_bytes()
    except OSError:
        return False
    header = _parse_header(data[:33])
    if header != PngHeader(size[0], size[1], 8, RGB):
        return False
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if end > len(data):
            return False
        (checksum,) = struct.unpack(">I", data[end - 4 : end])
        if zlib.crc32(data[position + 4 : end - 4]) != checksum:
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end
    return False
