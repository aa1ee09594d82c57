"""Reading images and labels, with one clear line for every file that is not what it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from data_handlers.datasets import DataSet
from data_handlers.label_maps import to_train_ids
from utils.errors import UserError
from utils.png import GREY, PALETTE, RGB, RGBA, read_png_header

Resample = Literal["exact", "fast"]
RESAMPLINGS = ("fast", "exact")

# Pillow refuses very large pictures to protect web servers. These are the user's own files, and export promises to
# translate pictures of any size.
Image.MAX_IMAGE_PIXELS = None


def read_image(path: Path) -> Image.Image:
    """Decode an image to 8-bit RGB; palettes are expanded and alpha is dropped.

    Raises:
        UserError: missing, truncated, not an image, or of more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            deep_png = image.format == "PNG" and read_png_header(path).bit_depth > 8  # Pillow would cut these silently
            if deep_png or image.mode.startswith(("I", "F")):
                raise UserError(f"{path} has more than 8 bits per channel; convert it to 8-bit RGB")
            if image.mode == "RGB":
                image.load()  # a conversion would copy it
                return image
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image file; replace it") from None
    except MemoryError:
        raise UserError(f"{path} is too large for this machine's memory") from None
    except (OSError, SyntaxError, ValueError, OverflowError, EOFError) as error:
        raise UserError(f"{path} is truncated or damaged ({error}); replace it") from None


def read_pixels(path: Path) -> np.ndarray:
    """The pixels of `read_image`, uint8 (H,W,3); a plain RGB PNG is decoded by torchvision, a fifth faster than Pillow.

    Raises:
        UserError: as `read_image`.
    """
    try:
        header = read_png_header(path)
        if header.bit_depth == 8 and header.colour_type == RGB:
            pixels = decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED)
            if len(pixels) == 3:
                return pixels.permute(1, 2, 0).contiguous().numpy()
    except (UserError, RuntimeError):
        pass  # another format, or a file that Pillow words better what is wrong with
    return np.array(read_image(path))


def read_resized(path: Path, size: tuple[int, int], resample: Resample) -> tuple[np.ndarray, tuple[int, int]]:
    """An image at (W,H), uint8 (H,W,3), and its own (W,H).

    Raises:
        UserError: as `read_image`.
    """
    if resample == "exact":
        image = read_image(path)
        return resize_image(image, size, resample), image.size
    pixels = read_pixels(path)
    own = (pixels.shape[1], pixels.shape[0])
    return pixels if own == size else resize_pixels(pixels, size), own


def image_size(path: Path) -> tuple[int, int]:
    """(W,H) from the file's header alone.

    Raises:
        UserError: missing, or not an image.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a readable image file ({error}); replace it") from None


def check_label_header(path: Path, data_set: DataSet, size: tuple[int, int]) -> None:
    """Check size, bit depth and channels of a label without decoding it.

    Args:
        size: (W,H) of the image the label belongs to.

    Raises:
        UserError: missing, not a PNG, of another size, or of an encoding the data set does not use.
    """
    header = read_png_header(path)
    if (header.width, header.height) != size:
        raise UserError(
            f"label {path} is {header.width}x{header.height}, but its image is {size[0]}x{size[1]}; "
            "the two must have the same size"
        )
    if data_set.label_encoding == "16-bit channel 0":
        if header.bit_depth != 16 or header.colour_type not in (RGB, RGBA):
            raise UserError(
                f"label {path}: found {header}, but {data_set.name} labels are 16-bit RGB PNGs with the "
                "class id in channel 0; use the original files, not a colour or converted version"
            )
    elif header.bit_depth > 8 or header.colour_type not in (GREY, PALETTE):
        raise UserError(
            f"label {path}: found {header}, but {data_set.name} labels are 8-bit grey or palette PNGs "
            "that hold label ids; use the id files, not a colour or 16-bit version"
        )
    elif header.bit_depth < 8 and header.colour_type == GREY:
        raise UserError(f"label {path}: {header} cannot hold label ids; they need 8 bits a pixel")


def read_label(path: Path, data_set: DataSet, size: tuple[int, int]) -> np.ndarray:
    """Decode a label to trainIds, uint8 (H,W) with 255 = ignore; palette PNGs are read by index, never by colour.

    Raises:
        UserError: as `check_label_header`, truncated, or holding an id the data set does not know.
    """
    check_label_header(path, data_set, size)
    try:
        if data_set.label_encoding == "16-bit channel 0":
            ids = decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED)[0].numpy()
        else:
            with Image.open(path) as image:
                ids = np.asarray(image)
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise UserError(f"label {path} is truncated or damaged ({str(error).splitlines()[0]}); replace it") from None
    try:
        return to_train_ids(ids, data_set.id_map, data_set.void_ids)
    except ValueError as error:
        raise UserError(
            f"label {path} holds the id {error}, which {data_set.name} does not know; is this the file of label ids, "
            "and not one of trainIds, instances or colours?"
        ) from None


def resize_image(image: Image.Image, size: tuple[int, int], resample: Resample) -> np.ndarray:
    """Resize an RGB image to (W,H) with the antialiased bicubic filter, uint8 (H,W,3).

    Args:
        resample: `exact` is Pillow's arithmetic, the method's own; `fast` is PyTorch's, several times as fast and at
            most one level off in some values of a thousand.
    """
    if image.size == size:
        return np.array(image)
    if resample == "exact":
        return np.array(image.resize(size, Image.Resampling.BICUBIC))
    return resize_pixels(np.array(image), size)


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The `fast` resampling of uint8 (h,w,3) to (W,H)."""
    levels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = F.interpolate(levels, size=size[::-1], mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize trainIds (h,w) to (W,H) by taking the nearest pixel."""
    return np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def normalise(pixels: Tensor) -> Tensor:
    """uint8 0..255 of any shape -> float32 network input (x - 128) / 128, on the tensor's device."""
    return (pixels.float() - 128.0) / 128.0
