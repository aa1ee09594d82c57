"""Work divided among processes: the first failure stops all, and none of them outlives the process it works for."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from typing import Any

from utils.errors import UserError


@dataclass(frozen=True)
class Job:
    """What one process does.

    Attributes:
        name: of the process, in messages.
        work: function of a module, called with `arguments` and a function `go_on`. It calls `go_on(count)` after every
            piece of work with what it has done since, and ends early where that returns False.
        arguments: pickled, tensors included, so the process works on copies.
    """

    name: str
    work: Callable[..., None]
    arguments: tuple[Any, ...]


def leave_the_end_to_parent() -> None:
    """Make this process ignore Ctrl-C, and end at once, without a word, when the one that started it is gone."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        shutil.rmtree(get_temp_dir(), ignore_errors=True)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def run_jobs(jobs: Sequence[Job], progress: Callable[[int], object], if_killed: str) -> None:
    """Do every job in a process of its own and wait for all; they may start processes themselves.

    To be called in the main thread. After a failure the others are told to end early and waited for. Any exception in
    this process, such as `KeyboardInterrupt`, kills them. They do not react to Ctrl-C, and end when this process is
    killed.

    Args:
        progress: called with every count that a job reports.
        if_killed: what to do when a process is killed from outside, as the end of a one-line message.

    Raises:
        UserError: the first one of a job, or a process was killed.
        RuntimeError: a job failed otherwise; the message holds its traceback.
    """
    running: list[_Running] = []
    try:
        with _interrupts_put_off():
            for job in jobs:
                running.append(_Running(job.name))
        for process, job in zip(running, jobs, strict=True):
            process.send_job(job)
        _wait_for(running, progress, if_killed)
    finally:
        for process in running:
            process.process.kill()  # does nothing to those that have ended
        for process in running:
            process.process.join()


class _Running:
    """A started process, and this end of the connection to it: a job goes there, counts and its outcome come back."""

    def __init__(self, name: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        # No daemon: those may not start processes.
        self.process = context.Process(target=_run_job, args=(theirs,), daemon=False)
        try:
            self.process.start()
        except OSError as error:
            raise UserError(f"cannot start a process for {name}: {error.strerror}") from None
        theirs.close()
        self.is_done = False

    def send_job(self, job: Job) -> None:
        """Apart from the start, which would wait until the process has imported everything, one after the other."""
        # The plain pickler copies tensors; that of multiprocessing would move them to shared memory.
        with suppress(ConnectionError):  # a process that died is found when its outcome is asked for
            self.connection.send_bytes(pickle.dumps((job.work, job.arguments)))

    def end_early(self) -> None:
        """Tell the process; it finishes what it is on."""
        with suppress(ConnectionError):
            self.connection.send(None)

    def failure(self, progress: Callable[[int], object], if_killed: str) -> Exception | None:
        """Read what the process sent. Its failure, once it `is_done`; None while it works and where it did not fail."""
        # In this order: the outcome that a process sends before it ends is there when its end is seen.
        exit_code = self.process.exitcode
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if not isinstance(message, int):
                    self.is_done = True
                    return message
                progress(message)
        except (EOFError, ConnectionError):
            self.process.join()
            exit_code = self.process.exitcode
        if exit_code is None:
            return None
        self.is_done = True
        how = f"with exit code {exit_code}" if exit_code >= 0 else f"by signal {-exit_code}"
        if -exit_code == signal.SIGKILL:
            how += " (SIGKILL, as the system does where memory runs out)"
        return UserError(f"the process of {self.name} was ended {how}; {if_killed}")


def _wait_for(running: Sequence[_Running], progress: Callable[[int], object], if_killed: str) -> None:
    first: Exception | None = None
    while waiting := [process for process in running if not process.is_done]:
        # The end of a process shows in neither while processes that it forked hold its side open; hence the timeout.
        wait([p.connection for p in waiting] + [p.process.sentinel for p in waiting], timeout=1)
        for process in waiting:
            failure = process.failure(progress, if_killed)
            if failure is not None and first is None:
                first = failure
                for other in running:
                    other.end_early()
    for process in running:
        process.process.join()
    if first is not None:
        raise first


@contextmanager
def _interrupts_put_off() -> Iterator[None]:
    """Ctrl-C acts after the block, and never on processes started in it, not even before they run code of ours."""
    # multiprocessing would start this process of its own with the first one, and unblock SIGINT there.
    resource_tracker.ensure_running()
    pending: list[int] = []
    # The handler is for this process, where any thread can be given the signal; the mask is what processes inherit.
    handler = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if pending:
            signal.raise_signal(signal.SIGINT)


def _run_job(connection: Connection) -> None:
    """Main function of a process."""
    leave_the_end_to_parent()
    # In a spawned process everything would be spawned, so that every loader would import all modules for itself; and
    # the semaphores in use, named then, would be left over from a killed process.
    multiprocessing.set_start_method("fork", force=True)

    def go_on(count: int) -> bool:
        connection.send(count)
        return not connection.poll()

    outcome: Exception | None = None
    try:
        work, arguments = pickle.loads(connection.recv_bytes())
        work(*arguments, go_on)
    except UserError as error:
        outcome = UserError(str(error))
    except Exception as error:
        # As text: not every exception can be pickled, and a traceback never.
        outcome = RuntimeError("".join(traceback.format_exception(error)))
    with suppress(ConnectionError):
        connection.send(outcome)
