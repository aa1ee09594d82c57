"""Checks of the input of a ProCST run, before anything is written, and the networks that it does not train."""

import shlex
from dataclasses import replace
from pathlib import Path

from torch import nn

from core.config import ProCSTConfig
from core.procst import ProCST
from data_handlers.datasets import DataSet, find_data_set, for_net_of, with_labels, with_split
from data_handlers.domain import Domain
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images, missing_labels, require_labels
from data_handlers.splits import val_split
from models.resnet import recompute_blocks
from models.segmentation import require_classes
from models.vgg import build_vgg
from training.config import default_semseg_weights
from training.distributed import Rank
from training.precision import recomputes_blocks
from training.run_folder import Continued
from training.segmentation_files import load_segmentation_net, net_to_train
from training.validation import Validator, scored_classes
from utils.devices import workers_for
from utils.errors import UserError
from utils.sizes import evenly_spaced

LABEL_FREE_IMAGES = 100  # target images of the label-free score where there is no val split


def prepare(config: ProCSTConfig, rank: Rank, continued: Continued | None) -> ProCST:
    """Check the input, load the perceptual net and P, build Q. Raises `UserError`, which names file or flag."""
    source, target = _file_lists(config)
    seg_source, seg_sit, validator, line = None, None, None, ""
    fresh = continued is None or "seg_sit" not in continued.checkpoint.modules
    if not config.labels.no_semseg:
        require_classes(config.net.num_classes, source.data_set.name, source.data_set.value_map)
        config, validator, line = _validation(config, source.data_set, target, rank)
        seg_source = _load_seg_source(config)
        seg_sit = net_to_train(config.net, config.run.manual_seed, fresh)
        if recomputes_blocks(config.run.precision, rank.device):
            recompute_blocks(seg_sit)
    reads_labels = not config.labels.no_semseg
    skip = config.loader.on_bad_image == "skip"
    check_samples(source, labels=reads_labels, flag="--src_labels", skip=skip)
    check_samples(target, labels=False, skip=skip)
    shared = {
        "seed": config.run.manual_seed, "crop": config.source.crop_size, "resample": config.loader.resample,
        "skips": skip, "cache_dir": config.loader.cache_dir,
        "num_workers": workers_for(config.loader.num_workers, rank.device, rank.count),
    }  # fmt: skip
    method = ProCST(
        config=config,
        rank=rank,
        source=Domain(files=source, name="source", resize=config.source.src_resize, labels=reads_labels, **shared),
        target=Domain(files=target, name="target", resize=config.target.trg_resize, **shared),
        perceptual=build_vgg(config.loss.vgg_weights, config.loss.perceptual_layers, config.run.manual_seed),
        seg_source=seg_source,
        seg_sit=seg_sit,
        seg_sit_is_fresh=fresh,
    )
    method.validator, method.validation_line = validator, line
    return method


def _file_lists(config: ProCSTConfig) -> tuple[FileList, FileList]:
    source_set = with_split(find_data_set(config.source.source, "--source"), config.source.src_split)
    source_set = with_labels(source_set, config.source.src_labels, "--src_labels")
    target_set = with_labels(find_data_set(config.target.target, "--target"), config.target.trg_labels, "--trg_labels")
    source_set, target_set = (for_net_of(one, config.net.num_classes) for one in (source_set, target_set))
    source = list_images(source_set, config.source.src_data_dir, "--src_data_dir", list_file=config.source.src_list)
    target = list_images(target_set, config.target.trg_data_dir, "--trg_data_dir", list_file=config.target.trg_list)
    if not config.labels.no_semseg:
        if not source_set.has_labels:
            raise UserError(f"--source {source_set.name} has no labels, which the label losses need: add --no_semseg")
        require_labels(source, "--src_data_dir")
    return source, target


# --- the segmentation nets of the last scale -------------------------------------------------------------------------


def _load_seg_source(config: ProCSTConfig) -> nn.Module:
    """P, frozen, on the CPU."""
    path, wanted = Path(config.labels.semseg_weights), config.net.shape()
    if not path.exists():
        raise UserError(
            f"--semseg_weights {path}: no such file; the label losses need a segmentation net trained on "
            f"{config.source.source}: put the authors' file there, name another, go without (--no_semseg), or train "
            f"one with: {_training_command(config)}"
        )
    shape, net = load_segmentation_net(path, "--semseg_weights")
    if shape != wanted:
        differing = [
            f"--{name} {getattr(shape, name)}"
            for name in ("model", "backbone", "num_classes")
            if getattr(shape, name) != getattr(wanted, name) and getattr(shape, name) != "none"
        ]
        raise UserError(
            f"--semseg_weights {path} holds {shape}, but the command line asks for {wanted}; give "
            f"{' '.join(differing)}, or other weights"
        )
    return net


def _training_command(config: ProCSTConfig) -> str:
    """The command that trains P for a run."""
    source, weights = config.source, config.labels.semseg_weights
    words = ["--source", source.source, "--src_data_dir", source.src_data_dir, *config.net.shape().flags(source.source)]
    if Path(weights) != Path(default_semseg_weights(source.source)).absolute():
        words += ["--output", weights]
    return shlex.join(["python", "train_semseg_on_source.py", *words])


# --- validation ------------------------------------------------------------------------------------------------------


def _validation(
    config: ProCSTConfig, source: DataSet, target: FileList, rank: Rank
) -> tuple[ProCSTConfig, Validator | None, str]:
    """The configuration with `--select_by` decided, the validator of the last scale, and a line that describes it."""
    files, asked = val_split(target), config.validation.select_by
    missing = len(missing_labels(files)) if files else 0
    has_labels = files is not None and target.data_set.has_labels and missing < len(files)
    select_by = ("miou" if has_labels else "none") if asked == "auto" else asked
    if select_by == "miou" and not has_labels:
        raise UserError(
            f"--select_by miou needs a labelled val split in --trg_data_dir {target.root}, and there is none; use "
            "--select_by label_free, which needs no labels, or none"
        )
    if select_by == "miou" and missing:
        raise UserError(
            f"--trg_data_dir {target.root}: {missing} of the {len(files)} val images have no label, so their mIoU is "
            "unknown; complete the labels, or use --select_by label_free or none"
        )
    config = replace(config, validation=replace(config.validation, select_by=select_by))
    if select_by == "none":
        if config.validation.validation_rate:
            raise UserError(
                f"--validation_rate: {target.root} has no labelled val split, so nothing is validated; remove the "
                "flag, or validate without labels with --select_by label_free"
            )
        reason = "as --select_by none says" if asked == "none" else "the target has no labelled val split"
        return config, None, f"no validation of the last scale: {reason}"
    labelled = has_labels and not missing
    if labelled and target.data_set.class_names != source.class_names:
        raise UserError(
            f"--target {target.data_set.name} has other classes than --source {source.name}, so its labels score "
            "nothing; use --select_by none or label_free, or describe it with the same class names"
        )
    if files is None:
        files = replace(target, images=tuple(evenly_spaced(target.images, LABEL_FREE_IMAGES)))
    skip = config.loader.on_bad_image == "skip"
    check_samples(files, labels=labelled, flag="--trg_labels", skip=skip)
    if not labelled:  # predictions are of the source's classes
        kinds = {name: getattr(source, name) for name in ("class_names", "colours", "classes")}
        files = replace(files, data_set=replace(files.data_set, id_map={}, **kinds))
    validator = Validator(
        files=files,
        with_labels=labelled,
        select_by=select_by,
        classes=scored_classes(config.net.num_classes, files.data_set, source),
        num_classes=config.net.num_classes,
        num_workers=workers_for(config.loader.num_workers, rank.device, rank.count),
        rank=rank,
        skip_unusable=skip,
    )
    return config, validator, f"validating the last scale on {files.describe()}, best by {select_by}"
