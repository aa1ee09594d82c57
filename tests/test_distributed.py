"""Training in several processes: gloo on the CPU against one process, and what happens when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_procst
import train_semseg_on_source
import training.precision
from commands import assert_same_tensors, metrics_of, procst_flags, source_flags
from conftest import ScriptResult
from data_handlers.datasets import DATA_SETS
from data_handlers.images import PROCST_INPUT
from data_handlers.lists import list_images
from processes import in_processes
from steps import GOLDEN_FILES, GoldenStep, meta_of, relative_l2, zero_gradient_biases
from training.checkpoint import LATEST, load_checkpoint
from training.distributed import Rank
from training.launching import FOLDER, LAUNCHER
from training.run import agreed_precision
from training.synchronised_norm import SynchronisedBatchNorm2d, synchronise_batch_norms
from training.validation import Validator
from utils.errors import UserError
from utils.stopping import STOPPED
from worlds import write_cityscapes

pytestmark = pytest.mark.processes
TWO = ("cpu", "cpu")
STEPS = 12
LONGEST = 600.0  # seconds after which a run that should have ended fails its test


# --- the arithmetic --------------------------------------------------------------------------------------------------


def _shared_golden_step(rank, path, scale, recompute):
    """Losses, gradients and weights of the reference's step, of which every process computes a part."""
    step = GoldenStep(path, scale)
    size = len(step.batch.source[0])
    part = rank.part(size)
    samples = slice(part.start, part.stop)
    for net in (*step.nets.values(), *([step.segmentation.seg_sit] if step.segmentation else [])):
        synchronise_batch_norms(net)
    batch = replace(
        step.batch,
        source=[level[samples] for level in step.batch.source],
        target=[level[samples] for level in step.batch.target],
        label=None if step.batch.label is None else step.batch.label[samples],
    )
    step.take(batch=batch, rank=rank, fraction=rank.fraction(size), recompute=recompute)
    rank.all_reduce(list(step.result.losses.values()))
    weights = {f"{name} {key}": value for name, net in step.nets.items() for key, value in net.state_dict().items()}
    return step.order, step.result.losses, step.gradients, weights


# The batch of the batch norm file is 3, which gives parts of 2 and 1.
@pytest.mark.parametrize(("scale", "recompute"), [(0, False), (2, True)])
@pytest.mark.parametrize("path", GOLDEN_FILES, ids=[path.stem for path in GOLDEN_FILES])
def test_two_processes_meet_the_reference_numbers(path, scale, recompute):
    assert scale in meta_of(path)["scales"]
    (order, losses, gradients, weights), (*_, other_weights) = in_processes(_shared_golden_step, path, scale, recompute)
    golden = GoldenStep(path, scale)
    assert order == [ours for ours, _ in golden.expected_steps()]
    for name, value in golden.tensors("loss").items():
        ours = name if name.startswith("Semseg/") else name.removeprefix(f"Scale{scale}/")
        assert float(losses[ours]) == pytest.approx(float(value), rel=1e-10), name
    for ours, theirs in golden.expected_steps():
        net = golden.nets.get(ours.split("#")[0])
        noise = zero_gradient_biases(net) if net else set()
        for name, value in golden.tensors(f"grad/{theirs}").items():
            if name not in noise:
                assert relative_l2(gradients[ours][name], value) < 1e-9, f"{theirs} {name}"
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


def _twice_differentiated(norm, x):
    """Output, and the gradients of a gradient penalty, which go back through the norm's backward."""
    x = x.clone().requires_grad_(True)
    y = norm(x)
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return y, torch.autograd.grad((gradient**2).sum(), (x, norm.weight, norm.bias))


def _normalised(rank, norm, x):
    norm = synchronise_batch_norms(torch.nn.Sequential(norm))[0]
    assert isinstance(norm, SynchronisedBatchNorm2d)
    part = rank.part(len(x))
    y, (to_x, *to_weights) = _twice_differentiated(norm, x[part.start : part.stop])
    rank.all_reduce(to_weights)
    with torch.no_grad():
        norm.eval()
        if rank.is_main:
            norm(x)  # alone: in eval mode no process waits for another
    return y.detach(), to_x, to_weights, norm.state_dict()


def test_synchronised_batch_norm_is_batch_norm_of_all_samples():
    x = 1e3 + torch.randn(5, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    parts = in_processes(_normalised, norm, x)
    y, (to_x, *to_weights) = _twice_differentiated(norm, x)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), to_x)
    for part in parts:
        torch.testing.assert_close(part[2], to_weights)
        torch.testing.assert_close(dict(part[3]), dict(norm.state_dict()))


def _precision(rank, wishes):
    training.precision.computes_in_bf16 = lambda device: True
    training.precision.bf16_pays = lambda device: rank.is_main
    try:
        return agreed_precision(wishes[rank.index], rank)
    except UserError as error:
        rank.broadcast(None)  # for the other process, which waits
        return str(error)


def test_processes_agree_on_a_precision():
    assert in_processes(_precision, ("auto", "auto")) == ["bf16", "bf16"]
    assert in_processes(_precision, ("fp32", "fp32")) == ["fp32", "fp32"]
    one, other = in_processes(_precision, ("fp32", "bf16"))
    assert one == "fp32"
    assert other.startswith("the --precision of process 1")


@pytest.mark.parametrize(("batch", "parts"), [(3, [2, 1]), (4, [2, 2]), (2, [1, 1])])
def test_parts_cover_the_batch(batch, parts):
    ranges = [Rank(index, len(parts)).part(batch) for index in range(len(parts))]
    assert [k for part in ranges for k in part] == list(range(batch))
    assert [len(part) for part in ranges] == parts


def _validated(rank, root):
    files = list_images(DATA_SETS["cityscapes"], root, "--trg_data_dir", split="val", training=False)
    torch.manual_seed(1)
    net = torch.nn.Conv2d(3, 19, 3, padding=1)
    net.network_input = PROCST_INPUT
    return Validator(
        files=files, with_labels=True, select_by="miou", classes=range(19), num_classes=19, num_workers=0, rank=rank
    )(net)


def test_a_shared_validation_finds_the_same(tmp_path):
    write_cityscapes(tmp_path, count=3, split="val")
    first, second = in_processes(_validated, tmp_path)
    alone = _validated(Rank(), tmp_path)
    for shared in (first, second):
        assert shared.scores == alone.scores
        ours, theirs = shared.statistics, alone.statistics
        assert ours.mutual_information() == pytest.approx(theirs.mutual_information(), rel=1e-12)
        assert ours.mean_confidence() == pytest.approx(theirs.mean_confidence(), rel=1e-12)
        assert ours.confidence_histogram.tolist() == theirs.confidence_histogram.tolist()


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def launched_flags(world, out, **changes):
    """A run of one scale in two processes, 3 = 2 + 1 images in a step, that saves after every step."""
    flags = {
        "gpus": TWO, "num_scales": 0, "batch_size_list": 3, "crop_size": (24, 20), "steps_per_scale": STEPS,
        "run_dir": out / "run", "checkpoints_dir": None, "save_checkpoint_rate": 1, "print_rate": 1, "lr_g": 1e-4,
        "lr_d": 1e-4,
    }  # fmt: skip
    return procst_flags(world, out, **{**flags, **changes})


def run_apart(script, flags, disturb=None):
    """A script in processes of its own, whose output pytest's `capsys` would not see."""
    command = [sys.executable, script.__file__, *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            if disturb is not None:
                disturb(process)
            out, err = process.communicate(timeout=LONGEST)
        except BaseException:
            for started in (process.pid, *living(ranks())):
                os.kill(started, signal.SIGKILL)
            raise
    return ScriptResult(process.returncode, out, err)


def ranks():
    """Process ids of the newest that were started."""
    texts = [path.read_text() for path in Path(tempfile.gettempdir()).glob("procst_ranks_*/*.rank")]
    return [int(text) for text in texts if text]


def living(processes):
    return [process for process in processes if Path(f"/proc/{process}").exists()]


def wait_for_step(run, process):
    """Wait until the run has saved a step that it has not saved when this is called."""
    path = run / LATEST
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not path.exists() or path.stat().st_mtime_ns <= before or not ranks():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_last_line_is_all(result):
    """Check that one line, after the progress bar, says what is wrong."""
    *before, last = result.err.replace("\r", "\n").strip().splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.strip() and "steps [" not in line]


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The run folder of a ProCST training in two processes."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        result = run_apart(train_procst, launched_flags(world, out))
    assert result.code == 0, result.err
    assert "finished; export with" in result.out
    assert result.out.count("run folder") == 1
    return out / "run"


def weights_of(run):
    return {
        f"{name} {key}": value
        for name, state in load_checkpoint(run / LATEST).modules.items() for key, value in state.items()
    }  # fmt: skip


@pytest.mark.slow
def test_a_launched_training_is_that_of_one_process(world, undisturbed, tmp_path, run_script):
    assert run_script(train_procst, *launched_flags(world, tmp_path, gpus="cpu")).code == 0
    # Later, rounding lets a LeakyReLU change side, which the gradient penalty sees: the first two steps are compared.
    # The critics' losses are small differences of larger sums, whose rounding counts as it is. tests/test_methods.py
    # compares two processes with one in float64.
    alone, together = (metrics_of(run)[:2] for run in (tmp_path / "run", undisturbed))
    assert [entry["step"] for entry in together] == [entry["step"] for entry in alone] == [1, 2]
    for one, two in zip(alone, together, strict=True):
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_launched_training_on_source_is_that_of_one_process(world, tmp_path, run_script):
    def flags(name, gpus, **more):
        changes = {**more, "batch_size": 3, "num_steps": 6, "validation_rate": 3, "checkpoints_dir": None, "output": ""}
        return source_flags(world, tmp_path, gpus=gpus, run_dir=tmp_path / name, **changes)

    result = run_apart(train_semseg_on_source, flags("two", TWO, micro_batch=1))
    assert result.code == 0, result.err
    assert run_script(train_semseg_on_source, *flags("one", "cpu")).code == 0
    alone, together = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5, msg=name)
    one, two = (json.loads((tmp_path / name / "validations.json").read_text()) for name in ("one", "two"))
    assert [found["step"] for found in two] == [found["step"] for found in one] == [3, 6]


@pytest.mark.slow
def test_a_run_whose_launcher_and_ranks_are_killed_ends_with_the_same_bits(world, undisturbed, tmp_path):
    run, flags = tmp_path / "run", launched_flags(world, tmp_path)

    def kill_launcher(launcher):
        wait_for_step(run, launcher)
        launcher.kill()

    def stop(launcher):
        wait_for_step(run, launcher)
        launcher.send_signal(signal.SIGUSR1)

    def kill_rank(launcher):
        before = set(ranks())
        wait_for_step(run, launcher)
        first, *_ = living(set(ranks()) - before)
        os.kill(first, signal.SIGKILL)

    result = run_apart(train_procst, flags, kill_launcher)
    assert result.code == -signal.SIGKILL
    deadline = time.monotonic() + LONGEST
    while living(ranks()):  # they notice, save and end
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert load_checkpoint(run / LATEST).step < STEPS

    result = run_apart(train_procst, flags, stop)
    assert result.code == STOPPED, result.err
    assert result.err.count("finishing this step") == 1
    step = load_checkpoint(run / LATEST).step
    assert step < STEPS
    assert result.err.strip().splitlines()[-1].startswith(f"stopped at step {step} of scale 0")

    result = run_apart(train_procst, flags, kill_rank)
    assert result.code == 0, result.err
    assert "finished; export with" in result.out
    starts = json.loads((run / "config.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 2, 2, 2]  # the last is the restart
    assert_same_tensors(run / LATEST, undisturbed / LATEST)


def test_a_process_whose_launcher_was_killed_before_it_connects_ends(world, tmp_path, monkeypatch):
    with subprocess.Popen(["true"]) as launcher:
        launcher.wait()
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]  # nothing listens there afterwards
    values = {
        "RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_MAX_RESTARTS": 3,
        FOLDER: tmp_path, LAUNCHER: launcher.pid,
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    assert run_apart(train_procst, launched_flags(world, tmp_path)).code == -signal.SIGTERM
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_is_one_line_and_no_restart(world, tmp_path):
    """The launcher does not look at images: the processes find that they are damaged, all at once."""
    for kind in ("images", "labels"):
        (tmp_path / "gta" / kind).mkdir(parents=True)
        for path in (world / "gta" / kind).iterdir():
            data = path.read_bytes()
            (tmp_path / "gta" / kind / path.name).write_bytes(data[:200] if kind == "images" else data)
    seen = set()

    def watch(launcher):
        while launcher.poll() is None:
            seen.update(ranks())
            time.sleep(0.1)

    result = run_apart(train_procst, launched_flags(world, tmp_path, src_data_dir=tmp_path / "gta"), watch)
    assert result.code == 2
    assert_last_line_is_all(result)
    assert len(seen) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gpus": ("cpu", "0")}, "--gpus"), ({"gpus": ("0", "0")}, "names a device twice")],
)
def test_devices_that_cannot_share_are_refused(world, tmp_path, run_script, changes, message):
    result = run_script(train_procst, *launched_flags(world, tmp_path, **changes))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "run").exists()
