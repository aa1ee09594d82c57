"""Label a target by a net's own confident predictions: the labelling pass of a round of train_uda.py on its own.

    python generate_pseudo_labels.py --weights NET.pth --target cityscapes --output data/pseudo_labels

Prints the threshold of each class and the share of the pixels that is labelled.
"""

from training.flags import build_parser, parse, section_from
from uda.cbst_config import LabellingFlags
from utils.errors import run_cli

GROUPS, FIRST = {"how it labels": [LabellingFlags]}, LabellingFlags.first


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    flags = section_from(LabellingFlags, parse(build_parser(__doc__, GROUPS, FIRST)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from uda.generate import generate

    generate(flags, script=__file__)


if __name__ == "__main__":
    run_cli(main)
