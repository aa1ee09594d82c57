"""The groups of flags that trainings share. Nothing here imports PyTorch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_handlers.choices import LABELS, ON_BAD_IMAGE, RESAMPLINGS
from data_handlers.datasets import find_data_set
from models.shapes import MODEL_BACKBONES, SMALLEST_CROP, SMP_MODELS, SegmentationShape, default_backbone, model_called
from training.flags import (
    Size,
    as_given,
    check,
    check_not_negative,
    check_positive,
    data_set_option,
    option,
    path_option,
    size_option,
)

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
ROOT_HELP = "its root folder (default: what the data set declares, data/gta for gta5, else data/NAME)"
SELECT_BY = ("auto", "miou", "label_free", "none")


@dataclass(frozen=True)
class StartFlags:
    """How one start of a run begins; not part of its configuration."""

    run_dir: str = path_option(
        "", "folder of this run: made where it is missing, continued where it holds a checkpoint, so that the same "
        "command starts a run and continues it (default: a new folder in --checkpoints_dir)", metavar="RUN",
    )  # fmt: skip
    continue_train_from_path: str = path_option("", "continue the run in this folder", metavar="RUN")
    resume_to_epoch: int = option(
        0, "with --continue_train_from_path: set the step counter to the start of epoch E (from 1) of the stage in "
        "training; weights and optimisers stay those of the checkpoint", metavar="E",
    )  # fmt: skip
    dry_run: bool = option(
        False, "check everything, train a few steps of every stage in memory, print time and memory, and write nothing"
    )
    print_config: bool = option(False, "print the configuration that the flags come to as JSON, and end")


@dataclass(frozen=True)
class RunConfig:
    """Machine, seed, outputs and reporting of a run."""

    gpus: tuple[str, ...] = option(
        (), "indices of CUDA devices, or cpu; several share every batch, one process each (default: the first GPU, or "
        "the CPU where there is none)", type=str, nargs="+", metavar="GPU", may_change=True,
    )  # fmt: skip
    manual_seed: int = option(1337, "seed of weights, data order and crops")
    checkpoints_dir: str = path_option("./TrainedModels", "new run folders are made here", metavar="DIR")
    tb_logs_dir: str = path_option("./runs", "TensorBoard logs are written here", metavar="DIR", may_change=True)
    print_rate: int = option(100, "steps between two log entries", may_change=True)
    save_checkpoint_rate: int = option(1000, "steps between two checkpoints", may_change=True)
    save_checkpoint_minutes: float = option(30.0, "most minutes between two checkpoints", may_change=True)
    pics_per_epoch: int = option(10, "TensorBoard picture rows an epoch", may_change=True)
    precision: str = option(
        "auto", "arithmetic of the networks; weights and losses are float32 in each; auto: bf16 on hardware that is "
        "faster in it, else fp32", choices=PRECISIONS, may_change=True,
    )  # fmt: skip
    deterministic: bool = option(
        False, "on a GPU, use algorithms that give the same bits every time, which is slower; on the CPU all do",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_positive(self, "print_rate", "save_checkpoint_rate", "save_checkpoint_minutes")
        check_not_negative(self, "pics_per_epoch", "manual_seed")


@dataclass(frozen=True)
class LoaderConfig:
    """How images are read."""

    num_workers: int | None = option(
        None, "loader processes for each data set (default: 6, or as many as CPUs; half of them on a CPU)", type=int,
        may_change=True,
    )  # fmt: skip
    cache_dir: str = path_option(
        "", "keep the resized images in memory-mapped files in this folder, made once: 2.1 MB for a GTA5 frame "
        "(default: read the data sets every time)", metavar="DIR", may_change=True,
    )  # fmt: skip
    on_bad_image: str = option(
        "stop", "an image or label that cannot be used ends the run, or another one takes its place and it is listed "
        "at the end", choices=ON_BAD_IMAGE, may_change=True,
    )  # fmt: skip
    resample: str = option(
        "fast", "arithmetic of the bicubic filter: exact is Pillow's; fast is at most one level of 255 off",
        choices=RESAMPLINGS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_not_negative(self, "num_workers")


@dataclass(frozen=True)
class SourceFiles:
    """The source images and labels."""

    source: str = data_set_option("gta5", "source data set")
    src_data_dir: str = path_option("", ROOT_HELP, metavar="DIR", may_change=True)
    src_split: str = option("", "a split it declares: of GTA5 train, val, test, of Cityscapes fine (default: all)")
    src_labels: str = option("", "what its label files hold (default: what the data set declares)", choices=LABELS)
    src_list: str = path_option("", "text file with one source image a line, instead of all", metavar="FILE")


@dataclass(frozen=True)
class SourceConfig(SourceFiles):
    """The source images and labels, and the (W,H) of the crops that a training sees."""

    src_resize: Size | None = size_option("size source images are resized to (default: the data set's, GTA5 1126 619)")
    crop_size: Size | None = size_option("random crop, and size of the finest scale (default: 1024 512)")

    def __post_init__(self) -> None:
        check_positive(self, "src_resize", "crop_size")
        check_crop_fits(self.crop_size, "src_resize", self.src_resize)


@dataclass(frozen=True)
class TargetImages:
    """The target images."""

    target: str = data_set_option("cityscapes", "target data set")
    trg_data_dir: str = path_option("", ROOT_HELP, metavar="DIR", may_change=True)
    trg_list: str = path_option("", "text file with one target image a line, instead of all", metavar="FILE")


@dataclass(frozen=True)
class TargetFiles(TargetImages):
    """The target images; their labels are used for validation only."""

    trg_labels: str = option("", "what its label files hold (default: what the data set declares)", choices=LABELS)


@dataclass(frozen=True)
class TargetConfig(TargetFiles):
    """The target images and the (W,H) they are resized to."""

    trg_resize: Size | None = size_option("size target images are resized to (default: the data set's, 1024 512)")

    def __post_init__(self) -> None:
        check_positive(self, "trg_resize")


@dataclass(frozen=True)
class NetConfig:
    """A segmentation net and the initial weights of its backbone."""

    model: str = option(
        "DeepLabV2", f"segmentation net: {', '.join(MODEL_BACKBONES)}, or of segmentation_models_pytorch "
        f"{', '.join(SMP_MODELS)}", type=model_called,
    )  # fmt: skip
    backbone: str = option(
        "", "its backbone: of the DeepLab nets resnet101, resnet50, resnet34 or resnet18, of DeepLabV2DDB also "
        "these with _v1c, a stem of 3x3 convolutions; of smp: nets an encoder of the package, such as mit_b2 "
        "(default: the published one; of smp: nets the package's, of Segformer mit_b2)",
    )  # fmt: skip
    aspp_branches: int = option(
        2, "of the two-headed nets, branches of the heads that are computed, of which the published nets have 2",
        choices=(2, 4),
    )  # fmt: skip
    num_classes: int | None = option(None, "its classes (default: those of the source, 19 of the known sets)", type=int)
    backbone_weights: str = path_option(
        "imagenet", "what the backbone starts from: torchvision's ImageNet weights (of smp: nets the package's "
        "own), or a state dict with its names; of _v1c backbones mmsegmentation's file; of ResNet38 the authors' "
        "ImageNet classifier (.params of MXNet)",
        keywords=("imagenet", "random"), metavar="imagenet|PATH", may_change=True,
    )  # fmt: skip
    no_pretrained_backbone: bool = option(False, "the backbone starts from random weights; nothing is downloaded")

    def __post_init__(self) -> None:
        self.shape()

    def shape(self) -> SegmentationShape:
        """The net's shape."""
        backbone = self.backbone or default_backbone(self.model)
        return SegmentationShape(self.model, backbone, self.num_classes, self.aspp_branches)


@dataclass(frozen=True)
class InitConfig:
    """The net that a training starts from."""

    init: str = path_option(
        "", "the net to start from: a run folder, a checkpoint, or a file of the ProCST, CBST or DDB authors; a "
        "training on source gets its --model, --backbone and --num_classes (default: its --backbone_weights)",
        metavar="FILE",
    )  # fmt: skip


@dataclass(frozen=True)
class PassesConfig:
    """In how many passes a step is computed."""

    micro_batch: int = option(
        0, "most images in a pass of a process, to save memory; the gradients of a step's passes add up to those of "
        "its batch, but batch norms that learn statistics see a pass alone (default: the whole batch)",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_not_negative(self, "micro_batch")


@dataclass(frozen=True)
class SGDConfig:
    """SGD of a segmentation net; its head learns ten times as fast as its backbone."""

    lr_semseg: float = option(1e-4, "learning rate of the backbone, the head's is 10x")
    weight_decay: float = option(5e-4, "weight decay of the segmentation net's SGD")
    momentum: float = option(0.9, "momentum of the segmentation net's SGD")

    def __post_init__(self) -> None:
        check_positive(self, "lr_semseg")
        check_not_negative(self, "weight_decay")
        check(0.0 <= self.momentum < 1.0, f"--momentum is {self.momentum}; it must be in [0, 1)")


@dataclass(frozen=True)
class ValidationConfig:
    """Which validations pick the best checkpoint; `auto` becomes one of the others when a run starts."""

    select_by: str = option(
        "auto", "keep the best state by mIoU on the val split, which needs labels, or by the mutual information of the "
        "predictions, which needs none (default: miou where the val split has labels, else none)", choices=SELECT_BY,
    )  # fmt: skip
    validation_rate: int = option(0, "steps between two validations (default: one epoch)", metavar="STEPS")

    def __post_init__(self) -> None:
        check_not_negative(self, "validation_rate")


def default_semseg_weights(source: str) -> str:
    """Default path of the segmentation net, for training on source, which writes it, and for ProCST."""
    return f"pretrained/pretrained_semseg_on_{find_data_set(source, '--source').name}.pth"


def resolve_common(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with the backbone, its weights (random without one) and what the source's description says decided."""
    backbone, source = flags["backbone"] or default_backbone(flags["model"]), find_data_set(flags["source"], "--source")
    at_random = flags["no_pretrained_backbone"] or (backbone == "none" and flags["backbone_weights"] == "imagenet")
    return {
        **flags,
        "src_resize": flags["src_resize"] or source.resize,
        "src_data_dir": flags["src_data_dir"] or source.default_root,
        "crop_size": flags["crop_size"] or source.crop,
        "num_classes": len(source.class_names) if flags["num_classes"] is None else flags["num_classes"],
        "backbone": backbone,
        "backbone_weights": "random" if at_random else flags["backbone_weights"],
        "no_pretrained_backbone": False,
    }


def check_common(given: Mapping[str, Any]) -> None:
    """Raise `UserError` for flags of these groups on the command line that contradict each other."""
    contradictions = (
        ("run_dir", "continue_train_from_path"),
        ("run_dir", "checkpoints_dir"),
        ("no_pretrained_backbone", "backbone_weights"),
    )
    for one, other in contradictions:
        check(not (given.get(one) and other in given), f"--{one} and --{other} contradict each other; give one")
    check(
        not given.get("resume_to_epoch") or bool(given.get("continue_train_from_path")),
        "--resume_to_epoch acts only with --continue_train_from_path",
    )
    check(given.get("select_by") != "none" or not given.get("validation_rate"),
          "--validation_rate acts only with a --select_by that validates")  # fmt: skip


def check_start(given: Mapping[str, Any]) -> None:
    """Raise `UserError` for weights of a backbone on the command line that `--init` replaces."""
    for name in ("backbone_weights", "no_pretrained_backbone"):
        check(not (given.get("init") and given.get(name)), f"--init and --{name} contradict each other; give one")


def check_crop(crop: Size) -> None:
    """Raise `UserError` unless a crop is large enough for a segmentation net."""
    check(min(crop) >= SMALLEST_CROP, f"--crop_size {as_given(crop)}: both sides must be at least {SMALLEST_CROP}")


def check_crop_fits(crop: Size, name: str, resize: Size) -> None:
    """Raise `UserError` unless a crop fits into the image resized to `--{name}`."""
    sizes = f"--crop_size {as_given(crop)} does not fit into --{name} {as_given(resize)}"
    check(crop[0] <= resize[0] and crop[1] <= resize[1], f"{sizes}; lower the crop or raise the resize")
