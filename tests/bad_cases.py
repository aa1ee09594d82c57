"""Bad input for every script: what is spoilt, the command line, and what the one line about it must name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hostile_files as hostile
from test_label_training import label_flags, source_flags
from test_train_cli import export_flags, training_flags
from worlds import noise_image

IMAGE, LABEL = "gta/images/00002.png", "gta/labels/00002.png"
TARGET = "cityscapes/leftImg8bit/train/town/town_000001_000019_leftImg8bit.png"
VAL = "cityscapes/leftImg8bit/val/town/town_000001_000019_leftImg8bit.png"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@dataclass(frozen=True)
class Case:
    """A command line, run in the folder of the world.

    Attributes:
        parts: what the message must hold.
        spoil: changes the world before.
        own_process: run the script as a person does, and without root's right to read and write everything.
    """

    script: str
    what: str
    flags: list
    parts: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda world: None
    own_process: bool = False

    def __str__(self) -> str:
        return f"{self.script}-{self.what}"


def train(**changes):
    return training_flags(Path(), Path("out"), **changes)


def train_with_labels(**changes):
    return label_flags(Path(), Path("out"), Path("net.pth"), **changes)


def train_source(**changes):
    return source_flags(Path(), Path("out"), **changes)


def export(**changes):
    return export_flags(Path("run"), Path(), Path("sit"), **changes)


def _line(defaults, changes):
    flags = {**defaults, **changes}
    given = ((f"--{n}", *(v if isinstance(v, tuple) else (v,))) for n, v in flags.items() if v is not None)
    return [word for words in given for word in words]


def score(**changes):
    return _line({"gpus": "cpu", "weights": "net.pth", "data_dir": "cityscapes", "num_workers": 0}, changes)


def measure(**changes):
    data = {"gpus": "cpu", "src_data_dir": "gta", "trg_data_dir": "cityscapes", "json": "out/distances.json"}
    return _line({**data, "vgg_weights": "random", "size": (32, 32), "layer": 3}, changes)


def toy(**changes):
    return _line({"out": "toy", "domain": "gta5", "count": 2, "size": (64, 32)}, changes)


def demo(**changes):
    return _line({"out": "demo"}, changes)


def spoiling(path, *ways):
    """Spoil the file at `path` in the world."""
    return lambda world: [way(world / path) for way in ways]


def lock(path, mode=0):
    return lambda world: (world / path).chmod(mode)


CONTINUE = ["--continue_train_from_path", "run"]
CONTINUE_SOURCE = ["--continue_train_from_path", "source_run"]

# Every flag that names a file of weights, with every way to spoil one.
LOADERS = (
    ("train_procst", "latest.pth", "run/latest.pth", CONTINUE),
    ("train_procst", "--vgg_weights", "vgg.pth", train(vgg_weights="vgg.pth", content_layers=3, style_layers=3)),
    ("train_procst", "net.pth", "net.pth", train_with_labels()),
    ("create_sit_dataset", "latest.pth", "run/latest.pth", export()),
    ("train_semseg_on_source", "latest.pth", "source_run/latest.pth", CONTINUE_SOURCE),
    ("train_semseg_on_source", "--backbone_weights", "vgg.pth",
     train_source(model="DeepLabV2", backbone="resnet18", no_pretrained_backbone=None, backbone_weights="vgg.pth")),
    ("evaluate", "net.pth", "net.pth", score()),
    ("measure_domain_distance", "--vgg_weights", "vgg.pth", measure(vgg_weights="vgg.pth")),
)  # fmt: skip
WEIGHTS = [
    Case(script, f"{name}-{way.__name__}", flags, (name, part), spoiling(path, way))
    for script, name, path, flags in LOADERS
    for way, part in hostile.WEIGHTS.items()
]

# Every script that reads pictures, with every way to spoil one.
READERS = (
    ("train_procst", IMAGE, train()),
    ("train_procst", TARGET, train()),
    ("create_sit_dataset", IMAGE, export()),
    ("train_semseg_on_source", IMAGE, train_source()),
    ("evaluate", VAL, score(save_predictions="out", json="out.json")),
    ("measure_domain_distance", TARGET, measure()),
)
PICTURES = [
    Case(script, f"{path}-{way.__name__}", flags, (path, part), spoiling(path, way))
    for script, path, flags in READERS
    for way, part in hostile.IMAGES.items()
]
PICTURES += [
    Case(script, f"{LABEL}-{name}-{way.__name__}", flags, (LABEL, part), spoiling(LABEL, way))
    for script, name, flags in (("train_procst", "headers", train()), ("train_semseg_on_source", "ids", train_source()))
    for way, part in hostile.LABELS.items()
]


def other_names(world):
    (world / "gta/images").rename(world / "gta/image")


def other_labels(world):
    (world / LABEL).rename(world / "gta/labels/00002_label.png")


def same_stems(world):
    (world / "pictures").mkdir()
    for name in ("a.png", "a.jpg"):
        noise_image((60, 44), 0).save(world / "pictures" / name)


def folder_loop(world):
    shutil.rmtree(world / "gta/images")
    (world / "gta/images").symlink_to("images")


def bits_8(world):
    for path in (world / "synthia/GT/LABELS").iterdir():
        noise_image((48, 32), 0).save(path)


def grey_16(world):
    for path in (world / "gta/labels").iterdir():
        Image.fromarray(np.zeros((44, 60), np.uint16)).save(path)


def outside(world):
    (world / "list.txt").write_text("00001.png\n../secret.png\n")


def latin_list(world):
    (world / "list.txt").write_bytes(b"caf\xe9.png\n")


def widen(world):
    """A checkpoint whose configuration is another architecture than its weights."""
    state = torch.load(world / "run/latest.pth", weights_only=True)
    state["config"]["network"]["base_channels_list"] = [16, 8, 8]
    torch.save(state, world / "run/latest.pth")


def claiming(**changes):
    """A checkpoint that says something impossible about itself."""

    def claim(world):
        state = torch.load(world / "run/latest.pth", weights_only=True)
        torch.save(state | changes, world / "run/latest.pth")

    return claim


def foreign(path, name="file"):
    """A folder with something in it that none of the scripts made."""

    def make(world):
        (world / path).mkdir(parents=True, exist_ok=True)
        (world / path / name).write_text("precious")

    return make


def link_to_itself(path):
    return lambda world: (world / path).symlink_to(path)


FLAGS = [
    Case("train_procst", "crop", train(crop_size=(53, 36)), ("--crop_size 53 36", "--src_resize 52 40")),
    Case("train_procst", "counts", train(batch_size_list=(2, 2)), ("--batch_size_list", "2 values", "3 scales")),
    Case("train_procst", "epochs", train(epochs_per_scale=2), ("--epochs_per_scale", "--steps_per_scale")),
    Case("train_procst", "no-semseg", train(lambda_labels=2), ("--lambda_labels", "--no_semseg")),
    Case("train_procst", "rate", train(lr_g="nan"), ("--lr_g",)),
    Case("train_procst", "gpus", train(gpus=None), ("--gpus is required",)),
    Case("train_procst", "rounded", train(bf16_discriminators=()), ("--bf16_discriminators", "--precision fp32")),
    Case("train_procst", "unknown", train(no_such_flag=1), ("--no_such_flag",)),
    Case("train_procst", "bytes", train(src_data_dir=NOT_UTF8), ("--src_data_dir", "caf", "UTF-8")),
    Case("train_procst", "null", train(src_data_dir="a\0b"), ("--src_data_dir", "no such folder")),
    Case("train_procst", "widened", CONTINUE, ("latest.pth", "Dst of scale 0", "(8, 3, 3, 3)"), widen),
    Case("train_procst", "other-run", ["--continue_train_from_path", "source_run"], ("source_run", "not a checkpoint")),
    Case("train_procst", "two-runs", [*CONTINUE, "--run_dir", "run"], ("--run_dir", "--continue_train_from_path")),
    Case("train_procst", "two-places", train(run_dir="new"), ("--run_dir", "--checkpoints_dir")),
    Case("train_procst", "run-dir", train(run_dir="gta", checkpoints_dir=None), ("--run_dir gta", "no checkpoint")),
    Case("train_procst", "run-file", train(run_dir="net.pth", checkpoints_dir=None), ("--run_dir", "net.pth")),
    Case("train_procst", "minutes", train(save_checkpoint_minutes="nan"), ("--save_checkpoint_minutes",)),
    Case("train_procst", "bad-image", train(on_bad_image="ignore"), ("--on_bad_image",)),
    Case("train_procst", "shares", train(gpus=("cpu", "cpu"), batch_size_list=(1, 1, 1)), ("batch of 1",)),
    Case("train_procst", "dry-run", [*train(), "--dry_run", "--lr_g", "0"], ("--lr_g",)),
    Case("create_sit_dataset", "bad-image", export(on_bad_image="ignore"), ("--on_bad_image",)),
    Case("train_semseg_on_source", "two-runs", [*CONTINUE_SOURCE, "--run_dir", "source_run"],
         ("--run_dir", "--continue_train_from_path")),
    Case("train_semseg_on_source", "run-dir", train_source(run_dir="gta", checkpoints_dir=None),
         ("--run_dir gta", "no checkpoint")),
    Case("train_semseg_on_source", "minutes", train_source(save_checkpoint_minutes=0), ("--save_checkpoint_minutes",)),
    Case("create_sit_dataset", "pixels", export(max_pixels=100), ("--max_pixels", "9216")),
    Case("create_sit_dataset", "compression", export(png_compression=10), ("--png_compression is 10",)),
    Case("create_sit_dataset", "twice", export(gpus=("0", "0")), ("--gpus 0 0", "twice")),
    Case("create_sit_dataset", "factor", export(scale_factor=0.7), ("--scale_factor 0.7", "0.5")),
    Case("create_sit_dataset", "batch", export(batch_size=0), ("--batch_size is 0",)),
    Case("create_sit_dataset", "workers", export(num_workers=-1), ("--num_workers is -1",)),
    Case("create_sit_dataset", "source", export(source="synthia"), ("--source synthia", "--src_data_dir")),
    Case("create_sit_dataset", "nowhere", export(src_data_dir="nowhere"), ("--src_data_dir nowhere",)),
    Case("create_sit_dataset", "widened", export(), ("latest.pth", "Gst of scale 0", "(16, 3, 3, 3)"), widen),
    Case("create_sit_dataset", "net", export(trained_procst_path="net.pth"), ("--trained_procst_path net.pth",)),
    Case("create_sit_dataset", "bytes", export(sit_output_path=NOT_UTF8), ("--sit_output_path", "UTF-8")),
    Case("train_semseg_on_source", "count", train_source(val_count=4), ("--val_count 4", "1 to 3")),
    Case("train_semseg_on_source", "power", train_source(power=-1), ("--power",)),
    Case("train_semseg_on_source", "lists", train_source(val_list="list.txt"), ("--val_list", "--val_count")),
    Case("train_semseg_on_source", "model", [*CONTINUE_SOURCE, "--model", "VGG"], ("--model", "UNet")),
    Case("train_semseg_on_source", "other-run", CONTINUE, ("run/latest.pth", "not a segmentation net")),
    Case("evaluate", "scales", score(scales=0), ("--scales 0.0",)),
    Case("evaluate", "lists", score(list="list.txt", val_count=2), ("--list", "--val_count")),
    Case("evaluate", "format", score(prediction_format="colour"), ("--prediction_format", "--save_predictions")),
    Case("evaluate", "gpus", score(gpus=None), ("--gpus",)),
    Case("measure_domain_distance", "size", measure(size=(8, 8)), ("--size", "16")),
    Case("measure_domain_distance", "layer", measure(layer=4), ("layer [4]",)),
    Case("measure_domain_distance", "max", measure(max_images=0), ("--max_images",)),
    Case("make_toy_data", "count", toy(count=0), ("--count is 0",)),
    Case("make_toy_data", "size", toy(size=(8, 8)), ("--size is 8 8",)),
    Case("make_toy_data", "split", toy(split="val"), ("--split", "gta5")),
    Case("make_toy_data", "seed", toy(seed=-1), ("--seed is -1",)),
    Case("make_demo", "unknown", demo(gpus=0), ("--gpus",)),
    Case("make_demo", "bytes", demo(out=NOT_UTF8), ("--out", "UTF-8")),
]
FOLDERS = [
    Case("train_procst", "names", train(), ("--src_data_dir gta", "no images", "images/*.png"), other_names),
    Case("train_procst", "labels", train(), ("1 of 4", IMAGE[4:], LABEL[4:]), other_labels),
    Case("train_procst", "folder-loop", train(), ("gta/images", "symbolic links"), folder_loop),
    Case("train_procst", "root-loop", train(src_data_dir="loop"), ("--src_data_dir loop",), link_to_itself("loop")),
    Case("train_procst", "file-name", train(), ("gta", "caf", "UTF-8"), spoiling(IMAGE, hostile.not_utf8)),
    Case("train_procst", "synthia", train(source="synthia", src_data_dir="synthia"), ("GT/LABELS", "16-bit"), bits_8),
    Case("train_procst", "palette", train_with_labels(), (LABEL, "id 200"), spoiling(LABEL, hostile.unknown_id)),
    Case("train_procst", "16-bit", train(), ("gta/labels", "16-bit"), grey_16),
    Case("train_procst", "list", train(src_list="list.txt"), ("list.txt line 2",), outside),
    Case("train_procst", "list-bytes", train(trg_list="list.txt"), ("list.txt",), latin_list),
    Case("train_procst", "output", train(checkpoints_dir="net.pth/models"), ("--checkpoints_dir",)),
    Case("create_sit_dataset", "overwrite", export(sit_output_path="gta"), ("--sit_output_path gta", "overwrite")),
    Case("create_sit_dataset", "loop", export(sit_output_path="loop"), ("--sit_output_path", "loop"),
         link_to_itself("loop")),
    Case("create_sit_dataset", "foreign", export(), ("--sit_output_path sit", "did not write"),
         foreign("sit/images", "00001.png")),
    Case("create_sit_dataset", "stems", export(source="folder", src_data_dir="pictures"), ("a.jpg", "a.png"),
         same_stems),
    Case("create_sit_dataset", "no-run", export(trained_procst_path="gta"), ("--trained_procst_path gta",)),
    Case("train_semseg_on_source", "palette", train_source(), (LABEL, "id 200"), spoiling(LABEL, hostile.unknown_id)),
    Case("train_semseg_on_source", "labels", train_source(), ("1 of 2", LABEL[4:]), other_labels),
    Case("train_semseg_on_source", "16-bit", train_source(), ("gta/labels", "16-bit"), grey_16),
    Case("train_semseg_on_source", "output", train_source(output="net.pth"), ("--output net.pth", "not of this run")),
    Case("train_semseg_on_source", "label-loop", train_source(src_label_dir="loop"), ("--src_label_dir loop",),
         link_to_itself("loop")),
    Case("evaluate", "predictions", score(save_predictions="gta"), ("--save_predictions gta", "not empty")),
    Case("evaluate", "json", score(json="gta"), ("--json gta", "folder")),
    Case("evaluate", "classes", score(data_set="gta5", data_dir="gta", val_count=9), ("--val_count 9", "4 images")),
    Case("measure_domain_distance", "json", measure(json="gta"), ("--json gta", "folder")),
    Case("measure_domain_distance", "json-below-file", measure(json="net.pth/x.json"), ("--json", "net.pth")),
    Case("measure_domain_distance", "sit", measure(sit_data_dir="nowhere"), ("--sit_data_dir nowhere",)),
    Case("make_toy_data", "file", toy(out="net.pth"), ("--out", "net.pth")),
    Case("make_toy_data", "foreign", toy(), ("--out toy", "images"), foreign("toy/images")),
    Case("make_toy_data", "loop", toy(out="loop"), ("loop",), link_to_itself("loop")),
    Case("make_demo", "foreign", demo(out="gta"), ("--out gta", "something else")),
    Case("make_demo", "file", demo(out="net.pth"), ("--out", "net.pth")),
    Case("make_demo", "loop", demo(out="loop"), ("--out", "loop"), link_to_itself("loop")),
]  # fmt: skip
UNREADABLE = [
    Case("train_procst", "unreadable-folder", train(), ("gta/images", "Permission"), lock("gta/images"), True),
    Case("create_sit_dataset", "unreadable-run", export(), ("latest.pth", "Permission"), lock("run/latest.pth"), True),
    Case("train_semseg_on_source", "unreadable-label", train_source(), (LABEL, "Permission"), lock(LABEL), True),
    Case("evaluate", "unreadable-net", score(), ("net.pth", "Permission"), lock("net.pth"), True),
    Case("measure_domain_distance", "unwritable", measure(json="gta/x.json"), ("--json", "gta"), lock("gta", 0o555),
         True),
    Case("make_toy_data", "unwritable", toy(out="gta"), ("--out", "gta"), lock("gta", 0o555), True),
    Case("make_demo", "unreadable", demo(out="gta"), ("gta", "Permission"), lock("gta"), True),
]  # fmt: skip
# What a checkpoint claims, and what is wrong with it, to those who go on from it and to those who use it.
IMPOSSIBLE = [
    Case(script, f"claims-{name}-{value}", flags, ("latest.pth",), claiming(**{name: value}))
    for script, flags in (("train_procst", CONTINUE), ("create_sit_dataset", export()))
    for name, value in (
        ("scale", 7), ("scale", -1), ("step", -5), ("optimizers", {}), ("networks", {}), ("config", {}),
        ("version", 99),
    )
]  # fmt: skip
# A run keeps its configuration: the flag, and the value that the message must name.
KEPT = [
    Case("train_procst", f"continue-{flag}", [*CONTINUE, f"--{flag}", *values], (f"--{flag}", kept))
    for flag, values, kept in (
        ("base_channels_list", (16, 16, 16), "(8, 8, 8)"), ("body_layers", (6,), "5"), ("num_scales", (1,), "2"),
        ("batch_size_list", (1, 1, 1), "(2, 2, 1)"), ("batch_size", (2,), "(2, 2, 1)"),
        ("lr_g", (1e-5,), "0.001"), ("padd_size", (2,), "1"), ("norm", ("batch",), "'group'"),
        ("source", ("synthia",), "gta5"),
    )
]  # fmt: skip
CASES = [*WEIGHTS, *PICTURES, *FLAGS, *FOLDERS, *IMPOSSIBLE, *KEPT, *UNREADABLE]
