"""A run from its flags to its end: configuration, devices, folder, loop. The same for every method."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from training.checkpoint import BEST
from training.config import StartFlags
from training.distributed import Rank
from training.dry_run import dry_run
from training.flags import section_from
from training.launching import RESTARTS, in_processes, is_launched, is_restarted, launch
from training.loop import Loop
from training.method import Method
from training.precision import Precision, resolve_precision, set_convolution_precision, set_determinism
from training.progress import Progress
from training.run_folder import Continued, environment, locked_run_folder, log_name, run_to_continue, write_record
from utils.devices import resolve_devices
from utils.errors import UserError, out_of_memory_means
from utils.files import check_folder
from utils.stopping import StopRequests

# Checks everything that can be wrong with the input of a run (`UserError`) and makes its method.
Prepare = Callable[[Any, Rank, Continued | None], Method]


def train(*, script: str, method: type[Method], prepare: Prepare, given: Mapping[str, Any]) -> None:
    """Start a run or continue one, in this process or in those that it launches.

    Args:
        script: file of the command.
        given: the flags on the command line.
    """
    in_processes(partial(_start, script, method, prepare, given), "continue from the last checkpoint")


def _start(script: str, method: type[Method], prepare: Prepare, given: Mapping[str, Any], rank: Rank) -> None:
    method.config_class.check_given(given)
    flags = section_from(StartFlags, given)
    run_dir, has_folder = flags.run_dir, bool(flags.run_dir or flags.continue_train_from_path)
    if is_restarted() and not has_folder:
        raise UserError("--run_dir is needed where processes are restarted: without it, each start is a new run")
    stop = StopRequests(quiet=is_launched() or not rank.is_main)
    continued = run_to_continue(flags.continue_train_from_path, run_dir, method.name)
    config = _config(method, given, rank, continued)
    if flags.print_config:
        if rank.is_main:
            print(json.dumps(config.to_json(), indent=2))
        return
    devices = resolve_devices(config.run.gpus)
    if rank.count == 1 and len(devices) > 1:
        launch(Path(script), devices, restarts=RESTARTS if has_folder else 0)
        return
    rank = rank.at(devices)
    if not config.run.gpus and rank.is_main:
        print(f"computing on {rank.device} (choose with --gpus)")
    # Until the training begins there is nothing to save; several processes decide together when they are trained.
    stop.at_once = rank.count == 1
    with stop:
        set_determinism(config.run.deterministic)
        precision = agreed_precision(config.run.precision, rank)
        set_convolution_precision(precision)
        config = replace(config, run=replace(config.run, precision=precision))
        prepared = prepare(config, rank, continued)
        for name in ("tb_logs_dir",) if continued or run_dir else ("checkpoints_dir", "tb_logs_dir"):
            check_folder(Path(getattr(config.run, name)), f"--{name}")
        _require_one_run(prepared)
        if flags.dry_run:
            folder = continued.origin.parent if continued else Path(run_dir or config.run.checkpoints_dir)
            _dry_run(prepared, folder)
            return
        # All input has been checked; only now is a run folder made.
        where = {"run_dir": run_dir, "parent": Path(config.run.checkpoints_dir), "task": prepared.task()}
        with locked_run_folder(continued, **where) if rank.is_main else nullcontext() as folder:
            _train(prepared, continued, rank.broadcast(folder), flags.resume_to_epoch, stop)


def _config(method: type[Method], given: Mapping[str, Any], rank: Rank, continued: Continued | None) -> Any:
    if continued is None:
        processes = {"num_processes": rank.count} if rank.count > 1 else {}
        return method.config_class.from_flags({**method.completed(given), **processes})
    stored = method.config_class.from_json(continued.checkpoint.config, continued.origin)
    starting = StartFlags.__dataclass_fields__
    return stored.continued({name: value for name, value in given.items() if name not in starting})


def _require_one_run(method: Method) -> None:
    """Check that all processes have the same configuration and see the same files."""
    config = method.config
    values = {f"configuration (--{n})": v for n, v in config.flags().items() if not config.may_change(n)}
    method.rank.require_equal({**values, **method.inputs()})
    smallest = min(stage.batch_size for stage in method.stages())
    if smallest < method.rank.count:
        raise UserError(
            f"{method.batch_flag}: a batch of {smallest} cannot be shared by {method.rank.count} processes, "
            "the batch sizes are totals; raise it, or name fewer GPUs"
        )


def _dry_run(method: Method, folder: Path) -> None:
    method.domains = {name: replace(domain, cache_dir="") for name, domain in method.domains.items()}
    loop = Loop(method=method, folder=folder)
    if method.rank.is_main:
        _print_description(method)
    with out_of_memory_means(lambda: _less_memory(loop)):
        dry_run(loop)


def _train(
    method: Method, continued: Continued | None, folder: Path, resume_to_epoch: int, stop: StopRequests
) -> None:
    rank, config = method.rank, method.config
    loop = Loop(method=method, folder=folder, info={"run": str(folder)}, stop=stop)
    if continued:
        loop.restore(continued.checkpoint, continued.origin)
        if resume_to_epoch and not is_restarted():
            loop.move_to_epoch(resume_to_epoch)
    if rank.is_main:
        content = {"method": method.name, "config": config.to_json(), "inputs": method.inputs()}
        where = {"stage": loop.stage, "step": loop.step}
        write_record(folder, content, {**where, **environment(rank.device, rank.count)})
        _print_description(method)
        print(f"run folder: {folder}")
        if continued:
            print(f"continuing after step {loop.step} of {loop.stages[loop.stage].name}", flush=True)
    progress = Progress(
        method=method, done=(loop.stage, loop.step), folder=folder if rank.is_main else None,
        log_dir=Path(config.run.tb_logs_dir) / log_name(folder) if rank.is_main else None,
        print_rate=config.run.print_rate, quiet=not rank.is_main,
    )  # fmt: skip
    stop.at_once = False
    try:
        with out_of_memory_means(lambda: _less_memory(loop)):
            loop.run(progress)
    finally:
        progress.close()
    if rank.is_main:
        if loop.skipped:
            print(f"{len(loop.skipped)} images or labels could not be used and were skipped:")
            print("\n".join(f"  {reason}" for reason in loop.skipped))
        if best := loop.best():
            print(f"best state by {method.validator.select_by}: {folder / BEST}, of step {best['step']}")
        print(f"finished; {method.conclusion(folder)}")


def agreed_precision(wanted: str, rank: Rank) -> Precision:
    """The precision of all processes. Raises `UserError` if they were given different ones or a device lacks it."""
    rank.require_equal({"--precision": wanted})
    return resolve_precision(rank.broadcast(resolve_precision(wanted, rank.device)), rank.device)


def _print_description(method: Method) -> None:
    """Print what is trained and validated on which data."""
    print("\n".join(filter(None, [*method.describe(), method.validation_line])))


def _less_memory(loop: Loop) -> str:
    stage = loop.stages[loop.stage]
    passes = "--micro_batch, " if "micro_batch" in loop.method.config.flags() else ""
    return f" for batch {stage.batch_size} of {stage.name}; lower {passes}{loop.method.batch_flag} or --crop_size"
