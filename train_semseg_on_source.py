"""Train a segmentation net on a labelled source data set: the net behind the label loss of train_procst.py.

    python train_semseg_on_source.py --source gta5 --src_data_dir data/gta

The best net by mIoU on the held-out images goes to pretrained/pretrained_semseg_on_<source>.pth, where train_procst.py
looks for it.
"""

from training.flags import build_parser, parse
from uda.config import SourceTrainingConfig
from utils.errors import run_cli

GROUPS, FIRST = SourceTrainingConfig.groups, SourceTrainingConfig.first


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    given = parse(build_parser(__doc__, GROUPS, FIRST))
    # Imported after the flags are read: a mistyped flag is answered at once.
    from training.run import train
    from uda.source import SourceTraining, prepare_source

    train(script=__file__, method=SourceTraining, prepare=prepare_source, given=given)


if __name__ == "__main__":
    run_cli(main)
