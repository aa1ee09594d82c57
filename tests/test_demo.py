"""The demo's command lines are ones the scripts accept; the demo itself takes minutes and is run by `make demo`."""

from __future__ import annotations

import shlex

import make_demo
import train_semseg_on_source
from core import command_line
from utils.flags import parse_flags


def test_flags_of_the_demo():
    line = ["--gpus", "cpu", *shlex.split(make_demo.SEGMENTATION)]
    net = train_semseg_on_source.config_from_flags(*parse_flags(train_semseg_on_source.build_parser(), line))
    line = ["--gpus", "cpu", *shlex.split(make_demo.TRAINING), "--semseg_weights", "net.pth"]
    run = command_line.config_from_flags(*parse_flags(command_line.build_parser(""), line))
    assert run.semseg.shape() == net.shape
    assert (net.crop_size, run.data.crop_size) == ((128, 64), (128, 64))
