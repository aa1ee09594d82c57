"""Folders of very many files: work for each name is counted, not timed, and no file is looked at before its turn."""

from __future__ import annotations

import builtins
import os
import sys

import pytest

import train_procst
from commands import procst_flags
from core.procst import ProCST
from data_handlers.datasets import DATA_SETS
from data_handlers.lists import list_images, missing_labels, require_labels
from utils.files import TEMPORARY, remove_leftovers
from worlds import write_cityscapes, write_gta5

COUNT = 3000
CALLS = 35  # of functions, for each name; with a path object for each it would be over a hundred


@pytest.fixture
def world(tmp_path):
    """Names alone; the few files that are looked at are whole."""
    write_gta5(tmp_path / "gta", names=[f"{k:05d}" for k in (*range(0, COUNT, COUNT // 5), COUNT - 1)], size=(60, 44))
    for folder in ("images", "labels"):
        for k in range(COUNT):
            (tmp_path / "gta" / folder / f"{k:05d}.png").touch()
    return tmp_path


class Counter:
    """What is asked of the file system, and how many functions are called."""

    def __init__(self, monkeypatch):
        self.asked, self.listed, self.calls = [], [], 0
        for module, name in ((os, "stat"), (os, "lstat"), (os, "open"), (os, "access"), (builtins, "open")):
            monkeypatch.setattr(module, name, self._noting(self.asked, getattr(module, name)))
        for name in ("scandir", "listdir"):
            monkeypatch.setattr(os, name, self._noting(self.listed, getattr(os, name)))

    def _noting(self, log, function):
        def noting(*arguments, **options):
            log.append(str(arguments[0]) if arguments else "")
            return function(*arguments, **options)

        return noting

    def __enter__(self):
        def count(_frame, event, _argument):
            self.calls += event in ("call", "c_call")

        sys.setprofile(count)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def check(self):
        asked = [path for path in self.asked if path.endswith(".png")]
        assert not asked, asked[:5]
        assert len(self.listed) <= 4, self.listed
        assert self.calls < CALLS * COUNT


def a_list(world):
    (world / "list.txt").write_text("".join(f"{k:05d}.png\n" for k in range(COUNT)))
    return list_images(DATA_SETS["gta5"], world / "gta", "--src", list_file=str(world / "list.txt"))


@pytest.mark.parametrize(
    "work",
    [
        lambda world: list_images(DATA_SETS["gta5"], world / "gta", "--src"),
        lambda world: list_images(DATA_SETS["folder"], world / "gta/images", "--src"),
        lambda world: require_labels(list_images(DATA_SETS["gta5"], world / "gta", "--src"), "--src"),
        a_list,
        lambda world: remove_leftovers(world / "gta/images"),
    ],
    ids=["list", "folder", "labels", "list file", "leftovers"],
)
def test_no_file_is_asked_for_by_its_name(world, monkeypatch, work):
    with monkeypatch.context() as patch, Counter(patch) as counter:
        work(world)
    counter.check()


def test_a_training_opens_a_handful_of_files_before_it_starts(world, run_script, monkeypatch):
    """All but a few files are empty, so that the run ends with a message as soon as it reads any other."""
    write_cityscapes(world / "cityscapes", count=3, size=(64, 40), labels=False)

    def started(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ProCST, "begin_stage", started)
    with monkeypatch.context() as patch:
        counter = Counter(patch)
        result = run_script(train_procst, *procst_flags(world, world / "out"))
    assert result.code == 130, result.err
    assert 8 <= len({path for path in counter.asked if path.endswith(".png")}) <= 16


def test_the_order_is_that_of_the_names_whatever_the_folder_says(world):
    files = list_images(DATA_SETS["gta5"], world / "gta", "--src")
    assert files.images == tuple(f"images/{k:05d}.png" for k in range(COUNT) if k not in (15188, 17705))
    assert files.fingerprint() == a_list(world).fingerprint()
    assert not missing_labels(files)


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    for name in (f".a.png.x{TEMPORARY}", ".hidden", "a.png", f"b{TEMPORARY}"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "missing")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "a.png", f"b{TEMPORARY}"]
