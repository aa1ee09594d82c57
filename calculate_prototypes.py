"""Calculate the class prototypes of a teacher over the images of a target, for train_uda.py --method ddb-ckd.

    python calculate_prototypes.py --weights TrainedModels/CUT --output pretrained/cut_prototypes.pth

A class's prototype is the mean feature of the pixels that the net takes for it.
"""

from training.flags import build_parser, parse, section_from
from uda.ddb_ckd_config import PrototypeFlags
from utils.errors import run_cli

GROUPS, FIRST = {"what is calculated": [PrototypeFlags]}, PrototypeFlags.first


def main() -> None:
    """Command line entry."""
    flags = section_from(PrototypeFlags, parse(build_parser(__doc__, GROUPS, FIRST)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from uda.make_prototypes import make_prototypes

    make_prototypes(flags)


if __name__ == "__main__":
    run_cli(main)
