"""Train a segmentation net on a labelled source data set: the net behind the label loss of train_procst.py.

    python train_semseg_on_source.py --gpus 0 --source gta5 --src_data_dir data/gta

The best net by mIoU on the held-out images goes to pretrained/pretrained_semseg_on_<source>.pth, where train_procst.py
looks for it.
"""

from __future__ import annotations

import argparse
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from core.checkpoint import LATEST, has_checkpoint, read_newest
from core.command_line import backbone_weights
from core.config import SGDConfig, default_semseg_weights
from core.execution import PRECISIONS, resolve_precision, set_convolution_precision
from core.run_folder import claim_run_folder, print_skipped, run_to_continue, stamps
from core.segmentation_files import SegmentationFile, is_of_run, read_segmentation_file, run_identity
from core.source_training import SourceTrainer, SourceTrainingConfig
from training.validation import Validator, scored_classes
from data_handlers.cache import OR_SKIP
from data_handlers.datasets import DATA_SETS
from data_handlers.labelled import check_samples
from data_handlers.choices import ON_BAD_IMAGE
from data_handlers.lists import FileList
from data_handlers.splits import train_and_validation
from models.segmentation import (
    BACKBONES,
    MODELS,
    SegmentationShape,
    build_segmentation_net,
    default_backbone,
    load_backbone,
    require_classes,
)
from utils.devices import loader_workers, resolve_device
from utils.errors import UserError, out_of_memory_means, run_cli
from utils.files import check_folder, remove_leftovers
from utils.flags import OneLineParser, flag_of, parse_flags
from utils.memory import keep_freed_memory
from utils.seeds import seed_for
from utils.stopping import StopRequests

# Flags that may differ when a run is continued: where things are and how they are reported, never what is computed.
CONTINUE_FLAGS = ("gpus", "num_workers", "src_data_dir", "src_label_dir", "tb_logs_dir", "print_rate",
                  "save_checkpoint_rate", "output", "precision", "save_checkpoint_minutes", "on_bad_image")  # fmt: skip
LABELLED = sorted(name for name, data_set in DATA_SETS.items() if data_set.label_path)


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_run_flags(parser.add_argument_group("run"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_training_flags(parser.add_argument_group("net and training"))
    return parser


def _add_run_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--gpus", nargs="+", metavar="GPU", help="index of the CUDA device, or cpu (required for a new run)")
    add("--output", default=None, metavar="FILE",
        help="the best net (default: pretrained/pretrained_semseg_on_<source>.pth); never overwrites a file of another "
        "run; '' writes to the run folder alone")  # fmt: skip
    add("--checkpoints_dir", default="./TrainedModels", help="run folders go in here (default: %(default)s)")
    add("--tb_logs_dir", default="./runs", help="TensorBoard logs go in here (default: %(default)s)")
    add("--continue_train_from_path", default="", metavar="RUN", help="go on with the run in this folder")
    add("--run_dir", default="", metavar="RUN",
        help="folder of this run: made where it is not there, gone on with where it holds a checkpoint "
        "(default: a new folder in --checkpoints_dir)")  # fmt: skip
    add("--manual_seed", type=int, default=1337, help="seed of weights, data order and crops (default: %(default)s)")
    add("--print_rate", type=int, default=100, help="steps between two log entries (default: %(default)s)")
    add("--save_checkpoint_rate", type=int, default=1000, help="steps between two checkpoints (default: %(default)s)")
    add("--save_checkpoint_minutes", type=float, default=30.0,
        help="most minutes between two checkpoints (default: %(default)s)")  # fmt: skip
    add("--validation_rate", type=int, default=0, help="steps between two validations (default: one epoch)")
    add("--precision", choices=PRECISIONS, default="fp32",
        help="arithmetic of the training; auto: bf16 where that is faster (default: %(default)s)")  # fmt: skip


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    size = {"type": int, "nargs": 2, "metavar": ("W", "H"), "default": None}
    add("--source", choices=LABELLED, default="gta5", help="labelled data set (default: %(default)s)")
    add("--src_data_dir", default="data/gta", help="its root folder (default: %(default)s)")
    add("--src_label_dir", default="", metavar="DIR",
        help="root folder of the labels, where it is another: SiT images have the labels of their source")  # fmt: skip
    add("--src_list", default="", metavar="FILE", help="text file with one image a line, instead of all")
    add("--val_list", default="", metavar="FILE", help="text file with the images to validate on")
    add("--val_count", type=int, default=0, metavar="N",
        help="validate on the last N images, which are then not trained on (default: the data set's val split; GTA5 "
        "the last 500, SYNTHIA the last 300)")  # fmt: skip
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="stop",
        help="an image or label that cannot be used ends the run, or another one takes its place and it is listed at "
        "the end (default: %(default)s)")  # fmt: skip
    add("--src_resize", **size, help="size images are resized to for training (default: the data set's, GTA5 1126 619)")
    add("--crop_size", **size, help="random crop for training (default: the data set's, 1024 512)")
    add("--num_workers", type=int, default=None,
        help="loader processes (default: 6, or the number of CPUs; half of them with --gpus cpu)")  # fmt: skip


def _add_training_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model", choices=list(MODELS), default="DeepLabV2", help="segmentation net (default: %(default)s)")
    add("--backbone", choices=BACKBONES, default=None, help="its backbone (default: the model's published one)")
    add("--num_classes", type=int, default=19, help="classes (default: %(default)s)")
    add("--backbone_weights", default="imagenet", metavar="imagenet|PATH",
        help="torchvision's ImageNet weights, or a state dict with its names (default: %(default)s)")  # fmt: skip
    add("--no_pretrained_backbone", action="store_true", help="start from random weights; nothing is downloaded")
    add("--num_steps", type=int, default=250_000, help="steps of the poly schedule (default: %(default)s)")
    add("--batch_size", type=int, default=1, help="images in a step (default: %(default)s)")
    add("--lr_semseg", type=float, default=1e-4, help="rate of the backbone, the head's is 10x (default: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="weight decay of SGD (default: %(default)s)")
    add("--momentum", type=float, default=0.9, help="momentum of SGD (default: %(default)s)")
    add("--power", type=float, default=0.9, help="power of the poly schedule (default: %(default)s)")


def config_from_flags(flags: argparse.Namespace, given: frozenset[str]) -> SourceTrainingConfig:
    """Build and validate the configuration of a new run.

    Raises:
        UserError: names the flag that is missing, out of range or contradicts another.
    """
    if not flags.gpus:
        raise UserError("--gpus is required: the index of a CUDA device, or cpu")
    if flags.run_dir and "checkpoints_dir" in given:
        raise UserError("--run_dir and --checkpoints_dir contradict each other; give one")
    if flags.val_list and flags.val_count:
        raise UserError("--val_list and --val_count contradict each other; give one")
    data_set = DATA_SETS[flags.source]
    output = default_semseg_weights(flags.source) if flags.output is None else flags.output
    return SourceTrainingConfig(
        source=flags.source,
        src_data_dir=flags.src_data_dir,
        src_label_dir=flags.src_label_dir,
        src_list=flags.src_list,
        val_list=flags.val_list,
        val_count=flags.val_count,
        src_resize=tuple(flags.src_resize or data_set.resize),
        crop_size=tuple(flags.crop_size or data_set.crop),
        shape=SegmentationShape(flags.model, flags.backbone or default_backbone(flags.model), flags.num_classes),
        backbone_weights=backbone_weights(flags, given),
        sgd=SGDConfig(flags.lr_semseg, flags.weight_decay, flags.momentum),
        power=flags.power,
        num_steps=flags.num_steps,
        batch_size=flags.batch_size,
        manual_seed=flags.manual_seed,
        validation_rate=flags.validation_rate,
        output=output,
        gpus=" ".join(flags.gpus),
        num_workers=loader_workers(flags.num_workers, flags.gpus),
        tb_logs_dir=flags.tb_logs_dir,
        print_rate=flags.print_rate,
        save_checkpoint_rate=flags.save_checkpoint_rate,
        precision=flags.precision,
        save_checkpoint_minutes=flags.save_checkpoint_minutes,
        on_bad_image=flags.on_bad_image,
    )


def continued_config(
    stored: SourceTrainingConfig, flags: argparse.Namespace, given: frozenset[str]
) -> SourceTrainingConfig:
    """The stored configuration of a run with the few flags that may change when it is continued.

    Raises:
        UserError: a flag would change what is computed.
    """
    known = stored.to_json()
    known |= known.pop("shape") | known.pop("sgd") | {"no_pretrained_backbone": stored.backbone_weights == "random"}
    for name in sorted(given - {*CONTINUE_FLAGS, "continue_train_from_path", "run_dir"}):
        value = getattr(flags, name)
        value = tuple(value) if isinstance(value, list) else value
        if name not in known or known[name] != value:
            raise UserError(
                f"{flag_of(name)}: the run was started with "
                f"{known.get(name, 'its own setting')}, the command line says {value}; a continued run keeps its "
                "configuration, so leave the flag out or start a new run"
            )
    changed = {name: getattr(flags, name) for name in CONTINUE_FLAGS if name in given}
    if "gpus" in changed:
        changed["gpus"] = " ".join(flags.gpus)
    return replace(stored, **changed)


def file_lists(config: SourceTrainingConfig) -> tuple[FileList, FileList]:
    """The labelled images to train on and to validate on.

    Raises:
        UserError: a list or a label is missing, or one of the two is empty.
    """
    train, val = train_and_validation(
        DATA_SETS[config.source], config.src_data_dir, "--src_data_dir", list_file=config.src_list,
        val_list=config.val_list, val_count=config.val_count, label_root=config.src_label_dir,
    )  # fmt: skip
    if len(train) < config.batch_size:
        raise UserError(f"--batch_size {config.batch_size}: there are {len(train)} images to train on")
    return train, val


def _check_output(output: str, origin: Path | None, state: SegmentationFile | None) -> None:
    """The file of another run, or of the authors, is never overwritten."""
    path = Path(output)
    if not output:
        return
    if path.is_dir():
        raise UserError(f"--output {path} is a folder; name a file")
    check_folder(path.parent, "--output")
    if path.exists() and (state is None or not is_of_run(path, run_identity(origin.parent, state.info))):
        raise UserError(f"--output {path} exists and is not of this run; move it away or name another file")


def _state_to_continue(path: Path) -> tuple[Path, SegmentationFile, SourceTrainingConfig]:
    folder = path.resolve()  # the folder's name names the run, which '.' would not
    if not has_checkpoint(folder):
        raise UserError(f"--continue_train_from_path {path}: there is no {LATEST} to go on from")
    state, file = read_newest(folder, read_segmentation_file)
    if "config" not in state.training:
        raise UserError(f"{file} holds a finished net and no training state")
    return file, state, SourceTrainingConfig.from_json(state.training["config"], file)


def main() -> None:
    """Command line entry: start a run or continue one."""
    flags, given = parse_flags(build_parser())
    with ExitStack() as claims:
        _run(flags, given, claims)


def _run(flags: argparse.Namespace, given: frozenset[str], claims: ExitStack) -> None:
    origin, state, seen = None, None, {}
    stop = claims.enter_context(StopRequests())
    stop.at_once = True
    if (run := run_to_continue(flags.continue_train_from_path, flags.run_dir)) is not None:
        seen = stamps(run)
        origin, state, stored = _state_to_continue(run)
        config = continued_config(stored, flags, given)
    else:
        config = config_from_flags(flags, given)

    device = resolve_device(config.gpus.split())
    config = replace(config, precision=resolve_precision(config.precision, device))
    set_convolution_precision(config.precision)
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.benchmark = True  # one crop size
    data_set = DATA_SETS[config.source]
    require_classes(config.shape.num_classes, data_set.name, data_set.value_map)
    train, val = file_lists(config)
    skip = config.on_bad_image == "skip"
    for files in (train, val):
        check_samples(files, flag="--src_labels", or_else=OR_SKIP, skip=skip)
    check_folder(Path(flags.checkpoints_dir), "--checkpoints_dir")
    check_folder(Path(config.tb_logs_dir), "--tb_logs_dir")
    _check_output(config.output, origin, state)
    torch.manual_seed(seed_for(config.manual_seed, 5))
    net = build_segmentation_net(config.shape)
    if state is None and config.backbone_weights != "random":
        load_backbone(net, config.shape.backbone, config.backbone_weights)
    net.to(device)

    # Everything that can be wrong with the input has been looked at; only now is a run folder made.
    task = f"semseg_on_{config.source}"
    folder = claim_run_folder(origin, seen, flags.run_dir, Path(flags.checkpoints_dir), task, claims)
    remove_leftovers(folder)
    if config.output:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    classes = scored_classes(config.shape.num_classes, data_set)
    validator = Validator(
        val, True, classes, config.shape.num_classes, device, config.num_workers, skip_unusable=skip
    )
    trainer = SourceTrainer(config, net, train, validator, data_set.class_names, device, folder, stop)
    if state is not None:
        trainer.restore(state, origin)
    print(f"training on {train.describe()}\nvalidating on {val.describe()}")
    parameters = sum(parameter.numel() for parameter in net.parameters())
    print(f"{config.shape}, {parameters:,} parameters, epoch of {trainer.steps_per_epoch} steps")
    if config.backbone_weights == "random" and config.shape.backbone != "none":
        print("WARNING: the backbone starts from random weights; the published nets start from ImageNet")
    print(f"run folder: {folder}", flush=True)
    stop.at_once = False
    with out_of_memory_means(lambda: f" for batch {config.batch_size}; lower --batch_size or --crop_size"):
        trainer.fit()
    print_skipped(trainer.skipped)
    use = shlex.join(["train_procst.py", *config.shape.flags(), "--semseg_weights", str(trainer.best_file())])
    print(f"finished, best mIoU {100 * trainer.best_miou:.2f}; use it with: python {use}")


if __name__ == "__main__":
    run_cli(main)
