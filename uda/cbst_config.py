"""Configuration of self-training (docs/uda.md, section CBST): frozen, validated once, stored as JSON. No PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_handlers.choices import ON_BAD_IMAGE
from models.shapes import SMALLEST_CROP
from training.config import (
    InitConfig,
    LoaderConfig,
    PassesConfig,
    RunConfig,
    SourceFiles,
    StartFlags,
    TargetFiles,
    TargetImages,
    check_common,
)
from training.flags import (
    Config,
    Size,
    as_given,
    check,
    check_not_negative,
    check_positive,
    flag_of,
    option,
    path_option,
)
from uda.config import SourceImages
from uda.presets import PresetFlags

METHODS = ("st", "cbst", "cbst-sp")
IMAGE_WISE = ("iw_maxsquare", "iw_entropy")
MAXSQUARE_METHODS = ("maxsquare", "entropy", *IMAGE_WISE, "hard")
DDB_METHODS, DDB_CKD = ("ddb-cut", "ddb-class"), "ddb-ckd"
TRAIN_FIRST = "train one first with train_semseg_on_source.py"


@dataclass(frozen=True)
class MethodConfig:
    """Which method trains."""

    method: str = option(
        "cbst", "source: on labelled source images alone, with the flags of train_semseg_on_source.py; st: "
        "self-training with one threshold for all classes; cbst: with one for each class; cbst-sp: and a spatial "
        "prior; maxsquare, entropy, iw_maxsquare, iw_entropy, hard: a loss on the predictions; ddb-cut, ddb-class: a "
        "teacher labels target images, which are mixed with source images by rectangles or by classes; ddb-ckd: "
        "these two label them for another net",
        choices=("source", *METHODS, *MAXSQUARE_METHODS, *DDB_METHODS, DDB_CKD),
    )  # fmt: skip


@dataclass(frozen=True)
class ModeConfig:
    """Whether a method computes as its published code does."""

    mode: str = option(
        "clean", "reference computes as the published code does; docs/uda.md lists the differences",
        choices=("clean", "reference"),
    )  # fmt: skip


@dataclass(frozen=True)
class SelectionConfig:
    """Which state of a run is kept besides the last one."""

    select_by: str = option(
        "none", "keep a best state besides the last one: none, by mIoU on the target's val split, which then is no "
        "test any more, or by the mutual information of the predictions, which needs no labels",
        choices=("none", "miou", "label_free"),
    )  # fmt: skip


@dataclass(frozen=True)
class LabellingConfig(ModeConfig):
    """How a net labels the target."""

    spatial_prior: str = path_option(
        "", "of cbst-sp: file of make_spatial_prior.py, or the published one", metavar="FILE"
    )
    split_tgt: str = option("train", "split of the target that is adapted to", choices=("train", "val"))
    test_scales: int | None = option(
        None, "longer side of the images that the net labels, published 1850 (default: each one's own)", type=int
    )

    def __post_init__(self) -> None:
        check_positive(self, "test_scales")


@dataclass(frozen=True)
class AdaptationConfig(LabellingConfig, SelectionConfig, InitConfig):
    """The net that is adapted, and how it labels the target."""


@dataclass(frozen=True)
class RoundsConfig(PassesConfig):
    """Number and length of the rounds, and what grows from one to the next."""

    num_round: int = option(6, "rounds")
    epoch_per_round: int = option(2, "epochs of a round, over its source images and all target images")
    batch_size: int = option(2, "images in a step, over all GPUs")
    base_lr: float = option(1e-4, "learning rate of the first round; divided by the square root of 2 after each")
    weight_decay: float = option(5e-4, "weight decay of weights; biases have none, and learn twice as fast")
    momentum: float = option(0.9, "momentum of the SGD, which begins at 0 in each round")
    init_tgt_port: float = option(0.2, "portion of the target's pixels that is labelled in the first round")
    max_tgt_port: float = option(0.5, "its maximum")
    step_tgt_port: float = option(0.05, "its growth from round to round")
    init_src_port: float = option(0.03, "portion of the source images that the first round trains on; 0 for none")
    max_src_port: float = option(0.06, "its maximum")
    step_src_port: float = option(0.0025, "its growth from round to round")
    source_sample_policy: str = option(
        "cumulative", "draw the source images of all rounds by --seed_int, so that later rounds add images to those of "
        "earlier ones, or of each round by its number", choices=("cumulative", "random"),
    )  # fmt: skip
    seed_int: int = option(0, "seed of the choice of source images")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_round", "epoch_per_round", "batch_size", "base_lr")
        check_not_negative(self, "weight_decay", "seed_int")
        check(self.seed_int < 2**32, f"--seed_int is {self.seed_int}; it must be below 2^32")
        check(0.0 <= self.momentum < 1.0, f"--momentum is {self.momentum}; it must be in [0, 1)")
        check_shares(self, *(f"{name}_{of}_port" for of in ("tgt", "src") for name in ("init", "max", "step")))


@dataclass(frozen=True)
class CropsConfig:
    """The square crops of a training."""

    crop_size: int = option(500, "side of the square crops that the net sees")
    scale_rate_range: tuple[float, float] = option(
        (0.7, 1.3), "smallest and largest factor by which images are scaled before they are cropped", type=float,
        nargs=2, metavar=("X", "X"),
    )  # fmt: skip
    origin_size: int | None = option(
        None, "longer side of a source image at the factor 1 (default: its own)", type=int
    )
    origin_size_tgt: int | None = option(
        None, "longer side of a target image at the factor 1 (default: its own)", type=int
    )
    mine_port: float = option(0.8, "share of the crops that are centred on a pixel of a rare class")
    mine_id_number: int = option(3, "number of the rarest classes that crops are centred on")
    mine_thresh: float = option(0.001, "classes with a smaller share of the predictions go before those")

    def __post_init__(self) -> None:
        check(self.crop_size >= SMALLEST_CROP, f"--crop_size {self.crop_size}: it must be at least {SMALLEST_CROP}")
        check_positive(self, "crop_size", "scale_rate_range", "origin_size", "origin_size_tgt")
        check_not_negative(self, "mine_id_number")
        check_shares(self, "mine_port", "mine_thresh")
        smallest, largest = self.scale_rate_range
        check(smallest <= largest, f"--scale_rate_range {smallest} {largest}: the smallest factor comes first")


@dataclass(frozen=True)
class AppliedNetFlags(TargetImages):
    """A net, the images that it sees, and how they are read."""

    weights: str = path_option(
        "", "the net: a run folder, a checkpoint, or a file of the ProCST, CBST or DDB authors (required)",
        metavar="FILE", required=True,
    )  # fmt: skip
    gpus: tuple[str, ...] = option(
        (), "indices of CUDA devices, or cpu; several share the images, one process each, of "
        "generate_pseudo_labels.py alone (default: the first GPU, or the CPU where there is none)", type=str, nargs="+",
        metavar="GPU",
    )  # fmt: skip
    num_workers: int | None = option(
        None, "loader processes (default: 6, or as many as CPUs; half of them on a CPU)", type=int
    )
    on_bad_image: str = option(
        "stop", "an image that cannot be used ends the program, or is left out", choices=ON_BAD_IMAGE
    )

    def __post_init__(self) -> None:
        check_not_negative(self, "num_workers")


@dataclass(frozen=True)
class LabellingFlags(LabellingConfig, AppliedNetFlags):
    """What generate_pseudo_labels.py reads and writes."""

    output: str = path_option(
        "", "folder of the labels, PNGs of trainIds with 255 = no label, and of manifest.json; the same command "
        "continues what was interrupted (required)", metavar="DIR", required=True,
    )  # fmt: skip
    portion: float = option(0.2, "portion of the target's pixels that is labelled, --init_tgt_port of train_uda.py")
    kc_policy: str = option(
        "cb", "cb: a threshold for each class; global: one for all classes", choices=("cb", "global")
    )
    colours: bool = option(False, "write the labels in colours into OUTPUT_colours, too")

    first: ClassVar[Sequence[str]] = ("weights", "target", "trg_data_dir", "output", "portion", "kc_policy", "gpus")

    def __post_init__(self) -> None:
        super().__post_init__()
        AppliedNetFlags.__post_init__(self)
        check_shares(self, "portion")


@dataclass(frozen=True)
class PriorFlags(SourceFiles):
    """What make_spatial_prior.py reads and writes."""

    prior_size: Size = option(
        (2048, 1024), "size of the prior; images of another size are given a resized one", type=int, nargs=2,
        metavar=("W", "H"),
    )  # fmt: skip
    sigma: float | None = option(
        None, "standard deviation of the smoothing Gaussian in pixels of the prior, 0 for none (default: 35 at the "
        "width of 2048, and in proportion at others)", type=float,
    )  # fmt: skip
    num_classes: int | None = option(
        None, "classes of the prior, those of the net (default: those of the source, 19 of the known sets)", type=int
    )
    num_workers: int = option(2, "loader processes")
    output: str = path_option(
        "", "MATLAB file to write, beside one picture for each class", metavar="FILE", required=True
    )

    def __post_init__(self) -> None:
        check_positive(self, "prior_size")
        check_not_negative(self, "sigma", "num_workers")
        usable = self.num_classes is None or 2 <= self.num_classes <= 255
        check(usable, f"--num_classes is {self.num_classes}; it must be 2 to 255")


def check_shares(section: object, *names: str) -> None:
    """Raise `UserError` unless these fields of a section lie in [0,1]."""
    for name in names:
        value = getattr(section, name)
        check(0.0 <= value <= 1.0, f"{flag_of(name)} is {as_given(value)}; it must be in [0, 1]")


@dataclass(frozen=True)
class SelfTrainingConfig(Config):
    """The whole configuration of a self-training."""

    method: MethodConfig
    run: RunConfig
    loader: LoaderConfig
    source: SourceFiles
    images: SourceImages
    target: TargetFiles
    adaptation: AdaptationConfig
    rounds: RoundsConfig
    crops: CropsConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (PresetFlags, StartFlags, RunConfig),
        "data": (SourceFiles, SourceImages, TargetFiles, LoaderConfig),
        "method": (MethodConfig, AdaptationConfig, RoundsConfig, CropsConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "method", "init", "gpus", "source", "src_data_dir", "target", "trg_data_dir", "num_round", "batch_size",
        "crop_size", "run_dir", "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        name, prior, rounds = self.method.method, self.adaptation.spatial_prior, self.rounds
        for of, init, most in (
            ("tgt", rounds.init_tgt_port, rounds.max_tgt_port), ("src", rounds.init_src_port, rounds.max_src_port)
        ):  # fmt: skip
            fits = init <= most or self.adaptation.mode == "reference"
            check(fits, f"--init_{of}_port {init:g} is above --max_{of}_port {most:g}; raise that")
        check(name in METHODS, f"--method {name} has another configuration; start it with --method {name}")
        check(bool(prior) or name != "cbst-sp", "--method cbst-sp needs --spatial_prior: see make_spatial_prior.py")
        only = f"--spatial_prior (or a preset's) acts only with cbst-sp, not with --method {name}"
        check(not prior or name == "cbst-sp", only)

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """See `Config.check_given`."""
        check_common(given)
        for name in ("cache_dir", "resample"):
            check(name not in given, f"--{name}: self-training reads images at their own size; omit the flag")
