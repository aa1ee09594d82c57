"""Shared by all tests: reference numbers, running a script in this process, a tiny world and what is trained on it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from utils.errors import run_cli
from utils.stopping import STOP_SIGNALS
from worlds import write_cityscapes, write_gta5

# Before PyTorch is imported: threads that spin while they wait make the tests crawl where another program is computing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared among the files of tests
# A shell that starts the tests in its background has them ignore these, and programs leave ignored signals ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
pytest.register_assert_rewrite("steps")
GOLDEN_DIR = Path(os.environ.get("PROCST_GOLDEN_DIR") or Path(__file__).parent / "golden")


def pytest_collection_modifyitems(items):
    """Files with tests that start processes come first: one of them alone at the end would leave other CPUs idle."""
    long_files = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in long_files)


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


def train(module, flags):
    """Run a training script to its end, for a fixture that several tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [f"{module.__name__}.py", *map(str, flags)])
        module.main()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A labelled source, a target with an unlabelled train and a labelled val split, and one without labels.

    Tests that change files take a copy.
    """
    root = tmp_path_factory.mktemp("world with spaces é")
    write_gta5(root / "gta", count=6, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=4, size=(64, 40), labels=False)
    write_cityscapes(root / "cityscapes", count=2, size=(64, 40), seed=300, split="val")
    write_cityscapes(root / "unlabelled", count=4, size=(64, 40), labels=False)
    return root


@pytest.fixture(scope="session")
def source_net(world, tmp_path_factory):
    """The file of a UNet trained on the source for a few steps."""
    import train_semseg_on_source
    from commands import source_flags

    out = tmp_path_factory.mktemp("source")
    train(train_semseg_on_source, source_flags(world, out))
    return out / "source.pth"


@pytest.fixture(scope="session")
def finished_run(world, tmp_path_factory):
    """The folder of a finished ProCST run of `procst_flags`, beside its logs; tests that change files take a copy."""
    import train_procst
    from commands import only_run, procst_flags

    out = tmp_path_factory.mktemp("finished")
    train(train_procst, procst_flags(world, out))
    return only_run(out)


@pytest.fixture(scope="session")
def undisturbed_run(world, tmp_path_factory):
    """The folder of a finished ProCST run of `faults.run_flags`, which nothing happened to."""
    import train_procst
    from faults import run_flags

    out = tmp_path_factory.mktemp("undisturbed")
    train(train_procst, run_flags(world, out))
    return out / "run"
