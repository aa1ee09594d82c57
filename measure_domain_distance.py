"""Measure how far source and SiT images are from the target: Frechet distance of VGG16 features.

    python measure_domain_distance.py --sit_data_dir data/sit
"""

from core.command_flags import DistanceFlags
from training.flags import build_parser, parse, section_from
from utils.errors import run_cli

GROUPS = {"flags": [DistanceFlags]}


def main() -> None:
    """Command line entry."""
    flags = section_from(DistanceFlags, parse(build_parser(__doc__, GROUPS)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from core.domain_distance import measure_distances

    measure_distances(flags)


if __name__ == "__main__":
    run_cli(main)
