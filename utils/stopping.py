"""Ending a long run with its state saved: at a signal of its user or of a scheduler, or when a loader process died."""

import ctypes
import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType

# SIGUSR1 is what SLURM is usually told to send some minutes before a job's time is over.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# EX_TEMPFAIL of sysexits.h: not finished, to be started again.
STOPPED = 75
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class Stopped(BaseException):
    """The run was asked to stop and has saved its state: exit code `STOPPED`, and the message as one line.

    It is no `Exception`, because a signal can raise it where any `Exception` means a damaged file.
    """


class LoaderDied(Exception):
    """A loader process died or is stuck, by no fault of the input: exit code `STOPPED`; the same command continues."""

    @classmethod
    def because(cls, reason: str | Exception) -> "LoaderDied":
        """With the first sentence of a reason and advice."""
        if isinstance(reason, cls):
            return reason
        if isinstance(reason, Exception) and is_loader_death(reason.__context__):
            return cls.because(reason.__context__)
        first_sentence = " ".join(str(reason).split()).partition(". ")[0].rstrip(".")
        return cls(f"{first_sentence}: memory or shared memory (/dev/shm) may be short, lower --num_workers")


def is_loader_death(error: BaseException | None) -> bool:
    """Whether an error means that a loader process is gone.

    PyTorch's handler of SIGCHLD raises a `RuntimeError` in the main thread, also in the middle of a training step; in
    the middle of `torch.save`, that raises another one.
    """
    if not isinstance(error, RuntimeError):
        return isinstance(error, LoaderDied)
    died = str(error).startswith(("DataLoader worker (pid", "DataLoader timed out"))
    return died or is_loader_death(error.__context__)


class StopRequests:
    """Inside the block the first stop signal is remembered, and others are ignored.

    Calling the object tells whether a stop was requested. It must be entered in the main thread. After a request the
    handlers stay when the block ends: a request that is sent twice does not kill a process that is about to exit.

    Args:
        quiet: print nothing about the first signal.

    Attributes:
        at_once: set while there is nothing to save: a signal then raises `Stopped`.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.at_once = False
        self.received: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.received is not None

    def __enter__(self) -> "StopRequests":
        # An ignored signal stays ignored, as with `nohup`.
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in wanted}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.received is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        if self.at_once and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.at_once:
            raise Stopped(f"{self.received.name}: stopped with nothing to save yet; run the command again")
        if not self.quiet:
            announce(self.received)


def announce(number: signal.Signals) -> None:
    """Print what follows a first signal, not through Python's streams: the interrupted code may be using them."""
    with suppress(OSError):  # the reader may have been ended by the same Ctrl-C
        os.write(2, f"\n{number.name}: finishing this step and saving; Ctrl-\\ ends at once, without\n".encode())


def signal_at_parents_end(number: signal.Signals) -> None:
    """Let Linux send this process a signal when its parent has ended, also by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
