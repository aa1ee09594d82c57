"""Which folder a run works in: its own, and no other process's."""

from __future__ import annotations

import multiprocessing

from core.checkpoint import load_checkpoint
from core.run_folder import log_name

import train_procst
from faults import one_line, run_flags, world  # noqa: F401
from utils.files import atomic_write_bytes
from utils.locks import claimed


def test_a_folder_with_other_files_is_no_run(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"x")
    assert "--run_dir" in one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    assert [path.name for path in folder.iterdir()] == ["holiday.jpg"]


def test_a_run_in_use_is_left_alone(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with claimed(folder, "--run_dir"):
            ready.set()
            done.wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert ready.wait(30)
        line = one_line(run_script(train_procst, *run_flags(world, tmp_path)))
    finally:
        done.set()
        other.join()
    assert "another process" in line
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_what_a_kill_in_the_first_write_leaves_is_no_other_file(world, tmp_path, run_script):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".latest.pth.x1.procst-tmp", ".config.json.x2.procst-tmp", "config.json", ".lock"):
        (folder / name).write_bytes(b"{")
    assert run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)).code == 0
    assert not list(folder.glob(".*.procst-tmp"))


def test_a_run_that_went_on_meanwhile_is_left_alone(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    assert run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)).code == 0
    latest = tmp_path / "run" / "latest.pth"

    def and_another_saves(path):
        state = load_checkpoint(path)
        atomic_write_bytes(latest, latest.read_bytes())
        return state

    monkeypatch.setattr(train_procst, "load_checkpoint", and_another_saves)
    assert "meanwhile" in one_line(run_script(train_procst, *run_flags(world, tmp_path, steps_per_scale=1)))


def test_logs_of_runs_named_alike_are_apart(tmp_path):
    names = {log_name(tmp_path / name) for name in ("a/run", "b/run", "c/2026-11-21_10-00-00_gta5_to_cityscapes")}
    assert len(names) == 3
    assert "2026-11-21_10-00-00_gta5_to_cityscapes" in names
