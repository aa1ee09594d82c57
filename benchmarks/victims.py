"""The toolkit's scripts in processes of their own, to be disturbed: no import of PyTorch for each of them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import create_sit_dataset
import train_procst
from utils.errors import run_cli

SCRIPTS = {"train_procst": train_procst.main, "create_sit_dataset": create_sit_dataset.main}
PRELOADED = ["core.export", "core.preparation", "training.run"]  # what the scripts import in `main`
_NUMBER = count()


class Victim:
    """A started script.

    Args:
        script: module name, one of `SCRIPTS`.
        flags: its command line.
        logs: folder for what it prints.
        file_size: bytes that no file may grow beyond; the system refuses to write more.
    """

    def __init__(self, script: str, flags: Sequence[object], logs: Path, file_size: int | None = None) -> None:
        self.script = script
        self.log = logs / f"{next(_NUMBER):04d}_{script}.log"
        # Forked from a process that has imported everything and computed nothing.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SCRIPTS, *PRELOADED])
        self.process = context.Process(target=_run, args=(script, [str(f) for f in flags], self.log, file_size))
        self.process.start()

    def __str__(self) -> str:
        return f"{self.script} (log {self.log.name})"

    def ended_within(self, seconds: float) -> bool:
        """Wait so long, or until it has ended; whether it has."""
        self.process.join(seconds)
        return self.process.exitcode is not None

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None if it takes longer than that, and then it is killed."""
        if not self.ended_within(seconds):
            self.process.kill()
            self.process.join()
            return None
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> bool:
        """SIGKILL; True if that is what it ended by, and none of its own processes outlives it by 20 seconds."""
        self.process.kill()
        self.process.join()
        deadline = time.monotonic() + 20.0
        while orphans := _session(self.process.pid):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self}: processes {orphans} outlived it")
            time.sleep(0.02)
        return self.process.exitcode == -signal.SIGKILL

    def kill_child(self) -> bool:
        """SIGKILL of one of its own processes; False if it has none at the moment."""
        for pid in _session(self.process.pid):
            if pid != self.process.pid:
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text().replace("\r", "\n") if self.log.exists() else ""

    def last_line(self) -> str:
        """The last line it printed."""
        return (self.output().strip().splitlines() or [""])[-1]


def _session(leader: int) -> list[int]:
    """Living processes of the session that `leader` made."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[3]) == leader:
            found.append(int(entry.name))
    return found


def _run(script: str, flags: list[str], log: Path, file_size: int | None) -> None:
    """Main function of the process."""
    os.setsid()
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` around the campaign would have ignored
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = [f"{script}.py", *flags]
    run_cli(SCRIPTS[script])
