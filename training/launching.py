"""Starting the processes of one machine that train together; `training.distributed.joined` connects them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from training.distributed import FORWARDED, LAUNCHER_FOLDER
from utils.errors import UserError
from utils.stopping import SAME_REQUEST, announce


def launch(script: Path, arguments: Sequence[str], devices: Sequence[torch.device], if_killed: str) -> None:
    """Run a script in one process for each device of this machine and wait for all.

    The first one that fails ends all. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on to the processes, which decide
    what to do about it; a second one kills them.

    Args:
        script: calls `joined`.
        arguments: its command line.
        if_killed: what to do when a process is killed from outside, as the end of a one-line message.

    Raises:
        UserError: a process was killed.
        SystemExit: a process ended with another exit code than 0 and has said why.
    """
    with (
        tempfile.TemporaryDirectory(prefix="procst_ranks_") as folder,
        _environment(_for_ranks(folder)),
        _signals_passed_on(Path(folder)) as received,
        _without_logging(),
    ):
        try:
            elastic_launch(_configuration(len(devices)), sys.executable)(str(script), *arguments)
            return
        except ChildFailedError as error:
            index, failure = next(iter(error.failures.items()))  # the first one noticed; the others followed
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
    code = failure.exitcode
    if code > 0:
        raise SystemExit(code)
    if received:
        raise SystemExit(128 + received[-1])
    print(file=sys.stderr)  # its progress bar was left without a line's end
    name = signal.Signals(-code).name
    hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
    raise UserError(f"process {index} ({devices[index]}) was ended by signal {-code} ({name}{hint}); {if_killed}")


def _configuration(processes: int) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        # A store on a free port of this machine, which needs no network and no name.
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        # torchelastic would kill the processes 30 seconds after one of ours, in the middle of saving.
        signals_to_handle="SIGQUIT",
    )


def _for_ranks(folder: str) -> dict[str, str]:
    values = {LAUNCHER_FOLDER: folder}
    if Path("/sys/class/net/lo").exists():
        values["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return values


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*values, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update(values)
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
    """torchelastic reports a failure on some thirty lines; one is enough."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _signals_passed_on(folder: Path) -> Iterator[list[int]]:
    """Pass signals on to the processes that have announced themselves in `folder`; yields those received, in order.

    Not to their groups: loader processes are no concern of whoever asks for a stop.
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
        for path in folder.glob("*.rank"):
            with suppress(ProcessLookupError):
                os.kill(int(path.stem), signal.SIGKILL if again else number)

    wanted = [n for n in (*FORWARDED, signal.SIGQUIT) if signal.getsignal(n) != signal.SIG_IGN]  # nohup stays nohup
    before = {number: signal.signal(number, pass_on) for number in wanted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
