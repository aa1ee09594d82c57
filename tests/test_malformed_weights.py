"""Weights files that are nearly right: refused in one line, never by a traceback, never scored."""

from __future__ import annotations

import pytest
import torch

import evaluate
from core.legacy import load_legacy_generators
from hostile_files import write_pickle
from models.segmentation import build_segmentation_net, load_backbone
from models.shapes import SegmentationShape
from refusals import check_refusal
from training.segmentation_files import load_segmentation_net
from utils.errors import UserError
from worlds import save_net, write_cityscapes, write_gta5

RESNET = b"csemseg_models.deeplabv2\nResNet101\n)\x81}"
PARALLEL = b"ctorch.nn.parallel.data_parallel\nDataParallel\n)\x81}"


@pytest.mark.parametrize(
    "payload",
    [
        RESNET + b"X\x0b\0\0\0_parameters]sb",
        RESNET + b"X\x08\0\0\0_modulesK\x05sb",
        RESNET + b"X\x08\0\0\0_modules}K\x01K\x02ssb",
        PARALLEL + b"X\x08\0\0\0_modules]sb",
        RESNET + b"sb"[1:],
    ],
)
def test_records_without_the_tables_of_a_module(tmp_path, payload):
    write_pickle(tmp_path / "semseg.pth", b"\x80\x02" + payload + b".")
    write_pickle(tmp_path / "Gst.pth", b"\x80\x02](" + payload + b"e.")
    for load, name in ((lambda path: load_segmentation_net(path, "--weights"), "semseg.pth"),
                       (load_legacy_generators, "Gst.pth")):  # fmt: skip
        with pytest.raises(UserError, match=name) as refusal:
            load(tmp_path / name)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, {"conv1.weight": 5}, {"classifier.0.weight": "x"}, [1], 3])
@pytest.mark.parametrize(("model", "backbone"), [("DeepLabV2", "resnet18"), ("VGG", "vgg16")])
def test_backbone_weights_that_are_no_state_dict(tmp_path, content, model, backbone):
    torch.save(content, tmp_path / "backbone.pth")
    with torch.device("meta"):
        net = build_segmentation_net(SegmentationShape(model, backbone, 19))
    with pytest.raises(UserError, match=r"--backbone_weights.*backbone\.pth") as refusal:
        load_backbone(net, backbone, str(tmp_path / "backbone.pth"))
    assert "\n" not in str(refusal.value)


@pytest.fixture
def unet(tmp_path):
    """State of a UNet, and how it is saved."""
    shape = SegmentationShape("UNet", "none", 19)
    state = build_segmentation_net(shape).state_dict()

    def save(name, **changes):
        return save_net(tmp_path / name, shape, {**state, **changes})

    return save


def evaluation(world, weights, *flags):
    return ("--gpus", "cpu", "--weights", weights, "--num_workers", 0, *flags)


def test_predictions_that_are_not_finite_are_not_scored(tmp_path, run_script, unet):
    """Huge but finite weights: every weight passes, and the logits overflow."""
    write_cityscapes(tmp_path / "cityscapes", count=2, split="val")
    weights = unet("huge.pth", **{"head.classify.weight": torch.full((19, 16, 1, 1), 3e38)})
    flags = ("--data_dir", tmp_path / "cityscapes", "--json", tmp_path / "out.json")
    check_refusal(run_script(evaluate, *evaluation(tmp_path, weights, *flags)), "not finite")
    assert not (tmp_path / "out.json").exists()


def test_report_in_a_new_folder(tmp_path, run_script, unet):
    write_cityscapes(tmp_path / "cityscapes", count=2, split="val")
    report = tmp_path / "new" / "folder" / "out.json"
    flags = ("--data_dir", tmp_path / "cityscapes", "--json", report)
    result = run_script(evaluate, *evaluation(tmp_path, unet("net.pth"), *flags))
    assert result.code == 0, result.err
    assert '"images": 2' in report.read_text()


def test_the_whole_of_a_small_set_can_be_scored(tmp_path, run_script, unet):
    write_gta5(tmp_path / "gta", count=3)
    flags = ("--data_set", "gta5", "--data_dir", tmp_path / "gta", "--val_count", 3)
    result = run_script(evaluate, *evaluation(tmp_path, unet("net.pth"), *flags))
    assert result.code == 0, result.err
    assert "gta5: 3 images" in result.out
