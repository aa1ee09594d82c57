"""Nets of segmentation_models_pytorch: sizes, pixels, weights, names, and training and scoring through the scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate as evaluate_script
import train_semseg_on_source as train_script
from commands import command
from data_handlers.images import IMAGENET_INPUT
from models.segmentation import build_segmentation_net, load_backbone, parameter_groups
from models.shapes import SMP_ENCODERS, SMP_MODELS, SegmentationShape
from refusals import check_refusal, check_refused
from training.segmentation_files import load_segmentation_net
from worlds import write_gta5

smp = pytest.importorskip("segmentation_models_pytorch")
ROOT = Path(__file__).parent.parent


def made(model="Segformer", backbone="mit_b0", classes=5):
    torch.manual_seed(0)
    return build_segmentation_net(SegmentationShape(f"smp:{model}", backbone, classes)).eval()


def test_the_names_are_the_packages():
    assert sorted(SMP_ENCODERS) == sorted(smp.encoders.get_encoder_names())
    ours = {name.removeprefix("smp:").lower() for name in SMP_MODELS}
    assert ours == set(smp.MODEL_ARCHITECTURES_MAPPING)


@pytest.mark.parametrize("model", [name.removeprefix("smp:") for name in SMP_MODELS])
@torch.no_grad()
def test_any_size_is_taken(model):
    net = made(model, "tu-vit_tiny_patch16_224" if model == "DPT" else "resnet18")
    for size in ((16, 16), (33, 49), (64, 32)):
        assert net(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@torch.no_grad()
def test_images_are_padded_and_the_padding_is_cropped():
    net, image = made(), torch.randn(2, 3, 33, 50)
    padded = torch.zeros(2, 3, 64, 64)
    padded[..., :33, :50] = image
    torch.testing.assert_close(net(image), net.model(padded)[..., :33, :50])
    fitting = torch.randn(1, 3, 64, 96)
    assert torch.equal(net(fitting), net.model(fitting))


def test_pixels_are_those_of_the_encoder():
    assert made().network_input == IMAGENET_INPUT
    black = torch.zeros(1, 1, 1, 3, dtype=torch.uint8)
    for backbone, expected in (("xception", -1.0), ("dpn68", -124 * 0.0167), ("tu-resnet18", -0.485 / 0.229)):
        assert made("Unet", backbone).network_input(black)[0, 0, 0, 0].item() == pytest.approx(expected)


def test_the_head_learns_ten_times_as_fast():
    net = made("Unet", "resnet18")
    slow, fast = parameter_groups(net, 0.5)
    assert (slow["lr"], fast["lr"]) == (0.5, 5.0)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in slow["params"]} == {"encoder"}
    assert {names[id(p)].split(".")[1] for p in fast["params"]} == {"decoder", "segmentation_head"}
    assert len(slow["params"]) + len(fast["params"]) == len(names)


def test_weights_of_a_file_and_of_the_package(tmp_path, monkeypatch):
    other, net = made("Unet", "resnet18"), made("Unet", "resnet18")
    for value in other.backbone.parameters():
        value.data.uniform_(-1, 1)
    torch.save(other.backbone.state_dict(), tmp_path / "encoder.pth")
    assert load_backbone(net, "resnet18", str(tmp_path / "encoder.pth")) == ""
    assert all(torch.equal(v, net.backbone.state_dict()[n]) for n, v in other.backbone.state_dict().items())
    make = Mock(return_value=other.model)
    monkeypatch.setattr(smp, "create_model", make)
    net = build_segmentation_net(SegmentationShape("smp:Unet", "resnet18"))
    assert "resnet18 (imagenet)" in load_backbone(net, "resnet18", "imagenet")
    assert [call.kwargs["encoder_weights"] for call in make.mock_calls] == [None, "imagenet"]
    make.side_effect = OSError("no\nroute")
    check_refused(lambda: load_backbone(net, "resnet18", "imagenet"), "resnet18", "no", "--no_pretrained_backbone")


def test_unknown_names_are_refused_with_the_closest_first():
    parts = ("--model Segformer: no such net; there are smp:Segformer, ", "DeepLabV2")
    check_refused(lambda: SegmentationShape("Segformer", "mit_b0"), *parts)
    parts = ("--backbone mit-b2: smp:Unet is built on mit_b2, mit_b5, ", "resnet18")
    check_refused(lambda: SegmentationShape("smp:Unet", "mit-b2"), *parts)
    check_refused(lambda: SegmentationShape("DeepLab", "tu-resnet18"), "--backbone tu-resnet18")
    check_refused(lambda: made("Unet", "tu-resnet81"), "--backbone tu-resnet81", "no such net")
    check_refused(lambda: made("Linknet"), "--model smp:Linknet --backbone mit_b0", "no such net")
    net = made("DeepLabV3", "resnet18").train()
    check_refused(lambda: net(torch.zeros(1, 3, 32, 32)), "--batch_size", "smp:DeepLabV3 on resnet18")


@pytest.mark.parametrize(
    ("flag", "typo", "answer"),
    [
        ("--model", "smp:Segfromer", "no such net; there are smp:Segformer, "),
        ("--backbone", "mit-b2", "DeepLabV2 is built on resnet101"),
    ],
)
def test_a_typo_is_answered(flag, typo, answer):
    code = """import sys, train_procst
try: train_procst.main()
except Exception as error: print(error, sys.modules.keys() & {"timm"})"""
    words = [sys.executable, "-c", code, flag, typo]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{flag} {typo}: {answer}")
    assert found.stdout.endswith(" set()\n")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "backbone"), [("smp:Segformer", "mit_b0"), ("smp:Unet", "resnet18")])
def test_training_and_scoring(run_script, tmp_path, model, backbone):
    write_gta5(tmp_path / "gta", count=5)
    flags = {
        "src_data_dir": tmp_path / "gta", "val_count": 2, "model": model, "backbone": backbone, "src_resize": (48, 32),
        "backbone_weights": "random", "crop_size": (40, 24), "batch_size": 2, "num_steps": 1,
        "run_dir": tmp_path / "run",
        "output": tmp_path / "net.pth", "tb_logs_dir": tmp_path / "tb", "gpus": "cpu", "num_workers": 0,
    }  # fmt: skip
    result = run_script(train_script, *map(str, command(flags)))
    assert result.code == 0, result.err
    shape, net = load_segmentation_net(tmp_path / "net.pth", "net")  # reads tensors and plain values alone
    assert (str(shape), shape.flags("gta5")[:2]) == (f"{model} on {backbone} with 19 classes", ["--model", model])
    scored = {
        "weights": tmp_path / "net.pth", "data_set": "gta5", "data_dir": tmp_path / "gta", "val_count": 1,
        "gpus": "cpu", "num_workers": 0, "save_predictions": tmp_path / "saved", "prediction_format": "trainids",
    }  # fmt: skip
    result = run_script(evaluate_script, *map(str, command(scored)))
    assert result.code == 0, result.err
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "gta/images/00005.png")))[None]
    image = F.pad(net.network_input(pixels), (0, 16, 0, 0))
    with torch.no_grad():
        expected = net.model(image)[0, :, :, :48].argmax(0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "saved/images/00005.png")), expected)


def test_a_missing_package_is_one_line(run_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    check_refused(lambda: made(), "--model smp:", "segmentation_models_pytorch is not installed", "make env")
    write_gta5(tmp_path / "gta", count=4)
    flags = {"src_data_dir": tmp_path / "gta", "val_count": 1, "model": "smp:Unet", "run_dir": tmp_path / "run",
             "output": "", "gpus": "cpu"}  # fmt: skip
    check_refusal(run_script(train_script, *map(str, command(flags))), "segmentation_models_pytorch")
    assert not (tmp_path / "run").exists()
