"""`--dry_run`: check every file, train some steps of every stage in memory, and print what the run takes."""

import io
import resource
import shutil
import time
from itertools import islice

import torch
from tqdm import tqdm

from data_handlers.images import check_label_header, image_size
from data_handlers.lists import FileList
from training.loop import Loop
from utils.errors import UserError

STEPS = 3  # measured in every stage, after one that is not


def dry_run(loop: Loop) -> None:
    """Check every file, measure every stage, and print what a run takes. Raises `UserError`.

    Args:
        loop: a new one; its folder is where checkpoints would go. Its method cannot be used afterwards.
    """
    method, stages, is_main = loop.method, loop.stages, loop.rank.is_main
    domains = method.domains.values()
    if is_main:
        lists = [(files, domain.labels, domain.skips) for domain in domains for files in domain.lists]
        if (validator := method.validator) is not None:
            lists.append((validator.files, validator.with_labels, validator.skip_unusable))
        for files, with_labels, skips in lists:
            _check_every_file(files, with_labels, skips)
        print(f"checked the headers of {' + '.join(str(len(files)) for files, *_ in lists)} files", flush=True)
    memory_name = "GPU memory" if method.device.type == "cuda" else "memory of the process"
    total, kept, size = 0.0, 0, 0
    for index, stage in enumerate(stages):
        seconds, memory, size = _measure(loop, index)
        total += stage.steps * seconds
        kept += size if stage.keep_as else 0
        if is_main:
            print(
                f"{stage.name}: {stage.steps} steps of {seconds:.3g} s, {tqdm.format_interval(stage.steps * seconds)}; "
                f"most {memory_name} {memory / 1e9:.2f} GB; checkpoint {size / 1e6:.1f} MB"
            )
    if not is_main:
        return
    print(f"whole run, without validations: {tqdm.format_interval(total)}")
    # Besides those that are kept: the newest, the one before, one being written, and the best.
    needed = kept + (4 if method.validator else 3) * size
    path = loop.folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.exists())).free
    print(f"checkpoints: up to {needed / 1e6:,.1f} MB in {path}, where {free / 1e6:,.0f} MB are free")
    print("dry run finished, nothing was written")


def _check_every_file(files: FileList, with_labels: bool, skips: bool) -> None:
    """Read the header of every image and label; with `--on_bad_image skip` print what cannot be used."""
    wrong = []
    for name in files.images:
        try:
            size = image_size(files.image_file(name))
            if with_labels:
                check_label_header(files.label_file(name), files.data_set, size)
        except UserError as error:
            wrong.append(str(error))
    if wrong and skips:
        print(f"{len(wrong)} of {len(files)} files of {files.root} will be skipped:")
        print("\n".join(f"  {reason}" for reason in wrong))
    elif wrong:
        raise UserError(f"{len(wrong)} of {len(files)} files of {files.root} cannot be used, the first: {wrong[0]}")


def _measure(loop: Loop, index: int) -> tuple[float, int, int]:
    """Train a few steps of a stage from new networks; seconds of a step, most bytes of memory, bytes of a checkpoint.

    The memory is that of the GPU or, on a CPU, of the whole process.
    """
    method, device, stage = loop.method, loop.method.device, loop.stages[index]
    loop.begin_stage(index, resumed=False)
    if (line := method.prepare_stage(index, None, lambda: None)) and loop.rank.is_main:
        print(line)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    # The last steps of the stage include losses that begin after a warm-up.
    steps = range(max(0, stage.steps - 1 - STEPS), stage.steps)
    started = time.perf_counter()
    for count, batch in enumerate(islice(method.batches(index, steps), len(steps))):
        if count == 1:
            started = time.perf_counter()  # the first step also starts loaders and chooses algorithms
        losses = method.step(batch, index, steps[count])
        torch.stack([loss.float() for loss in losses.values()]).cpu()  # waits for a GPU
    seconds = (time.perf_counter() - started) / max(1, len(steps) - 1)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else used
    written = io.BytesIO()
    loop.checkpoint().write(written)
    method.end_stage(index)
    return seconds, memory, written.tell()
