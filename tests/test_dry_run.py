"""--dry_run, and the record of what a run was made with."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from core.run_record import git_commit

import train_procst
from core import dry_run as dry_run_module
from test_train_cli import only_run, training_flags, world  # noqa: F401
from utils.errors import UserError
from worlds import write_gta5


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_dry_run_tells_what_a_run_takes_and_writes_nothing(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    before = snapshot(world), snapshot(tmp_path)
    result = run_script(train_procst, *training_flags(world, tmp_path, cache_dir=tmp_path / "cache"), "--dry_run")
    assert result.code == 0, result.err
    assert (snapshot(world), snapshot(tmp_path)) == before
    config = json.loads(result.out[result.out.index("\n{") : result.out.index("\n}") + 2])
    assert config["schedule"]["batch_size_list"] == [2, 2, 1]
    assert "steps at scales 0..2: 3, 3, 3" in result.out
    for scale in range(3):
        assert f"scale {scale}: 3 steps of " in result.out
    for part in (
        "checkpoints: up to",
        "cache: up to",
        "whole run",
        "memory of the process",
        "are left",
        "nothing was written",
    ):
        assert part in result.out


def test_a_dry_run_looks_at_every_file(world, tmp_path, run_script):  # noqa: F811
    root = write_gta5(tmp_path / "gta", count=8, size=(60, 44))
    label = root / "labels" / "00003.png"  # five others are looked at in any run
    label.write_bytes(b"text")
    result = run_script(train_procst, *training_flags(world, tmp_path, src_data_dir=root), "--dry_run")
    assert result.code == 2
    assert "1 of 8 files" in result.err
    assert str(label) in result.err


def test_a_dry_run_without_space_for_the_checkpoints(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    monkeypatch.setattr(dry_run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = run_script(train_procst, *training_flags(world, tmp_path), "--dry_run")
    assert result.code == 2
    assert "too little space for the checkpoints" in result.err


def test_space_on_one_disk_and_of_what_is_there(tmp_path, monkeypatch):
    for name, size in (("latest.pth", 60), ("previous.pth", 20), ("damaged.pth", 1000), ("config.json", 1000)):
        (tmp_path / name).write_bytes(bytes(size))
    assert dry_run_module.bytes_in(tmp_path) == 80
    assert dry_run_module.bytes_in(tmp_path / "new") == 0
    monkeypatch.setattr(dry_run_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    dry_run_module.require_space({"checkpoints": (tmp_path / "run", 60), "cache": (tmp_path / "cache", 40)})
    with pytest.raises(UserError, match="too little space for the cache"):
        dry_run_module.require_space({"checkpoints": (tmp_path / "run", 60), "cache": (tmp_path / "cache", 41)})


def test_a_dry_run_of_a_run_to_continue(world, tmp_path, run_script):  # noqa: F811
    assert run_script(train_procst, *training_flags(world, tmp_path)).code == 0
    before = snapshot(tmp_path)
    result = run_script(train_procst, "--continue_train_from_path", only_run(tmp_path), "--dry_run")
    assert result.code == 0, result.err
    assert snapshot(tmp_path) == before


def test_the_record_of_a_run(world, tmp_path, run_script):  # noqa: F811
    flags = training_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / "run", deterministic=())
    try:
        for _ in range(2):
            assert run_script(train_procst, *flags).code == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["compute"]["deterministic"] is True
    assert {"list of source images", "list of target images"} <= record["inputs"].keys()
    first, second = record["starts"]
    assert (first["scale"], first["step"]) == (0, 0)
    assert (second["scale"], second["step"]) == (2, 3)
    assert first["torch"] == torch.__version__
    assert first["device"] == "cpu"
    assert {"commit", "python", "torchvision", "system", "threads"} <= first.keys()


def test_no_commit_outside_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None


@pytest.mark.parametrize("seconds", [0.4, 59.0, 61.0, 3 * 3600 + 120])
def test_durations(seconds):
    shown = dry_run_module._duration(seconds)
    assert shown == {0.4: "0 s", 59.0: "1 min", 61.0: "1 min", 10920: "3 h 2 min"}[seconds]
