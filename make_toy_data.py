"""Draw a toy data set: random street scenes in the look, folder layout and encodings of GTA5, SYNTHIA or Cityscapes.

    python make_toy_data.py --out data/toy/gta5 --domain gta5 --count 200 --size 256 128 --seed 0
    python make_toy_data.py --out data/toy/cityscapes --domain cityscapes --count 200 --split train
    python make_toy_data.py --out data/toy/cityscapes --domain cityscapes --count 50 --split val
"""

from dataclasses import dataclass
from pathlib import Path

from data_handlers.toy import MOST_TOY_FRAMES, TOY_DOMAINS, TOY_SPLITS
from training.flags import build_parser, check, check_not_negative, option, parse, section_from
from utils.errors import run_cli


@dataclass(frozen=True)
class ToyFlags:
    """The flags of this script."""

    out: str = option("", "root folder of the data set (required)", metavar="DIR", required=True)
    domain: str = option("", "whose look and layout (required)", choices=tuple(TOY_DOMAINS), required=True)
    count: int = option(100, "number of frames")
    size: tuple[int, int] = option((256, 128), "frame size in pixels", type=int, nargs=2, metavar=("W", "H"))
    seed: int = option(0, "0 or greater; other seeds give other streets")
    split: str = option("", "cityscapes only: which split to draw (default: train)", choices=tuple(TOY_SPLITS))

    def __post_init__(self) -> None:
        width, height = self.size
        check(1 <= self.count <= MOST_TOY_FRAMES, f"--count is {self.count}; it must be from 1 to {MOST_TOY_FRAMES}")
        fits = 32 <= width <= 4096 and 16 <= height <= 4096
        check(fits, f"--size is {width} {height}; it must be from 32 16 to 4096 4096")
        check_not_negative(self, "seed")
        has_splits = not self.split or self.domain == "cityscapes"
        check(has_splits, f"--split is for --domain cityscapes; {self.domain} has no splits")


GROUPS = {"flags": [ToyFlags]}


def main() -> None:
    """Command line entry."""
    flags = section_from(ToyFlags, parse(build_parser(__doc__, GROUPS)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from tqdm import tqdm

    from data_handlers.toy.files import prepare_folder, write_frame

    root, split = Path(flags.out), flags.split or "train"
    prepare_folder(root, flags.domain, flags.seed, split, flags.count, flags.size)
    for number in tqdm(range(flags.count), unit="frame", desc=f"drawing {flags.domain}", dynamic_ncols=True):
        write_frame(root, flags.domain, flags.seed, split, number, flags.size)
    print(f"{flags.count} toy {flags.domain} frames of {flags.size[0]}x{flags.size[1]} in {root}")


if __name__ == "__main__":
    run_cli(main)
