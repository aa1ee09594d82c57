"""ProCST through the command line, on a tiny world: run folder, resume, schedule."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import train_procst
from commands import (
    STEPS,
    assert_same_tensors,
    label_flags,
    logged,
    metrics_of,
    only_run,
    procst_flags,
    stop_at,
    tensors_of,
)
from core.procst import ProCST
from training.checkpoint import load_checkpoint
from training.precision import computes_in_bf16
from worlds import write_gta5

pytestmark = pytest.mark.slow


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of a finished run."""
    return shutil.copytree(finished_run, tmp_path / finished_run.name)


def test_run_folder(finished_run):
    assert ":" not in finished_run.name
    assert {path.name for path in finished_run.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "latest.pth", "previous.pth",
        *(f"scale_{scale}.pth" for scale in range(3)), *(f"contact_sheet_scale_{scale}.png" for scale in range(3)),
    }  # fmt: skip
    state = torch.load(finished_run / "latest.pth", weights_only=True)
    assert (state["stage"], state["step"], state["stage_finished"]) == (2, STEPS, True)
    record = json.loads((finished_run / "config.json").read_text())
    assert record["method"] == "procst"
    assert record["config"] == json.loads(json.dumps(state["config"]))
    assert record["config"]["network"]["base_channels_list"] == [8, 8, 8]
    assert record["config"]["network"]["norm"] == ["group", "group", "group"]
    for scale in range(3):
        with Image.open(finished_run / f"contact_sheet_scale_{scale}.png") as sheet:
            assert sheet.width > sheet.height > 3 * 36


def test_log(finished_run):
    events = logged(finished_run.parent.parent)
    tags = events.Tags()
    for scale in range(3):
        for name in ("ST/Generator/StyleLoss", "TS/Discriminator/LossGP", "Cyclic/LossTST"):
            assert f"Scale{scale}/{name}" in tags["scalars"]
    assert [tag for tag in tags["images"] if tag.startswith("Scale1/source-SiT-SiTiS-target-TiS-TiSiT")]
    assert np.isfinite([event.value for event in events.Scalars("Scale2/ST/Generator/StyleLoss")]).all()
    lines = metrics_of(finished_run)
    # The first step, every second one, and the last one of each stage.
    assert [(line["stage"], line["step"]) for line in lines] == [(s, k) for s in range(3) for k in (1, 3)]
    assert [line["overall_step"] for line in lines] == [1, 3, 4, 6, 7, 9]
    assert lines[-1]["losses"]["ST/Generator/StyleLoss"] == pytest.approx(
        events.Scalars("Scale2/ST/Generator/StyleLoss")[-1].value
    )


def test_finished_scales_stay_frozen(finished_run):
    early, late = load_checkpoint(finished_run / "scale_0.pth"), load_checkpoint(finished_run / "latest.pth")
    assert set(early.modules) == {"Dst.0", "Gst.0", "Dts.0", "Gts.0"}
    for name, state in early.modules.items():
        for key, value in state.items():
            assert torch.equal(value, late.modules[name][key])
    first = load_checkpoint(finished_run / "scale_1.pth").modules["Gst.1"]["head.conv.weight"]
    assert not torch.equal(first, late.modules["Gst.2"]["head.conv.weight"])


workers = pytest.param({"num_workers": 1}, STEPS - 1, marks=pytest.mark.processes)
bf16 = pytest.mark.skipif(not computes_in_bf16(torch.device("cpu")), reason="no bfloat16 arithmetic")


@pytest.mark.parametrize(
    ("changes", "step"),
    [({"norm": "batch"}, 1), workers, pytest.param({"precision": "bf16"}, 1, marks=bf16)],
    ids=str,
)
def test_a_continued_run_equals_an_uninterrupted_one(world, tmp_path, run_script, monkeypatch, changes, step):
    """It is stopped within scale 1 and, from another working directory, continued."""
    whole, cut, changes = tmp_path / "whole", tmp_path / "cut", {**changes, "print_rate": 1}
    assert run_script(train_procst, *procst_flags(world, whole, **changes)).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 1, step)
        stopped = run_script(train_procst, *procst_flags(world, cut, **changes))
    assert stopped.code == 75, stopped.err
    run = only_run(cut)
    assert f"stopped at step {step + 1} of scale 1, and saved" in stopped.err
    monkeypatch.chdir(run.parent)
    result = run_script(train_procst, "--continue_train_from_path", run.name)
    assert result.code == 0, result.err
    assert_same_tensors(run / "latest.pth", only_run(whole) / "latest.pth")
    assert metrics_of(run) == metrics_of(only_run(whole))


def test_a_finished_run_has_nothing_to_continue(run, run_script):
    before = (run / "latest.pth").read_bytes()
    assert run_script(train_procst, "--run_dir", run).code == 0
    assert (run / "latest.pth").read_bytes() == before
    assert len(json.loads((run / "config.json").read_text())["starts"]) == 2


def test_run_dir_starts_and_continues(world, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = procst_flags(world, tmp_path, checkpoints_dir=None, run_dir="run", num_scales=0, batch_size_list=2)
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 0)
        assert run_script(train_procst, *flags).code == 75
    assert load_checkpoint(tmp_path / "run/latest.pth").step == 1
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    assert load_checkpoint(tmp_path / "run/latest.pth").stage_finished
    assert [start["step"] for start in json.loads((tmp_path / "run/config.json").read_text())["starts"]] == [0, 1]


def test_metrics_are_cut_back_to_the_checkpoint(world, tmp_path, run_script, monkeypatch):
    """A run that was killed after its checkpoint has logged steps that the continued one takes again."""
    short = {"num_scales": 0, "batch_size_list": 2, "steps_per_scale": 3, "print_rate": 1}
    flags = procst_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / "run", **short)
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 1)
        assert run_script(train_procst, *flags).code == 75
    path = tmp_path / "run/metrics.jsonl"
    assert [line["step"] for line in metrics_of(path.parent)] == [1, 2]
    with path.open("a") as file:
        file.write('{"stage": 0, "step": 3, "overall_step": 3}\n{"stage": 0')
    assert run_script(train_procst, *flags).code == 0
    assert [line["step"] for line in metrics_of(path.parent)] == [1, 2, 3]
    assert all("losses" in line for line in metrics_of(path.parent))


def test_resume_to_epoch_sets_the_step_counter(world, tmp_path, run_script, monkeypatch):
    """Two steps an epoch; the run stops after step 3, and starts epoch 2 again with the weights that it has."""
    short = {"num_scales": 0, "batch_size_list": 3, "steps_per_scale": None, "epochs_per_scale": 2}
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 2)
        assert run_script(train_procst, *procst_flags(world, tmp_path, **short)).code == 75
    again = ("--continue_train_from_path", only_run(tmp_path))
    refused = run_script(train_procst, *again, "--resume_to_epoch", 3)
    assert refused.code == 2
    assert "--resume_to_epoch 3: scale 0 has 4 steps" in refused.err
    assert run_script(train_procst, *again, "--resume_to_epoch", 2).code == 0
    optimizer = load_checkpoint(only_run(tmp_path) / "latest.pth").optimizers["Gst"]
    assert {int(state["step"]) for state in optimizer["state"].values()} == {3 + 2}
    refused = run_script(train_procst, *again, "--resume_to_epoch", 1)
    assert refused.code == 2
    assert "scale 0 is finished" in refused.err


def test_debug_run_stops_early(world, tmp_path, run_script):
    debug = {"debug_run": (), "debug_stop_iteration": 1, "debug_stop_epoch": 1}
    debug |= {"num_scales": 1, "batch_size_list": (2, 2)}
    result = run_script(train_procst, *procst_flags(world, tmp_path, steps_per_scale=None, **debug))
    assert result.code == 0, result.err
    assert "steps at scales 0..1: 2, 2" in result.out


def test_auto_norm_follows_the_batch_and_is_stored(world, tmp_path, run_script):
    root = write_gta5(tmp_path / "gta", count=17)
    flags = procst_flags(world, tmp_path, src_data_dir=root, num_scales=1, batch_size_list=(16, 2))
    assert run_script(train_procst, *flags, "--steps_per_scale", 1).code == 0
    run = only_run(tmp_path)
    assert json.loads((run / "config.json").read_text())["config"]["network"]["norm"] == ["batch", "group"]
    refused = run_script(train_procst, "--continue_train_from_path", run, "--norm", "group")
    assert refused.code == 2
    assert "--norm: the run was started with batch group," in refused.err
    assert run_script(train_procst, "--continue_train_from_path", run, "--norm", "auto").code == 0


def test_divergence_keeps_the_last_good_checkpoint(world, tmp_path, run_script):
    flags = procst_flags(world, tmp_path, steps_per_scale=6, save_checkpoint_rate=1, lr_g=1e14, lr_d=1e14)
    result = run_script(train_procst, *flags)
    assert result.code == 2
    assert "diverged" in result.err
    assert "lower learning rates" in result.err
    for name, value in tensors_of(only_run(tmp_path) / "latest.pth").items():
        assert value.isfinite().all(), name


def test_running_out_of_memory_names_the_batch(world, source_net, tmp_path, run_script, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(ProCST, "step", fail)
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net))
    assert result.code == 2
    assert "memory does not suffice for batch 2 of scale 0; lower --batch_size_list or --crop_size" in result.err


def test_other_errors_keep_their_traceback(world, tmp_path, run_script, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(ProCST, "step", fail)
    with pytest.raises(RuntimeError, match="mistake of ours"):
        run_script(train_procst, *procst_flags(world, tmp_path))
