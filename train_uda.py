"""Adapt a segmentation net to an unlabelled target, from labelled source images: one of the methods of --method.

    python train_uda.py --method cbst --init pretrained/pretrained_semseg_on_gta5.pth --run_dir TrainedModels/CBST
    python train_uda.py --preset gta5-cityscapes-cbst --init NET.params --run_dir TrainedModels/CBST

The net is the one that train_semseg_on_source.py trains, which is `--method source` here.
"""

import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise

from training.flags import Config, build_parser, parse
from uda.cbst_config import DDB_CKD, DDB_METHODS, MAXSQUARE_METHODS, MethodConfig, SelfTrainingConfig
from uda.config import SourceTrainingConfig
from uda.ddb_ckd_config import DistillationTrainingConfig, DistilledSamplesConfig
from uda.ddb_config import DDBConfig, SamplesConfig
from uda.maxsquare_config import MaxSquareConfig, SizesConfig
from uda.presets import PresetFlags, listing, preset
from utils.errors import run_cli

CONFIGS = {"source": SourceTrainingConfig, DDB_CKD: DistillationTrainingConfig}
CONFIGS |= dict.fromkeys(MAXSQUARE_METHODS, MaxSquareConfig) | dict.fromkeys(DDB_METHODS, DDBConfig)
GROUPS, FIRST = SelfTrainingConfig.groups, SelfTrainingConfig.first
MORE_GROUPS = {
    f"With --method {', '.join(MAXSQUARE_METHODS)}": [SizesConfig, *MaxSquareConfig.groups["method"]],
    f"With --method {', '.join(DDB_METHODS)}": [SamplesConfig, *DDBConfig.groups["method"]],
    f"With --method {DDB_CKD}": [DistilledSamplesConfig, *DistillationTrainingConfig.groups["method"]],
}


def flags_of(words: Sequence[str]) -> tuple[type[Config], Mapping[str, Sequence[type]]]:
    """The configuration of the method that a command line or its preset names, and the groups of its flags."""
    given = dict(pairwise(word for argument in words for word in argument.split("=", 1)))
    method = given.get("--method") or (preset(given["--preset"])["method"] if "--preset" in given else "")
    config = CONFIGS.get(method, SelfTrainingConfig)
    more = {"method": [PresetFlags, MethodConfig]} if config is SourceTrainingConfig else {}
    return config, {**more, **config.groups}


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    config, groups = flags_of(sys.argv[1:])
    given = parse(build_parser(__doc__, groups, config.first))
    if given.pop("list_presets", False):
        print(listing())
        return
    if config is SourceTrainingConfig:
        del given["method"]
    # Imported after the flags are read: a mistyped flag is answered at once.
    from training.run import train
    from uda.starting import METHODS

    method, prepare = METHODS[config]
    train(script=__file__, method=method, prepare=prepare, given=given)


if __name__ == "__main__":
    run_cli(main)
