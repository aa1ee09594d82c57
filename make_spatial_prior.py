"""Make the spatial prior of `train_uda.py --method cbst-sp` from the labels of a source.

    python make_spatial_prior.py --source gta5 --src_data_dir data/gta --output pretrained/prior_gta5.mat

Beside the file, one picture for each class shows where it lies.
"""

from training.flags import build_parser, parse, section_from
from uda.cbst_config import PriorFlags
from utils.errors import run_cli

GROUPS = {"flags": [PriorFlags]}


def main() -> None:
    """Command line entry."""
    flags = section_from(PriorFlags, parse(build_parser(__doc__, GROUPS)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from uda.make_prior import make_prior

    make_prior(flags)


if __name__ == "__main__":
    run_cli(main)
