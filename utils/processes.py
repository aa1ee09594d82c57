"""Loader processes, none of which outlives the process that it works for."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue

GRACE = 5.0  # seconds
END_NOW = signal.SIGUSR2


def leave_the_end_to_parent() -> None:
    """Make this process ignore Ctrl-C, and end at once, without a word, when the one that started it is gone."""
    inherited = _own_folder()

    def watch() -> None:
        multiprocessing.parent_process().join()
        _exit(inherited)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _own_folder() -> str | None:
    """Where this process keeps sockets, in /tmp; its own or that of the process it was forked from."""
    return multiprocessing.current_process()._config.get("tempdir")


def _exit(inherited_folder: str | None) -> None:
    """End at once, with an exit code that is no success; what is in memory alone is lost."""
    if (folder := _own_folder()) not in (None, inherited_folder):
        shutil.rmtree(folder, ignore_errors=True)  # each loader would leave one behind
    os._exit(1)


def _end_later(inherited_folder: str | None) -> None:
    timer = threading.Timer(GRACE, _exit, (inherited_folder,))
    timer.daemon = True  # a loader that comes to its end before does not wait
    timer.start()


def init_loader(worker_id: int) -> None:
    """What every DataLoader worker starts with (`worker_init_fn`): PyTorch's own do not always notice a dead parent.

    A scheduler sends its signals to all processes of a job, and a training must be able to finish its step. A loader
    that is told to end, or stuck where its parent wants to end, does so after `GRACE` seconds.

    A batch that cannot be sent, as where shared memory is full, would be dropped, and waited for without end: the
    worker ends instead, which its parent notices.
    """
    inherited = _own_folder()
    Queue._on_queue_feeder_error = staticmethod(lambda error, batch: _exit(inherited))
    leave_the_end_to_parent()
    for number in (signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(END_NOW, lambda number, frame: _exit(inherited))
    signal.signal(signal.SIGTERM, lambda number, frame: _end_later(inherited))


def end_loaders(processes: Sequence[BaseProcess]) -> None:
    """End loaders whose work is of no use any more, whatever they are at: by `END_NOW`, or else by SIGKILL."""
    for process in processes:
        if process.is_alive():
            with suppress(ProcessLookupError):  # another thread may have seen its end first
                os.kill(process.pid, END_NOW)
    for process in processes:
        process.join(0.5)
        process.kill()  # does nothing to those that have ended
