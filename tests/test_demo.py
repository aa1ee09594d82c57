"""The demo's command lines are ones the scripts accept; the demo itself takes minutes and is run by `make demo`."""

from __future__ import annotations

import shlex

import make_demo
from core.config import ProCSTConfig
from training.flags import build_parser, parse
from uda.config import SourceTrainingConfig
from worlds import noise_image


def configuration(kind, *line):
    given = parse(build_parser("", kind.groups), ["--gpus", "cpu", *line])
    kind.check_given(given)
    return kind.from_flags(given)


def test_flags_of_the_demo():
    net = configuration(SourceTrainingConfig, *shlex.split(make_demo.SEGMENTATION))
    run = configuration(ProCSTConfig, *shlex.split(make_demo.TRAINING), "--semseg_weights", "net.pth")
    assert run.net.shape() == net.net.shape()
    assert net.source.crop_size == run.source.crop_size == (128, 64)


def test_the_demo_never_replaces_a_folder_it_did_not_make(tmp_path, run_script):
    noise_image((20, 10), 0).save(tmp_path / "holiday.png")
    result = run_script(make_demo, "--out", tmp_path)
    assert result.code == 2
    assert "something else" in result.err
    assert (tmp_path / "holiday.png").exists()
