"""Bad input to every script: exit code 2, one line that names the flag or the file, no traceback, nothing written."""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train_procst
import train_semseg_on_source
from bad_cases import CASES, train
from commands import only_run, procst_flags, source_flags
from conftest import ScriptResult
from data_handlers.images import read_image, read_pixels
from hostile_files import BAIT, Command, jpeg
from nets import save_net, write_vgg
from refusals import check_refusal, tree
from worlds import noise_image, write_cityscapes, write_gta5, write_synthia

REPOSITORY = Path(__file__).parent.parent
CAPABILITY_VERSION, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 0x20080522, 1, 2


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Data sets, weights, lists, a run of each training: what the cases spoil copies of."""
    root = tmp_path_factory.mktemp("template")
    write_gta5(root / "gta", count=4, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=3, size=(64, 40), labels=False)
    write_cityscapes(root / "cityscapes", count=2, size=(64, 40), split="val")
    write_synthia(root / "synthia", count=2)
    (root / "list.txt").write_text("00002.png\n")
    (root / "all.txt").write_text("".join(f"0000{k}.png\n" for k in range(1, 5)))
    (root / "empty.txt").write_text("\n")
    save_net(root / "net.pth")
    write_vgg(root / "vgg.pth", last_conv=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for script, name, flags in (
            (train_procst, "run", procst_flags(Path(), Path("made"), steps_per_scale=1)),
            (train_semseg_on_source, "source_run", source_flags(Path(), Path("made"), num_steps=1, output="")),
        ):
            patch.setattr("sys.argv", [f"{script.__name__}.py", *map(str, flags)])
            script.main()
            only_run(root / "made").rename(root / name)
            (root / name / "previous.pth").unlink()  # it would stand in for a damaged latest.pth
    shutil.rmtree(root / "made")
    return root


@pytest.fixture(scope="module")
def sound(template, tmp_path_factory):
    """A copy of everything in a folder with spaces and letters of two scripts, in which nothing is spoilt."""
    return copied(template, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def world(template, tmp_path, monkeypatch):
    """Another such copy, to be spoilt; it is the working folder."""
    root = copied(template, tmp_path)
    monkeypatch.chdir(root)
    yield root
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            if not os.path.islink(path):
                os.chmod(path, 0o755)  # pytest must be able to delete what a case locked


def copied(template, folder):
    """Copy everything, and let the stored paths of the runs name the copied data."""
    root = shutil.copytree(template, folder / "wörld with späces 日本")
    for checkpoint in root.glob("*run/latest.pth"):
        content = torch.load(checkpoint, weights_only=True)
        for section in content["config"].values():
            for name, value in section.items():
                if isinstance(value, str):
                    section[name] = value.replace(str(template), str(root))
        torch.save(content, checkpoint)
    return root


def drop_the_rights_of_root():
    """Permissions then bind this process even if it is run by root."""
    libc = ctypes.CDLL(None)
    header, data = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    data[0] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)  # of those in effect, 0 to 31
    assert libc.capset(header, data) == 0


def run_process(script, flags, folder):
    """Run a script as a shell would, but in a process that has imported everything."""

    def run():
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
        sys.__stderr__ = sys.stderr
        sys.argv = [f"{script}.py", *map(str, flags)]
        torch.set_num_threads(1)
        drop_the_rights_of_root()
        runpy.run_path(str(REPOSITORY / f"{script}.py"), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(300)
    return ScriptResult(process.exitcode, (folder / "out").read_text(), (folder / "err").read_text())


def marked(case):
    return pytest.param(case, id=str(case), marks=[pytest.mark.processes] if case.own_process else [])


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_bad_input(request, run_script, tmp_path_factory, monkeypatch, case):
    world = request.getfixturevalue("world" if case.spoil else "sound")
    monkeypatch.chdir(world)
    if case.spoil:
        case.spoil(world)
    before = tree(world.parent)
    if case.own_process:
        result = run_process(case.script, case.flags, tmp_path_factory.mktemp("printed"))
    else:
        result = run_script(importlib.import_module(case.script), *case.flags)
    check_refusal(result, *case.parts)
    assert tree(world.parent) == before


def test_every_script_is_among_the_cases_and_is_once_run_as_a_process():
    scripts = {path.stem for path in REPOSITORY.glob("*.py")}
    assert {case.script for case in CASES} == scripts
    assert {case.script for case in CASES if case.own_process} == scripts
    assert len({str(case) for case in CASES}) == len(CASES)


def test_the_bait_is_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call, arguments = Command().__reduce__()
    call(*arguments)
    assert (tmp_path / BAIT).exists()


def test_good_input_is_not_refused(world, run_script):
    """The command lines of the cases are sound where nothing is spoilt."""
    for case in CASES:
        if case.script in ("create_sit_dataset", "evaluate", "measure_domain_distance") and case.own_process:
            result = run_script(importlib.import_module(case.script), *case.flags)
            assert result.code == 0, result.err


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_an_image_that_turns_out_to_be_cut_short_in_the_training(world, run_script, workers):
    """It is not among the few that are read before, so a run folder has been made."""
    for k in range(5, 9):
        noise_image((60, 44), k).save(world / f"gta/images/{k:05d}.png")
        shutil.copy(world / "gta/labels/00001.png", world / f"gta/labels/{k:05d}.png")
    path = world / "gta/images/00003.png"
    path.write_bytes(path.read_bytes()[:900])
    result = run_script(train_procst, *train(batch_size_list=(4, 2, 1), num_workers=workers))
    check_refusal(result, path, "truncated", "--on_bad_image skip")


def test_a_jpeg_called_png_is_read_by_what_it_is(tmp_path):
    jpeg(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "JPEG"
    assert read_image(tmp_path / "a.png").size == (60, 44)
    assert read_pixels(tmp_path / "a.png").shape == (44, 60, 3)
