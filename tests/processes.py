"""Running a function in several processes that are connected by gloo, and another process that holds a folder."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from training.distributed import Rank
from utils.locks import locked

WORLD = 2


def _in_process(index, folder, results, work, arguments):
    """Main function of a process: `work(rank, *arguments)` with the others connected."""
    torch.set_num_threads(1)
    outcome = failure = None
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # asking for this machine's address by its name may take long
    try:
        store = dist.FileStore(str(Path(folder) / "store"), WORLD)
        dist.init_process_group("gloo", store=store, rank=index, world_size=WORLD)
        outcome = work(Rank(index, WORLD), *pickle.loads(arguments))
        dist.destroy_process_group()
    except Exception:
        failure = traceback.format_exc()
    results.put(pickle.dumps((index, outcome, failure)))


def in_processes(work, *arguments):
    """What `work(rank, *arguments)` returns in each of two processes, in order.

    Both travel as bytes: tensors would be shared between the processes, and end with them. A traceback fails the test.
    """
    # Processes forked from one that has imported everything, but never computed: threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["methods", "steps"])
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_in_process, args=(index, folder, results, work, pickle.dumps(arguments)), daemon=True
            )
            for index in range(WORLD)
        ]
        for process in processes:
            process.start()
        found = sorted((pickle.loads(results.get()) for _ in processes), key=lambda one: one[0])
        for process in processes:
            process.join()
    for _, _, failure in found:
        assert failure is None, failure
    return [outcome for _, outcome, _ in found]


@contextmanager
def in_use(folder):
    """Inside the block another process has locked the folder."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with locked(folder, "--run_dir"):
            ready.set()
            done.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        done.set()
        other.join()
