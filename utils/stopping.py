"""Ending a long run in good order when it is asked to: by Ctrl-C, by a scheduler, or by its user."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType, TracebackType

# SIGUSR1 is what SLURM is usually told to send some minutes before a job's time is over.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# EX_TEMPFAIL of sysexits.h: not finished, to be started again.
STOPPED = 75
# A group of processes and the process that leads it may both be sent what was meant as one signal.
SAME_REQUEST = 1.0  # seconds


class Stopped(BaseException):
    """The run was asked to stop and has saved its state: exit code `STOPPED`, and the message as one line.

    No `Exception`: a signal can raise it anywhere, also where a file is read and whatever goes wrong means damage.
    """


class LoaderDied(Exception):
    """A process that loads images died or is stuck, by no fault of the input: exit code `STOPPED`.

    A training saves its state first; the same command goes on. The message is one line without that advice.
    """

    @classmethod
    def because(cls, reason: str | Exception) -> LoaderDied:
        """In words of ours, with what to do about it."""
        if isinstance(reason, cls):
            return reason
        first_sentence = " ".join(str(reason).split()).partition(". ")[0].rstrip(".")
        return cls(f"{first_sentence}: memory or shared memory (/dev/shm) may be short, lower --num_workers")


def is_loader_death(error: BaseException) -> bool:
    """Whether an error means that a loader process is gone.

    While loaders work, PyTorch's handler of SIGCHLD raises such a `RuntimeError` in the main thread wherever that is,
    as in the middle of a training step.
    """
    return isinstance(error, LoaderDied) or (
        isinstance(error, RuntimeError) and str(error).startswith(("DataLoader worker (pid", "DataLoader timed out"))
    )


class StopRequests:
    """Inside the block the first stop signal is remembered, and a second one ends the process with 128 + its number.

    Call the object to ask whether a stop is wanted. To be entered in the main thread; processes forked inside the block
    ignore what they are sent. After the block the handlers stay where a stop was asked for: the same request, sent
    twice, must not end by a signal a process that has saved and is about to say so with its exit code.

    Args:
        quiet: say nothing about the first one, as where several processes are sent the same.

    Attributes:
        at_once: set while there is nothing to save: a signal then ends what is going on by `Stopped`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.at_once = False
        self.received: signal.Signals | None = None
        self._time = 0.0
        self._process = os.getpid()

    def __call__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> StopRequests:
        self._process = os.getpid()
        # What is ignored stays so: `nohup` means that the end of a terminal is not meant for this process.
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.received is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        now, name = time.monotonic(), signal.Signals(number).name
        if self.received is not None:
            if now - self._time > SAME_REQUEST:
                _say(f"{name} again: ended without saving; the last checkpoint stays")
                os._exit(128 + number)
            return
        self.received, self._time = signal.Signals(number), now
        if self.at_once and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.at_once:
            raise Stopped(f"{name}: stopped before the training began; run the command again")
        if not self.quiet:
            announce(self.received)


def announce(number: signal.Signals) -> None:
    """Tell what follows a first signal."""
    _say(f"{number.name}: finishing this step and saving; once more ends at once")


def _say(line: str) -> None:
    # Past Python's buffered streams, which the interrupted code may be in the middle of using. Who reads them may have
    # been ended by the same Ctrl-C.
    if sys.__stderr__ is not None:  # closed by who started the program
        with suppress(OSError):
            os.write(sys.__stderr__.fileno(), f"\n{line}\n".encode())
