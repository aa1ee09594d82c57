"""The command line of train_procst.py and the configuration it stands for."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import TypeVar

from core.config import (
    ComputeConfig,
    DataConfig,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    ProCSTConfig,
    RunConfig,
    ScheduleConfig,
    SemsegConfig,
    default_semseg_weights,
    require_one_per_scale,
    resolve_norms,
)
from core.execution import PRECISIONS
from data_handlers.choices import ON_BAD_IMAGE, RESAMPLINGS
from data_handlers.datasets import DATA_SETS
from models.segmentation import BACKBONES, MODELS, default_backbone
from utils.devices import loader_workers
from utils.errors import UserError
from utils.flags import OneLineParser, flag_of

Section = TypeVar("Section")

# Flags that configure the segmentation nets of the last scale: without those nets they could not act.
SEGMENTATION_FLAGS = (
    "semseg_weights", "warmup_epochs", "lambda_labels", "model", "backbone", "num_classes", "backbone_weights",
    "no_pretrained_backbone", "lr_semseg", "weight_decay", "momentum", "select_by", "validation_rate",
)  # fmt: skip
# Flags that may differ when a run is continued: where things are, how they are reported and, since another machine may
# lack a precision, how they are computed; never what is computed.
CONTINUE_FLAGS = frozenset(
    {
        "continue_train_from_path", "resume_to_epoch", "gpus", "num_workers", "src_data_dir", "trg_data_dir",
        "vgg_weights", "semseg_weights", "backbone_weights", "tb_logs_dir", "print_rate", "save_checkpoint_rate",
        "pics_per_epoch", "precision", "compile", "cache_dir", "run_dir", "dry_run", "bf16_discriminators",
        "save_checkpoint_minutes", "on_bad_image", "deterministic",
    }
)  # fmt: skip


def build_parser(description: str) -> argparse.ArgumentParser:
    """All flags, grouped; names and defaults are the published ones."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_run_flags(parser.add_argument_group("run"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_network_flags(parser.add_argument_group("networks"))
    _add_loss_flags(parser.add_argument_group("losses"))
    _add_schedule_flags(parser.add_argument_group("training"))
    _add_compute_flags(parser.add_argument_group("speed"))
    _add_segmentation_flags(parser.add_argument_group("segmentation nets of the last scale"))
    return parser


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gpus", nargs="+", metavar="GPU",
        help="index of the CUDA device, or cpu (required for a new run); several share every batch, with one process "
        "each")  # fmt: skip
    add("--manual_seed", type=int, default=1337, help="seed of weights, data order and crops (default: %(default)s)")
    add("--checkpoints_dir", default="./TrainedModels", help="run folders go in here (default: %(default)s)")
    add("--tb_logs_dir", default="./runs", help="TensorBoard logs go in here (default: %(default)s)")
    add("--continue_train_from_path", default="", metavar="RUN", help="go on with the run in this folder")
    add("--run_dir", default="", metavar="RUN",
        help="folder of this run: made where it is not there, gone on with where it holds a checkpoint, so that the "
        "same command starts a run and continues it (default: a new folder in --checkpoints_dir)")  # fmt: skip
    add("--resume_to_epoch", type=int, default=None, metavar="E",
        help="with --continue_train_from_path: set the step counter to the start of epoch E (from 1) of the scale in "
        "training; weights and optimisers stay those of the checkpoint")  # fmt: skip
    add("--print_rate", type=int, default=100, help="steps between two log entries (default: %(default)s)")
    add("--save_checkpoint_rate", type=int, default=1000, help="steps between two checkpoints (default: %(default)s)")
    add("--save_checkpoint_minutes", type=float, default=30.0,
        help="most minutes between two checkpoints (default: %(default)s)")  # fmt: skip
    add("--pics_per_epoch", type=int, default=10, help="TensorBoard picture rows an epoch (default: %(default)s)")
    add(
        "--dry_run",
        action="store_true",
        help="check everything, train a few steps of every scale in memory, tell time and memory, and write nothing",
    )
    add("--debug_run", action="store_true", help="short run: stop every epoch and scale early, as the next two say")
    add("--debug_stop_iteration", type=int, default=15, help="steps an epoch with --debug_run (default: %(default)s)")
    add("--debug_stop_epoch", type=int, default=0, help="last epoch, from 0, with --debug_run (default: %(default)s)")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    size = {"type": int, "nargs": 2, "metavar": ("W", "H"), "default": None}
    add("--source", choices=sorted(DATA_SETS), default="gta5", help="source data set (default: %(default)s)")
    add("--target", choices=sorted(DATA_SETS), default="cityscapes", help="target data set (default: %(default)s)")
    add("--src_data_dir", default="data/gta", help="root folder of the source (default: %(default)s)")
    add("--trg_data_dir", default="data/cityscapes", help="root folder of the target (default: %(default)s)")
    add("--src_list", default="", metavar="FILE", help="text file with one source image a line, instead of all")
    add("--trg_list", default="", metavar="FILE", help="text file with one target image a line, instead of all")
    add("--src_resize", **size, help="size source images are resized to (default: the data set's, GTA5 1126 619)")
    add("--trg_resize", **size, help="size target images are resized to (default: the data set's, 1024 512)")
    add("--crop_size", **size, help="random crop of both, and size of the finest scale (default: 1024 512)")
    add("--num_workers", type=int, default=None,
        help="loader processes for each domain (default: 6, or as many as CPUs; half with --gpus cpu)")  # fmt: skip
    add("--cache_dir", default="", metavar="DIR",
        help="keep the resized images in memory-mapped files in this folder, made once: 2.1 MB for a GTA5 frame "
        "(default: read the data sets every time)")  # fmt: skip
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="stop",
        help="an image or label that cannot be used ends the run, or another one takes its place and it is listed at "
        "the end (default: %(default)s)")  # fmt: skip
    add("--resample", choices=RESAMPLINGS, default="fast",
        help="arithmetic of the bicubic filter: exact is Pillow's; fast is at most one level of 255 off "
        "(default: %(default)s)")  # fmt: skip


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num_scales", type=int, default=2, help="index N of the finest scale: N + 1 scales (default: %(default)s)")
    add("--scale_factor", type=float, default=0.5, help="size ratio of neighbouring scales (default: %(default)s)")
    add("--base_channels_list", type=int, nargs="+", default=[64, 64, 64], help="width at each scale (default: 64 ...)")
    add("--body_layers", type=int, default=5,
        help="convolutions of a network; the two finest scales get 2 more (default: %(default)s)")  # fmt: skip
    add("--norm", choices=("auto", "batch", "group"), default="auto",
        help="auto: batch norm where a GPU gets 16 images or more, group norm elsewhere; resolved once when the run "
        "starts and stored with it (default: %(default)s)")  # fmt: skip
    add("--groups_num", type=int, default=8, help="groups of the group norm (default: %(default)s)")
    add("--nc_im", type=int, default=3, help="image channels; only 3 is possible (default: %(default)s)")
    add("--ker_size", type=int, default=3, help="kernel size, odd (default: %(default)s)")
    add("--stride", type=int, default=1, help="stride; only 1 keeps the image size (default: %(default)s)")
    add("--padd_size", type=int, default=None, help="padding; must keep the image size (default: (ker_size - 1) / 2)")


def _add_loss_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    for name, help_text in (
        ("lambda_adversarial", "weight of the adversarial terms"),
        ("lambda_grad", "weight of the gradient penalty inside them"),
        ("lambda_cyclic", "weight of the cycle terms"),
        ("lambda_style", "weight of the sum of the next three"),
        ("content_weight", "weight of the content term"),
        ("style_weight", "weight of the Gram matrix term"),
        ("tv_weight", "weight of the total variation"),
    ):
        default = getattr(LossConfig, name)
        add(f"--{name}", type=float, default=default, help=f"{help_text} (default: {default:.4g})")
    add("--content_layers", type=int, nargs="+", default=[15], help="layers of VGG16's features (default: 15)")
    add("--style_layers", type=int, nargs="+", default=[3, 8, 15, 22],
        help="layers of VGG16's features (default: 3 8 15 22)")  # fmt: skip
    add("--vgg_weights", default="imagenet", metavar="imagenet|random|PATH",
        help="weights of the perceptual net: torchvision's ImageNet weights, seeded random ones, or a state dict that "
        "reaches the layers asked for (default: %(default)s)")  # fmt: skip


def _add_schedule_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch_size", type=int, default=1, help="batch of every scale without --batch_size_list (default: 1)")
    add("--batch_size_list", type=int, nargs="+", default=None, help="batch of each scale (published: 32 16 3)")
    add("--epochs_per_scale", type=int, default=40, help="epochs of each scale (default: %(default)s)")
    add("--steps_per_scale", type=int, nargs="+", default=[], metavar="STEPS",
        help="steps of each scale (one number for all, or one each), instead of epochs")  # fmt: skip
    add("--lr_g", type=float, default=1e-4, help="learning rate of the generators (default: %(default)s)")
    add("--lr_d", type=float, default=1e-4, help="learning rate of the discriminators (default: %(default)s)")
    add("--beta1", type=float, default=0.9, help="beta1 of Adam (default: %(default)s)")


def _add_compute_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--precision", choices=PRECISIONS, default="auto",
        help="arithmetic of the networks; weights, losses, Gram matrices and the gradient penalty's norm are float32 "
        "in each; bf16 leaves discriminators and the generators' last layer in float32 (TF32 on a GPU); auto: bf16 on "
        "hardware that is faster in it, else fp32 (default: %(default)s)")  # fmt: skip
    add("--bf16_discriminators", action=argparse.BooleanOptionalAction, default=False,
        help="with bf16, compute discriminators in it, too: faster where the hardware is faster in it, may cost "
        "accuracy (default: no)")  # fmt: skip
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile all networks but the discriminators and, in fp32, the generators; takes minutes at the start "
        "(default: no)")  # fmt: skip
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False,
        help="on a GPU, take algorithms that give the same bits every time, which is slower; on the CPU they always do "
        "(default: no)")  # fmt: skip


def _add_segmentation_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--no_semseg", action="store_true", help="train the last scale without label losses; the flags below need them")
    add("--semseg_weights", default="", metavar="PATH",
        help="net trained on source: a file of the authors or of train_semseg_on_source.py, or its run folder "
        "(default: pretrained/pretrained_semseg_on_<source>.pth)")  # fmt: skip
    add("--warmup_epochs", type=int, default=0, help="epochs without label losses (default: %(default)s)")
    add("--lambda_labels", type=float, default=1.0, help="weight of the cyclic label loss (default: %(default)s)")
    add("--model", choices=list(MODELS), default="DeepLabV2", help="both segmentation nets (default: %(default)s)")
    add("--backbone", choices=BACKBONES, default=None, help="their backbone (default: the model's published one)")
    add("--num_classes", type=int, default=19, help="their classes (default: %(default)s)")
    add("--backbone_weights", default="imagenet", metavar="imagenet|PATH",
        help="what the backbone of the net trained on SiT starts from: torchvision's ImageNet weights, or a state dict "
        "with its names (default: %(default)s)")  # fmt: skip
    add("--no_pretrained_backbone", action="store_true", help="it starts from random weights; nothing is downloaded")
    add("--lr_semseg", type=float, default=1e-4, help="rate of its backbone, its head's is 10x (default: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="weight decay of its SGD (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of its SGD (default: %(default)s)")
    add("--select_by", choices=("miou", "label_free", "none"), default=None,
        help="keep the checkpoint with the best net trained on SiT, by its mIoU on the target's val split, which needs "
        "target labels, or by the mutual information of its predictions, which needs none (default: miou where the "
        "val split has labels, else none)")  # fmt: skip
    add("--validation_rate", type=int, default=0, metavar="STEPS",
        help="steps of the last scale between two validations (default: one epoch)")  # fmt: skip


def _refuse_segmentation_flags(given: frozenset[str]) -> None:
    idle = [flag_of(name) for name in SEGMENTATION_FLAGS if name in given]
    if idle:
        raise UserError(f"{', '.join(idle)}: has no effect with --no_semseg; leave it out")


def _check_segmentation_flags(flags: argparse.Namespace, given: frozenset[str]) -> None:
    if flags.no_semseg:
        _refuse_segmentation_flags(given)
    if flags.select_by == "none" and flags.validation_rate:
        raise UserError("--validation_rate acts only with a --select_by that validates")


def backbone_weights(flags: argparse.Namespace, given: frozenset[str]) -> str:
    """`imagenet`, a path or `random`, from the two flags that say it; nets without ImageNet weights start at random.

    Raises:
        UserError: both are given.
    """
    if flags.no_pretrained_backbone and "backbone_weights" in given:
        raise UserError("--backbone_weights and --no_pretrained_backbone contradict each other; give one")
    backbone = flags.backbone or default_backbone(flags.model)
    without = backbone == "none" and "backbone_weights" not in given
    return "random" if flags.no_pretrained_backbone or without else flags.backbone_weights


def _semseg_config(flags: argparse.Namespace, given: frozenset[str]) -> SemsegConfig:
    if flags.no_semseg:
        return SemsegConfig()
    return _section(
        SemsegConfig, flags,
        backbone=flags.backbone or default_backbone(flags.model),
        semseg_weights=flags.semseg_weights or default_semseg_weights(flags.source),
        backbone_weights=backbone_weights(flags, given),
        select_by=flags.select_by or "auto",
    )  # fmt: skip


def _per_scale(values: list[int], scales: int) -> tuple[int, ...]:
    """One number stands for every scale."""
    return tuple(values) * scales if len(values) == 1 else tuple(values)


def _section(kind: type[Section], flags: argparse.Namespace, **others: object) -> Section:
    """A section of the configuration: flags of its fields' names, lists as tuples, where `others` does not say."""
    flagged = {field.name: getattr(flags, field.name) for field in fields(kind) if field.name not in others}
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in flagged.items()}, **others)


def _check_flags(flags: argparse.Namespace, given: frozenset[str]) -> None:
    """Refuse what no section of the configuration can see."""
    if not flags.gpus:
        raise UserError("--gpus is required: the index of a CUDA device, or cpu")
    if flags.run_dir and "checkpoints_dir" in given:
        raise UserError("--run_dir and --checkpoints_dir contradict each other; give one")
    if flags.resume_to_epoch is not None:
        raise UserError("--resume_to_epoch acts only with --continue_train_from_path")
    _check_segmentation_flags(flags, given)
    if "batch_size" in given and flags.batch_size_list:
        raise UserError("--batch_size and --batch_size_list contradict each other; give one")
    if flags.stride != 1:
        raise UserError(f"--stride is {flags.stride}; only 1 keeps the image size")
    if flags.padd_size not in (None, (flags.ker_size - 1) // 2):
        raise UserError(f"--padd_size {flags.padd_size} changes the image size with --ker_size {flags.ker_size}")
    if flags.steps_per_scale and (flags.debug_run or "epochs_per_scale" in given):
        raise UserError("--steps_per_scale contradicts --epochs_per_scale and --debug_run; give one of them")
    if not flags.debug_run and given & {"debug_stop_iteration", "debug_stop_epoch"}:
        raise UserError("--debug_stop_iteration and --debug_stop_epoch act only with --debug_run")


def config_from_flags(
    flags: argparse.Namespace, given: frozenset[str], num_processes: int | None = None
) -> ProCSTConfig:
    """Build and validate the configuration of a new run.

    Args:
        num_processes: that train together, on all machines; None where `--gpus` says it.

    Raises:
        UserError: names the flag that is missing, out of range or contradicts another.
    """
    _check_flags(flags, given)
    scales = max(flags.num_scales, 0) + 1
    batches = tuple(flags.batch_size_list or [flags.batch_size] * scales)
    require_one_per_scale("batch_size_list", batches, flags.num_scales)
    channels = tuple(flags.base_channels_list) if "base_channels_list" in given else (64,) * scales
    source, target = DATA_SETS[flags.source], DATA_SETS[flags.target]
    return ProCSTConfig(
        data=_section(
            DataConfig, flags,
            src_resize=tuple(flags.src_resize or source.resize),
            trg_resize=tuple(flags.trg_resize or target.resize),
            crop_size=tuple(flags.crop_size or source.crop),
            num_workers=loader_workers(flags.num_workers, flags.gpus),
        ),
        network=_section(
            NetworkConfig, flags,
            base_channels_list=_per_scale(list(channels), scales),
            norms=resolve_norms(flags.norm, batches, num_processes or len(flags.gpus)),
        ),
        loss=_section(LossConfig, flags),
        optim=_section(OptimConfig, flags),
        schedule=_section(
            ScheduleConfig, flags, batch_size_list=batches, steps_per_scale=_per_scale(flags.steps_per_scale, scales)
        ),
        run=_section(RunConfig, flags, gpus=" ".join(flags.gpus)),
        semseg=_semseg_config(flags, given),
        compute=_section(ComputeConfig, flags),
    )  # fmt: skip


def continued_config(stored: ProCSTConfig, flags: argparse.Namespace, given: frozenset[str]) -> ProCSTConfig:
    """The stored configuration of a run with the few flags that may change when it is continued.

    Raises:
        UserError: a flag would change what is computed.
    """
    known = {name: value for section in stored.to_json().values() for name, value in section.items()}
    if stored.run.no_semseg:
        _refuse_segmentation_flags(given)
    known["no_pretrained_backbone"] = stored.semseg.backbone_weights == "random"
    known |= {"norm": stored.network.norms, "stride": 1, "padd_size": (stored.network.ker_size - 1) // 2}
    batches = set(stored.schedule.batch_size_list)
    known["batch_size"] = batches.pop() if len(batches) == 1 else stored.schedule.batch_size_list
    for name in sorted(given - CONTINUE_FLAGS):
        value = getattr(flags, name)
        if name == "norm":
            # What auto came to when the run was started holds for any number of GPUs.
            batches = stored.schedule.batch_size_list
            value = stored.network.norms if value == "auto" else resolve_norms(value, batches, 1)
        if isinstance(value, list):
            per_scale = isinstance(known.get(name), tuple) and name not in ("content_layers", "style_layers")
            value = _per_scale(value, len(known[name])) if per_scale else tuple(value)
        if name not in known or known[name] != value:
            started = known.get(name, "its own setting")
            raise UserError(
                f"{flag_of(name)}: the run was started with {started}, the command line says {value}; a "
                "continued run keeps its configuration, so leave the flag out or start a new run"
            )
    places = ("num_workers", "src_data_dir", "trg_data_dir", "cache_dir", "on_bad_image")
    data = {n: getattr(flags, n) for n in places if n in given}
    reporting = (
        "vgg_weights", "tb_logs_dir", "print_rate", "save_checkpoint_rate", "save_checkpoint_minutes", "pics_per_epoch",
    )  # fmt: skip
    run = {n: getattr(flags, n) for n in reporting if n in given}
    if "gpus" in given:
        run["gpus"] = " ".join(flags.gpus)
    computing = ("compile", "deterministic", "bf16_discriminators")
    compute = stored.compute.in_precision(flags.precision) if "precision" in given else stored.compute
    semseg = {n: getattr(flags, n) for n in ("semseg_weights", "backbone_weights") if n in given}
    if "backbone_weights" in given and stored.semseg.backbone_weights == "random":
        raise UserError("--backbone_weights: the run was started from random weights; leave the flag out")
    return replace(
        stored,
        data=replace(stored.data, **data),
        run=replace(stored.run, **run),
        semseg=replace(stored.semseg, **semseg),
        compute=replace(compute, **{n: getattr(flags, n) for n in computing if n in given}),
    )
