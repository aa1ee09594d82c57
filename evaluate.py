"""Score a segmentation net on a labelled data set: IoU, accuracy and precision of every class, their means.

    python evaluate.py --weights pretrained/pretrained_semseg_on_gta5.pth
    python evaluate.py --weights NET.pth --data_set synthia --data_dir data/synthia --scales 0.75 1 1.25 --flip
"""

from training.evaluation_flags import EvaluationFlags
from training.flags import build_parser, parse, section_from
from utils.errors import run_cli

GROUPS, FIRST = {"more": [EvaluationFlags]}, EvaluationFlags.first


def main() -> None:
    """Command line entry."""
    flags = section_from(EvaluationFlags, parse(build_parser(__doc__, GROUPS, FIRST)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from training.evaluation import evaluate

    evaluate(flags)


if __name__ == "__main__":
    run_cli(main)
