"""The demo's command lines are ones the scripts accept; the demo itself takes minutes and is run by `make demo`."""

from __future__ import annotations

import shlex

import pytest
import torch

import make_demo
from core.config import ProCSTConfig
from data_handlers.toy.files import draw_frame
from models.vgg import build_vgg
from training.flags import build_parser, parse
from uda.config import SourceTrainingConfig
from utils.errors import UserError
from worlds import noise_image


def configuration(kind, *line):
    given = parse(build_parser("", kind.groups), ["--gpus", "cpu", *line])
    kind.check_given(given)
    return kind.from_flags(given)


def test_flags_of_the_demo():
    flags = (*shlex.split(make_demo.SEGMENTATION), "--src_resize", *make_demo.SOURCE_SIZE)
    net = configuration(SourceTrainingConfig, *flags)
    run = configuration(ProCSTConfig, *shlex.split(make_demo.TRAINING))
    size = tuple(map(int, make_demo.SIZE))
    assert net.source.crop_size == run.source.crop_size == run.target.trg_resize == size


def test_the_perceptual_net_of_the_demo():
    """It is small, reaches the layers that the demo uses, and tells more from a frame's things than from its tint."""
    run = configuration(ProCSTConfig, *shlex.split(make_demo.TRAINING))
    assert make_demo.FEATURES.stat().st_size < 2_000_000
    layers = (*run.loss.content_layers, *run.loss.style_layers)
    net = build_vgg(run.loss.vgg_weights, layers)
    frames = [torch.from_numpy(draw_frame("gta5", 7, "train", k, (96, 48))[0]) for k in range(8)]
    images = torch.stack(frames).permute(0, 3, 1, 2) / 127.5 - 1
    features, tinted = net(images), net((0.7 * images + 0.2).clamp(-1, 1))
    for layer in run.loss.content_layers:
        assert 0.5 < features[layer].square().mean() < 2
        changed = (features[layer] - tinted[layer]).square().mean()
        others = (features[layer] - features[layer].roll(1, 0)).square().mean()
        assert changed < 0.25 * others


def test_the_gap_that_an_arm_closes():
    scores = {"source": [20.0, 24.0], "histogram": [22.0, 22.0], "sit": [40.0, 42.0], "oracle": [60.0, 60.0]}
    assert [make_demo.closed(scores, arm) for arm in make_demo.ARMS] == [0, 0, 50, 100]


def test_a_command_that_fails_ends_the_others(tmp_path):
    run = make_demo.Commands(tmp_path)
    toy = ("make_toy_data.py", "--domain", "gta5", "--out", str(tmp_path / "toy"), "--size", "32", "16")
    jobs = [lambda: run("bad", *toy, "--count", "0"), lambda: run("endless", *toy, "--count", "99999")]
    with pytest.raises(UserError, match=r"make_toy_data.py failed .*bad.log.*--count is 0"):
        make_demo.two_at_a_time([*jobs, lambda: run("never", *toy)])
    assert not run.running
    assert not (tmp_path / "never.log").exists() or not (tmp_path / "never.log").read_bytes()


def test_the_demo_never_replaces_a_folder_it_did_not_make(tmp_path, run_script):
    noise_image((20, 10), 0).save(tmp_path / "holiday.png")
    result = run_script(make_demo, "--out", tmp_path)
    assert result.code == 2
    assert "something else" in result.err
    assert (tmp_path / "holiday.png").exists()
