"""ProCST with the label losses of the last scale on a tiny world."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

import create_sit_dataset
import train_procst
from commands import (
    assert_same_tensors,
    export_flags,
    label_flags,
    logged,
    only_run,
    procst_flags,
    stop_at,
    tensors_of,
)
from core.procst import ProCST
from nets import save_net
from refusals import check_refusal
from training.checkpoint import load_checkpoint
from training.segmentation_files import load_segmentation_net
from training.validation import Validator

pytestmark = pytest.mark.slow


def validations(run):
    return json.loads((run / "validations.json").read_text())


def test_a_run_with_label_losses(world, tmp_path, run_script, source_net):
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net))
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    found = validations(run)
    assert [(validation["stage"], validation["step"]) for validation in found] == [(2, 2), (2, 3)]
    assert "last scale: validating on cityscapes: 2 images" in result.out
    best = max(found, key=lambda validation: validation["miou"])
    checkpoint = load_checkpoint(run / "best.pth")
    assert (checkpoint.stage, checkpoint.step, checkpoint.validations[-1]["miou"]) == (2, best["step"], best["miou"])
    _, source = load_segmentation_net(source_net, "--weights")
    _, trained = load_segmentation_net(run, "--weights")
    assert not torch.equal(source.head.classify.weight, trained.head.classify.weight)
    events = logged(tmp_path)
    tags = events.Tags()
    scalars = {"Scale2/Cyclic/SourceLabelLoss", "Semseg/SemsegLoss", "Validation/mIoU", "Validation/MeanConfidence"}
    assert scalars <= set(tags["scalars"])
    assert any(tag.startswith("Validation/Image-Label-Prediction") for tag in tags["images"])
    values = [event.value for event in events.Scalars("Validation/mIoU")]
    assert values == pytest.approx([validation["miou"] for validation in found])
    # The best state can be exported.
    result = run_script(create_sit_dataset, *export_flags(run / "best.pth", tmp_path / "sit"))
    assert result.code == 0, result.err
    assert len(list((tmp_path / "sit/images").iterdir())) == 6


def test_a_continued_run_equals_an_uninterrupted_one(world, tmp_path, run_script, monkeypatch):
    """With batch norm and dropout, whose statistics and draws could go wrong; stopped in a step and in a validation."""
    net = save_net(tmp_path / "resnet18.pth", "DeepLabV2", "resnet18")
    changes = {
        "model": "DeepLabV2", "backbone": "resnet18", "no_pretrained_backbone": (), "lr_semseg": 1e-3, "num_scales": 0,
        "batch_size_list": 2, "steps_per_scale": 2, "validation_rate": 1,
    }  # fmt: skip

    def flags(out):
        return label_flags(world, out, net, **changes, checkpoints_dir=None, run_dir=out / "run")

    before = torch.load(net, weights_only=True)["modules"]["net"]
    assert run_script(train_procst, *flags(tmp_path / "whole")).code == 0
    assert all(torch.equal(v, torch.load(net, weights_only=True)["modules"]["net"][n]) for n, v in before.items())
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 0)
        assert run_script(train_procst, *flags(tmp_path / "cut")).code == 75
    real = Validator.__call__

    def stop(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validator, "__call__", stop)
        assert run_script(train_procst, *flags(tmp_path / "cut")).code == 75
    checkpoint = load_checkpoint(tmp_path / "cut/run/latest.pth")
    assert (checkpoint.step, checkpoint.validations) == (1, [])  # what was broken off is made again
    assert run_script(train_procst, *flags(tmp_path / "cut")).code == 0
    ours, theirs = tmp_path / "cut/run", tmp_path / "whole/run"
    assert any("seg_sit" in name and "momentum_buffer" in name for name in tensors_of(ours / "latest.pth"))
    assert_same_tensors(ours / "latest.pth", theirs / "latest.pth")
    assert_same_tensors(ours / "best.pth", theirs / "best.pth")
    assert validations(ours) == validations(theirs)
    trained = load_checkpoint(ours / "latest.pth").modules["seg_sit"]
    assert not torch.equal(trained["backbone.bn1.running_mean"], torch.zeros(64))


def test_selection_without_target_labels(world, tmp_path, run_script, source_net):
    changes = {"trg_data_dir": world / "unlabelled", "select_by": "label_free", "num_scales": 0, "batch_size_list": 2}
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net, **changes))
    assert result.code == 0, result.err
    found = validations(only_run(tmp_path))
    assert [validation["miou"] for validation in found] == [None, None]
    best = max(found, key=lambda validation: validation["label_free"])
    assert load_checkpoint(only_run(tmp_path) / "best.pth").step == best["step"]


def test_a_target_without_labels_is_not_validated(world, tmp_path, run_script, source_net):
    changes = {"trg_data_dir": world / "unlabelled", "validation_rate": None, "num_scales": 0, "batch_size_list": 2}
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net, **changes))
    assert result.code == 0, result.err
    assert "last scale: no validation: the target has no labelled val split" in result.out
    assert not {"validations.json", "best.pth"} & {path.name for path in only_run(tmp_path).iterdir()}


def test_missing_target_labels_do_not_matter_to_a_selection_without_them(world, tmp_path, run_script, source_net):
    root = shutil.copytree(world / "cityscapes", tmp_path / "cityscapes")
    next((root / "gtFine/val").rglob("*1_000019_gtFine_labelIds.png")).unlink()
    short = {"trg_data_dir": root, "num_scales": 0, "batch_size_list": 2}
    for changes in ({"select_by": "none", "validation_rate": None}, {"select_by": "label_free"}):
        flags = label_flags(world, tmp_path, source_net, **short, **changes)
        assert run_script(train_procst, *flags, "--dry_run").code == 0


def test_warmup_epochs_hold_the_label_losses_back(world, tmp_path, run_script, source_net):
    """One warm-up epoch, of three steps, covers the run: Gst is what it is without segmentation nets; Q learns."""
    short = {"num_scales": 0, "batch_size_list": 2, "steps_per_scale": 2}
    flags = {
        "without": procst_flags(world, tmp_path / "without", **short),
        "warm": label_flags(world, tmp_path / "warm", source_net, warmup_epochs=1, **short),
        "cold": label_flags(world, tmp_path / "cold", source_net, **short),
    }
    runs = {}
    for name, words in flags.items():
        result = run_script(train_procst, *words)
        assert result.code == 0, result.err
        assert ("--warmup_epochs covers the whole last scale" in result.out) == (name == "warm")
        runs[name] = load_checkpoint(only_run(tmp_path / name) / "latest.pth").modules
    for name, state in runs["without"].items():
        for key, value in state.items():
            assert torch.equal(value, runs["warm"][name][key]), f"{name} {key}"
    assert not torch.equal(*(runs[name]["Gst.0"]["head.conv.weight"] for name in ("without", "cold")))
    assert not torch.equal(*(runs[name]["seg_sit"]["head.classify.weight"] for name in ("warm", "cold")))


def test_continuing_with_another_source_net(world, tmp_path, run_script, source_net):
    short = {"num_scales": 0, "batch_size_list": 2, "steps_per_scale": 1, "validation_rate": None, "select_by": "none"}
    assert run_script(train_procst, *label_flags(world, tmp_path, source_net, **short)).code == 0
    again = ("--continue_train_from_path", only_run(tmp_path), "--semseg_weights")
    check_refusal(run_script(train_procst, *again, save_net(tmp_path / "other.pth")), "segmentation net", "not the one")
    moved = shutil.copy(source_net, tmp_path / "moved.pth")
    assert run_script(train_procst, *again, moved).code == 0




def test_continuing_with_other_backbone_weights(world, tmp_path, run_script, monkeypatch):
    """The file may have moved, but it must be the same one until the net that starts from it is in the checkpoint."""
    net = save_net(tmp_path / "resnet.pth", "DeepLabV2", "resnet18")
    state = load_segmentation_net(net, "--weights")[1].backbone.state_dict()
    torch.save(state, tmp_path / "start.pth")
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "other.pth")
    changes = {
        "model": "DeepLabV2", "backbone": "resnet18", "backbone_weights": tmp_path / "start.pth", "num_scales": 1,
        "batch_size_list": (2, 2), "steps_per_scale": 1, "select_by": "none", "validation_rate": None,
    }  # fmt: skip
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 0)
        assert run_script(train_procst, *label_flags(world, tmp_path, net, **changes)).code == 75
    again = ("--continue_train_from_path", only_run(tmp_path))
    (tmp_path / "start.pth").rename(tmp_path / "moved.pth")
    check_refusal(run_script(train_procst, *again), "--backbone_weights", "start.pth", "no such file")
    refused = run_script(train_procst, *again, "--backbone_weights", tmp_path / "other.pth")
    check_refusal(refused, "--backbone_weights", "not the one the run was started with")
    result = run_script(train_procst, *again, "--backbone_weights", tmp_path / "moved.pth")
    assert result.code == 0, result.err
