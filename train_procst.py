"""Train the ProCST pyramid: source images are moved into the look of the target images, scale by scale.

    python train_procst.py                      the published setting, on the first GPU, data in data/
    python train_procst.py --gpus 0 1 2 3       several GPUs share every batch
    python train_procst.py --run_dir RUN        starts a run in this folder; the same command continues it
"""

from core.config import ProCSTConfig
from training.flags import build_parser, parse
from utils.errors import run_cli

GROUPS, FIRST = ProCSTConfig.groups, ProCSTConfig.first


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    given = parse(build_parser(__doc__, GROUPS, FIRST))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from core.preparation import prepare
    from core.procst import ProCST
    from training.run import train

    train(script=__file__, method=ProCST, prepare=prepare, given=given)


if __name__ == "__main__":
    run_cli(main)
