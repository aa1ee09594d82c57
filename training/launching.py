"""Starting the processes that work together, connecting them, and ending them in good order.

`launch` starts those of this machine with PyTorch's elastic launcher, which ends all when one has died and starts all
again, up to `RESTARTS` times; a training then continues from the last checkpoint. A process that ends for a reason that
a restart cannot mend (bad input, a requested stop) writes its exit code into a folder of the launcher and ends with 0,
so that nothing is restarted. `torchrun` or a batch system may start the processes instead, with `RANK`, `WORLD_SIZE`
and `LOCAL_RANK` in the environment.
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training.distributed import Rank, environment_number
from utils.errors import UserError, run_cli
from utils.stopping import STOP_SIGNALS, STOPPED, Stopped, announce

RESTARTS = 3
FOLDER = "PROCST_LAUNCHER_FOLDER"  # environment variable: the folder for process numbers and exit codes
LAUNCHER = "PROCST_LAUNCHER"  # environment variable: the launcher, which may be gone when a process has started
# Processes wait for each other while one builds a cache or writes a checkpoint. A dead process is noticed at once.
TIMEOUT = timedelta(hours=3)
CLOSING = 5.0  # seconds in which connections are closed after an error


def is_launched() -> bool:
    """Whether `launch` started this process."""
    return FOLDER in os.environ


def is_restarted() -> bool:
    """Whether the elastic launcher started this process again after a process of the group had died."""
    return _restarts() != "0"


def _restarts() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _has_launcher() -> bool:
    """Whether `launch` or torchrun started this process and watches it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def in_processes(body: Callable[[Rank], None], if_lost: str) -> None:
    """Run `body` in this process, which may be one of several that `launch`, torchrun or a batch system has started.

    Args:
        body: is given this process's rank, whose device is not yet chosen; alone, it may `launch` others.
        if_lost: what to do where the connection to the other processes is lost, as the end of a message.

    Raises:
        UserError: bad input, or another process is gone.
        SystemExit: another process, or the launcher, reports the reason.
        Stopped: in the main process, when all have been asked to stop.
    """

    def main() -> None:
        with _joined(if_lost) as rank:
            body(rank)

    if is_launched():
        with _reporting_to_launcher():
            run_cli(main)
    else:
        main()


def launch(
    script: Path, devices: Sequence[torch.device], *, restarts: int = RESTARTS,
    if_killed: str = "continue from the last checkpoint",
) -> None:  # fmt: skip
    """Run a script with this command line in one process for each device of this machine, and wait for all.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the processes. This process is only fit to end afterwards: its
    environment, logging and signal handlers stay changed.

    Args:
        script: does its work inside `in_processes`.
        restarts: how often all processes are started again when one has died.
        if_killed: what to do when a process was killed more often, as the end of a message.

    Raises:
        SystemExit: with the exit code of the processes, unless it is 0.
        UserError: a process was killed more often than it was restarted.
    """
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.disable(logging.CRITICAL)  # PyTorch's launcher logs some thirty lines about a failure
    with tempfile.TemporaryDirectory(prefix="procst_ranks_") as name:
        folder, failure = Path(name), None
        os.environ.update({FOLDER: name, LAUNCHER: str(os.getpid())})
        received = _pass_signals_on(folder)
        configuration = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=len(devices), run_id=uuid.uuid4().hex, max_restarts=restarts,
            # A store on a free port of this machine, which needs no network and no name.
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost",
            monitor_interval=0.1, logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
            # By default it kills the processes 30 seconds after a stop signal, in the middle of saving.
            signals_to_handle="SIGUSR2",
        )  # fmt: skip
        try:
            elastic_launch(configuration, sys.executable)(str(script), *sys.argv[1:])
        except ChildFailedError as error:
            index, failure = next(iter(error.failures.items()))  # the first one noticed; the others followed
        codes = sorted(int(path.read_text()) for path in folder.glob("*.code"))
    if codes:
        raise SystemExit(codes[0])
    if failure is None:
        return
    if received or failure.exitcode > 0:
        raise SystemExit(128 + received[-1] if received else failure.exitcode)
    signal_name = signal.Signals(-failure.exitcode).name
    hint = ", as the system does where memory runs out" if signal_name == "SIGKILL" else ""
    raise UserError(
        f"process {index} ({devices[index]}) was ended by signal {-failure.exitcode} ({signal_name}{hint}); {if_killed}"
    )


def _pass_signals_on(folder: Path) -> list[int]:
    """Pass signals on to the processes with a file in `folder`, not to their loaders; returns those received so far."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not received:
            announce(signal.Signals(number))
        received.append(number)
        with suppress(FileNotFoundError):  # all processes have ended
            (folder / "signal").write_text(str(int(number)))
        for path in folder.glob("*.rank"):
            # A process that is gone, or that has not yet written its number and will look for the signal.
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(path.read_text()), number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # an ignored signal stays ignored, as with nohup
            signal.signal(number, pass_on)
    return received


@contextmanager
def _reporting_to_launcher() -> Iterator[None]:
    """In a process of `launch`: receive its signals; report exit codes that a restart cannot mend, and exit with 0."""
    folder = Path(os.environ[FOLDER])
    if any(folder.glob("*.code")):
        raise SystemExit(0)  # all were restarted because others lost their connection to one that ended for good
    (folder / f"{os.environ['LOCAL_RANK']}.rank").write_text(str(os.getpid()))
    try:
        if (folder / "signal").exists():  # sent before this process had its file
            raise SystemExit(128 + int((folder / "signal").read_text()))
        yield
    except SystemExit as end:
        if end.code in (0, 1, None):
            raise
        (folder / f"{os.getpid()}.code").write_text(str(end.code))
        if os.environ["TORCHELASTIC_MAX_RESTARTS"] == "0":
            raise
        raise SystemExit(0) from None


@contextmanager
def _joined(if_lost: str) -> Iterator[Rank]:
    """Connect with the other processes, if there are any, for the time of the block.

    At the end of the block, and at a `Stopped`, on which all agree, processes wait for each other, so that none is
    ended while it writes. The process that meets bad input first reports it.

    Raises:
        UserError: the variables are wrong, or the others cannot be reached or are gone and are not restarted.
        SystemExit: code 2 or 75 where another process reports bad input or the stop; code 1 where another process is
            gone, after which the launcher starts all again.
    """
    alone = not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if alone or environment_number("WORLD_SIZE") == 1:
        yield Rank()
        return
    rank = Rank(environment_number("RANK"), environment_number("WORLD_SIZE"))
    if _has_launcher():
        launcher = environment_number(LAUNCHER) if is_launched() else os.getppid()
        threading.Thread(target=_stop_without, args=(launcher,), daemon=True).start()
    store = _connect(rank)
    with _disconnected_at_the_end():
        try:
            yield rank
            rank.barrier()
        except Stopped:
            rank.barrier()
            if rank.is_main:
                raise
            raise SystemExit(STOPPED) from None
        except UserError:
            if not _is_first(store):
                raise SystemExit(2) from None
            if not rank.is_main:
                print(file=sys.stderr)  # ends the line of the main process's progress bar
            raise
        except Exception as error:
            if not _is_lost_connection(error):
                raise
            if _has_launcher():
                raise SystemExit(1) from None
            raise UserError(
                "the connection to the other processes was lost: one of them was ended, or its machine cannot be "
                f"reached; {if_lost}"
            ) from None


def _stop_without(launcher: int) -> None:
    """Ask this process to stop when its launcher has been killed."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _disconnected_at_the_end() -> Iterator[None]:
    """Close all connections; otherwise gloo's threads end the process by SIGABRT."""
    try:
        yield
    except BaseException:
        # NCCL may wait for processes that are gone.
        closing = threading.Thread(target=dist.destroy_process_group, daemon=True)
        closing.start()
        closing.join(CLOSING)
        raise
    dist.destroy_process_group()


def _connect(rank: Rank) -> dist.Store:
    # NCCL for GPU tensors, gloo for those in memory, whatever --gpus will say.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, _, _ = next(dist.rendezvous("env://", rank.index, rank.count, timeout=timedelta(minutes=10)))
        # The launcher's store outlives a restart; gloo would look for the processes that were connected before it.
        store = dist.PrefixStore(f"start_{_restarts()}", store)
        dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0][:150]
        raise UserError(
            f"process {rank.index} of {rank.count} cannot reach the others at MASTER_ADDR "
            f"{os.environ.get('MASTER_ADDR', '(not set)')}, MASTER_PORT {os.environ.get('MASTER_PORT', '(not set)')} "
            f"({reason})"
        ) from None
    return store


def _is_first(store: dist.Store) -> bool:
    """Whether this process is the first to fail."""
    try:
        return store.add("procst/failures", 1) == 1
    except RuntimeError:
        return True  # the process that holds the store is gone


def _is_lost_connection(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
