"""Bad input around the segmentation nets: one clear line, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from core.segmentation_files import SegmentationFile
from PIL import Image
from test_bad_input import check_refusal, tree

import train_procst
import train_semseg_on_source
from data_handlers.datasets import DataSet
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from test_label_training import label_flags, source_flags
from test_train_cli import only_run, training_flags
from utils.errors import run_cli
from worlds import write_cityscapes, write_gta5


def save_net(path, model="UNet", backbone="none", num_classes=19):
    shape = SegmentationShape(model, backbone, num_classes)
    SegmentationFile(shape, build_segmentation_net(shape).state_dict()).save(path)
    return path


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=4, size=(60, 44))
    write_cityscapes(tmp_path / "cityscapes", count=3, size=(64, 40), labels=False)
    write_cityscapes(tmp_path / "cityscapes", count=2, size=(64, 40), split="val")
    save_net(tmp_path / "net.pth")
    return tmp_path


def check_training_refused(run_script, world, *parts, **changes):
    before = tree(world)
    flags = label_flags(world, world / "out", world / "net.pth", **changes)
    check_refusal(run_script(train_procst, *flags), *parts)
    assert tree(world) == before


def check_source_training_refused(run_script, world, *parts, **changes):
    before = tree(world)
    check_refusal(run_script(train_semseg_on_source, *source_flags(world, world / "out", **changes)), *parts)
    assert tree(world) == before


def test_weights_of_another_architecture(run_script, world):
    save_net(world / "fcn.pth", "DeepLab", "resnet18")
    parts = ("fcn.pth", "DeepLab on resnet18", "--model DeepLab --backbone resnet18")
    check_training_refused(run_script, world, *parts, semseg_weights=world / "fcn.pth")


def test_weights_with_other_classes(run_script, world):
    save_net(world / "few.pth", num_classes=7)
    check_training_refused(run_script, world, "few.pth", "--num_classes 7", semseg_weights=world / "few.pth")


def test_classes_that_do_not_cover_the_labels(run_script, world):
    save_net(world / "few.pth", num_classes=7)
    changes = {"semseg_weights": world / "few.pth", "num_classes": 7}
    check_training_refused(run_script, world, "--num_classes is 7", "gta5", "0..18", **changes)
    check_source_training_refused(run_script, world, "--num_classes is 7", "gta5", "0..18", num_classes=7)


def test_weights_that_are_something_else(run_script, world):
    torch.save({"conv.weight": torch.zeros(3)}, world / "state.pth")
    check_training_refused(run_script, world, "state.pth", "segmentation net", semseg_weights=world / "state.pth")
    (world / "text.pth").write_text("not weights")
    check_training_refused(run_script, world, "text.pth", semseg_weights=world / "text.pth")
    (world / "empty").mkdir()
    check_training_refused(run_script, world, "empty", "no run folder", semseg_weights=world / "empty")
    state = build_segmentation_net(SegmentationShape("UNet", "none", 19)).state_dict()
    state["head.classify.bias"] = torch.full((19,), float("nan"))
    SegmentationFile(SegmentationShape("UNet", "none", 19), state).save(world / "nan.pth")
    check_training_refused(run_script, world, "nan.pth", "not finite", semseg_weights=world / "nan.pth")


def test_missing_weights_say_how_to_get_them(run_script, world):
    parts = ("nowhere.pth", "--semseg_weights", "train_semseg_on_source.py", "--model UNet", "--no_semseg")
    check_training_refused(run_script, world, *parts, semseg_weights=world / "nowhere.pth")


def test_selection_by_miou_needs_target_labels(run_script, world):
    shutil.rmtree(world / "cityscapes/gtFine")
    check_training_refused(run_script, world, "--select_by miou", "label_free", select_by="miou")


def test_some_target_labels_missing(run_script, world):
    next((world / "cityscapes/gtFine/val").rglob("*1_000019_gtFine_labelIds.png")).unlink()
    check_training_refused(run_script, world, "--trg_data_dir", "1 of the 2 val images have no label")
    for changes in ({"select_by": "none", "validation_rate": None}, {"select_by": "label_free"}):
        flags = label_flags(world, world / changes["select_by"], world / "net.pth", **changes)
        assert run_script(train_procst, *flags).code == 0


def test_validation_rate_without_validation(run_script, world):
    shutil.rmtree(world / "cityscapes/gtFine")
    check_training_refused(run_script, world, "--validation_rate", "no labelled val split", "label_free")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"select_by": "accuracy"}, ("--select_by", "accuracy")),
        ({"validation_rate": -1}, ("--validation_rate",)),
        ({"select_by": "none"}, ("--validation_rate",)),
        ({"backbone": "resnet18"}, ("--backbone resnet18", "UNet")),
        ({"model": "VGG", "backbone": "resnet18"}, ("--backbone resnet18", "vgg16")),
        ({"model": "SegFormer"}, ("--model", "SegFormer")),
        ({"num_classes": 1}, ("--num_classes", "1")),
        ({"lr_semseg": 0}, ("--lr_semseg",)),
        ({"momentum": 1}, ("--momentum",)),
        ({"weight-decay": -1}, ("--weight-decay",)),
        ({"backbone_weights": "x.pth", "no_pretrained_backbone": ()}, ("--backbone_weights", "contradict")),
        ({"backbone_weights": "x.pth"}, ("--backbone_weights", "no ImageNet weights")),
        ({"source": "folder", "src_data_dir": "gta/images"}, ("--source folder", "--no_semseg")),
    ],
    ids=str,
)
def test_bad_segmentation_flags(run_script, world, monkeypatch, changes, parts):
    monkeypatch.chdir(world)
    check_training_refused(run_script, world, *parts, **changes)


def test_a_run_without_label_losses_is_not_continued_with_them(run_script, world):
    assert run_script(train_procst, *training_flags(world, world / "out")).code == 0
    run = only_run(world / "out")
    flags = ("--continue_train_from_path", run, "--semseg_weights", world / "net.pth")
    check_refusal(run_script(train_procst, *flags), "--semseg_weights", "--no_semseg")


def test_continuing_with_another_source_net(run_script, world):
    assert run_script(train_procst, *label_flags(world, world / "out", world / "net.pth")).code == 0
    save_net(world / "other.pth")
    flags = ("--continue_train_from_path", only_run(world / "out"), "--semseg_weights", world / "other.pth")
    check_refusal(run_script(train_procst, *flags), "segmentation net", "not the one")


def test_continuing_with_other_backbone_weights(run_script, world, monkeypatch):
    """The file may have moved, but it must be the same one until the net that starts from it is in the checkpoint."""
    shape = SegmentationShape("DeepLabV2", "resnet18", 19)
    save_net(world / "resnet.pth", "DeepLabV2", "resnet18")
    for name in ("start.pth", "other.pth"):
        torch.save(build_segmentation_net(shape).backbone.state_dict(), world / name)
    changes = {"model": "DeepLabV2", "backbone": "resnet18", "backbone_weights": world / "start.pth"}
    flags = label_flags(world, world / "out", world / "resnet.pth", **changes)
    monkeypatch.setattr(train_procst.Trainer, "one_step", interrupt)
    assert run_script(train_procst, *flags).code == 130
    (world / "start.pth").rename(world / "moved.pth")
    again = ("--continue_train_from_path", only_run(world / "out"))
    check_refusal(run_script(train_procst, *again), "start.pth", "no such file")
    refused = run_script(train_procst, *again, "--backbone_weights", world / "other.pth")
    check_refusal(refused, "--backbone_weights", "not the one")
    went_on = run_script(train_procst, *again, "--backbone_weights", world / "moved.pth")
    assert went_on.code == 130, went_on.err  # up to the step that is interrupted


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.cuda.OutOfMemoryError("out of memory")]
)
def test_memory_that_does_not_suffice(run_script, world, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train_procst.Trainer, "one_step", fail)
    monkeypatch.setattr(train_semseg_on_source.SourceTrainer, "_one_step", fail)
    result = run_script(train_procst, *label_flags(world, world / "out", world / "net.pth"))
    check_refusal(result, "memory", "batch 2 at scale 0", "--crop_size")
    result = run_script(train_semseg_on_source, *source_flags(world, world / "source"))
    check_refusal(result, "memory", "--batch_size", "--crop_size")


def test_other_errors_keep_their_traceback(world, monkeypatch):
    def fail(*_):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(train_procst.Trainer, "one_step", fail)
    with pytest.raises(RuntimeError, match="mistake of ours"):
        train_procst_in_process(monkeypatch, label_flags(world, world / "out", world / "net.pth"))


def train_procst_in_process(monkeypatch, flags):
    monkeypatch.setattr("sys.argv", ["train_procst.py", *map(str, flags)])
    run_cli(train_procst.main)


def test_a_data_set_must_name_its_classes():
    shared = {"images": {"train": ("*.png",)}, "label_path": (), "resize": (64, 32), "crop": (64, 32)}
    with pytest.raises(ValueError, match=r"mine: trainId 2 has no name"):
        DataSet(name="mine", id_map={7: 2}, classes=(0, 1), class_names=("a", "b"), **shared)
    with pytest.raises(ValueError, match=r"mine: trainId 18 has no name"):
        DataSet(name="mine", id_map={7: 1}, class_names=("a", "b"), **shared)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"gpus": None}, ("--gpus",)),
        ({"val_count": 4}, ("--val_count 4", "1 to 3")),
        ({"val_count": None}, ("--val_count 500", "4 images")),
        ({"val_count": -1}, ("--val_count",)),
        ({"val_list": "list.txt"}, ("--val_list", "--val_count")),
        ({"val_list": "all.txt", "val_count": None}, ("all.txt", "none is left")),
        ({"val_list": "empty.txt", "val_count": None}, ("empty.txt", "no image")),
        ({"val_list": "list.txt", "src_list": "all.txt", "val_count": None}, ("list.txt", "training would see it")),
        ({"num_steps": 0}, ("--num_steps",)),
        ({"batch_size": 9}, ("--batch_size 9",)),
        ({"power": -1}, ("--power",)),
        ({"crop_size": (60, 36)}, ("--crop_size 60 36", "--src_resize 52 40")),
        ({"crop_size": (48, 15)}, ("--crop_size 48 15", "at least 16")),
        ({"src_label_dir": "nowhere"}, ("--src_label_dir", "nowhere")),
        ({"output": "gta"}, ("--output", "folder")),
        ({"source": "folder"}, ("--source", "folder")),
        ({"src_data_dir": "nowhere"}, ("--src_data_dir", "nowhere")),
    ],
    ids=str,
)
def test_bad_source_training_flags(run_script, world, monkeypatch, changes, parts):
    monkeypatch.chdir(world)
    (world / "list.txt").write_text("00002.png\n")
    (world / "all.txt").write_text("".join(f"0000{k}.png\n" for k in range(1, 5)))
    (world / "empty.txt").write_text("\n")
    check_source_training_refused(run_script, world, *parts, **changes)


@pytest.mark.parametrize("bad_id", [77, 200])
def test_label_ids_out_of_range(run_script, world, bad_id):
    label = np.full((44, 60), 7, np.uint8)
    label[0, 0] = bad_id
    for k in range(1, 5):
        Image.fromarray(label).save(world / f"gta/labels/{k:05d}.png")
    check_source_training_refused(run_script, world, "gta/labels/0000", f"id {bad_id}", "gta5")
    check_training_refused(run_script, world, "gta/labels/0000", f"id {bad_id}", "gta5")


def test_target_labels_of_another_kind(run_script, world):
    for path in (world / "cityscapes/gtFine/val").rglob("*.png"):
        Image.new("RGB", (64, 40)).save(path)
    check_training_refused(run_script, world, "gtFine/val", "8-bit grey or palette")


def test_validation_labels_without_a_scored_class(run_script, world):
    for k in (3, 4):
        Image.fromarray(np.zeros((44, 60), np.uint8)).save(world / f"gta/labels/{k:05d}.png")
    result = run_script(train_semseg_on_source, *source_flags(world, world / "out"))
    check_refusal(result, "no pixel of a scored class", "--val_count")
    assert not (world / "out/source.pth").exists()


def test_empty_val_split(run_script, world):
    shutil.rmtree(world / "cityscapes/leftImg8bit/val")
    flags = {"source": "cityscapes", "src_data_dir": world / "cityscapes", "val_count": None}
    check_source_training_refused(run_script, world, "no images found", "leftImg8bit/val", **flags)
    check_training_refused(run_script, world, "--select_by miou", "val split", select_by="miou")


def test_diverging_source_training(run_script, world):
    flags = source_flags(world, world / "out", lr_semseg=1e14, num_steps=20)
    check_refusal(run_script(train_semseg_on_source, *flags), "diverged", "--lr_semseg")
    assert not (world / "out/source.pth").exists()
