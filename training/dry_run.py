"""`--dry_run`: check every file, train some steps of every stage in memory, and tell what the run takes."""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from data_handlers.domain import Domain
from data_handlers.images import check_label_header, image_size
from training.checkpoint import DAMAGED
from training.loop import Loop
from training.method import Stage
from utils.errors import UserError

STEPS = 3  # measured in every stage, after one that is not


@dataclass(frozen=True)
class Measurement:
    """What a stage takes.

    Attributes:
        seconds: of a step.
        peak_bytes: most memory, of the GPU or, on a CPU, of the whole process.
        checkpoint_bytes: size of a checkpoint of this stage.
    """

    seconds: float
    peak_bytes: int
    checkpoint_bytes: int


def check_every_file(domain: Domain) -> None:
    """Look at the header of every image and label; with `--on_bad_image skip` print what cannot be used.

    Raises:
        UserError: how many cannot be used, and what is wrong with the first of them.
    """
    files, wrong = domain.files, []
    for name in files.images:
        try:
            size = image_size(files.root / name)
            if domain.labels != "none":
                check_label_header(files.label_file(name), files.data_set, size)
        except UserError as error:
            wrong.append(str(error))
    if wrong and domain.skips:
        print(f"{len(wrong)} of {len(files)} files of {files.root} will be skipped:")
        print("\n".join(f"  {reason}" for reason in wrong))
    elif wrong:
        raise UserError(f"{len(wrong)} of {len(files)} files of {files.root} cannot be used, the first: {wrong[0]}")


def dry_run(loop: Loop, *, continued: bool, with_best: bool) -> None:
    """Check every file, measure every stage, and print what a run takes.

    Args:
        loop: a fresh one, whose folder is where checkpoints would go; its method is spent afterwards.
        continued: the run has checkpoints there.
        with_best: a best state will be kept, too.

    Raises:
        UserError: a file cannot be used, or disk space does not suffice.
    """
    method, is_main = loop.method, loop.rank.is_main
    domains = method.domains.values()
    if is_main:
        print(json.dumps(method.config.to_json(), indent=2))
        for domain in domains:
            check_every_file(domain)
        print(f"checked the headers of {' + '.join(str(len(domain)) for domain in domains)} files", flush=True)
    found = [measure(loop, index, stage) for index, stage in enumerate(loop.stages)]
    if not is_main:
        return
    print("\n".join(describe(found, loop.stages, method.device)))
    there = bytes_in(loop.folder) if continued else 0
    needed = max(0, needed_bytes(found, loop.stages, with_best) - there)
    wanted = {"checkpoints": (loop.folder, needed)}
    cache = sum(domain.bytes_to_cache() for domain in domains)
    if cache:
        wanted["cache"] = (Path(next(iter(domains)).cache_dir), cache)
    require_space(wanted)
    print("dry run finished, nothing was written")


def measure(loop: Loop, index: int, stage: Stage) -> Measurement:
    """Train a few steps of a stage from fresh networks; nothing is written.

    Raises:
        UserError: an image or label cannot be used.
    """
    method, device = loop.method, loop.method.device
    loop.begin_stage(index, resumed=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # The last steps of the stage: losses that begin after a warm-up are part of them.
    steps = range(max(0, stage.steps - 1 - STEPS), stage.steps)
    started = time.perf_counter()
    for count, batch in enumerate(islice(method.batches(index, steps), len(steps))):
        if count == 1:
            _wait_for(device)
            started = time.perf_counter()  # the first step also starts loaders and chooses algorithms
        method.step(batch, index, steps[count])
    _wait_for(device)
    seconds = (time.perf_counter() - started) / max(1, len(steps) - 1)
    found = Measurement(seconds, _peak_bytes(device), loop.checkpoint().size())
    method.end_stage(index)
    return found


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def needed_bytes(found: Sequence[Measurement], stages: Sequence[Stage], with_best: bool) -> int:
    """Disk space of a run's checkpoints: those kept, the newest, the one before, one being written, the best."""
    kept = sum(m.checkpoint_bytes for m, stage in zip(found, stages, strict=True) if stage.keep_as)
    return kept + (4 if with_best else 3) * found[-1].checkpoint_bytes


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
        print(f"{what}: up to {size / 1e6:,.1f} MB more in {folder}, where {max(0, free) / 1e6:,.0f} MB are free")
        if size > free:
            raise UserError(f"{folder}: too little space for the {what}; free some, or choose a folder on another disk")
        taken[disk] = taken.get(disk, 0) + size


def describe(found: Sequence[Measurement], stages: Sequence[Stage], device: torch.device) -> list[str]:
    """Lines for a person: time and memory of every stage, and the time of the whole run."""
    memory = "GPU memory" if device.type == "cuda" else "memory of the process"
    lines = [
        f"{stage.name}: {stage.steps} steps of {m.seconds:.3g} s, {_duration(stage.steps * m.seconds)}; "
        f"most {memory} {m.peak_bytes / 1e9:.2f} GB; checkpoint {m.checkpoint_bytes / 1e6:.1f} MB"
        for stage, m in zip(stages, found, strict=True)
    ]
    total = sum(stage.steps * m.seconds for stage, m in zip(stages, found, strict=True))
    return [*lines, f"whole run, without validations: {_duration(total)}"]


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"
