"""Ways to export faster: the same images from several processes, other compression, reduced precision."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import create_sit_dataset
import train_procst
from test_bad_input import check_refusal
from test_train_cli import export_flags, only_run, training_flags
from worlds import write_cityscapes, write_gta5

COUNT = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_gta5(root / "gta", count=COUNT, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=3, size=(64, 40), labels=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_procst.py", *map(str, training_flags(root, root, steps_per_scale=2))])
        train_procst.main()
    return root


def export(run_script, world, out, *flags):
    result = run_script(create_sit_dataset, *export_flags(only_run(world), world, out), *flags)
    assert result.code == 0, result.err
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())}


def test_several_processes_write_the_same_images(world, tmp_path, run_script):
    alone = export(run_script, world, tmp_path / "alone")
    shared = export(run_script, world, tmp_path / "shared", "--gpus", "cpu", "cpu")
    assert len(alone) == COUNT
    assert alone.keys() == shared.keys()
    assert all(np.array_equal(pixels, shared[name]) for name, pixels in alone.items())


def test_an_error_in_one_of_several_processes(world, tmp_path, run_script):
    source = tmp_path / "gta"
    write_gta5(source, count=4, size=(60, 44))
    (source / "images/00002.png").write_bytes(b"no image")
    flags = export_flags(only_run(world), world, tmp_path / "sit")
    result = run_script(create_sit_dataset, *flags, "--src_data_dir", source, "--gpus", "cpu", "cpu")
    check_refusal(result, "00002.png", "--skip_created_files")
    assert {path.name for path in (tmp_path / "sit/images").iterdir()} >= {"00001.png", "00003.png"}


def test_compression_changes_the_files_and_not_the_pixels(world, tmp_path, run_script):
    fast = export(run_script, world, tmp_path / "fast", "--png_compression", "0")
    small = export(run_script, world, tmp_path / "small", "--png_compression", "9", "--encoders", "3")
    assert all(np.array_equal(pixels, small[name]) for name, pixels in fast.items())
    sizes = [sum(path.stat().st_size for path in (tmp_path / name / "images").iterdir()) for name in ("fast", "small")]
    assert sizes[0] > sizes[1]


def test_bf16_moves_pixels_by_little(world, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr("core.execution.computes_in_bf16", lambda device: True)
    exact = export(run_script, world, tmp_path / "exact")
    rounded = export(run_script, world, tmp_path / "rounded", "--precision", "bf16")
    differences = np.concatenate([(exact[n].astype(int) - rounded[n].astype(int)).ravel() for n in exact])
    assert 0 < np.abs(differences).max() <= 3
    assert np.abs(differences).mean() < 0.5


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (("--png_compression", "10"), ("--png_compression", "10")),
        (("--png_compression", "-1"), ("--png_compression",)),
        (("--encoders", "0"), ("--encoders",)),
        (("--gpus", "0", "0"), ("--gpus",)),
        (("--gpus", "cpu", "99"), ("--gpus", "99")),
        (("--precision", "tf32"), ("--precision tf32",)),
    ],
)
def test_bad_flags(world, tmp_path, run_script, flags, parts):
    result = run_script(create_sit_dataset, *export_flags(only_run(world), world, tmp_path / "sit"), *flags)
    check_refusal(result, *parts)
    assert not (tmp_path / "sit").exists()
