"""A rehearsal of a run: some steps of every scale, in memory alone, to tell how long it takes and what it needs."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from core.batches import open_streams
from core.checkpoint import DAMAGED
from core.progress import ScalePlan
from core.step import ScaleOptimizers
from core.trainer import Trainer
from data_handlers.images import check_label_header, image_size
from data_handlers.lists import FileList
from utils.errors import UserError

STEPS = 3  # measured at every scale, after one that is not


@dataclass(frozen=True)
class Rehearsal:
    """What a scale takes.

    Attributes:
        seconds: of a step.
        peak_bytes: most memory, of the GPU or, on a CPU, of the whole process.
        checkpoint_bytes: size of a checkpoint at this scale.
    """

    seconds: float
    peak_bytes: int
    checkpoint_bytes: int


def check_every_file(files: FileList, with_labels: bool, skip: bool) -> None:
    """Look at the header of every image and label.

    Args:
        skip: print what cannot be used, which will be left out, instead of raising.

    Raises:
        UserError: how many cannot be used, and what is wrong with the first of them.
    """
    wrong: list[str] = []
    for name in files.images:
        try:
            size = image_size(files.root / name)
            if with_labels:
                check_label_header(files.label_file(name), files.data_set, size)
        except UserError as error:
            wrong.append(str(error))
    if wrong and skip:
        print(f"{len(wrong)} of {len(files)} files of {files.root} will be skipped:")
        print("\n".join(f"  {reason}" for reason in wrong))
    elif wrong:
        raise UserError(f"{len(wrong)} of {len(files)} files of {files.root} cannot be used, the first: {wrong[0]}")


def report(
    trainer: Trainer,
    plans: Sequence[ScalePlan],
    folder: Path,
    continued: bool = False,
    cache: tuple[Path, int] | None = None,
) -> None:
    """Check every file, rehearse every scale, and print what a run takes.

    Args:
        folder: where checkpoints will go.
        continued: the run has checkpoints there.
        cache: `--cache_dir`, and the bytes that will be built there.

    Raises:
        UserError: a file cannot be used, or disk space does not suffice.
    """
    source, target, first = trainer.source, trainer.target, trainer.rank.is_first
    if first:
        print(json.dumps(trainer.config.to_json(), indent=2))
        skip = trainer.config.data.on_bad_image == "skip"
        check_every_file(source, with_labels=bool(source.data_set.label_path), skip=skip)
        check_every_file(target, with_labels=False, skip=skip)
        print(f"looked at the headers of {len(source)} + {len(target)} files", flush=True)
    rehearsals = rehearse(trainer, plans)
    if not first:
        return
    print("\n".join(describe(rehearsals, plans, trainer.device)))
    there = bytes_in(folder) if continued else 0
    needed = max(0, needed_bytes(rehearsals, with_best=trainer.labels is not None) - there)
    require_space({"checkpoints": (folder, needed), **({"cache": cache} if cache else {})})
    print("dry run finished, nothing was written")


def rehearse(trainer: Trainer, plans: Sequence[ScalePlan]) -> list[Rehearsal]:
    """Train a few steps of every scale, from fresh networks; nothing is written, and the trainer is spent afterwards.

    Raises:
        UserError: an image or label cannot be used.
    """
    found = []
    for scale, plan in enumerate(plans):
        trainer.start_scale(scale)
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)
        steps = range(min(1 + STEPS, plan.steps))
        batches = open_streams(
            trainer.config, scale, steps, trainer.source, trainer.target, trainer.caches,
            with_labels=trainer.labels is not None and scale == len(plans) - 1,
            pin_memory=trainer.device.type == "cuda",
            share=trainer.rank.share(trainer.config.schedule.batch_size_list[scale]),
        )  # fmt: skip
        nets, optimizers = trainer.scale_networks(), ScaleOptimizers(**trainer.optimizers)
        started = time.perf_counter()
        for step, (source, target) in enumerate(batches):
            if step == 1:
                _wait_for_device(trainer.device)
                started = time.perf_counter()  # the first step also starts loaders and chooses algorithms
            trainer.one_step(nets, optimizers, source, target, epoch=trainer.config.schedule.warmup_epochs)
        _wait_for_device(trainer.device)
        seconds = (time.perf_counter() - started) / max(1, len(steps) - 1)
        found.append(Rehearsal(seconds, _peak_bytes(trainer.device), trainer.checkpoint().size()))
        trainer.finish_scale()
    return found


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def needed_bytes(rehearsals: Sequence[Rehearsal], with_best: bool) -> int:
    """Disk space of a run's checkpoints: one of each scale, the newest, the one before, one being written, the best."""
    last = rehearsals[-1].checkpoint_bytes
    return sum(r.checkpoint_bytes for r in rehearsals) + (5 if with_best else 3) * last


def bytes_in(folder: Path) -> int:
    """Disk space of the checkpoints that a run to be continued already has, and will keep or replace."""
    return sum(path.stat().st_size for path in folder.glob("*.pth") if path.name != DAMAGED)


def require_space(wanted: Mapping[str, tuple[Path, int]]) -> None:
    """Print the bytes wanted in each folder beside those that are free; folders may be on one disk.

    Raises:
        UserError: they do not fit.
    """
    taken: dict[int, int] = {}
    for what, (folder, size) in wanted.items():
        path = folder.absolute()
        home = next(p for p in (path, *path.parents) if p.exists())
        disk = home.stat().st_dev
        free = shutil.disk_usage(home).free - taken.get(disk, 0)
        print(f"{what}: up to {size / 1e6:,.1f} MB more in {folder}, where {max(0, free) / 1e6:,.0f} MB are left")
        if size > free:
            raise UserError(f"{folder}: too little space for the {what}; free some, or choose a folder on another disk")
        taken[disk] = taken.get(disk, 0) + size


def describe(rehearsals: Sequence[Rehearsal], plans: Sequence[ScalePlan], device: torch.device) -> list[str]:
    """Lines for a person: time and memory of every scale, and the time of the whole run."""
    memory = "GPU memory" if device.type == "cuda" else "memory of the process"
    lines = [
        f"scale {scale}: {plan.steps} steps of {found.seconds:.3g} s, {_duration(plan.steps * found.seconds)}; "
        f"most {memory} {found.peak_bytes / 1e9:.2f} GB; checkpoint {found.checkpoint_bytes / 1e6:.1f} MB"
        for scale, (plan, found) in enumerate(zip(plans, rehearsals, strict=True))
    ]
    total = sum(plan.steps * found.seconds for plan, found in zip(plans, rehearsals, strict=True))
    return [*lines, f"whole run, without validations: {_duration(total)}"]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
