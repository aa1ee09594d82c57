"""Translate a source data set into the target's look: write its "Source in Target" (SiT) images.

    python create_sit_dataset.py --trained_procst_path TrainedModels/RUN --sit_output_path data/sit
    python create_sit_dataset.py --trained_procst_path TrainedModels/RUN --sit_output_path data/sit --gpus 0 1 2 3

Every source image becomes an 8-bit RGB PNG of its native size, under its own name and folder below the output path
(GTA5: OUT/images/00001.png). --skip_created_files continues an interrupted export.
"""

from core.command_flags import ExportFlags
from training.flags import build_parser, parse, section_from
from utils.errors import run_cli

GROUPS, FIRST = {"speed and special cases": [ExportFlags]}, ExportFlags.first


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    flags = section_from(ExportFlags, parse(build_parser(__doc__, GROUPS, FIRST)))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from core.export import export

    export(flags, script=__file__)


if __name__ == "__main__":
    run_cli(main)
