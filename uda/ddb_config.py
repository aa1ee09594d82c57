"""Configuration of DDB's first step (docs/uda.md, section DDB): frozen, validated once. No PyTorch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_handlers.datasets import find_data_set
from training.config import (
    InitConfig,
    LoaderConfig,
    NetConfig,
    RunConfig,
    SourceFiles,
    StartFlags,
    TargetConfig,
    check_common,
    check_crop,
    check_crop_fits,
    check_start,
    resolve_common,
)
from training.flags import Config, Size, check, check_not_negative, check_positive, option, size_option
from uda.cbst_config import DDB_METHODS, MethodConfig, ModeConfig, SelectionConfig, check_shares
from uda.config import SourceImages
from uda.presets import PresetFlags

PUBLISHED_SIZES = {"gta5": (1280, 704), "cityscapes": (1024, 512)}
PUBLISHED_CROP = 512
PUBLISHED_STEPS, PUBLISHED_WARMUP, PUBLISHED_VALIDATIONS = 40_000, 1500, 10


@dataclass(frozen=True)
class SamplesConfig(TargetConfig):
    """The target images, and the (W,H) and the colours of what the net sees."""

    src_resize: Size | None = size_option(
        "size source images are resized to; with --mode reference a box that they fit into (default: the published "
        "1280 704 for GTA5, the data set's for others)"
    )
    crop_size: Size | None = size_option("random crop of both (default: the published 512 512, or what fits)")
    cat_max_ratio: float = option(
        0.75, "source crops in which a class has this share are drawn again, at most 10 times; 1 takes any crop"
    )
    photometric_distortion: bool = option(False, "distort the colours of source images")
    jitter_p: float = option(0.8, "probability that the colours of a mixed image are changed")
    blur_p: float = option(0.5, "probability that a mixed image is blurred")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "src_resize", "crop_size")
        check_shares(self, "cat_max_ratio", "jitter_p", "blur_p")
        check_crop(self.crop_size)
        check_crop_fits(self.crop_size, "src_resize", self.src_resize)
        check_crop_fits(self.crop_size, "trg_resize", self.trg_resize)


@dataclass(frozen=True)
class TeacherConfig(ModeConfig, SelectionConfig, InitConfig):
    """The net to start from, and how its teacher labels the target."""

    teacher_alpha: float = option(0.99, "share of the teacher that stays at a step, after a mean of all steps")
    pseudo_threshold: float = option(0.968, "the share of target pixels with this probability is the weight of all")
    ignore_top: int = option(0, "upper rows of target crops that have no weight")
    ignore_bottom: int = option(0, "lower rows of target crops that have no weight")
    lambda_features: float = option(
        0.0, "weight of the distance between the features of the net and of one with the --backbone_weights, on source"
    )
    feature_classes: tuple[int, ...] = option(
        (), "of --lambda_features: trainIds of the cells that count, 255 for mixed ones (default: all)", type=int,
        nargs="+",
    )  # fmt: skip
    feature_min_ratio: float = option(
        0.75, "of --feature_classes: a cell in which no class has this share is mixed"
    )

    def __post_init__(self) -> None:
        check_not_negative(self, "lambda_features", "ignore_top", "ignore_bottom", "feature_classes")
        check_shares(self, "teacher_alpha", "pseudo_threshold", "feature_min_ratio")
        check(max(self.feature_classes, default=0) < 256, "--feature_classes: trainIds are 0 to 255")


@dataclass(frozen=True)
class ScheduleConfig:
    """AdamW, and the length and rates of the training: lr (1 - step / num_steps)^power after a warm-up."""

    num_steps: int = option(PUBLISHED_STEPS, "steps of the training")
    batch_size: int = option(4, "images of each domain in a step, over all GPUs")
    lr_semseg: float = option(6e-5, "learning rate of the backbone, the head's is 10x; published 6e-6 in round 2")
    weight_decay: float = option(0.01, "weight decay of all tensors")
    power: float = option(1.0, "power of the poly schedule")
    warmup_steps: int | None = option(
        None, "steps in which the rate grows linearly (default: 3.75% of the steps, the published 1500 of 40000)",
        type=int,
    )  # fmt: skip
    warmup_ratio: float = option(1e-6, "share of the rate at the first of them")
    validation_rate: int | None = option(
        None, "steps between two validations (default: a tenth of the steps, the published 4000)", type=int,
        metavar="STEPS",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_positive(self, "num_steps", "batch_size", "lr_semseg", "validation_rate")
        check_not_negative(self, "weight_decay", "warmup_steps")
        check(0.0 <= self.power < 100.0, f"--power is {self.power}; it must be between 0 and 100")
        check_shares(self, "warmup_ratio")
        fits = self.warmup_steps <= self.num_steps
        check(fits, f"--warmup_steps {self.warmup_steps} is above --num_steps {self.num_steps}; lower it")


@dataclass(frozen=True)
class DDBConfig(Config):
    """The whole configuration of DDB's first step."""

    method: MethodConfig
    run: RunConfig
    loader: LoaderConfig
    source: SourceFiles
    images: SourceImages
    samples: SamplesConfig
    net: NetConfig
    teacher: TeacherConfig
    schedule: ScheduleConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (PresetFlags, StartFlags, RunConfig),
        "data": (SourceFiles, SourceImages, SamplesConfig, LoaderConfig),
        "method": (MethodConfig, NetConfig, TeacherConfig, ScheduleConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "method", "init", "model", "gpus", "source", "src_data_dir", "target", "trg_data_dir", "num_steps",
        "batch_size", "run_dir", "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        name = self.method.method
        check(name in DDB_METHODS, f"--method {name} has another configuration; start it with --method {name}")

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """See `Config.check_given`."""
        check_common({**given, "select_by": ""})  # this method validates with --select_by none, too
        distance = given.get("lambda_features")
        if not distance:
            check_start(given)
        for name in ("feature_classes", "feature_min_ratio"):
            check(name not in given or bool(distance), f"--{name} acts only with --lambda_features")
        fitted = "resample" in given and given.get("mode") == "reference"
        check(not fitted, "--resample: --mode reference resizes as published; omit the flag")

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags with what follows from the data sets and the number of steps filled in."""
        source, target = (find_data_set(flags[name], f"--{name}") for name in ("source", "target"))
        sizes = (
            flags["src_resize"] or PUBLISHED_SIZES.get(source.name, source.resize),
            flags["trg_resize"] or target.resize,
        )
        steps = flags["num_steps"]
        warmup, rate = flags["warmup_steps"], flags["validation_rate"]
        return resolve_common(flags) | {
            "src_resize": sizes[0],
            "trg_resize": sizes[1],
            "crop_size": flags["crop_size"] or tuple(min(PUBLISHED_CROP, *sides) for sides in zip(*sizes, strict=True)),
            "warmup_steps": steps * PUBLISHED_WARMUP // PUBLISHED_STEPS if warmup is None else warmup,
            "validation_rate": max(1, steps // PUBLISHED_VALIDATIONS) if rate is None else rate,
        }
