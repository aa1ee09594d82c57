"""Starting the processes that work together, connecting them, and ending them in good order.

`launch` starts those of this machine, ends all when one has died and starts all again, up to `RESTARTS` times; a
training then continues from the last checkpoint. What a restart cannot mend (bad input, a requested stop) has an exit
code above 1 and ends them for good. `torchrun` or a batch system may start the processes instead, with `RANK`,
`WORLD_SIZE` and `LOCAL_RANK` in the environment.
"""

import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from training.distributed import Rank, environment_number
from utils.errors import UserError
from utils.stopping import STOP_SIGNALS, STOPPED, Stopped, announce, signal_at_parents_end

RESTARTS = 3
FOLDER = "PROCST_LAUNCHER_FOLDER"  # environment variable: folder of `launch` for what its processes share
RESTART = "TORCHELASTIC_RESTART_COUNT"  # environment variable of torchrun, and of `launch`
# Processes wait for each other while one builds a cache or writes a checkpoint. A dead process is noticed at once.
TIMEOUT = timedelta(hours=3)
CLOSING = 5.0  # seconds in which connections are closed after an error
ENDING = 30.0  # seconds in which the others end when one has ended with an error


def is_launched() -> bool:
    """Whether `launch` started this process."""
    return FOLDER in os.environ


def remember(line: str) -> None:
    """In a process of `launch`: keep a line for the processes that are started again after one has died."""
    if is_launched():
        (Path(os.environ[FOLDER]) / "remembered").write_text(line)


def remembered() -> str:
    """What `remember` was given; '' where nothing was, or where `launch` did not start this process."""
    path = Path(os.environ.get(FOLDER, "")) / "remembered"
    return path.read_text() if is_launched() and path.exists() else ""


def is_restarted() -> bool:
    """Whether a launcher started this process again after a process of the group had died."""
    return os.environ.get(RESTART, "0") != "0"


def _has_launcher() -> bool:
    """Whether `launch` or torchrun started this process and watches it."""
    return is_launched() or "TORCHELASTIC_RUN_ID" in os.environ


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
    is_main = True
    try:
        with _joined(if_lost) as rank:
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


def launch(
    script: Path, devices: Sequence[torch.device], *, restarts: int = RESTARTS,
    if_killed: str = "the same command continues from the last checkpoint",
) -> None:  # fmt: skip
    """Run a script with this command line in one process for each device of this machine, and wait for all.

    A stop signal asks all of them to stop. This process is only fit to end afterwards, as its handlers stay.

    Args:
        script: does its work inside `in_processes`.
        restarts: how often all processes are started again when one has died.
        if_killed: what to do when a process was killed more often, as the end of a message.

    Raises:
        SystemExit: with the exit code of the processes, unless it is 0.
        UserError: a process was killed more often than it was restarted.
    """
    group: list[subprocess.Popen] = []
    received = _pass_signals_on(group)
    with tempfile.TemporaryDirectory(prefix="procst_ranks_") as folder:
        for restart in range(restarts + 1):
            group[:] = [_started(script, folder, index, len(devices), restart) for index in range(len(devices))]
            if received:  # while they were started
                _ask_to_stop(group)
            first = _first_failed(group)
            codes = [process.wait() for process in group]
            if first is None or received or max(codes) > 1:
                break
    if first is None:
        return
    code = min((code for code in codes if code > 1), default=128 + received[0] if received else codes[first])
    if code > 0:
        raise SystemExit(code)
    signal_name = signal.Signals(-code).name
    hint = ", as the system does where memory runs out" if signal_name == "SIGKILL" else ""
    often = f" after {restarts} restarts" if restarts else ""
    raise UserError(
        f"process {first} ({devices[first]}) was ended by signal {-code} ({signal_name}{hint}){often}; {if_killed}"
    )


def _started(script: Path, folder: str, index: int, count: int, restart: int) -> subprocess.Popen:
    """A process of the group, in a session of its own, so that the terminal's signals reach the launcher alone."""
    places = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, RESTART: restart}
    environment = {**os.environ, FOLDER: folder, **{name: str(value) for name, value in places.items()}}
    if Path("/sys/class/net/lo").exists():
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, str(script), *sys.argv[1:]]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _first_failed(group: Sequence[subprocess.Popen]) -> int | None:
    """Wait for the end of all, and end them soon after one has failed; the index of that one, or None."""
    first, deadline = None, math.inf
    while any(process.poll() is None for process in group) and time.monotonic() < deadline:
        failed = [index for index, process in enumerate(group) if process.returncode]
        if first is None and failed:
            first = min(failed, key=lambda index: group[index].returncode)  # a killed one rather than one that lost it
            # One that ended by itself may not be the first that met the reason; after a kill there is none to wait for.
            deadline = time.monotonic() + (ENDING if group[first].returncode > 0 else 0.0)
        time.sleep(0.1)
    for process in group:
        process.kill()
    return first if first is not None else next((k for k, process in enumerate(group) if process.wait()), None)


def _pass_signals_on(group: Sequence[subprocess.Popen]) -> list[int]:
    """Ask the processes to stop at a stop signal; returns the signals received so far."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not received:
            announce(signal.Signals(number))
        received.append(number)
        _ask_to_stop(group)

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # an ignored signal stays ignored, as with nohup
            signal.signal(number, pass_on)
    return received


def _ask_to_stop(group: Sequence[subprocess.Popen]) -> None:
    for process in group:
        process.send_signal(signal.SIGTERM)  # nothing, if it has ended


@contextmanager
def _joined(if_lost: str) -> Iterator[Rank]:
    """Connect with the other processes, if there are any, for the time of the block.

    At the end of the block, and at a `Stopped`, on which all agree, processes wait for each other, so that none is
    ended while it writes. The process that meets bad input first reports it.

    Raises:
        UserError: the variables are wrong, or the others cannot be reached or are gone and are not restarted.
        SystemExit: code 2 where another process reports bad input; code 1 where another process is gone, after which
            the launcher starts all again.
    """
    alone = not all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if alone or environment_number("WORLD_SIZE") == 1:
        yield Rank()
        return
    rank = Rank(environment_number("RANK"), environment_number("WORLD_SIZE"))
    if _has_launcher():
        signal_at_parents_end(signal.SIGTERM)
    store = _connect(rank)
    with _disconnected_at_the_end():
        try:
            yield rank
            rank.barrier()
        except Stopped:
            rank.barrier()
            raise
        except UserError:
            if _is_first(store):
                raise
            raise SystemExit(2) from None
        except Exception as error:
            if not _is_lost_connection(error):
                raise
            if _has_launcher():
                raise SystemExit(1) from None
            raise UserError(
                "the connection to the other processes was lost: one of them was ended, or its machine cannot be "
                f"reached; {if_lost}"
            ) from None


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
        # A store outlives a restart; gloo would look for the processes that were connected before it.
        name = f"start_{os.environ.get(RESTART, '0')}"
        if is_launched():
            store = dist.FileStore(str(Path(os.environ[FOLDER]) / name), rank.count)
        else:
            store, _, _ = next(dist.rendezvous("env://", rank.index, rank.count, timeout=timedelta(minutes=10)))
            store = dist.PrefixStore(name, store)
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
