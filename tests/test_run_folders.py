"""Which folder a run works in: its own, and no other process's."""

from __future__ import annotations

import time

import pytest

import train_procst
from commands import procst_flags
from processes import in_use
from refusals import check_refusal
from training.run_folder import log_name, new_run_folder


@pytest.fixture
def flags(world, tmp_path):
    """A short run in `run`."""
    short = {"num_scales": 0, "batch_size_list": 2, "steps_per_scale": 1}
    return procst_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / "run", **short)


def test_a_folder_with_other_files_is_no_run(flags, tmp_path, run_script):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"x")
    check_refusal(run_script(train_procst, *flags), "--run_dir", "holds files, but no checkpoint")
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


@pytest.mark.processes
def test_a_run_in_use_is_left_alone(flags, tmp_path, run_script):
    folder = tmp_path / "run"
    folder.mkdir()
    with in_use(folder):
        result = run_script(train_procst, *flags)
    check_refusal(result, "another process")
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_kill_in_the_first_write_leaves_is_no_other_file(flags, tmp_path, run_script):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".latest.pth.x1.procst-tmp", ".config.json.x2.procst-tmp", "config.json", ".lock"):
        (folder / name).write_bytes(b"{")
    assert run_script(train_procst, *flags).code == 0
    assert not list(folder.glob(".*.procst-tmp"))


def test_runs_of_one_second_have_their_own_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "2026-11-21_10-00-00")
    names = [new_run_folder(tmp_path, "gta5_to_cityscapes").name for _ in range(3)]
    assert names == [f"2026-11-21_10-00-00_gta5_to_cityscapes{end}" for end in ("", "_2", "_2_2")]


def test_logs_of_runs_named_alike_are_apart(tmp_path):
    names = {log_name(tmp_path / name) for name in ("a/run", "b/run")}
    assert len(names) == 2
    assert all(name.startswith("run_") for name in names)
