"""--dry_run, and the record of what a run was made with."""

from __future__ import annotations

import json

import pytest
import torch

import train_procst
import train_semseg_on_source
from commands import label_flags, procst_flags, source_flags
from refusals import check_refusal, tree
from training.run_folder import git_commit
from worlds import write_cityscapes, write_gta5

pytestmark = pytest.mark.slow


def test_a_dry_run_tells_what_a_run_takes_and_writes_nothing(world, tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(world), tree(tmp_path)
    result = run_script(train_procst, *procst_flags(world, tmp_path, cache_dir=tmp_path / "cache"), "--dry_run")
    assert result.code == 0, result.err
    assert (tree(world), tree(tmp_path)) == before
    for part in (
        "steps at scales 0..2: 3, 3, 3", *(f"scale {scale}: 3 steps of " for scale in range(3)),
        "checkpoints: up to", "whole run", "memory of the process", "MB are free",
        "nothing was written",
    ):  # fmt: skip
        assert part in result.out


def test_a_dry_run_checks_every_file(world, tmp_path, run_script):
    root = write_gta5(tmp_path / "gta", count=44, size=(60, 44))
    label = root / "labels" / "00002.png"  # any run checks twenty others
    label.write_bytes(b"text")
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path, src_data_dir=root), "--dry_run")
    check_refusal(result, "1 of 42 files", label)
    image = root / "images" / "00002.png"
    image.write_bytes(b"text")
    result = run_script(train_procst, *procst_flags(world, tmp_path, src_data_dir=root), "--dry_run")
    check_refusal(result, "1 of 44 files", image)


def test_a_dry_run_checks_every_validation_image(world, source_net, tmp_path, run_script):
    root = write_cityscapes(tmp_path / "cityscapes", count=3, labels=False)
    write_cityscapes(root, count=8, labels=False, split="val")
    image = sorted((root / "leftImg8bit/val").rglob("*.png"))[2]  # any run checks six others
    image.write_bytes(b"text")
    flags = label_flags(world, tmp_path, source_net, trg_data_dir=root, select_by="label_free")
    check_refusal(run_script(train_procst, *flags, "--dry_run"), "1 of 8 files", image)


def test_a_dry_run_of_a_run_to_continue(finished_run, run_script):
    before = tree(finished_run)
    result = run_script(train_procst, "--continue_train_from_path", finished_run, "--dry_run")
    assert result.code == 0, result.err
    assert tree(finished_run) == before


def test_the_record_of_a_run(world, tmp_path, run_script):
    changes = {"num_scales": 0, "batch_size_list": 2, "checkpoints_dir": None, "run_dir": tmp_path / "run"}
    try:
        for _ in range(2):
            assert run_script(train_procst, *procst_flags(world, tmp_path, deterministic=(), **changes)).code == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["method"], record["config"]["run"]["deterministic"]) == ("procst", True)
    assert record["inputs"].keys() == {
        "list of source images", "list of target images", "perceptual net (--vgg_weights)"
    }  # fmt: skip
    first, second = record["starts"]
    assert [(start["stage"], start["step"]) for start in (first, second)] == [(0, 0), (0, 3)]
    assert (first["torch"], first["device"], first["processes"]) == (torch.__version__, "cpu", 1)
    assert {"time", "commit", "python", "torchvision", "system", "threads"} <= first.keys()


def test_no_commit_outside_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
