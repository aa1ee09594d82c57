"""Configuration of MaxSquare and its relatives (docs/uda.md, section MaxSquare): frozen, validated once. No PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_handlers.datasets import find_data_set
from models.shapes import model_called
from training.config import (
    InitConfig,
    LoaderConfig,
    RunConfig,
    SGDConfig,
    SourceFiles,
    StartFlags,
    TargetConfig,
    check_common,
    check_crop,
    check_crop_fits,
)
from training.flags import Config, Size, check, check_not_negative, check_positive, option, size_option
from uda.cbst_config import IMAGE_WISE, MAXSQUARE_METHODS, MethodConfig, ModeConfig, SelectionConfig, check_shares
from uda.config import AuxiliaryConfig, SourceImages

PUBLISHED_SIZES = {"gta5": (1280, 720), "synthia": (1280, 760), "cityscapes": (1024, 512)}


@dataclass(frozen=True)
class SizesConfig(TargetConfig):
    """The target images, and the (W,H) of what the net sees."""

    src_resize: Size | None = size_option(
        "size source images are resized to (default: the published 1280 720 for GTA5, 1280 760 for SYNTHIA, 1024 512 "
        "for Cityscapes; the data set's for others)"
    )
    crop_size: Size | None = size_option("random crop of both (default: whole images)")
    no_gaussian_blur: bool = option(False, "do not blur half of the samples, by a radius of at most one pixel")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "src_resize", "crop_size")
        if self.crop_size:
            check_crop_fits(self.crop_size, "src_resize", self.src_resize)
            check_crop_fits(self.crop_size, "trg_resize", self.trg_resize)
        for size in (self.crop_size,) if self.crop_size else (self.src_resize, self.trg_resize):
            check_crop(size)


@dataclass(frozen=True)
class TargetLossConfig(AuxiliaryConfig, ModeConfig, SelectionConfig, InitConfig):
    """The net that is adapted, and what it learns from the target."""

    model: str = option(
        "", "the net, if it is not that of --init: deeplabv2_multi_snr gives a deeplabv2_multi a new restitution",
        type=model_called,
    )  # fmt: skip
    aspp_branches: int | None = option(
        None, "branches of the heads of a two-headed net that are computed (default: those of --init's, published 2)",
        choices=(2, 4), type=int,
    )  # fmt: skip
    lambda_target: float = option(0.1, "weight of the losses on the target")
    IW_ratio: float = option(0.2, "of iw_ methods: 0 weighs all pixels of an image alike, 1 all of its classes")
    threshold: float = option(0.95, "of hard and of --multi: probability above which a prediction is a label")
    lambda_restitution: float = option(
        0.0, "weight of the dual restitution loss on source, and of the cross-entropy of its heads; needs SNR"
    )
    freeze_bn: bool = option(False, "batch norms keep their statistics")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_not_negative(self, "lambda_target", "lambda_restitution")
        check_shares(self, "IW_ratio", "threshold")


@dataclass(frozen=True)
class ScheduleConfig(SGDConfig):
    """Length of the training and its poly schedule."""

    lr_semseg: float = option(2.5e-4, "learning rate of the backbone, the head's is 10x")
    round_num: int = option(5, "rounds")
    epoch_each_round: int = option(2, "epochs of a round, over all target images; each ends with a validation")
    batch_size: int = option(1, "images of each domain in a step, over all GPUs")
    power: float = option(0.9, "power of the poly schedule")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "round_num", "epoch_each_round", "batch_size")
        check(0.0 <= self.power < 100.0, f"--power is {self.power}; it must be between 0 and 100")

    @property
    def epochs(self) -> int:
        """Epochs of the training."""
        return self.round_num * self.epoch_each_round


@dataclass(frozen=True)
class MaxSquareConfig(Config):
    """The whole configuration of an adaptation by a loss on predictions."""

    method: MethodConfig
    run: RunConfig
    loader: LoaderConfig
    source: SourceFiles
    images: SourceImages
    target: SizesConfig
    adaptation: TargetLossConfig
    schedule: ScheduleConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (StartFlags, RunConfig),
        "data": (SourceFiles, SourceImages, SizesConfig, LoaderConfig),
        "method": (MethodConfig, TargetLossConfig, ScheduleConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "method", "init", "gpus", "source", "src_data_dir", "target", "trg_data_dir", "round_num", "batch_size",
        "run_dir", "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        name = self.method.method
        check(name in MAXSQUARE_METHODS, f"--method {name} has another configuration; start it with --method {name}")

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """See `Config.check_given`."""
        check_common(given)
        name, multi = given.get("method"), given.get("multi")
        check("IW_ratio" not in given or name in IMAGE_WISE, f"--IW_ratio acts only with {' and '.join(IMAGE_WISE)}")
        check("threshold" not in given or name == "hard" or multi, "--threshold acts only with hard or --multi")
        AuxiliaryConfig.check_flags(given)

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags with the sizes that follow from the data sets filled in."""
        source, target = (find_data_set(flags[name], f"--{name}") for name in ("source", "target"))
        return {
            **flags,
            "src_resize": flags["src_resize"] or PUBLISHED_SIZES.get(source.name, source.resize),
            "trg_resize": flags["trg_resize"] or target.resize,
        }
