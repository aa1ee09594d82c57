"""Toy data sets on disk: the folder layouts and file encodings of GTA5, SYNTHIA and Cityscapes."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import label as connected_parts

from data_handlers.classes import CITYSCAPES_IDS, IGNORE, SYNTHIA_IDS
from data_handlers.toy import TOY_DOMAINS, TOY_SPLITS
from data_handlers.toy.looks import LOOKS, Id
from data_handlers.toy.world import draw_scene
from utils.errors import UserError
from utils.files import atomic_write_bytes, atomic_write_json, make_folder, read_json

# Which toy set a folder holds. Without it a folder's frames are not ours, and must not be overwritten.
NOTE = "toy_world.json"
LAYOUT_FOLDERS = {"gta5": ("images", "labels"), "synthia": ("RGB", "GT"), "cityscapes": ("leftImg8bit", "gtFine")}

# Colours of the Cityscapes label ids 0 to 33, which are also the palette of GTA5's labels.
_PALETTE = (
    "000000 000000 000000 000000 000000 6f4a00 510051 804080 f423e8 faaaa0 e6968c 464646 66669c be9999 b4a5b4 966464"
    " 96785a 999999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c ff0000 00008e 000046 003c64 00005a 00006e 005064"
    " 0000e6 770b20"
)


def frame_files(domain: str, split: str, number: int) -> tuple[str, str]:
    """Relative paths of the image and the label of frame `number` (from 0)."""
    if domain == "gta5":
        return f"images/{number + 1:05d}.png", f"labels/{number + 1:05d}.png"
    if domain == "synthia":
        return f"RGB/{number:07d}.png", f"GT/LABELS/{number:07d}.png"
    stem = f"{split}/toytown/toytown_{number:06d}_000019"
    return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"


def draw_frame(domain: str, seed: int, split: str, number: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Frame `number` of a toy set, size (W,H): picture, uint8 (H,W,3), and trainIds, uint8 (H,W).

    The domain is part of the random seed, so equal numbers in two domains are different scenes: the sets are unpaired.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, TOY_DOMAINS[domain], TOY_SPLITS[split], number]))
    return draw_scene(rng, size, LOOKS[domain])


def encode_image(picture: np.ndarray) -> bytes:
    """An 8-bit PNG: RGB for uint8 (H,W,3), grey for uint8 (H,W)."""
    return _png(Image.fromarray(picture))


def encode_label(domain: str, train_ids: np.ndarray) -> bytes:
    """The PNG that the data set itself uses for labels, from trainIds, uint8 (H,W).

    GTA5: 8-bit palette indices. Cityscapes: 8-bit grey. SYNTHIA: 16-bit RGB with the class in red and an instance
    number in green. Void becomes id 0 in all three.
    """
    table = np.zeros(IGNORE + 1, np.uint8)
    for label_id, train_id in (SYNTHIA_IDS if domain == "synthia" else CITYSCAPES_IDS).items():
        table[train_id] = label_id
    ids = table[train_ids]
    if domain == "synthia":
        thing = (train_ids >= Id.PERSON) & (train_ids != Id.VOID)
        instances = connected_parts(thing)[0]
        return encode_png16(np.stack([ids, instances, np.zeros_like(ids)], axis=-1).astype(np.uint16))
    image = Image.fromarray(ids)
    if domain == "gta5":
        colours = bytes.fromhex(_PALETTE)
        image.putpalette(colours + bytes(3 * 256 - len(colours)))
    return _png(image)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def encode_png16(pixels: np.ndarray) -> bytes:
    """A 16-bit RGB PNG from uint16 (H,W,3); Pillow cannot write this kind."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 6 * width), np.uint8)  # each row begins with its filter type: 0, none
    rows[:, 1:] = pixels.astype(">u2").view(np.uint8).reshape(height, 6 * width)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6))
            + chunk(b"IEND", b""))


def write_frame(root: Path, domain: str, seed: int, split: str, number: int, size: tuple[int, int]) -> None:
    """Draw one frame and write its image and its label; the folders must exist."""
    picture, train_ids = draw_frame(domain, seed, split, number, size)
    image_file, label_file = frame_files(domain, split, number)
    # The label first: an image in the list then always has its label.
    atomic_write_bytes(root / label_file, encode_label(domain, train_ids))
    atomic_write_bytes(root / image_file, encode_image(picture))


def prepare_folder(root: Path, domain: str, seed: int, split: str, count: int, size: tuple[int, int]) -> None:
    """Make the set's folders and note what they are going to hold.

    Raises:
        UserError: the folder cannot be written to, or holds frames that are not the first ones of this very set.
            Nothing has been written then.
    """
    splits = _check_folder(root, domain, seed, split, count, size)
    for file in (NOTE, *frame_files(domain, split, 0)):
        make_folder((root / file).parent, "--out")
    splits[split] = {"seed": seed, "count": count}
    note = {"format": "procst-toy-world", "domain": domain, "size": list(size), "splits": dict(sorted(splits.items()))}
    atomic_write_json(root / NOTE, note)


def _check_folder(root: Path, domain: str, seed: int, split: str, count: int, size: tuple[int, int]) -> dict[str, dict]:
    """The splits that the folder's note names, once it is clear that this set may be written there."""
    advice = "choose another folder or delete this one"
    if not (root / NOTE).exists():
        for name in (name for names in LAYOUT_FOLDERS.values() for name in names):
            if (root / name).exists():
                raise UserError(f"--out {root} already holds {name}/, which is not a toy data set's; {advice}")
        return {}
    note = read_json(root / NOTE)
    try:
        held_domain, held_size, splits = note["domain"], tuple(note["size"]), dict(note["splits"])
        held_seed, held_count = (splits[split]["seed"], int(splits[split]["count"])) if split in splits else (seed, 0)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{root / NOTE} is not a toy data set's note; {advice}") from None
    if held_domain != domain or held_size != size:
        size_text = "x".join(str(side) for side in held_size)
        raise UserError(f"--out {root} already holds a toy {held_domain} set of {size_text} frames; {advice}")
    if held_seed != seed or held_count > count:
        raise UserError(f"--out {root} already holds {held_count} {split} frames of seed {held_seed}; {advice}")
    return splits
