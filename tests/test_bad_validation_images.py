"""Images that cannot be used, among those that a training is validated on."""

from __future__ import annotations

import json
import shutil

import pytest
from torch import nn

import train_procst
import train_semseg_on_source
from commands import label_flags, only_run, source_flags
from data_handlers.datasets import DATA_SETS
from data_handlers.images import PROCST_INPUT
from data_handlers.lists import list_images
from refusals import check_refusal
from training.distributed import Rank
from training.validation import Validator
from utils.errors import UserError


@pytest.fixture
def spoilt(world, tmp_path):
    """A copy of the world in which the last source image and a validation image of the target are cut short."""
    root = shutil.copytree(world, tmp_path / "world")
    source = max((root / "gta" / "images").iterdir())
    target = max((root / "cityscapes" / "leftImg8bit" / "val").rglob("*.png"))
    for path in (source, target):
        path.write_bytes(path.read_bytes()[:200])
    return root, source, target


def validator(root, skip):
    files = list_images(DATA_SETS["cityscapes"], root, "--data_dir", split="val", training=False)
    return Validator(
        files=files, with_labels=True, select_by="miou", classes=range(19), num_classes=19, num_workers=0, rank=Rank(),
        skip_unusable=skip,
    )  # fmt: skip


def linear_net():
    net = nn.Conv2d(3, 19, 3, padding=1)
    net.network_input = PROCST_INPUT
    return net


def test_the_others_are_validated(world, spoilt):
    root, _, bad = spoilt
    net = linear_net()
    with pytest.raises(UserError, match="--on_bad_image skip"):
        validator(root / "cityscapes", skip=False)(net)
    found = validator(root / "cityscapes", skip=True)(net)
    assert len(found.skipped) == 1
    assert found.skipped[0].startswith(str(bad))
    labels = bad.parents[3] / "gtFine" / "val"
    bad.unlink()
    next(labels.rglob(bad.name.replace("_leftImg8bit", "_gtFine_labelIds"))).unlink()
    assert validator(root / "cityscapes", skip=False)(net).scores == found.scores
    assert not validator(world / "cityscapes", skip=True)(net).skipped


def test_none_can_be_used(spoilt):
    root, _, _ = spoilt
    for path in (root / "cityscapes" / "leftImg8bit" / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 validation images"):
        validator(root / "cityscapes", skip=True)(linear_net())


def test_a_source_training_continues_without_them(spoilt, tmp_path, run_script):
    root, bad, _ = spoilt
    flags = source_flags(root, tmp_path, num_steps=4)
    check_refusal(run_script(train_semseg_on_source, *flags), bad)
    result = run_script(train_semseg_on_source, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    assert str(bad) in result.out[result.out.index("were skipped:") :]
    assert (tmp_path / "source.pth").exists()


def test_procst_continues_without_them(spoilt, tmp_path, run_script, source_net):
    root, bad_source, bad_target = spoilt
    flags = label_flags(root, tmp_path, source_net, num_scales=0, batch_size_list=3)
    check_refusal(run_script(train_procst, *flags), bad_target)
    result = run_script(train_procst, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    listed = result.out[result.out.index("were skipped:") :]
    assert str(bad_source) in listed
    assert str(bad_target) in listed
    found = json.loads((only_run(tmp_path) / "validations.json").read_text())
    assert all(validation["miou"] is not None for validation in found)
