"""Running a command in processes that work together, and starting those of this machine.

PyTorch's elastic launcher starts them, ends all when one has died, and starts all again, up to `RESTARTS` times: a
training continues from the last checkpoint. A process that ends for a reason that a restart cannot mend (bad input, a
requested stop) leaves its exit code in a folder of the launcher and ends with 0, so that nothing is restarted.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training.distributed import Rank, joined
from utils.errors import UserError, run_cli
from utils.stopping import SAME_REQUEST, STOP_SIGNALS, STOPPED, Stopped, announce

RESTARTS = 3
FOLDER = "PROCST_LAUNCHER_FOLDER"  # environment variable: where the processes leave their numbers and exit codes


def in_processes(body: Callable[[Rank], None], if_lost: str) -> None:
    """Run `body` in this process, alone or as one of those that `launch`, torchrun or a batch system has started.

    Args:
        body: is given this process's rank, whose device is not yet chosen; alone, it may `launch` others.
        if_lost: what to do where the connection to the other processes is lost, as the end of a message.

    Raises:
        UserError: bad input, or another process is gone.
        SystemExit: another process says what is the matter, or the launcher does.
        Stopped: in the main process, when all have been asked to stop.
    """

    def main() -> None:
        is_main = True
        try:
            with joined(if_lost) as rank:
                is_main = rank.is_main
                body(rank)
        except UserError:
            if not is_main:
                print(file=sys.stderr)  # ends the line of the main process's progress bar
            raise
        except Stopped:
            if is_main:
                raise
            raise SystemExit(STOPPED) from None

    if is_launched():
        with _launched():
            run_cli(main)
    else:
        main()


def launch(
    script: Path,
    devices: Sequence[torch.device],
    *,
    environment: Mapping[str, str] | None = None,
    restarts: int = RESTARTS,
    if_killed: str = "the same command continues from the last checkpoint",
) -> None:
    """Run a script with this command line in one process for each device of this machine, and wait for all.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the processes, which decide what to do about it; a second one
    kills them. Environment, logging and signal handlers of this process stay changed: it does nothing else afterwards.

    Args:
        script: its work is done inside `in_processes`.
        environment: variables for the processes.
        restarts: how often all processes are started again when one has died.
        if_killed: what to do when a process was killed more often, as the end of a message.

    Raises:
        SystemExit: with the exit code of the processes, unless it is 0.
        UserError: a process was killed more often than it was restarted.
    """
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.disable(logging.CRITICAL)  # PyTorch's launcher logs a failure on some thirty lines; one is enough
    with tempfile.TemporaryDirectory(prefix="procst_ranks_") as name:
        folder, failure = Path(name), None
        os.environ.update({FOLDER: name, **(environment or {})})
        received = _pass_signals_on(folder)
        try:
            elastic_launch(_configuration(len(devices), restarts), sys.executable)(str(script), *sys.argv[1:])
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
    often = f" after {restarts} restarts" if restarts else ""
    raise UserError(
        f"process {index} ({devices[index]}) was ended by signal {-failure.exitcode} ({signal_name}{hint}){often}; "
        f"{if_killed}"
    )


def is_launched() -> bool:
    """Whether this process was started by `launch`."""
    return FOLDER in os.environ


@contextmanager
def _launched() -> Iterator[None]:
    """In a process that `launch` started: receive its signals, and leave it an exit code for which all are to end.

    Raises:
        SystemExit: with code 0 in place of a code that a restart cannot mend.
    """
    folder = Path(os.environ[FOLDER])
    if any(folder.glob("*.code")):
        raise SystemExit(0)  # all were restarted because others lost their connection to one that ended for good
    (folder / f"{os.getpid()}.rank").touch()
    try:
        if (folder / "signal").exists():  # sent before this process could be told
            raise SystemExit(128 + int((folder / "signal").read_text()))
        yield
    except SystemExit as end:
        if end.code in (0, 1, None):
            raise
        (folder / f"{os.getpid()}.code").write_text(str(end.code))
        if os.environ["TORCHELASTIC_MAX_RESTARTS"] == "0":
            raise
        raise SystemExit(0) from None


def _configuration(processes: int, restarts: int) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        # A store on a free port of this machine, which needs no network and no name.
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        # By default it kills the processes 30 seconds after a stop signal, in the middle of saving.
        signals_to_handle="SIGUSR2",
    )


def _pass_signals_on(folder: Path) -> list[int]:
    """Pass signals on to the processes that have announced themselves in `folder`; returns a list of those received.

    Their loader processes get none: they are no concern of whoever asks for a stop.
    """
    received: list[int] = []
    deadline = math.inf  # a signal that comes later is another request

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal deadline
        again = time.monotonic() > deadline
        if not received:
            announce(signal.Signals(number))
            deadline = time.monotonic() + SAME_REQUEST
        received.append(number)
        with suppress(FileNotFoundError):  # all processes have ended
            (folder / "signal").write_text(str(int(number)))
            if again:
                (folder / "killed.code").write_text(str(128 + number))
        for path in folder.glob("*.rank"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL if again else number)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # a signal that is ignored stays so, as with nohup
            signal.signal(number, pass_on)
    return received
