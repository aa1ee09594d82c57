"""Configuration of the training of a segmentation net: frozen, validated once, stored as JSON. No PyTorch here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_handlers.choices import LABELS
from models.shapes import TWO_HEADED
from training.config import (
    ROOT_HELP,
    InitConfig,
    LoaderConfig,
    NetConfig,
    PassesConfig,
    RunConfig,
    SGDConfig,
    SourceConfig,
    StartFlags,
    ValidationConfig,
    check_common,
    check_crop,
    check_start,
    default_semseg_weights,
    resolve_common,
)
from training.flags import Config, check, check_not_negative, check_positive, data_set_option, option, path_option


@dataclass(frozen=True)
class SourceImages:
    """Where the source's labels and images are, if they are not below its root."""

    src_label_dir: str = path_option(
        "", "root folder of the labels, where it is another: SiT images have the labels of their source", metavar="DIR",
        may_change=True,
    )  # fmt: skip
    source_images: tuple[str, ...] = path_option(
        (), "folders with the images to train on under the names of --src_data_dir, such as SiT sets, of which one is "
        "drawn for each sample (default: --src_data_dir's own); a validation on source reads the first", metavar="DIR",
        type=str, nargs="+", may_change=True,
    )  # fmt: skip


@dataclass(frozen=True)
class HeldOutConfig(SourceImages):
    """Where labels and images are, which labelled images the net is validated on, and where the best net goes."""

    val_list: str = path_option("", "text file with the images to validate on", metavar="FILE")
    val_count: int = option(
        0, "validate on the last N images, which are then not trained on (default: the data set's val split; GTA5 the "
        "last 500, SYNTHIA the last 300)",
    )  # fmt: skip
    output: str | None = path_option(
        None, "the best net (default: pretrained/pretrained_semseg_on_<source>.pth); a new run never "
        "overwrites a file; '' writes to the run folder alone", metavar="FILE", type=str, may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_not_negative(self, "val_count")


@dataclass(frozen=True)
class ScoredTarget:
    """The target that a net is scored on while source alone trains it (domain generalisation)."""

    target: str = data_set_option(
        "", "score the net on the val split of this data set, not on held-out source images; it chooses no state, "
        "unless --select_by says so",
    )  # fmt: skip
    trg_data_dir: str = path_option("", ROOT_HELP, metavar="DIR", may_change=True)
    trg_labels: str = option("", "what its label files hold (default: what the data set declares)", choices=LABELS)


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Training of the auxiliary head of a two-headed net."""

    multi: bool = option(
        False, "train the auxiliary head, too; on the target with labels of both heads' mean"
    )
    lambda_seg: float = option(0.1, "of --multi: weight of the auxiliary head's losses")

    def __post_init__(self) -> None:
        check_not_negative(self, "lambda_seg")

    @staticmethod
    def check_flags(given: Mapping[str, Any]) -> None:
        """Raise `UserError` for flags on the command line that do not act."""
        check("lambda_seg" not in given or bool(given.get("multi")), "--lambda_seg acts only with --multi")


@dataclass(frozen=True)
class PolyConfig(PassesConfig):
    """Length of the training and its poly schedule: rate * (1 - step / num_steps) ** power."""

    num_steps: int = option(250_000, "steps of the poly schedule")
    batch_size: int = option(1, "images in a step, over all GPUs")
    power: float = option(0.9, "power of the poly schedule")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_steps", "batch_size")
        check(0.0 <= self.power < 100.0, f"--power is {self.power}; it must be between 0 and 100")


@dataclass(frozen=True)
class SourceTrainingConfig(Config):
    """The whole configuration of a training on labelled source images."""

    run: RunConfig
    loader: LoaderConfig
    source: SourceConfig
    held_out: HeldOutConfig
    scored: ScoredTarget
    start: InitConfig
    net: NetConfig
    sgd: SGDConfig
    poly: PolyConfig
    auxiliary: AuxiliaryConfig
    validation: ValidationConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (StartFlags, RunConfig),
        "data": (SourceConfig, HeldOutConfig, ScoredTarget, LoaderConfig),
        "net and training": (InitConfig, NetConfig, SGDConfig, PolyConfig, AuxiliaryConfig, ValidationConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "gpus", "source", "src_data_dir", "model", "num_steps", "batch_size", "crop_size", "output", "run_dir",
        "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_crop(self.source.crop_size)
        found = not self.auxiliary.multi or self.net.model in TWO_HEADED
        check(found, f"--multi needs a net of {', '.join(TWO_HEADED)}, not --model {self.net.model}")

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """See `Config.check_given`."""
        check_common(given)
        AuxiliaryConfig.check_flags(given)
        for name in () if given.get("target") else ("trg_data_dir", "trg_labels"):
            check(name not in given, f"--{name} acts only with --target")
        both = given.get("val_list") and given.get("val_count")
        check(not both, "--val_list and --val_count contradict each other; give one")
        check_start(given)

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags with what follows from the data set filled in."""
        output = default_semseg_weights(flags["source"]) if flags["output"] is None else flags["output"]
        return {**resolve_common(flags), "output": output}
