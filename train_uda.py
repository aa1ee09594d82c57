"""Adapt a segmentation net to an unlabelled target, from labelled source images: one of the methods of --method.

    python train_uda.py --method cbst --init pretrained/pretrained_semseg_on_gta5.pth --run_dir TrainedModels/CBST
    python train_uda.py --preset gta5-cityscapes-cbst --init NET.params --run_dir TrainedModels/CBST

The net is the one that train_semseg_on_source.py trains, which is `--method source` here.
"""

import sys
from itertools import pairwise

from training.flags import build_parser, parse
from uda.cbst_config import MethodConfig, SelfTrainingConfig
from uda.config import SourceTrainingConfig
from uda.presets import listing
from utils.errors import run_cli

GROUPS, FIRST = SelfTrainingConfig.groups, SelfTrainingConfig.first


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1)]
    on_source = ("--method", "source") in pairwise(words)  # its flags are others
    groups, first = GROUPS, FIRST
    if on_source:
        groups, first = {"method": [MethodConfig], **SourceTrainingConfig.groups}, SourceTrainingConfig.first
    given = parse(build_parser(__doc__, groups, first))
    if given.pop("list_presets", False):
        print(listing())
        return
    # Imported after the flags are read: a mistyped flag is answered at once.
    from training.run import train
    from uda.cbst import SelfTraining, prepare_self_training
    from uda.source import SourceTraining, prepare_source

    method, prepare = (SourceTraining, prepare_source) if on_source else (SelfTraining, prepare_self_training)
    if on_source:
        del given["method"]
    train(script=__file__, method=method, prepare=prepare, given=given)


if __name__ == "__main__":
    run_cli(main)
