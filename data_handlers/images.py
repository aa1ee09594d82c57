"""Reading images and labels from files, and turning pixels into network input.

A file that cannot be used raises a `UserError` of one line, which names the file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from data_handlers.choices import Resample
from data_handlers.datasets import DataSet
from data_handlers.descriptions import packed
from data_handlers.label_maps import to_train_ids
from utils.errors import UserError
from utils.png import GREY, PALETTE, RGB, RGBA, read_png_header
from utils.sizes import level_size

# Pillow refuses very large images to protect web servers. These are the user's own files, and export promises to
# translate images of any size.
Image.MAX_IMAGE_PIXELS = None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The file opened by Pillow; whatever goes wrong in the block is a `UserError`."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image file; replace it") from None
    except MemoryError:
        raise UserError(f"{path} is too large for this machine's memory") from None
    except (OSError, SyntaxError, ValueError, OverflowError, EOFError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is truncated or damaged ({reason}); replace it") from None


def read_image(path: Path) -> Image.Image:
    """Decode an image to 8-bit RGB; palettes are expanded and alpha is dropped.

    Raises `UserError`: missing, truncated, not an image, or of more than 8 bits per channel.
    """
    with _opened(path) as image:
        # Pillow would silently drop the low bits of such a PNG.
        deep_png = image.format == "PNG" and read_png_header(path).bit_depth > 8
        if deep_png or image.mode.startswith(("I", "F")):
            raise UserError(f"{path} has more than 8 bits per channel; convert it to 8-bit RGB")
        if image.mode == "RGB":
            image.load()  # a conversion would copy it
            return image
        return image.convert("RGB")


def read_pixels(path: Path) -> np.ndarray:
    """As `read_image`, uint8 (H,W,3); torchvision decodes plain RGB PNGs, a fifth faster than Pillow."""
    try:
        header = read_png_header(path)
        if header.bit_depth == 8 and header.colour_type == RGB:
            pixels = decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED)
            if len(pixels) == 3:
                return pixels.permute(1, 2, 0).contiguous().numpy()
    except (UserError, RuntimeError):
        pass  # Pillow reads other formats, and has the clearer messages about damaged files
    return np.array(read_image(path))


def read_resized(path: Path, size: tuple[int, int], resample: Resample) -> np.ndarray:
    """An image `resized` to (W,H), uint8 (H,W,3). Raises `UserError` as `read_image`."""
    return resized(read_pixels(path), size, resample)


def resized(pixels: np.ndarray, size: tuple[int, int], resample: Resample) -> np.ndarray:
    """Pixels uint8 (h,w,3) resized to (W,H) with the antialiased bicubic filter; the same array if they have that size.

    Args:
        resample: `exact` is Pillow's arithmetic, which the method uses; `fast` is PyTorch's, which is several times as
            fast and differs by one level of 0..255 in a few of a thousand values.
    """
    if pixels.shape[1::-1] == size:
        return pixels
    if resample == "exact":
        return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    levels = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    found = F.interpolate(levels, size=size[::-1], mode="bicubic", antialias=True)
    return found[0].permute(1, 2, 0).contiguous().numpy()


def resized_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label uint8 (h,w) at (W,H) by taking the nearest pixel; the same array if it has that size."""
    if label.shape[::-1] == size:
        return label
    return np.array(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))


def image_pyramid(
    pixels: np.ndarray, num_scales: int, scale_factor: float, up_to: int, resample: Resample = "exact"
) -> list[np.ndarray]:
    """Levels 0..`up_to` of an image, each `resized` from the image itself (docs/method.md, section 1).

    Generated images are tensors and are resized without antialiasing, see `core.cascade`.

    Args:
        pixels: uint8 (h,w,3), in training a resized and cropped image, in export a whole one at native size.
        num_scales: N; level N has the size of `pixels`.
        up_to: finest level wanted (training at scale s needs 0..s only).

    Returns:
        uint8 arrays (h_i,w_i,3).
    """
    sizes = (level_size(pixels.shape[1::-1], num_scales - scale, scale_factor) for scale in range(up_to + 1))
    return [resized(pixels, size, resample) for size in sizes]


def image_size(path: Path) -> tuple[int, int]:
    """(W,H) from the file's header alone. Raises `UserError`: missing, or not an image."""
    with _opened(path) as image:
        return image.size


def check_label_header(path: Path, data_set: DataSet, size: tuple[int, int]) -> None:
    """Check size, bit depth and channels of a label without decoding it. Raises `UserError`.

    Args:
        size: (W,H) of the image the label belongs to.
    """
    header = read_png_header(path)
    if (header.width, header.height) != size:
        raise UserError(
            f"label {path} is {header.width}x{header.height}, but its image is {size[0]}x{size[1]}; "
            "the two must have the same size"
        )
    is_index = header.colour_type in (GREY, PALETTE) and header.bit_depth <= 8
    values = "label ids" if data_set.labels == "ids" else "trainIds"
    said = f" ({data_set.labels_flag} {data_set.labels})" if data_set.labels_flag else ""
    fits, wanted, hint = is_index, f"8-bit grey or palette PNGs that hold {values}", ""
    if data_set.storage == "16-bit channel 0":
        fits = header.bit_depth == 16 and header.colour_type in (RGB, RGBA)
        wanted = "16-bit RGB PNGs with the class id in channel 0"
        hint = "; 8-bit trainIds are read with --src_labels trainids (--trg_labels, --labels)" if is_index else ""
    elif data_set.storage == "colours":
        fits, wanted = header.bit_depth == 8 and header.colour_type in (RGB, RGBA), "8-bit RGB PNGs of class colours"
    if not fits:
        raise UserError(
            f"label {path}: found {header}, but {data_set.name} labels{said} are {wanted}; use the original files, "
            f"not a colour or converted version{hint}"
        )
    if header.bit_depth < 8 and header.colour_type == GREY:
        raise UserError(f"label {path}: {header} cannot hold {values}; they need 8 bits a pixel")


def read_label_values(path: Path, data_set: DataSet, size: tuple[int, int]) -> np.ndarray:
    """Decode a label to the values in its file, an integer array (H,W); palettes are read by index, colours `packed`.

    Args:
        size: (W,H) of the image the label belongs to.

    Raises:
        UserError: as `check_label_header`, or truncated.
    """
    check_label_header(path, data_set, size)
    with _opened(path) as image:
        if data_set.storage == "16-bit channel 0":
            return decode_image(read_file(str(path)), mode=ImageReadMode.UNCHANGED)[0].numpy()
        if data_set.storage == "colours":
            return packed(np.asarray(image.convert("RGB")).astype(np.int32).transpose(2, 0, 1))
        return np.asarray(image)


def label_values_to_train_ids(values: np.ndarray, path: Path, data_set: DataSet) -> np.ndarray:
    """Values of `read_label_values` -> trainIds, uint8 of the same shape with 255 = ignore.

    Raises `UserError`: a value is no label id of the data set, or no trainId where trainIds are read; names `path`.
    """
    try:
        return to_train_ids(values, data_set.value_map, data_set.ignored_values)
    except ValueError as error:
        if data_set.labels == "trainids":
            said = f"{data_set.labels_flag} trainids" if data_set.labels_flag else f"{data_set.name}'s declaration"
            raise UserError(
                f"label {path} holds the value {error}, which is no trainId (0 to {len(data_set.class_names) - 1}, or "
                f"255 to ignore), but {said} says that labels hold trainIds; check the file and the flag"
            ) from None
        is_colour = data_set.storage == "colours"
        value = f"the colour {tuple(int(str(error)).to_bytes(3))}" if is_colour else f"the id {error}"
        raise UserError(
            f"label {path} holds {value}, which {data_set.name} does not know; is this the right file of labels, and "
            "not one of trainIds, instances or another encoding?"
        ) from None


def read_label(
    path: Path, data_set: DataSet, size: tuple[int, int], resize: tuple[int, int] | None = None
) -> np.ndarray:
    """A label as trainIds, uint8 (H,W) with 255 = ignore. Raises `UserError` as the two functions above.

    Args:
        size: (W,H) of the image the label belongs to.
        resize: (W,H) of the result, see `resized_label`; None keeps the size.
    """
    label = label_values_to_train_ids(read_label_values(path, data_set, size), path, data_set)
    return resized_label(label, resize or size)


@dataclass(frozen=True, kw_only=True)
class NetworkInput:
    """What a network expects as input: (pixels - mean) / std of red, green and blue, in levels of 0..255."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """RGB pixels, uint8 (...,H,W,3), to network input (...,3,H,W), contiguous, on the same device."""
        channels = pixels.movedim(-1, -3).to(dtype, copy=True, memory_format=torch.contiguous_format)
        for channel, mean, std in zip(channels.unbind(-3), self.mean, self.std, strict=True):
            channel.sub_(mean).div_(std)
        return channels

    def converted(self, images: Tensor, made_by: "NetworkInput") -> Tensor:
        """Input (...,3,H,W) that `made_by` made as this one would have made it; differentiable.

        Where the two are equal it is the same tensor.
        """
        if made_by == self:
            return images
        wanted, made = (images.new_tensor([one.mean, one.std])[:, :, None, None] for one in (self, made_by))
        return (images * made[1] + made[0] - wanted[0]) / wanted[1]


# RGB in [-1,1]: what the generators, their perceptual net and the authors' segmentation nets are trained on.
PROCST_INPUT = NetworkInput(mean=(128.0, 128.0, 128.0), std=(128.0, 128.0, 128.0))

# Mean and deviation of ImageNet's images, (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225) of the largest level.
IMAGENET_INPUT = NetworkInput(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
