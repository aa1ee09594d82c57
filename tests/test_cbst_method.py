"""Self-training from the command line: source net, rounds, evaluation; interrupted passes; what is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

import evaluate
import make_spatial_prior
import train_uda
from commands import assert_same_tensors, command, failing_at, source_flags, stop_at
from data_handlers.classes import CITYSCAPES_16_IDS, SYNTHIA_16, SYNTHIA_16_IDS
from data_handlers.datasets import DATA_SETS, for_net_of, with_labels
from data_handlers.spatial_prior import read_spatial_prior
from nets import save_net
from refusals import check_refusal, tree
from training.checkpoint import load_checkpoint
from uda import labelling
from uda.cbst import SelfTraining
from uda.labelling import MANIFEST, Labelling
from utils.errors import UserError
from worlds import write_own_description

pytestmark = pytest.mark.slow


def flags_for(world, net, run, **changes):
    """CBST of two rounds of 4 steps on the 4 target images and 2 of the 6 source images."""
    flags = {
        "method": "cbst", "init": net, "gpus": "cpu", "src_data_dir": world / "gta",
        "trg_data_dir": world / "cityscapes", "num_round": 2, "epoch_per_round": 2, "batch_size": 3, "crop_size": 32,
        "init_src_port": 0.34, "max_src_port": 0.34, "base_lr": 1e-2, "num_workers": 0, "precision": "fp32",
        "test_scales": 48, "run_dir": run, "tb_logs_dir": run.parent / "runs",
    }  # fmt: skip
    return command(flags, changes)


@pytest.fixture(scope="module")
def adapted(world, source_net, tmp_path_factory):
    """The run folder of an undisturbed self-training."""
    run = tmp_path_factory.mktemp("cbst") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_uda.py", *map(str, flags_for(world, source_net, run))])
        train_uda.main()
    return run


def labels_of(run):
    """Every label of a run, and its manifests without places."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in (run / "pseudo_labels").rglob("*.png")}
    manifests = [json.loads((run / f"pseudo_labels/round_{k}" / MANIFEST).read_text()) for k in range(2)]
    return found, manifests


def assert_same_run(run, adapted):
    for name in ("round_0.pth", "round_1.pth", "latest.pth"):
        assert_same_tensors(run / name, adapted / name)
    assert labels_of(run) == labels_of(adapted)
    assert (run / "validations.json").read_text() == (adapted / "validations.json").read_text()


def test_what_a_run_leaves(adapted):
    assert {path.name for path in adapted.iterdir()} == {
        ".lock", "config.json", "metrics.jsonl", "validations.json", "latest.pth", "previous.pth", "round_0.pth",
        "round_1.pth", "pseudo_labels",
    }  # fmt: skip
    assert [(found["stage"], found["best"]) for found in json.loads((adapted / "validations.json").read_text())] == [
        (0, False), (1, False),
    ]  # fmt: skip
    labels, (first, second) = labels_of(adapted)
    assert len(labels) == 8
    assert (first["made_from"]["portion"], second["made_from"]["portion"]) == (0.2, 0.25)
    assert first["made_from"]["weights"] != second["made_from"]["weights"]
    label = np.array(Image.open(adapted / "pseudo_labels/round_0" / next(iter(first["labels"]))))
    assert label.shape == (40, 64)
    assert set(np.unique(label)) <= {*range(19), 255}
    (entry, *_) = first["labels"].values()
    assert entry["pixels"] == 40 * 64
    assert entry["labelled"] == (label != 255).sum() > 0


def test_from_source_to_the_score(world, adapted, tmp_path, run_script, source_net):
    """`--method source` is train_semseg_on_source.py; evaluate.py takes the run of a self-training."""
    result = run_script(train_uda, "--method", "source", *source_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert_same_tensors(tmp_path / "source.pth", source_net)
    result = run_script(evaluate, "--weights", adapted, "--data_dir", world / "cityscapes", "--gpus", "cpu")
    assert result.code == 0, result.err
    (last,) = [f["miou"] for f in json.loads((adapted / "validations.json").read_text()) if f["stage"] == 1]
    assert f"{100 * last:.2f}  over" in result.out


@pytest.mark.parametrize("calls", [1, 6, 10, 22], ids=["first counts", "last counts", "labels", "labels of round 1"])
def test_a_run_killed_in_a_labelling_pass_ends_with_the_same_bits(
    world, source_net, adapted, tmp_path, run_script, monkeypatch, calls
):
    """A pass calls the net for 4 images three times; the labels that a killed pass has written are kept."""
    flags = flags_for(world, source_net, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "confidence_map", failing_at(calls, labelling.confidence_map))
        assert run_script(train_uda, *flags).code == 2
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("pseudo_labels/**/*.png")}
    assert len(kept) == {1: 0, 6: 0, 10: 1, 22: 5}[calls]
    result = run_script(train_uda, *flags)
    assert result.code == 0, result.err
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert_same_run(tmp_path / "run", adapted)


def test_a_damaged_label_of_a_killed_pass_is_made_again(
    world, source_net, adapted, tmp_path, run_script, monkeypatch
):
    flags = flags_for(world, source_net, tmp_path / "run")

    def killed(*arguments):
        raise UserError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(SelfTraining, "step", killed)  # the pass is finished, and no checkpoint knows
        assert run_script(train_uda, *flags).code == 2
    first, second, *_ = sorted((tmp_path / "run").rglob("pseudo_labels/**/*.png"))
    first.write_bytes(first.read_bytes()[:60])
    Image.new("L", (64, 40), 3).save(second)
    assert run_script(train_uda, *flags).code == 0
    assert_same_run(tmp_path / "run", adapted)


def test_a_stop_in_a_labelling_pass_and_one_in_a_step(world, source_net, adapted, tmp_path, run_script, monkeypatch):
    flags, real = flags_for(world, source_net, tmp_path / "run"), Labelling._write

    def stopped(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Labelling, "_write", stopped)
        result = run_script(train_uda, *flags)
    assert result.code == 75
    assert "stopped at step 0 of round 0, and saved" in result.err
    with monkeypatch.context() as patch:
        stop_at(patch, SelfTraining, 1, 1)
        assert run_script(train_uda, *flags).code == 75
    assert run_script(train_uda, *flags).code == 0
    assert_same_run(tmp_path / "run", adapted)


def change_a_label(folder):
    label = next(folder.rglob("*.png"))
    label.write_bytes(label.read_bytes()[:-20] + bytes(20))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("lose", "lost"), [
    (change_a_label, 1), (lambda folder: next(folder.rglob("*.png")).unlink(), 1),
    (lambda folder: (folder / MANIFEST).unlink(), 4), (shutil.rmtree, 4),
], ids=["a changed label", "a missing label", "no manifest", "nothing"])  # fmt: skip
def test_lost_labels_of_a_round_in_training_are_made_again(
    world, source_net, adapted, tmp_path, run_script, monkeypatch, stage, lose, lost
):
    """By the net that the round began with, in a single pass; the run ends with the same bits."""
    run, calls, real = tmp_path / "run", [], labelling.confidence_map
    flags = flags_for(world, source_net, run)
    with monkeypatch.context() as patch:
        stop_at(patch, SelfTraining, stage, 1)
        assert run_script(train_uda, *flags).code == 75
    lose(run / f"pseudo_labels/round_{stage}")
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "confidence_map", lambda *a, **k: calls.append(1) or real(*a, **k))
        result = run_script(train_uda, *flags)
    assert result.code == 0, result.err
    assert len(calls) == lost + (0 if stage else 12)  # and the pass of the next round
    assert_same_run(run, adapted)


def test_lost_labels_that_cannot_be_made_again_are_refused(world, source_net, tmp_path, run_script, monkeypatch):
    run, net = tmp_path / "run", shutil.copy(source_net, tmp_path / "net.pth")
    flags = flags_for(world, net, run)
    with monkeypatch.context() as patch:
        stop_at(patch, SelfTraining, 0, 1)
        assert run_script(train_uda, *flags).code == 75
    change_a_label(run / "pseudo_labels/round_0")
    lost = "round_0: the pseudo-labels of this round are missing or were changed"
    save_net(net)
    check_refusal(run_script(train_uda, *flags), lost, "by another net; restore them, or start again")
    net.unlink()
    check_refusal(run_script(train_uda, *flags), lost, f"the net that made them, {net}: no such file")
    shutil.copy(source_net, net)
    manifest = json.loads((run / "pseudo_labels/round_0" / MANIFEST).read_text())
    for entry in manifest["labels"].values():
        entry["sha256"] = "0" * 64
    (run / "pseudo_labels/round_0" / MANIFEST).write_text(json.dumps(manifest))
    check_refusal(run_script(train_uda, *flags), lost, "and come out differently")


def test_a_dry_run_writes_nothing(world, source_net, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path), tree(world)
    result = run_script(train_uda, *flags_for(world, source_net, tmp_path / "run"), "--dry_run")
    assert result.code == 0, result.err
    assert (tree(tmp_path), tree(world)) == before
    assert "labelling 4 images: " in result.out
    assert "round 1: 4 steps of " in result.out


def test_bad_images_are_skipped_or_refused(world, source_net, tmp_path, run_script):
    target = shutil.copytree(world / "cityscapes", tmp_path / "cityscapes")
    (bad, *_) = sorted(target.rglob("train/**/*.png"))
    bad.write_bytes(bad.read_bytes()[:90])
    flags = flags_for(world, source_net, tmp_path / "run", trg_data_dir=target)
    check_refusal(run_script(train_uda, *flags), bad.name, "--on_bad_image skip")
    result = run_script(train_uda, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "run/pseudo_labels/round_1").rglob("*.png"))) == 3
    assert "1 images or labels could not be used and were skipped:" in result.out


def test_a_prior_is_made_and_used(world, source_net, tmp_path, run_script):
    prior = tmp_path / "prior.mat"
    making = command({
        "src-data-dir": world / "gta", "prior-size": (32, 20), "num-workers": 0, "output": prior,
    })  # fmt: skip
    result = run_script(make_spatial_prior, *making)
    assert result.code == 0, result.err
    assert "19 classes at 32x20 from 6 labels, sigma 0.547 pixels" in result.out
    assert len(list(tmp_path.glob("prior_*.png"))) == 19
    assert read_spatial_prior(prior).sum(axis=0) == pytest.approx(1.0, abs=1e-5)
    check_refusal(run_script(make_spatial_prior, *making), f"--output {prior} exists")
    flags = flags_for(world, source_net, tmp_path / "run", method="cbst-sp", num_round=1, spatial_prior=prior)
    assert run_script(train_uda, *flags).code == 0
    inputs = load_checkpoint(tmp_path / "run/latest.pth").inputs
    assert len(inputs["spatial prior"]) == 64


def test_images_of_other_folders(world, source_net, adapted, tmp_path, run_script):
    """SiT images in place of the source's, with its labels; copies of these give the same."""
    roots = [shutil.copytree(world / "gta/images", tmp_path / name / "images").parent for name in ("v1", "v2")]
    result = run_script(train_uda, *flags_for(world, source_net, tmp_path / "run", source_images=tuple(roots)))
    assert result.code == 0, result.err
    assert_same_run(tmp_path / "run", adapted)


def test_selection_is_asked_for(world, source_net, tmp_path, run_script):
    for select_by in ("miou", "label_free"):
        run = tmp_path / select_by
        result = run_script(train_uda, *flags_for(world, source_net, run, select_by=select_by))
        assert result.code == 0, result.err
        assert (run / "best.pth").is_file()


REFUSED = {
    "no net": ({"init": None}, "--init is required", "train one first with train_semseg_on_source.py"),
    "a missing net": ({"init": "/nowhere.pth"}, "--init /nowhere.pth: no such file"),
    "no net in it": ({"init": "/proc/version"}, "/proc/version: cannot be read as a trained model"),
    "the cache": ({"cache_dir": "cache"}, "--cache_dir: self-training reads images at their own size"),
    "resampling": ({"resample": "exact"}, "--resample: self-training reads images at their own size"),
    "no prior": ({"method": "cbst-sp"}, "--method cbst-sp needs --spatial_prior"),
    "a maximum": ({"init_src_port": 0.5, "max_src_port": 0.06}, "--init_src_port 0.5 is above --max_src_port 0.06"),
    "a prior": ({"spatial_prior": "x.mat"}, "acts only with cbst-sp"),
    "a missing prior": ({"method": "cbst-sp", "spatial_prior": "/x.mat"}, "/x.mat does not exist"),
    "a portion": ({"init_tgt_port": 1.5}, "--init_tgt_port is 1.5; it must be in [0, 1]"),
    "no source image": ({"init_src_port": 0.1}, "--init_src_port 0.1: this is no whole one of 6 source images"),
    "a batch": ({"batch_size": 7}, "--batch_size 7: there are 6 images to train on in the first round"),
    "scales": ({"scale_rate_range": (2, 1)}, "--scale_rate_range 2.0 1.0: the smallest factor comes first"),
    "a crop": ({"crop_size": 8}, "--crop_size 8: it must be at least 16"),
    "a source without labels": ({"source": "folder"}, "--source folder has no labels"),
    "a split": ({"target": "gta5", "split_tgt": "val"}, "gta5 declares no 'val' split"),
    "a method": ({"method": "dacs"}, "argument --method: invalid choice: 'dacs'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_answered_in_a_line(world, source_net, tmp_path, run_script, case):
    changes, *parts = REFUSED[case]
    result = run_script(train_uda, *flags_for(world, source_net, tmp_path / "run", **changes))
    check_refusal(result, *parts)
    assert not (tmp_path / "run").exists()


def test_a_net_of_16_classes_sees_those_of_synthia():
    for name, ids in (("synthia", SYNTHIA_16_IDS), ("cityscapes", CITYSCAPES_16_IDS)):
        whole, found = DATA_SETS[name], for_net_of(DATA_SETS[name], 16)
        assert found.id_map == ids
        assert found.void_ids | ids.keys() == whole.void_ids | whole.id_map.keys()
        assert for_net_of(whole, 19) is whole
        assert (found.class_names[9], found.colours[9], found.categories["nature"]) == ("sky", (70, 130, 180), (8,))
    told = for_net_of(with_labels(DATA_SETS["synthia"], "trainids", "--src_labels"), 16)
    assert told.value_map == {c: k for k, c in enumerate(SYNTHIA_16)}
    assert (told.storage, told.ignored_values) == ("8-bit index", {9, 14, 16, 255})


def test_labels_of_other_classes_than_the_sources_score_nothing(world, tmp_path, run_script):
    own, net = write_own_description(tmp_path / "own.toml"), save_net(tmp_path / "net.pth", num_classes=4)
    flags = flags_for(world, net, tmp_path / "run", source=own, num_round=1)
    check_refusal(run_script(train_uda, *flags, "--select_by", "miou"), "--select_by miou needs a labelled val split")
    result = run_script(train_uda, *flags)
    assert result.code == 0, result.err
    assert "mIoU" not in result.out
    assert re.search(r"labelled; [abcd] 0\.", result.out)


def test_no_labels_of_the_target_are_needed_but_to_select_by_them(world, source_net, tmp_path, run_script):
    flags = flags_for(world, source_net, tmp_path / "run", trg_data_dir=world / "unlabelled", num_round=1)
    refused = run_script(train_uda, *flags, "--select_by", "miou")
    check_refusal(refused, "--select_by miou needs a labelled val split")
    result = run_script(train_uda, *flags)
    assert result.code == 0, result.err
    assert "no validation: the target has no labelled val split" in result.out
