"""Starting the processes of one machine that work together, and running a command in them.

PyTorch's elastic launcher starts them, ends all when one has died, and starts all again, up to `RESTARTS` times: a
training continues from the last checkpoint. A process that ends for a reason that a restart cannot mend (bad input, a
requested stop) leaves its exit code in a folder of the launcher and ends with 0, so that nothing is restarted.
"""

from __future__ import annotations

import logging
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

from training.distributed import AlreadyReported, LostConnection, Rank, joined
from utils.errors import UserError, run_cli
from utils.locks import say
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
    rank = Rank()

    def main() -> None:
        nonlocal rank
        try:
            with joined() as rank:
                body(rank)
        except AlreadyReported:
            raise SystemExit(2) from None
        except UserError:
            if not rank.is_main:
                print(file=sys.stderr)  # ends the line of the main process's progress bar
            raise
        except Stopped:
            if rank.is_main:
                raise
            raise SystemExit(STOPPED) from None
        except LostConnection:
            if is_launched():
                raise SystemExit(1) from None  # the launcher starts all processes again, or ends them
            raise UserError(
                "the connection to the other processes was lost: one of them was ended, or its machine cannot be "
                f"reached; {if_lost}"
            ) from None

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
    kills them.

    Args:
        script: its work is done inside `in_processes`.
        environment: variables for the processes.
        restarts: how often all processes are started again when one has died.
        if_killed: what to do when a process was killed more often, as the end of a message.

    Raises:
        SystemExit: with the exit code of the processes, unless it is 0.
        UserError: a process was killed more often than it was restarted.
    """
    environment = environment or {}
    with tempfile.TemporaryDirectory(prefix="procst_ranks_") as folder, _environment({FOLDER: folder, **environment}):
        with _signals_passed_on(Path(folder)) as received, _without_logging():
            try:
                elastic_launch(_configuration(len(devices), restarts), sys.executable)(str(script), *sys.argv[1:])
                failure = None
            except ChildFailedError as error:
                index, failure = next(iter(error.failures.items()))  # the first one noticed; the others followed
        codes = sorted(int(path.read_text()) for path in Path(folder).glob("*.code"))
    if codes:
        raise SystemExit(codes[0])
    if failure is None:
        return
    if received:
        raise SystemExit(128 + received[-1])
    if failure.exitcode > 0:
        raise SystemExit(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    often = f" after {restarts} restarts" if restarts else ""
    print(file=sys.stderr)  # its progress bar was left without a line's end
    raise UserError(
        f"process {index} ({devices[index]}) was ended by signal {-failure.exitcode} ({name}{hint}){often}; {if_killed}"
    )


def is_launched() -> bool:
    """Whether this process was started by `launch`."""
    return FOLDER in os.environ


@contextmanager
def _launched() -> Iterator[None]:
    """Report to the launcher: have its signals passed on, and leave it the exit code that ends all.

    Raises:
        SystemExit: with code 0 in place of a code that a restart cannot mend.
    """
    folder = Path(os.environ[FOLDER])
    if any(folder.glob("*.code")):
        raise SystemExit(0)  # all were restarted because others lost their connection to one that ended for good
    (folder / f"{os.getpid()}.rank").touch()
    if (folder / "signal").exists():  # sent before this process could be told
        signal.raise_signal(int((folder / "signal").read_text()))
    try:
        yield
    except SystemExit as end:
        if end.code not in (0, 1, None):
            (folder / f"{os.getpid()}.code").write_text(str(end.code))
            if os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
                raise SystemExit(0) from None
        raise


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
        # By default the launcher kills its processes 30 seconds after a signal of ours, in the middle of saving.
        signals_to_handle="SIGQUIT",
    )


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    if Path("/sys/class/net/lo").exists():
        values = {"GLOO_SOCKET_IFNAME": "lo", **values}
    before = {name: os.environ.get(name) for name in (*values, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update({name: value for name, value in values.items() if name not in os.environ})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _without_logging() -> Iterator[None]:
    """The launcher logs a failure on some thirty lines; one is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _signals_passed_on(folder: Path) -> Iterator[list[int]]:
    """Pass signals on to the processes that have announced themselves in `folder`; yields those received, in order.

    Their loader processes get none: they are no concern of whoever asks for a stop.
    """
    received: list[int] = []
    first: list[float] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        again = bool(first) and time.monotonic() - first[0] > SAME_REQUEST
        if not received:
            announce(signal.Signals(number))
        received.append(number)
        first.append(time.monotonic())
        (folder / "signal").write_text(str(int(number)))
        if again:
            say("ended without saving; the last checkpoint stays")
            (folder / "killed.code").write_text(str(128 + number))
        for path in folder.glob("*.rank"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL if again else number)

    # A signal that is ignored stays so, as with nohup.
    wanted = [n for n in (*STOP_SIGNALS, signal.SIGQUIT) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
