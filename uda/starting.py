"""Which class trains a configuration of train_uda.py, and what checks its input."""

from uda.cbst import SelfTraining, prepare_self_training
from uda.cbst_config import SelfTrainingConfig
from uda.config import SourceTrainingConfig
from uda.ddb import DDBTraining, prepare_ddb
from uda.ddb_ckd import Distillation, prepare_distillation
from uda.ddb_ckd_config import DistillationTrainingConfig
from uda.ddb_config import DDBConfig
from uda.maxsquare import MaxSquareTraining, prepare_maxsquare
from uda.maxsquare_config import MaxSquareConfig
from uda.source import SourceTraining, prepare_source

METHODS = {
    SourceTrainingConfig: (SourceTraining, prepare_source), SelfTrainingConfig: (SelfTraining, prepare_self_training),
    MaxSquareConfig: (MaxSquareTraining, prepare_maxsquare), DDBConfig: (DDBTraining, prepare_ddb),
    DistillationTrainingConfig: (Distillation, prepare_distillation),
}  # fmt: skip
