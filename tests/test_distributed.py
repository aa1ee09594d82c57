"""Training in several processes: gloo on the CPU against one process, and what happens when one of them fails."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import train_procst
import training.precision
from conftest import ScriptResult
from core.checkpoint import load_checkpoint
from core.preparation import agreed_precision
from data_handlers.datasets import DATA_SETS
from data_handlers.lists import list_images
from models.resnet import RESNETS, ResNet, recompute_blocks
from steps import GOLDEN_FILES, GoldenStep, meta_of
from test_train_cli import only_run, training_flags
from training.distributed import Rank
from training.local_batch import LocalBatch
from training.synchronised_norm import SynchronisedBatchNorm2d, synchronise_batch_norms
from training.validation import Validator
from utils.errors import UserError
from worlds import write_cityscapes, write_gta5

WORLD = 2


def _in_process(index, folder, results, work, arguments):
    """Main function of a forked process: `work(rank, *arguments)` with the others connected."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # asking for this machine's address by its name may take long
    try:
        store = dist.FileStore(str(Path(folder) / "store"), WORLD)
        dist.init_process_group("gloo", store=store, rank=index, world_size=WORLD)
        outcome = work(Rank(index, WORLD), *pickle.loads(arguments))
        dist.destroy_process_group()
    except Exception:
        outcome = traceback.format_exc()
    results.put(pickle.dumps((index, outcome)))


def in_processes(work, *arguments):
    """What `work(rank, *arguments)` returns in each of two processes, in order.

    Both travel as bytes: tensors would be shared between the processes, and end with them.
    """
    # Processes forked from one that has imported everything, but never computed: threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])
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
        outcomes = dict(pickle.loads(results.get()) for _ in processes)
        for process in processes:
            process.join()
    for outcome in outcomes.values():
        assert not isinstance(outcome, str), outcome
    return [outcomes[index] for index in range(WORLD)]


def take_together(step, rank, **way):
    """Take a golden step of which this process computes its samples; its losses become those of the whole batch."""
    mine = rank.share(len(step.batch.source[0]))
    samples = slice(mine.start, mine.stop)
    for net in (*step.nets.values(), *([step.segmentation.seg_sit] if step.segmentation else [])):
        synchronise_batch_norms(net)
    batch = replace(
        step.batch,
        source=[level[samples] for level in step.batch.source],
        target=[level[samples] for level in step.batch.target],
        label=None if step.batch.label is None else step.batch.label[samples],
    )
    local = LocalBatch(len(mine) / len(step.batch.source[0]), rank.add_up)
    step.take(batch=batch, local=local, **way)
    rank.add_up(list(step.result.losses.values()))


# A batch of 3, as in the batch norm file, is divided into 2 and 1.
TOGETHER = [
    (path, scale, {"recompute": scale == max(meta_of(path)["scales"])})
    for path in GOLDEN_FILES
    if meta_of(path)["batch"] >= WORLD
    for scale in meta_of(path)["scales"]
]


def _meets_the_reference(rank, path, scale, way):
    step = GoldenStep(path, scale)
    take_together(step, rank, **way)
    step.check_order()
    step.check_losses()
    step.check_gradients()
    step.check_weights()
    if rank.is_first:
        step.check_images()
    buffers = {f"{name} {key}": value for name, net in step.nets.items() for key, value in net.named_buffers()}
    weights = {f"{name} {key}": value for name, net in step.nets.items() for key, value in net.state_dict().items()}
    if step.segmentation:
        weights |= {f"Q {key}": value for key, value in step.segmentation.seg_sit.state_dict().items()}
    return buffers, weights


@pytest.mark.parametrize(("path", "scale", "way"), TOGETHER, ids=[f"{p.stem}-scale{s}" for p, s, _ in TOGETHER])
def test_two_processes_meet_the_reference_numbers(path, scale, way):
    one, two = in_processes(_meets_the_reference, path, scale, way)
    alone = GoldenStep(path, scale)
    alone.take(**way)
    buffers, weights = one
    for name, value in buffers.items():
        net, key = name.split()
        torch.testing.assert_close(value, dict(alone.nets[net].named_buffers())[key], rtol=1e-9, atol=1e-9)
    for name, value in weights.items():
        assert torch.equal(value, two[1][name]), name


def _twice_differentiated(norm, x):
    """Output, and the gradients of a gradient penalty, which go back through the norm's backward."""
    x = x.clone().requires_grad_(True)
    y = norm(x)
    (gradient,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    return y, torch.autograd.grad((gradient**2).sum(), (x, norm.weight, norm.bias))


def _normalised(rank, norm, x):
    norm = synchronise_batch_norms(torch.nn.Sequential(norm))[0]
    assert isinstance(norm, SynchronisedBatchNorm2d)
    mine = rank.share(len(x))
    y, (to_x, *to_weights) = _twice_differentiated(norm, x[mine.start : mine.stop])
    rank.add_up(to_weights)
    with torch.no_grad():
        norm.eval()
        if rank.is_first:
            norm(x)  # alone: in eval mode nobody is waited for
    return y.detach(), to_x, to_weights, norm.state_dict()


def test_synchronised_batch_norm_is_batch_norm_of_all_samples():
    x = 1e3 + torch.randn(5, 4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    shares = in_processes(_normalised, norm, x)
    y, (to_x, *to_weights) = _twice_differentiated(norm, x)
    torch.testing.assert_close(torch.cat([share[0] for share in shares]), y.detach())
    torch.testing.assert_close(torch.cat([share[1] for share in shares]), to_x)
    for share in shares:
        torch.testing.assert_close(share[2], to_weights)
        torch.testing.assert_close(dict(share[3]), dict(norm.state_dict()))


def _backbone_gradients(rank, recompute, images):
    torch.manual_seed(0)
    net = synchronise_batch_norms(ResNet(RESNETS["resnet18"])).double().train()
    if recompute:
        recompute_blocks(net)
    mine = rank.share(len(images))
    (net(images[mine.start : mine.stop]) ** 2).sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    rank.add_up(gradients)
    return gradients, dict(net.named_buffers())


def _precision(rank, wishes):
    training.precision.computes_in_bf16 = lambda device: True
    training.precision.bf16_pays = lambda device: rank.is_first
    try:
        return [agreed_precision(wishes[rank.index], rank)]
    except UserError as error:
        rank.from_first(None)  # for the other process, which waits
        return [str(error)]


def test_processes_agree_on_a_precision():
    assert in_processes(_precision, ("auto", "auto")) == [["bf16"], ["bf16"]]
    assert in_processes(_precision, ("fp32", "fp32")) == [["fp32"], ["fp32"]]
    (one,), (other,) = in_processes(_precision, ("fp32", "bf16"))
    assert one == "fp32"
    assert other.startswith("the --precision of process 1")


def test_recomputed_blocks_of_two_processes():
    images = torch.rand(3, 3, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain, recomputed = (in_processes(_backbone_gradients, recompute, images)[0] for recompute in (False, True))
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert all(int(n) == 1 for name, n in recomputed[1].items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(("batch", "shares"), [(3, [2, 1]), (4, [2, 2]), (2, [1, 1])])
def test_shares_cover_the_batch(batch, shares):
    ranges = [Rank(index, WORLD).share(batch) for index in range(WORLD)]
    assert [k for share in ranges for k in share] == list(range(batch))
    assert [len(share) for share in ranges] == shares


def _validated(rank, root):
    files = list_images(DATA_SETS["cityscapes"], root, "--trg_data_dir", split="val", training=False)
    torch.manual_seed(1)
    return Validator(files, True, range(19), 19, torch.device("cpu"), 0, rank)(torch.nn.Conv2d(3, 19, 3, padding=1))


def test_a_shared_validation_finds_the_same(tmp_path):
    write_cityscapes(tmp_path, count=3, split="val")
    first, second = in_processes(_validated, tmp_path)
    alone = _validated(Rank(), tmp_path)
    for shared_one in (first, second):
        assert shared_one.scores == alone.scores
        assert shared_one.label_free == pytest.approx(alone.label_free, rel=1e-12)
        assert shared_one.mean_confidence == pytest.approx(alone.mean_confidence, rel=1e-12)
        assert shared_one.confidence_histogram.tolist() == alone.confidence_histogram.tolist()


# --- the command line ------------------------------------------------------------------------------------------------


def train(world, out, **changes):
    """Flags of a run of one scale, three steps of 3 = 2 + 1 images."""
    flags = {"num_scales": 0, "batch_size_list": 3, "crop_size": (24, 20), **changes}
    return training_flags(world, out, **flags)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_gta5(root / "gta", count=5, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=4, size=(64, 40), labels=False)
    return root


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def run_apart(*arguments, disturb=None):
    """train_procst.py in processes of its own, whose output pytest's `capsys` would not see."""
    command = [sys.executable, train_procst.__file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if disturb is not None:
        disturb(process)
    out, err = process.communicate()
    return ScriptResult(process.returncode, out, err)


def only_error_line(result):
    """Check that one line, after the progress bar, says what is wrong."""
    *before, last = result.err.splitlines()
    assert last.startswith("error: ")
    assert not [line for line in before if line.strip() and "steps [" not in line]


def ranks():
    return [int(path.stem) for path in Path(tempfile.gettempdir()).glob("procst_ranks_*/*.rank")]


def test_stopped_and_killed_processes_go_on_and_others_in_their_place(world, tmp_path, run_script, monkeypatch):
    run, others = tmp_path / "run", []
    small = {"steps_per_scale": 5, "lr_g": 1e-4, "lr_d": 1e-4}

    def command(*gpus):
        changes = {"checkpoints_dir": None, "run_dir": run, "save_checkpoint_rate": 1, **small}
        return train(world, tmp_path, gpus=gpus, **changes)

    def wait_for_checkpoint(newer_than=0):
        while not (run / "latest.pth").exists() or (run / "latest.pth").stat().st_mtime_ns <= newer_than:
            time.sleep(0.02)

    def stop(launcher):
        wait_for_checkpoint()
        launcher.send_signal(signal.SIGUSR1)

    def stop_after_step(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return real_step(self, *arguments)

    def kill(launcher):
        wait_for_checkpoint(newer_than=written)
        first, *rest = ranks()
        others.extend(rest)
        os.kill(first, signal.SIGKILL)

    result = run_apart(*command("cpu", "cpu"), disturb=stop)
    assert result.code == 75, result.err
    assert result.err.count("finishing this step") == 1
    assert result.err.strip().splitlines()[-1].startswith("stopped at step 1 of scale 0")

    real_step = train_procst.Trainer.one_step
    with monkeypatch.context() as patch:
        patch.setattr(train_procst.Trainer, "one_step", stop_after_step)
        assert run_script(train_procst, *command("cpu")).code == 75
    assert load_checkpoint(run / "latest.pth").step == 2

    written = (run / "latest.pth").stat().st_mtime_ns
    result = run_apart(*command("cpu", "cpu"), disturb=kill)
    assert result.code == 2
    only_error_line(result)
    assert "(cpu) was ended by signal 9 (SIGKILL" in result.err
    assert "--continue_train_from_path" in result.err
    assert others
    assert not any(Path(f"/proc/{process}").exists() for process in others)

    result = run_apart(*command("cpu", "cpu"))
    assert result.code == 0, result.err
    assert "finished; export with" in result.out
    assert result.out.count("run folder") == 1
    starts = json.loads((run / "config.json").read_text())["starts"]
    assert [start["processes"] for start in starts] == [2, 1, 2, 2]
    assert run_script(train_procst, *train(world, tmp_path / "alone", **small)).code == 0
    alone, together = (load_checkpoint(f / "latest.pth") for f in (only_run(tmp_path / "alone"), run))
    assert (together.step, together.scale_finished) == (5, True)
    # Five steps of Adam move a weight by up to 5e-4. Biases before a norm are moved as far by rounding alone.
    for name, (expected,) in alone.networks.items():
        for key in (key for key in expected if key.endswith("weight")):
            other = together.networks[name][0][key]
            torch.testing.assert_close(other, expected[key], rtol=0, atol=1e-4, msg=f"{name} {key}")


def test_an_error_of_one_process_is_one_line(world, tmp_path):
    shutil.copytree(world / "gta", tmp_path / "gta")
    for path in (tmp_path / "gta" / "images").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    result = run_apart(*train(world, tmp_path, gpus=("cpu", "cpu"), src_data_dir=tmp_path / "gta"))
    assert result.code == 2
    only_error_line(result)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size_list": 1}, "a batch of 1 cannot be shared by 2 processes"),
        ({"gpus": ("cpu", "0")}, "--gpus"),
        ({"gpus": ("0", "0")}, "names a device twice"),
    ],
)
def test_devices_that_cannot_share_are_refused(world, tmp_path, run_script, changes, message):
    result = run_script(train_procst, *train(world, tmp_path, **{"gpus": ("cpu", "cpu"), **changes}))
    assert result.code == 2
    assert message in result.err
    assert not (tmp_path / "models").exists()
