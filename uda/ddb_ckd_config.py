"""Configuration of DDB's second step (docs/uda.md, section DDB): frozen, validated once. No PyTorch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from training.config import InitConfig, LoaderConfig, NetConfig, RunConfig, SourceFiles, StartFlags
from training.flags import Size, check, check_not_negative, check_positive, option, path_option, size_option
from uda.cbst_config import DDB_CKD, AppliedNetFlags, MethodConfig, ModeConfig, SelectionConfig, check_shares
from uda.config import SourceImages
from uda.ddb_config import DDBConfig, SamplesConfig, ScheduleConfig
from uda.presets import PresetFlags

PATHS = ("cut", "class")


@dataclass(frozen=True)
class PrototypeFlags(AppliedNetFlags):
    """What calculate_prototypes.py reads and writes."""

    trg_resize: Size | None = size_option("size target images are resized to (default: the data set's, 1024 512)")
    output: str = path_option(
        "", "file of the prototypes; the same command continues what was interrupted (required)", metavar="FILE",
        required=True,
    )  # fmt: skip

    first: ClassVar[Sequence[str]] = ("weights", "target", "trg_data_dir", "trg_resize", "output", "gpus")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "trg_resize")


@dataclass(frozen=True)
class DistilledSamplesConfig(SamplesConfig):
    """The images, as in the first step; the colours of source images are distorted."""

    photometric_distortion: bool = option(True, "distort the colours of source images")


@dataclass(frozen=True)
class DistillationConfig(ModeConfig, SelectionConfig, InitConfig):
    """The teachers, and what the net learns of them."""

    cut_teacher: str = path_option(
        "", "net of --method ddb-cut, as a run folder or a file (required)", metavar="FILE", may_change=True
    )
    class_teacher: str = path_option("", "net of --method ddb-class (required)", metavar="FILE", may_change=True)
    cut_prototypes: str = path_option(
        "", "file of calculate_prototypes.py for --cut_teacher", metavar="FILE", may_change=True
    )
    class_prototypes: str = path_option(
        "", "file of calculate_prototypes.py for --class_teacher", metavar="FILE", may_change=True
    )
    rectify: str = option(
        "", "what of the teachers is weighed by how near a pixel's feature is to the class's prototype (default: "
        "probabilities, with --soft_distill logits)", choices=("probabilities", "logits", "none"),
    )  # fmt: skip
    soft_distill: bool = option(False, "learn the teachers' probabilities, not their classes")
    soft_distill_w: float = option(0.1, "of --soft_distill: weight of the loss")
    temp: float = option(1.0, "of --soft_distill: what the logits are divided by")
    use_pl_weight: bool = option(False, "the share of target pixels with --pseudo_threshold is the weight of all")
    pseudo_threshold: float = option(0.968, "of --use_pl_weight: share of the probabilities that a class has")

    def __post_init__(self) -> None:
        check_positive(self, "temp")
        check_not_negative(self, "soft_distill_w")
        check_shares(self, "pseudo_threshold")
        for name in PATHS:
            given = bool(getattr(self, f"{name}_prototypes"))
            check(not given or self.rectify != "none", f"--{name}_prototypes does not act with --rectify none")
        on_probabilities = self.soft_distill and self.rectify == "probabilities"
        check(not on_probabilities, "--rectify probabilities: --soft_distill rectifies logits, or none")
        check(not (self.soft_distill and self.use_pl_weight), "--use_pl_weight does not act with --soft_distill")


@dataclass(frozen=True)
class DistillationTrainingConfig(DDBConfig):
    """The whole configuration of DDB's second step."""

    samples: DistilledSamplesConfig
    teacher: DistillationConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (PresetFlags, StartFlags, RunConfig),
        "data": (SourceFiles, SourceImages, DistilledSamplesConfig, LoaderConfig),
        "method": (MethodConfig, NetConfig, DistillationConfig, ScheduleConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "method", "cut_teacher", "class_teacher", "cut_prototypes", "class_prototypes", "gpus", "source",
        "src_data_dir", "target", "trg_data_dir", "num_steps", "batch_size", "run_dir", "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        name = self.method.method
        check(name == DDB_CKD, f"--method {name} has another configuration; start it with --method {name}")

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """See `Config.check_given`."""
        super().check_given(given)
        for names, flag in ((("soft_distill_w", "temp"), "soft_distill"), (("pseudo_threshold",), "use_pl_weight")):
            for name in names:
                check(name not in given or bool(given.get(flag)), f"--{name} acts only with --{flag}")

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """As `DDBConfig.resolve`, and what is rectified."""
        default = "logits" if flags["soft_distill"] else "probabilities"
        return {**super().resolve(flags), "rectify": flags["rectify"] or default}
