"""Training of a segmentation net on source: what is kept, continued and published, with the flags of every training."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch
from PIL import Image

import evaluate
import train_procst
import train_semseg_on_source
from commands import (
    assert_same_tensors,
    at_step,
    command,
    label_flags,
    logged,
    metrics_of,
    only_run,
    source_flags,
    stop_at,
    tensors_of,
)
from refusals import check_refusal, tree
from training.checkpoint import Checkpoint, load_checkpoint
from training.precision import computes_in_bf16
from training.segmentation_files import load_segmentation_net
from training.validation import Validator
from uda.source import SourceTraining, poly_rate
from utils.errors import UserError
from worlds import write_own_description

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(source_net):
    """The folder of the finished run that made `source_net`."""
    return only_run(source_net.parent)


def best_of(run):
    return max(json.loads((run / "validations.json").read_text()), key=lambda found: found["miou"])


def test_what_a_run_leaves(source_net, whole):
    assert {path.name for path in whole.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "validations.json", "latest.pth", "previous.pth", "best.pth",
    }  # fmt: skip
    latest, best = load_checkpoint(whole / "latest.pth"), load_checkpoint(whole / "best.pth")
    assert (latest.step, latest.stage_finished) == (8, True)
    assert (best.step, best.validations[-1]["miou"]) == (best_of(whole)["step"], best_of(whole)["miou"])
    assert best.validations[-1]["miou"] > 0
    assert latest.optimizers
    assert not best.optimizers
    assert_same_tensors(source_net, whole / "best.pth")
    assert load_checkpoint(source_net).info == best.info
    shape, net = load_segmentation_net(whole, "--weights")
    assert str(shape) == "UNet with 19 classes"
    assert all(torch.equal(value, best.modules["net"][name]) for name, value in net.state_dict().items())


def test_log(source_net, whole):
    events = logged(source_net.parent)
    # 4 images to train on in batches of 2: an epoch is 2 steps, and each ends with a validation.
    assert [event.step for event in events.Scalars("Validation/mIoU")] == [2, 4, 6, 8]
    assert max(event.value for event in events.Scalars("Validation/mIoU")) == pytest.approx(best_of(whole)["miou"])
    assert "Validation/IoU/road" in events.Tags()["scalars"]
    lines = metrics_of(whole)
    assert [line["validation"]["miou"] for line in lines if "validation" in line] == [
        found["miou"] for found in json.loads((whole / "validations.json").read_text())
    ]
    steps = [line for line in lines if "losses" in line]
    assert [line["step"] for line in steps] == [1, 2, 4, 6, 8]
    expected = [1e-2 * poly_rate(line["step"] - 1, 8, 0.9) for line in steps]
    assert [line["learning_rates"]["net"] for line in steps] == pytest.approx(expected)


def test_a_run_stopped_in_a_step_and_in_a_validation_equals_an_uninterrupted_one(
    world, whole, tmp_path, run_script, monkeypatch
):
    flags = source_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, SourceTraining, 0, 2)
        stopped = run_script(train_semseg_on_source, *flags)
    assert stopped.code == 75
    assert "stopped at step 3 of training, and saved" in stopped.err
    real = Validator.__call__

    def stop(self, *arguments):
        signal.raise_signal(signal.SIGUSR1)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", stop)
        stopped = run_script(train_semseg_on_source, *flags)
    assert stopped.code == 75
    assert load_checkpoint(tmp_path / "run/latest.pth").step == 4
    (tmp_path / "source.pth").unlink()  # it is published again
    assert run_script(train_semseg_on_source, *flags).code == 0
    assert_same_tensors(tmp_path / "run/latest.pth", whole / "latest.pth")
    assert (tmp_path / "run/validations.json").read_text() == (whole / "validations.json").read_text()
    assert_same_tensors(tmp_path / "source.pth", whole / "best.pth")
    curves = [
        [(event.step, event.value) for event in logged(out).Scalars("Validation/mIoU")]
        for out in (tmp_path, whole.parent.parent)
    ]
    assert curves[0] == curves[1]


def test_a_net_is_scored_on_a_target_that_it_does_not_see(world, tmp_path, run_script):
    """Domain generalisation in one command: source alone trains, the target's val split chooses no state."""
    target = {"target": "cityscapes", "trg_data_dir": world / "cityscapes"}
    flags = source_flags(world, tmp_path, model="UNetMultiSNR", multi=(), **target)
    result = run_script(train_semseg_on_source, *flags)
    assert result.code == 0, result.err
    assert "validating on" in result.out
    assert f"{world / 'cityscapes'}, which chooses nothing" in result.out
    run = only_run(tmp_path)
    assert not (run / "best.pth").exists()
    found = json.loads((run / "validations.json").read_text())
    assert [entry["step"] for entry in found] == [2, 4, 6, 8]
    words = command({"weights": run / "latest.pth", "data_dir": world / "cityscapes", "json": tmp_path / "scores.json"})
    scored = run_script(evaluate, *words, "--num_workers", 0, "--gpus", "cpu")
    assert scored.code == 0, scored.err
    assert json.loads((tmp_path / "scores.json").read_text())["miou"] == pytest.approx(found[-1]["miou"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"multi": ()}, ("--multi", "UNetMulti", "--model UNet")),
        ({"lambda_seg": 0.2}, ("--lambda_seg", "--multi")),
        ({"trg_data_dir": "{world}/cityscapes"}, ("--trg_data_dir", "--target")),
        ({"target": "{world}/pictures"}, ("--target", "no labels")),
        ({"val_list": "two.txt", "val_count": 1}, ("--val_list and --val_count contradict",)),
    ],
)
def test_what_cannot_act_is_refused(world, tmp_path, run_script, flags, words):
    flags = {name: value.format(world=world) if isinstance(value, str) else value for name, value in flags.items()}
    (world / "pictures").mkdir(exist_ok=True)
    before = tree(tmp_path)
    check_refusal(run_script(train_semseg_on_source, *source_flags(world, tmp_path, **flags)), *words)
    assert tree(tmp_path) == before


def test_a_dry_run_writes_nothing(world, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path), tree(world)
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path), "--dry_run")
    assert result.code == 0, result.err
    assert (tree(tmp_path), tree(world)) == before
    assert "training: 8 steps of " in result.out
    assert "nothing was written" in result.out


def test_the_cache_gives_the_same(world, whole, tmp_path, run_script):
    flags = source_flags(world, tmp_path, cache_dir=tmp_path / "cache")
    assert run_script(train_semseg_on_source, *flags).code == 0
    assert list((tmp_path / "cache").iterdir())
    assert_same_tensors(only_run(tmp_path) / "latest.pth", whole / "latest.pth")


def test_deterministic(world, whole, tmp_path, run_script):
    try:
        assert run_script(train_semseg_on_source, *source_flags(world, tmp_path, deterministic=())).code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert json.loads((only_run(tmp_path) / "config.json").read_text())["config"]["run"]["deterministic"] is True
    assert_same_tensors(only_run(tmp_path) / "latest.pth", whole / "latest.pth")


@pytest.mark.skipif(not computes_in_bf16(torch.device("cpu")), reason="no bfloat16 arithmetic")
def test_precision(world, whole, tmp_path, run_script):
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, precision="bf16", num_steps=2))
    assert result.code == 0, result.err
    assert "precision bf16" in result.out
    weights = tensors_of(only_run(tmp_path) / "latest.pth")
    assert {value.dtype for name, value in weights.items() if name.endswith("weight")} == {torch.float32}


def test_selection_without_labels(world, tmp_path, run_script):
    flags = source_flags(world, tmp_path, select_by="label_free", num_steps=4)
    result = run_script(train_semseg_on_source, *flags)
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    found = json.loads((run / "validations.json").read_text())
    assert [validation["score"] for validation in found] == [validation["label_free"] for validation in found]
    best = max(found, key=lambda validation: validation["label_free"])
    assert load_checkpoint(run / "best.pth").step == best["step"]
    assert f"best state by label_free: {run / 'best.pth'}, of step {best['step']}" in result.out


def test_no_validation_publishes_the_last_state(world, tmp_path, run_script):
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, select_by="none", num_steps=3))
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    assert not (run / "validations.json").exists()
    assert not (run / "best.pth").exists()
    published = load_checkpoint(tmp_path / "source.pth")
    assert published.step == 3
    assert not published.optimizers


def test_a_damaged_best_net_does_not_end_the_training(world, tmp_path, run_script, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, SourceTraining, 0, 4)
        assert run_script(train_semseg_on_source, *source_flags(world, tmp_path)).code == 75
    run = only_run(tmp_path)
    (run / "best.pth").write_bytes((run / "best.pth").read_bytes()[:500])
    result = run_script(train_semseg_on_source, "--continue_train_from_path", run)
    assert result.code == 0, result.err
    assert "best.pth is damaged" in result.err


@pytest.mark.parametrize(
    ("source", "num_classes", "said"),
    [("gta5", 16, " --num_classes 16"), ("own.toml", None, ""), ("own.toml", 19, " --num_classes 19")],
)
def test_the_line_that_uses_the_net_fits_it(world, tmp_path, run_script, source, num_classes, said):
    source = source if source == "gta5" else write_own_description(tmp_path / source)
    flags = source_flags(world, tmp_path, source=source, num_classes=num_classes, num_steps=1)
    result = run_script(train_semseg_on_source, *flags)
    assert result.code == 0, result.err
    words = f"--source {source} --model UNet{said} --semseg_weights {tmp_path / 'source.pth'}"
    assert f"use the net with: python train_procst.py {words}\n" in result.out
    of_net = {"model": None, "semseg_weights": None, "validation_rate": None, "select_by": "none"}
    dry_run = label_flags(world, tmp_path / "procst", None, **of_net)
    result = run_script(train_procst, *dry_run, *words.split(), "--dry_run")
    assert result.code == 0, result.err


def test_an_output_that_another_run_takes_meanwhile_stays(world, tmp_path, run_script, monkeypatch):
    output = tmp_path / "source.pth"
    at_step(monkeypatch, SourceTraining, 0, 2, lambda: output.write_text("another run's net"))
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert output.read_text() == "another run's net"
    assert f"now a file of another run and stays; the best net is {only_run(tmp_path) / 'best.pth'}" in result.err
    assert f"--semseg_weights {only_run(tmp_path)}\n" in result.out


def test_a_copy_of_a_run_does_not_own_its_output(world, tmp_path, run_script):
    """A run of the same name is another run, too; a continued one knows its own file."""
    flags = source_flags(world, tmp_path, checkpoints_dir=None, num_steps=2)
    assert run_script(train_semseg_on_source, *flags, "--run_dir", tmp_path / "a/run").code == 0
    assert run_script(train_semseg_on_source, *flags, "--run_dir", tmp_path / "a/run").code == 0
    shutil.copytree(tmp_path / "a/run", tmp_path / "a/copy")
    for other in ("a/copy", "b/run"):
        refused = run_script(train_semseg_on_source, *flags, "--run_dir", tmp_path / other)
        check_refusal(refused, f"--output {tmp_path / 'source.pth'}", "is not of this run")
    shutil.rmtree(tmp_path / "a/copy")
    (tmp_path / "a/run").rename(tmp_path / "a/renamed")
    assert run_script(train_semseg_on_source, *flags, "--run_dir", tmp_path / "a/renamed").code == 0
    shutil.copytree(tmp_path / "a/renamed", tmp_path / "a/copy")
    refused = run_script(train_semseg_on_source, *flags, "--run_dir", tmp_path / "a/copy")
    check_refusal(refused, "is not of this run")


def test_a_copied_checkpoint_finds_its_own_best_state(world, tmp_path, run_script, monkeypatch):
    """A score that the copied run has reached before does not count: its best state is in another folder."""
    flags = source_flags(world, tmp_path, checkpoints_dir=None, output="", run_dir=tmp_path / "run")
    with monkeypatch.context() as patch:
        stop_at(patch, SourceTraining, 0, 4)
        assert run_script(train_semseg_on_source, *flags).code == 75
    state = torch.load(tmp_path / "run/latest.pth", weights_only=True)
    state["validations"][-1] |= {"best": True, "score": 2.0}
    (tmp_path / "copy").mkdir()
    torch.save(state, tmp_path / "copy/latest.pth")
    assert run_script(train_semseg_on_source, "--continue_train_from_path", tmp_path / "copy").code == 0
    assert load_checkpoint(tmp_path / "copy/best.pth").step > 4


def test_a_run_killed_while_it_saves_a_validation_logs_it_once(world, whole, tmp_path, run_script, monkeypatch):
    flags = source_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / "run")
    real = Checkpoint.save

    def killed(self, path, keep=None):
        if path.name == "best.pth":
            raise UserError("killed")
        real(self, path, keep)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", killed)
        assert run_script(train_semseg_on_source, *flags).code == 2
    assert run_script(train_semseg_on_source, *flags).code == 0
    assert metrics_of(tmp_path / "run") == metrics_of(whole)


def test_labels_from_another_folder(world, whole, tmp_path, run_script):
    """SiT images have the labels of their source."""
    shutil.copytree(world / "gta/images", tmp_path / "sit/images")
    flags = source_flags(world, tmp_path, src_data_dir=tmp_path / "sit")
    check_refusal(run_script(train_semseg_on_source, *flags), "have no label")
    assert run_script(train_semseg_on_source, *flags, "--src_label_dir", world / "gta").code == 0
    assert_same_tensors(only_run(tmp_path) / "latest.pth", whole / "latest.pth")


def test_validation_labels_without_a_scored_class_give_no_best_state(world, tmp_path, run_script):
    root = shutil.copytree(world / "gta", tmp_path / "gta")
    for k in (5, 6):
        Image.new("L", (60, 44)).save(root / f"labels/{k:05d}.png")
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, src_data_dir=root, num_steps=2))
    assert result.code == 0, result.err
    assert "hold no pixel of a scored class: no best state" in result.err
    assert not (only_run(tmp_path) / "best.pth").exists()


def test_divergence(world, tmp_path, run_script):
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, lr_semseg=1e14, num_steps=20))
    assert result.code == 2
    assert "training diverged" in result.err
    assert not (tmp_path / "source.pth").exists()
    assert all(value.isfinite().all() for value in tensors_of(only_run(tmp_path) / "latest.pth").values())


def test_running_out_of_memory_names_the_batch(world, tmp_path, run_script, monkeypatch):
    def fail(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(SourceTraining, "step", fail)
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path))
    assert result.code == 2
    wanted = "lower --micro_batch, --batch_size or --crop_size"
    assert f"memory does not suffice for batch 2 of training; {wanted}" in result.err


@pytest.mark.parametrize("name", ["latest.pth", "previous.pth", "best.pth"])
def test_the_output_never_takes_the_place_of_a_checkpoint(world, tmp_path, run_script, name):
    run = tmp_path / "run"
    flags = source_flags(world, tmp_path, checkpoints_dir=None, run_dir=run, output=run / name)
    check_refusal(run_script(train_semseg_on_source, *flags), "--output", name)
    assert not run.exists()
