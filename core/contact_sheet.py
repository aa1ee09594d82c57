"""The contact sheet of a finished scale: a picture with rows of source, SiT and target images."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from core.cascade import to_pixels, translate_pyramid
from core.config import NetworkConfig
from core.networks import Generator
from data_handlers.domain import Domain, Samples
from data_handlers.images import PROCST_INPUT, image_pyramid
from utils.files import atomic_write

COLUMNS = 6
MIN_TILE_WIDTH = 192
GAP = 4
CAPTION_HEIGHT = 14


def save_rows(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> None:
    """Write a grid of rows (caption, uint8 (h,w,3) images of one size) to a PNG file; small images are enlarged."""
    height, width = rows[0][1][0].shape[:2]
    zoom = max(1, -(-MIN_TILE_WIDTH // width))
    tile_width, tile_height = width * zoom, height * zoom
    columns = max(len(images) for _, images in rows)
    row_height = tile_height + CAPTION_HEIGHT + GAP
    sheet = Image.new("RGB", (columns * (tile_width + GAP) + GAP, len(rows) * row_height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (caption, images) in enumerate(rows):
        top = GAP + i * row_height
        draw.text((GAP, top), caption, fill="black")
        for j, pixels in enumerate(images):
            tile = Image.fromarray(pixels).resize((tile_width, tile_height), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + j * (tile_width + GAP), top + CAPTION_HEIGHT))
    atomic_write(path, lambda file: sheet.save(file, format="PNG"))


def _sample_pyramids(domain: Domain, network: NetworkConfig, scale: int) -> list[Sequence[np.ndarray]]:
    """Pyramids of some training samples: the same images and crops at every scale."""
    pyramid = partial(image_pyramid, num_scales=network.num_scales, scale_factor=network.scale_factor, up_to=scale)
    count = len(domain)
    samples = Samples(domain=domain, stage=0, per_epoch=count, epoch_length=count, pyramid=pyramid, labels=False)
    return [samples[position][0] for position in range(min(COLUMNS, count))]


@torch.no_grad()
def save_contact_sheet(
    *,
    path: Path,
    network: NetworkConfig,
    source: Domain,
    target: Domain,
    generators: Sequence[Generator],
    device: torch.device,
) -> None:
    """Write a picture of source images, their translations by the frozen generators 0..s, and target images.

    Raises `UserError`: an image cannot be read and `--on_bad_image` is stop, or no image can.
    """
    sources, targets = (_sample_pyramids(domain, network, len(generators) - 1) for domain in (source, target))
    dtype, translated = next(generators[0].parameters()).dtype, []
    for pyramid in sources:
        levels = [PROCST_INPUT(torch.tensor(level[None], device=device), dtype) for level in pyramid]
        sit = translate_pyramid(generators, levels, network.scale_factor)
        translated.append(to_pixels(sit[0]).permute(1, 2, 0).cpu().numpy())
    rows = [
        (f"source ({source.files.data_set.name})", [pyramid[-1] for pyramid in sources]),
        ("SiT", translated),
        (f"target ({target.files.data_set.name})", [pyramid[-1] for pyramid in targets]),
    ]
    save_rows(path, rows)
