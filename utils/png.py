"""Headers of PNG files."""

import struct
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


def read_png_header(path: Path) -> PngHeader:
    """Read the header of a PNG file. Raises `UserError` if it is missing, unreadable, or no PNG."""
    try:
        with open(path, "rb") as file:
            start = file.read(33)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(start) < 33 or start[:8] != SIGNATURE or start[12:16] != b"IHDR":
        raise UserError(f"{path} is not a PNG file (empty, cut short, or of another format); replace it")
    return PngHeader(*struct.unpack(">IIBB", start[16:26]))
