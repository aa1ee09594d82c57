"""Data sets of pictures that compress like photographs: what loading and export are timed on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """uint8 (H,W,3): smooth shapes with sensor noise of +-2, about 2.2 MB as a PNG of 1914x1052."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-2, 3, smooth.shape)).clip(0, 255).astype(np.uint8)


def write_gta5(root: Path, count: int, size: tuple[int, int]) -> Path:
    """`count` frames with labels in the layout and encoding of GTA5; returns `root`."""
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for k in range(count):
        Image.fromarray(picture(size, k)).save(root / f"images/{k + 1:05d}.png")
        coarse = np.random.default_rng(k).choice(np.array([7, 8, 11, 21, 23, 26], np.uint8), (8, 14))
        label = Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)
        label.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
        label.save(root / f"labels/{k + 1:05d}.png")
    return root
