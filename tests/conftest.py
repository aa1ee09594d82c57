"""Shared by all tests: where the reference numbers are, and running a script in this process."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.errors import run_cli
from utils.stopping import STOP_SIGNALS

# Before PyTorch is imported: threads that spin while they wait make the tests crawl where another program is computing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared among the files of tests
# A shell that starts the tests in its background has them ignore these, and programs leave ignored signals ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
pytest.register_assert_rewrite("steps")
GOLDEN_DIR = Path(os.environ.get("PROCST_GOLDEN_DIR") or Path(__file__).parent / "golden")


@pytest.fixture
def golden_dir() -> Path:
    """Folder of the reference numbers; `PROCST_GOLDEN_DIR` overrides it."""
    return GOLDEN_DIR


@dataclass(frozen=True)
class ScriptResult:
    """Exit code and captured output of a script's `main`."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a script module's main through its command line entry, in this process: run_script(module, *arguments)."""

    def run(module, *arguments):
        monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, arguments)])
        capsys.readouterr()
        # A program that was asked to stop leaves its handlers behind, for the rest of its life.
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        with pytest.raises(SystemExit) as stop:
            run_cli(module.main)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        captured = capsys.readouterr()
        return ScriptResult(int(stop.value.code or 0), captured.out, captured.err)

    return run
