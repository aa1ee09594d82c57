"""Train the ProCST pyramid: source images are moved into the look of the target images, scale by scale.

    python train_procst.py --gpus 0 --batch_size_list 32 16 3
    python train_procst.py --gpus 0 1 2 3 --batch_size_list 32 16 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from core.checkpoint import LATEST, Checkpoint, has_checkpoint, load_checkpoint, read_newest
from core.command_line import build_parser, config_from_flags, continued_config
from core.config import ProCSTConfig
from core.dry_run import report
from core.preparation import PreparedRun, bytes_to_cache, open_caches, prepare
from core.progress import RunProgress, ScalePlan
from core.run_folder import claim_run_folder, log_name, print_skipped, run_to_continue, stamps
from core.run_record import environment, git_commit, write_record
from core.trainer import Trainer
from training.validation import BEST_PATTERN
from utils.devices import training_devices
from training.distributed import Rank, is_launched, joined
from utils.errors import UserError, out_of_memory_means, run_cli
from utils.files import check_folder, remove_leftovers
from utils.flags import parse_flags
from training.launching import launch
from utils.memory import keep_freed_memory
from utils.stopping import StopRequests


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
    compute = config.compute
    rounded = f" (discriminators {'too' if compute.bf16_discriminators else 'in float32'})"
    print(
        f"precision {compute.precision}{rounded if compute.precision == 'bf16' else ''}"
        f"{', compiled' if compute.compile else ''}"
    )
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
    """Start a run or continue one, in this process or in those it launches.

    Args:
        claims: holds what is to be given back at the end: the run folder's lock, the signal handlers.
    """
    stop = StopRequests(quiet=is_launched() or not rank.is_first)
    config, start = _start(flags, given, rank)
    devices = training_devices(config.run.gpus.split())
    _require_shares(config, max(rank.count, len(devices)))
    if rank.count == 1 and len(devices) > 1:
        go_on = "the same command with --run_dir, or --continue_train_from_path RUN, goes on from the last checkpoint"
        del start
        launch(Path(__file__), sys.argv[1:], devices, go_on)
        return
    rank = rank.at(devices)
    if rank.device.type == "cpu":
        keep_freed_memory()
    # Until the training begins there is nothing to save; several processes decide together when they are trained.
    stop.at_once = rank.count == 1
    claims.enter_context(stop)
    checkpoint = start.checkpoint
    prepared = prepare(config, rank, fresh_target_net=checkpoint is None or not checkpoint.segmentation)
    for flag in ("checkpoints_dir", "tb_logs_dir"):
        check_folder(Path(getattr(config.run, flag)), f"--{flag}")
    if flags.dry_run:
        _rehearse(prepared, start, Path(flags.run_dir or config.run.checkpoints_dir))
    else:
        _train(prepared, start, flags, stop, claims)


@dataclass(frozen=True)
class _Start:
    """What a run goes on from, if it does.

    Attributes:
        origin: file of the checkpoint, None for a new run.
        seen: `stamps` of its folder before it was read.
    """

    checkpoint: Checkpoint | None = None
    origin: Path | None = None
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)


def _start(flags: argparse.Namespace, given: frozenset[str], rank: Rank) -> tuple[ProCSTConfig, _Start]:
    run = run_to_continue(flags.continue_train_from_path, flags.run_dir)
    if run is None:
        return config_from_flags(flags, given, rank.count if rank.count > 1 else None), _Start()
    folder = _folder_to_continue(run)
    seen = stamps(folder)
    checkpoint, origin = read_newest(folder, load_checkpoint)
    return continued_config(checkpoint.config, flags, given), _Start(checkpoint, origin, seen)


def _rehearse(run: PreparedRun, start: _Start, folder: Path) -> None:
    """`--dry_run`, of a run whose checkpoints will go into `folder`, or to where there are some."""
    trainer = Trainer(
        run.config, run.source, run.target, run.perceptual, run.rank.device, Path(), run.labels, run.inputs,
        rank=run.rank,
    )  # fmt: skip
    if run.rank.is_first:
        _describe_run(run.config, trainer, run.plans, run.validation_line)
    cache_dir = run.config.data.cache_dir
    cache = (Path(cache_dir), bytes_to_cache(run.config, run.source, run.target)) if cache_dir else None
    with out_of_memory_means(lambda: _less_memory(trainer)):
        report(trainer, run.plans, start.origin.parent if start.origin else folder, start.origin is not None, cache)


def _train(run: PreparedRun, start: _Start, flags: argparse.Namespace, stop: StopRequests, claims: ExitStack) -> None:
    """Train to the end, in a folder that is this run's alone as long as `claims` hold."""
    config, rank, folder = run.config, run.rank, None
    if not rank.is_first:
        rank.wait_for_all()  # for the first one to build them
    caches = open_caches(config, run.source, run.target)
    if rank.is_first:
        rank.wait_for_all()
    # Everything that can be wrong with the input has been looked at; only now is a run folder made.
    if rank.is_first:
        task = f"{config.data.source}_to_{config.data.target}"
        parent = Path(config.run.checkpoints_dir)
        folder = claim_run_folder(start.origin, start.seen, flags.run_dir, parent, task, claims)
        remove_leftovers(folder)
    folder = rank.from_first(folder)
    trainer = Trainer(
        config, run.source, run.target, run.perceptual, rank.device, folder, run.labels, run.inputs, run.validator,
        caches, stop, rank,
    )  # fmt: skip
    if start.checkpoint is not None:
        trainer.restore(start.checkpoint, start.origin)
        if flags.resume_to_epoch is not None:
            trainer.move_to_step(_step_of_epoch(flags.resume_to_epoch, trainer))
    if rank.is_first:
        made_with = environment(rank.device, rank.count, git_commit(Path(__file__).parent))
        write_record(folder, config, run.inputs, made_with, (trainer.scale, trainer.step))
        _describe_run(config, trainer, run.plans, run.validation_line)
        print(f"run folder: {folder}", flush=True)
    progress = RunProgress(
        run.plans,
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
    if rank.is_first:
        _conclude(trainer)


def _conclude(trainer: Trainer) -> None:
    """Say what came out and what to do with it."""
    print_skipped(trainer.skipped)
    for best in sorted(trainer.run_folder.glob(BEST_PATTERN)):
        kind = trainer.config.semseg.select_by
        print(f"best by {kind}: {best} (the run folder itself stands for the last state)")
    command = f"python create_sit_dataset.py --trained_procst_path {trainer.run_folder} --sit_output_path OUT"
    print(f"finished; export with: {command}")


def _less_memory(trainer: Trainer) -> str:
    batch = trainer.config.schedule.batch_size_list[trainer.scale]
    return f" for batch {batch} at scale {trainer.scale}; lower --batch_size_list or --crop_size"


if __name__ == "__main__":
    run_cli(main)
