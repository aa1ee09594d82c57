"""Tiny data sets for the tests, written in the real layouts and encodings."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image


def noise_image(size, seed):
    """Smooth random picture of (W,H): noise enlarged from a few pixels, so that resampling has something to keep."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC)


def index_label(size, seed, ids=(7, 8, 11, 21, 23, 26, 0)):
    rng = np.random.default_rng(seed)
    return rng.choice(np.array(ids, dtype=np.uint8), size=(size[1], size[0]))


def write_png16(path, channels):
    """16-bit RGB PNG from uint16 (H,W,3)."""
    height, width, _ = channels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in channels)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_gta5(root, count=6, size=(48, 32), seed=0, names=None):
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for k, name in enumerate(names or [f"{i:05d}" for i in range(1, count + 1)]):
        noise_image(size, seed + k).save(root / "images" / f"{name}.png")
        label = Image.fromarray(index_label(size, seed + k)).convert("P")
        label.putdata(index_label(size, seed + k).ravel().tolist())
        label.putpalette([v for i in range(256) for v in (i, 255 - i, i // 2)])
        label.save(root / "labels" / f"{name}.png")
    return root


def write_synthia(root, count=4, size=(48, 32), seed=0):
    (root / "RGB").mkdir(parents=True)
    (root / "GT" / "LABELS").mkdir(parents=True)
    for k in range(count):
        noise_image(size, seed + k).save(root / "RGB" / f"{k:07d}.png")
        channels = np.zeros((size[1], size[0], 3), dtype=np.uint16)
        channels[..., 0] = index_label(size, seed + k, ids=(1, 2, 3, 8, 22, 0))
        channels[..., 1] = 300 + k
        write_png16(root / "GT" / "LABELS" / f"{k:07d}.png", channels)
    return root


def write_own_description(path):
    """Four classes of labels in GTA5's layout."""
    path.write_text(
        'classes = ["a", "b", "c", "d"]\n[images]\ntrain = ["images/*.png"]\n[labels]\n'
        'replace = [["images/", "labels/"]]\nmap = { 7 = 0, 8 = 1, 11 = 2, 21 = 3 }\n'
    )
    return path


def write_cityscapes(root, count=5, size=(48, 32), seed=100, split="train", city="town", labels=True):
    images, targets = (root / kind / split / city for kind in ("leftImg8bit", "gtFine"))
    images.mkdir(parents=True)
    if labels:
        targets.mkdir(parents=True)
    for k in range(count):
        stem = f"{city}_{k:06d}_000019"
        noise_image(size, seed + k).save(images / f"{stem}_leftImg8bit.png")
        if labels:
            Image.fromarray(index_label(size, seed + k)).save(targets / f"{stem}_gtFine_labelIds.png")
    return root


def write_crosscity(root, city="Rio", train=4, test=2, size=(48, 32), seed=500):
    """A city of the Cross-City set and its lists; returns the city's folder. Other pictures of training and test have
    the same stems."""
    city, lists = root / "NTHU_Datasets" / city, root / "NTHU_list" / city / "List"
    for folder in (city / "Images" / "Train", city / "Images" / "Test", city / "Labels" / "Test", lists):
        folder.mkdir(parents=True)
    for split, count in (("Train", train), ("Test", test)):
        stems = [f"pano_{k:05d}_{split}" if k else "pano_shared" for k in range(count)]
        for k, stem in enumerate(stems):
            noise_image(size, seed + k + len(split)).save(city / "Images" / split / f"{stem}.jpg")
            if split == "Test":
                label = index_label(size, seed + k, ids=(7, 8, 11, 19, 20, 21, 23, 24, 25, 26, 28, 32, 33, 0))
                Image.fromarray(label).save(city / "Labels" / "Test" / f"{stem}_eval.png")
        (lists / f"{split.lower()}.txt").write_text("\n".join(stems) + "\n")
    return city


def is_whole(path, size):
    """Whether an image is an RGB picture of this size that can be decoded to its end."""
    with Image.open(path) as image:
        image.load()
        return (image.mode, image.size) == ("RGB", size)
