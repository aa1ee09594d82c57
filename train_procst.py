"""Train the ProCST pyramid: source images are moved into the look of the target images, scale by scale.

    python train_procst.py --gpus 0 --batch_size_list 32 16 3
    python train_procst.py --gpus 0 1 2 3 --batch_size_list 32 16 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from core.checkpoint import LATEST, has_checkpoint, load_checkpoint, read_newest
from core.command_line import build_parser, config_from_flags, continued_config
from core.config import ProCSTConfig
from core.dry_run import report
from core.execution import channels_last, resolve_precision, set_convolution_precision, set_determinism
from core.label_networks import build_label_networks, load_source_net
from core.progress import RunProgress, ScalePlan, scale_plans
from core.run_folder import claim_run_folder, log_name, print_skipped, run_to_continue, stamps
from core.run_record import environment, git_commit, write_record
from core.trainer import Trainer
from core.validation import BEST_PATTERN, Validator, scored_classes
from data_handlers.cache import ImageCache, open_cache
from data_handlers.datasets import DATA_SETS
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images, missing_labels, require_labels
from data_handlers.stream import OR_SKIP
from models.segmentation import require_classes
from models.synchronised_norm import synchronise_batch_norms
from models.vgg import build_vgg
from utils.devices import training_devices
from utils.distributed import Rank, is_launched, joined, launch
from utils.errors import UserError, out_of_memory_means, run_cli
from utils.files import check_folder, remove_leftovers
from utils.flags import parse_flags
from utils.stopping import StopRequests
from utils.tensor_files import weights_fingerprint

LABEL_FREE_IMAGES = 100  # target images looked at for the label-free score where there is no val split


def _file_lists(config: ProCSTConfig) -> tuple[FileList, FileList]:
    data = config.data
    source = list_images(DATA_SETS[data.source], data.src_data_dir, "--src_data_dir", list_file=data.src_list)
    target = list_images(DATA_SETS[data.target], data.trg_data_dir, "--trg_data_dir", list_file=data.trg_list)
    require_labels(source, "--src_data_dir")
    if not config.run.no_semseg and not source.data_set.label_path:
        raise UserError(f"--source {data.source} has no labels, which the label losses need: add --no_semseg")
    return source, target


def _validation_list(target: FileList) -> tuple[FileList | None, int]:
    """The target's val split, None where there is none, and how many of its images have no label."""
    patterns = target.data_set.images.get("val", ())
    if not any(True for pattern in patterns for _ in target.root.glob(pattern)):
        return None, 0
    files = list_images(target.data_set, target.root, "--trg_data_dir", split="val", training=False)
    return files, len(missing_labels(files))


def _resolve_selection(select_by: str, files: FileList | None, missing: int, target: FileList) -> str:
    """What `--select_by` comes to with this target.

    Raises:
        UserError: selection by mIoU where labels are missing.
    """
    if select_by in ("none", "label_free"):
        return select_by
    if files is None or missing == len(files):
        if select_by == "auto":
            return "none"
        raise UserError(
            f"--select_by miou needs a labelled val split in --trg_data_dir {target.root}, and there is none; "
            "use --select_by label_free, which needs no labels, or none"
        )
    if missing:
        # Some labels and not others is a broken download, and neither way of going on is what was meant.
        raise UserError(
            f"--trg_data_dir {target.root}: {missing} of the {len(files)} val images have no label, so no mIoU can "
            "be had; complete the labels, or use --select_by label_free or none"
        )
    return "miou"


def _validation(
    config: ProCSTConfig, target: FileList, device: torch.device, rank: Rank
) -> tuple[ProCSTConfig, Validator | None, str]:
    """Resolve `--select_by`, and make what validates the last scale, with a line that says what is done.

    Raises:
        UserError: selection by mIoU where labels are missing, or `--validation_rate` where nothing is validated.
    """
    files, missing = _validation_list(target)
    asked = config.semseg.select_by
    select_by = _resolve_selection(asked, files, missing, target)
    if select_by == "none":
        if config.semseg.validation_rate:
            raise UserError(
                f"--validation_rate: {target.root} has no labelled val split, so nothing is validated; leave it out, "
                "or validate without labels with --select_by label_free"
            )
        reason = "as --select_by none says" if asked == "none" else "the target has no labelled val split"
        return _with_selection(config, "none"), None, f"no validation of the last scale: {reason}"
    labelled = files is not None and not missing
    if files is None:
        count = min(LABEL_FREE_IMAGES, len(target))
        files = replace(target, images=tuple(target.images[k * len(target) // count] for k in range(count)))
    check_samples(files, "read" if labelled else "none")
    classes = scored_classes(config.semseg.num_classes, target.data_set, DATA_SETS[config.data.source])
    validator = Validator(files, labelled, classes, config.semseg.num_classes, device, config.data.num_workers, rank)
    line = f"validating the last scale on {files.describe()}, best by {select_by}"
    return _with_selection(config, select_by), validator, line


def _with_selection(config: ProCSTConfig, select_by: str) -> ProCSTConfig:
    return replace(config, semseg=replace(config.semseg, select_by=select_by))


def _open_caches(config: ProCSTConfig, source: FileList, target: FileList) -> dict[str, ImageCache]:
    data = config.data
    if not data.cache_dir:
        return {}
    folder, workers, skip = Path(data.cache_dir), data.num_workers, data.on_bad_image == "skip"
    labels = not config.run.no_semseg
    return {
        "source": open_cache(folder, source, data.src_resize, data.resample, labels, workers, skip),
        "target": open_cache(folder, target, data.trg_resize, data.resample, False, workers, skip),
    }


def _folder_to_continue(path: Path) -> Path:
    if path.is_file() and path.name != LATEST:
        # Going on from an older state in the same folder would overwrite the newer ones.
        raise UserError(
            f"--continue_train_from_path {path}: a run goes on from its {LATEST}; to go on from another checkpoint, "
            f"copy it into an empty folder under the name {LATEST}"
        )
    folder = path.parent if path.is_file() else path
    if not folder.is_dir() or not has_checkpoint(folder):
        raise UserError(f"--continue_train_from_path {path}: there is no {LATEST} to go on from")
    return folder.resolve()  # the folder's name names the TensorBoard log


def _step_of_epoch(epoch: int, trainer: Trainer) -> int:
    """First step of `epoch` (from 1) of the scale in training."""
    schedule = trainer.config.schedule
    step = (epoch - 1) * schedule.steps_per_epoch(trainer.scale, trainer.epoch_length)
    steps = schedule.steps(trainer.scale, trainer.epoch_length)
    if epoch < 1 or step >= steps:
        raise UserError(f"--resume_to_epoch {epoch}: scale {trainer.scale} has {steps} steps, and epochs count from 1")
    return step


def _require_shares(config: ProCSTConfig, processes: int) -> None:
    """Check that every process gets at least one image pair of every batch."""
    if (smallest := min(config.schedule.batch_size_list)) < processes:
        raise UserError(
            f"--batch_size_list: a batch of {smallest} cannot be shared by {processes} processes, the batch sizes are "
            "totals; raise it, or name fewer GPUs"
        )


def _require_one_run(config: ProCSTConfig, inputs: dict[str, str], rank: Rank) -> None:
    """Check that all processes were asked for the same run and see the same files."""
    plain = config.to_json()
    compared = ("network", "loss", "optim", "schedule", "compute")
    values = {f"configuration ({name})": plain[name] for name in compared}
    paths = ("semseg_weights", "backbone_weights")
    values["configuration (semseg)"] = {name: value for name, value in plain["semseg"].items() if name not in paths}
    values["--manual_seed"] = config.run.manual_seed
    rank.require_equal({**values, **inputs})


def _describe_run(config: ProCSTConfig, trainer: Trainer, plans: Sequence[ScalePlan], validation_line: str) -> None:
    """Print what is going to be trained, on what and where."""
    source, target = trainer.source, trainer.target
    print(source.describe())
    print(target.describe())
    if trainer.labels is not None:
        print(f"label losses of the last scale: {config.semseg.shape()} from {config.semseg.semseg_weights}")
        print(validation_line)
        last, length = config.network.num_scales, max(len(source), len(target))
        if config.schedule.warmup_epochs * config.schedule.steps_per_epoch(last, length) >= plans[-1].steps:
            print("WARNING: --warmup_epochs covers the whole last scale: no label loss reaches the generators")
    if trainer.rank.count > 1:
        print(f"{trainer.rank.count} processes share every batch")
    print(f"precision {config.compute.precision}{', compiled' if config.compute.compile else ''}")
    print(f"norm at scales 0..{config.network.num_scales}: {', '.join(config.network.norms)}")
    print(f"steps at scales 0..{config.network.num_scales}: {', '.join(str(plan.steps) for plan in plans)}")
    if config.run.vgg_weights == "random":
        print("WARNING: --vgg_weights random: the perceptual net has random weights; style and content will be worse")


def main() -> None:
    """Command line entry: alone, or as one of several processes."""
    with joined() as rank, ExitStack() as claims:
        flags, given = parse_flags(build_parser(__doc__))
        _run(flags, given, rank, claims)


def _run(flags: argparse.Namespace, given: frozenset[str], rank: Rank, claims: ExitStack) -> None:
    """Start a run or continue one.

    Args:
        claims: holds what is to be given back at the end: the run folder's lock, the signal handlers.
    """
    origin, checkpoint, folder, seen = None, None, None, {}
    stop = StopRequests(quiet=is_launched() or not rank.is_first)
    if (run := run_to_continue(flags.continue_train_from_path, flags.run_dir)) is not None:
        folder = _folder_to_continue(run)
        seen = stamps(folder)
        checkpoint, origin = read_newest(folder, load_checkpoint)
        config = continued_config(checkpoint.config, flags, given)
    else:
        config = config_from_flags(flags, given, rank.count if rank.count > 1 else None)

    devices = training_devices(config.run.gpus.split())
    _require_shares(config, max(rank.count, len(devices)))
    if rank.count == 1 and len(devices) > 1:
        go_on = "the same command with --run_dir, or --continue_train_from_path RUN, goes on from the last checkpoint"
        del checkpoint
        launch(Path(__file__), sys.argv[1:], devices, go_on)
        return
    rank = rank.at(devices)
    # Until the training begins there is nothing to save; several processes decide together when they are trained.
    stop.at_once = rank.count == 1
    claims.enter_context(stop)
    device = rank.device
    set_determinism(config.compute.deterministic)
    precision = resolve_precision(config.compute.precision, device)
    config = replace(config, compute=replace(config.compute, precision=precision))
    set_convolution_precision(precision)
    source, target = _file_lists(config)
    plans = scale_plans(config, max(len(source), len(target)))
    labels, validator, validation_line = None, None, ""
    inputs = {"list of source images": source.fingerprint(), "list of target images": target.fingerprint()}
    if not config.run.no_semseg:
        require_classes(config.semseg.num_classes, source.data_set.name, source.data_set.id_map)
        config, validator, validation_line = _validation(config, target, device, rank)
        source_net = load_source_net(config)
        inputs["segmentation net (--semseg_weights)"] = weights_fingerprint(source_net)
        fresh = checkpoint is None or not checkpoint.segmentation
        labels = build_label_networks(config.semseg, source_net, config.run.manual_seed, pretrained=fresh)
        if fresh:
            inputs["start of the net trained on SiT (--backbone_weights)"] = weights_fingerprint(labels.target_net)
        if rank.count > 1:
            synchronise_batch_norms(labels.target_net)
        channels_last(labels.source_net)
        channels_last(labels.target_net)
    if config.data.on_bad_image == "stop":
        check_samples(source, "check" if config.run.no_semseg else "read", OR_SKIP)
        check_samples(target, "none", OR_SKIP)
    perceptual = build_vgg(config.run.vgg_weights, config.loss.perceptual_layers, config.run.manual_seed).to(device)
    channels_last(perceptual)
    inputs["perceptual net (--vgg_weights)"] = weights_fingerprint(perceptual)
    _require_one_run(config, inputs, rank)
    for flag in ("checkpoints_dir", "tb_logs_dir"):
        check_folder(Path(getattr(config.run, flag)), f"--{flag}")
    if flags.dry_run:
        trainer = Trainer(config, source, target, perceptual, device, Path(), labels, inputs, rank=rank)
        if rank.is_first:
            _describe_run(config, trainer, plans, validation_line)
        with out_of_memory_means(lambda: _less_memory(trainer)):
            report(trainer, plans, origin.parent if origin else Path(flags.run_dir or config.run.checkpoints_dir))
        return

    if not rank.is_first:
        rank.wait_for_all()  # for the first one to build them
    caches = _open_caches(config, source, target)
    if rank.is_first:
        rank.wait_for_all()
    # Everything that can be wrong with the input has been looked at; only now is a run folder made.
    if rank.is_first:
        task = f"{config.data.source}_to_{config.data.target}"
        folder = claim_run_folder(origin, seen, flags.run_dir, Path(config.run.checkpoints_dir), task, claims)
        remove_leftovers(folder)
    folder = rank.from_first(folder)
    trainer = Trainer(config, source, target, perceptual, device, folder, labels, inputs, validator, caches, stop, rank)
    if checkpoint is not None:
        trainer.restore(checkpoint, origin)
        if flags.resume_to_epoch is not None:
            trainer.move_to_step(_step_of_epoch(flags.resume_to_epoch, trainer))
    if rank.is_first:
        made_with = environment(device, rank.count, git_commit(Path(__file__).parent))
        write_record(folder, config, inputs, made_with, (trainer.scale, trainer.step))
        _describe_run(config, trainer, plans, validation_line)
        print(f"run folder: {folder}", flush=True)
    progress = RunProgress(
        plans,
        (trainer.scale, trainer.step),
        Path(config.run.tb_logs_dir) / log_name(folder) if rank.is_first else None,
        config.run.print_rate,
        quiet=not rank.is_first,
        add_up=rank.add_up if rank.count > 1 else None,
    )
    stop.at_once = False
    try:
        with out_of_memory_means(lambda: _less_memory(trainer)):
            trainer.fit(progress)
    finally:
        progress.close()
    if not rank.is_first:
        return
    print_skipped(trainer.skipped)
    for best in sorted(folder.glob(BEST_PATTERN)):
        print(f"best by {config.semseg.select_by}: {best} (the run folder itself stands for the last state)")
    print(f"finished; export with: python create_sit_dataset.py --trained_procst_path {folder} --sit_output_path OUT")


def _less_memory(trainer: Trainer) -> str:
    batch = trainer.config.schedule.batch_size_list[trainer.scale]
    return f" for batch {batch} at scale {trainer.scale}; lower --batch_size_list or --crop_size"


if __name__ == "__main__":
    run_cli(main)
