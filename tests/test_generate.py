"""generate_pseudo_labels.py: the labels of a round, what is continued, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import generate_pseudo_labels
import train_uda
from commands import command, failing_at
from data_handlers.classes import CLASS_COLOURS
from nets import save_net
from processes import in_use
from refusals import check_refusal, tree
from uda import labelling
from utils.locks import LOCK

pytestmark = pytest.mark.slow


def flags_for(world, net, output, **changes):
    flags = {
        "weights": net, "trg_data_dir": world / "cityscapes", "output": output, "test-scales": 48, "gpus": "cpu",
        "num_workers": 0,
    }  # fmt: skip
    return command(flags, changes)


@pytest.fixture
def labels(world, source_net, tmp_path, run_script):
    """The folder of an undisturbed pass."""
    result = run_script(generate_pseudo_labels, *flags_for(world, source_net, tmp_path / "labels"))
    assert result.code == 0, result.err
    line = result.out.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'labels'}: ")
    assert "% of the target's pixels labelled; " in line
    return tmp_path / "labels"


def files_of(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LOCK]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("policy", ["cb", "global"])
def test_they_are_those_of_a_round(world, source_net, tmp_path, run_script, policy):
    common = {"trg_data_dir": world / "cityscapes", "test_scales": 48, "gpus": "cpu", "num_workers": 0}
    training = command({
        **common, "method": "cbst" if policy == "cb" else "st", "init": source_net, "src_data_dir": world / "gta",
        "init_src_port": 0.34, "max_src_port": 0.34, "init_tgt_port": 0.3, "num_round": 1, "epoch_per_round": 1,
        "crop_size": 32, "run_dir": tmp_path / "run", "tb_logs_dir": tmp_path / "runs", "precision": "fp32",
    })  # fmt: skip
    result = run_script(train_uda, *training)
    assert result.code == 0, result.err
    flags = flags_for(world, source_net, tmp_path / "labels", **{"kc-policy": policy, "portion": 0.3})
    assert run_script(generate_pseudo_labels, *flags).code == 0
    assert files_of(tmp_path / "labels") == files_of(tmp_path / "run/pseudo_labels/round_0")


@pytest.mark.parametrize("calls", [2, 6, 10])
def test_a_killed_pass_continues(world, source_net, labels, tmp_path, run_script, monkeypatch, calls):
    flags = flags_for(world, source_net, tmp_path / "again")
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "confidence_map", failing_at(calls, labelling.confidence_map))
        assert run_script(generate_pseudo_labels, *flags).code == 2
    assert run_script(generate_pseudo_labels, *flags).code == 0
    assert files_of(tmp_path / "again") == files_of(labels)


def test_colours_come_into_a_folder_of_their_own(world, source_net, labels, run_script):
    before = files_of(labels)
    assert run_script(generate_pseudo_labels, *flags_for(world, source_net, labels, colours=())).code == 0
    assert files_of(labels) == before
    folder = labels.with_name(f"{labels.name}_colours")
    pictures = sorted(folder.rglob("*.png"))
    assert len(pictures) == 4
    picture = pictures[0]
    label = np.array(Image.open(labels / picture.relative_to(folder)))
    table = np.zeros((256, 3), np.uint8)
    table[:19] = CLASS_COLOURS
    np.testing.assert_array_equal(np.array(Image.open(picture)), table[label])


@pytest.mark.processes
def test_two_processes_write_the_same(world, source_net, labels, tmp_path):
    flags = flags_for(world, source_net, tmp_path / "two", gpus=("cpu", "cpu"))
    words = [sys.executable, generate_pseudo_labels.__file__, *map(str, flags)]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("% of the target's pixels labelled") == 1
    assert files_of(tmp_path / "two") == files_of(labels)


def test_the_output_may_be_a_link_and_has_one_writer(world, source_net, labels, tmp_path, run_script):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    flags = flags_for(world, source_net, tmp_path / "link")
    with in_use(tmp_path / "disk"):
        check_refusal(run_script(generate_pseudo_labels, *flags), "--output", "another process")
    assert run_script(generate_pseudo_labels, *flags).code == 0
    assert files_of(tmp_path / "disk") == files_of(labels)


def test_labels_of_something_else_are_not_replaced(world, source_net, labels, tmp_path, run_script):
    other = save_net(tmp_path / "other.pth")
    before = tree(labels)
    for changes in ({"portion": 0.3}, {"weights": other}, {"kc-policy": "global"}, {"mode": "reference"}):
        flags = flags_for(world, source_net, labels, **changes)
        check_refusal(run_script(generate_pseudo_labels, *flags), f"--output {labels} holds files", "another folder")
    assert tree(labels) == before


def test_an_image_that_cannot_be_used_is_refused_or_skipped(world, source_net, tmp_path, run_script):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / name)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    flags = flags_for(world, source_net, tmp_path / "out", target=tmp_path, trg_data_dir=None)
    check_refusal(run_script(generate_pseudo_labels, *flags), "a.png")
    result = run_script(generate_pseudo_labels, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    assert "skipped: " in result.out
    assert json.loads((tmp_path / "out/manifest.json").read_text())["labels"]["a.png"].keys() == {"skipped"}
