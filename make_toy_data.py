"""Draw a toy data set: random street scenes in the look, folder layout and encodings of GTA5, SYNTHIA or Cityscapes.

    python make_toy_data.py --out data/toy/gta5 --domain gta5 --count 200 --size 256 128 --seed 0
    python make_toy_data.py --out data/toy/cityscapes --domain cityscapes --count 200 --split train
    python make_toy_data.py --out data/toy/cityscapes --domain cityscapes --count 50 --split val
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from data_handlers.toy.files import DOMAINS, MOST_FRAMES, SPLITS, prepare_folder, write_frame
from utils.errors import UserError, run_cli
from utils.flags import OneLineParser, parse_flags

SMALLEST, LARGEST = (32, 16), (4096, 4096)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="root folder of the data set")
    parser.add_argument("--domain", required=True, choices=tuple(DOMAINS), help="whose look and layout")
    parser.add_argument("--count", type=int, default=100, help="number of frames (default: 100)")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), metavar=("W", "H"),
                        help="frame size in pixels (default: 256 128)")
    parser.add_argument("--seed", type=int, default=0, help="0 or greater; other seeds give other streets (default: 0)")
    parser.add_argument("--split", choices=tuple(SPLITS), default="train",
                        help="cityscapes only: which split to draw (default: train)")
    return parser


def _check_flags(flags: argparse.Namespace, given: frozenset[str]) -> None:
    width, height = flags.size
    if not flags.out:
        raise UserError("--out is empty; name a folder")
    if not 1 <= flags.count <= MOST_FRAMES:
        raise UserError(f"--count is {flags.count}; it must be from 1 to {MOST_FRAMES}")
    if not (SMALLEST[0] <= width <= LARGEST[0] and SMALLEST[1] <= height <= LARGEST[1]):
        raise UserError(f"--size is {width} {height}; it must be from {SMALLEST[0]} {SMALLEST[1]} to {LARGEST[0]} "
                        f"{LARGEST[1]}")
    if flags.seed < 0:
        raise UserError(f"--seed is {flags.seed}; it must be 0 or greater")
    if "split" in given and flags.domain != "cityscapes":
        raise UserError(f"--split is for --domain cityscapes; {flags.domain} has no splits")


def main() -> None:
    """Command line entry."""
    flags, given = parse_flags(build_parser())
    _check_flags(flags, given)
    root, size = Path(flags.out), tuple(flags.size)
    prepare_folder(root, flags.domain, flags.seed, flags.split, flags.count, size)
    for number in tqdm(range(flags.count), unit="frame", desc=f"drawing {flags.domain}", dynamic_ncols=True):
        write_frame(root, flags.domain, flags.seed, flags.split, number, size)
    print(f"{flags.count} toy {flags.domain} frames of {size[0]}x{size[1]} in {root}")


if __name__ == "__main__":
    run_cli(main)
