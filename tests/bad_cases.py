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
from commands import command, export_flags, label_flags, procst_flags, source_flags
from nets import save_net
from worlds import noise_image

IMAGE, LABEL = "gta/images/00002.png", "gta/labels/00002.png"
TARGET = "cityscapes/leftImg8bit/train/town/town_000001_000019_leftImg8bit.png"
VAL = "cityscapes/leftImg8bit/val/town/town_000001_000019_leftImg8bit.png"
VAL_LABEL = "cityscapes/gtFine/val/town/town_000001_000019_gtFine_labelIds.png"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


@dataclass(frozen=True)
class Case:
    """A command line, run in the folder of the world.

    Attributes:
        parts: what the message must hold.
        spoil: changes the world before; None leaves it as it is.
        own_process: run the script as a person does, and without root's right to read and write everything.
    """

    script: str
    what: str
    flags: list
    parts: tuple[str, ...]
    spoil: Callable[[Path], object] | None = None
    own_process: bool = False

    def __str__(self) -> str:
        return f"{self.script}-{self.what}"


# --- command lines ---------------------------------------------------------------------------------------------------


def train(**changes):
    return procst_flags(Path(), Path("out"), **changes)


def train_with_labels(**changes):
    return label_flags(Path(), Path("out"), Path("net.pth"), **changes)


def train_source(**changes):
    return source_flags(Path(), Path("out"), **changes)


def export(**changes):
    return export_flags(Path("run"), Path("sit"), **changes)


def adapt(**changes):
    flags = {"gpus": "cpu", "method": "cbst", "init": "net.pth", "src_data_dir": "gta", "trg_data_dir": "cityscapes"}
    return command({**flags, "checkpoints_dir": "out", "tb_logs_dir": "out"}, changes)


def uda(method, **changes):
    return adapt(method=method, src_resize=(60, 44), trg_resize=(64, 40), **changes)


def pseudo_labels(**changes):
    return command({"gpus": "cpu", "weights": "net.pth", "trg_data_dir": "cityscapes", "output": "labels"}, changes)


def prototypes(**changes):
    return command({"gpus": "cpu", "weights": "net.pth", "trg_data_dir": "cityscapes", "output": "p.pth"}, changes)


def prior(**changes):
    return command({"src_data_dir": "gta", "prior_size": (32, 16), "output": "prior.mat"}, changes)


def score(**changes):
    return command({"gpus": "cpu", "weights": "net.pth", "data_dir": "cityscapes", "num_workers": 0}, changes)


def measure(**changes):
    data = {"gpus": "cpu", "src_data_dir": "gta", "trg_data_dir": "cityscapes", "json": "out/distances.json"}
    return command({**data, "vgg_weights": "random", "size": (32, 32), "layer": 3}, changes)


def toy(**changes):
    return command({"out": "toy", "domain": "gta5", "count": 2, "size": (64, 32)}, changes)


def demo(**changes):
    return command({"out": "demo"}, changes)


CONTINUE = ["--continue_train_from_path", "run"]
CONTINUE_SOURCE = ["--continue_train_from_path", "source_run"]


# --- what is spoilt --------------------------------------------------------------------------------------------------


def spoiling(path, *ways):
    """Spoil the file at `path` in the world."""
    return lambda world: [way(world / path) for way in ways]


def locked(path, mode=0):
    return lambda world: (world / path).chmod(mode)


def removed(*paths):
    return lambda world: [shutil.rmtree(world / p) if (world / p).is_dir() else (world / p).unlink() for p in paths]


def renamed(path, name):
    return lambda world: (world / path).rename((world / path).with_name(name))


def link_to_itself(path):
    return lambda world: (world / path).symlink_to(path)


def text(path, content):
    return lambda world: (world / path).write_bytes(content)


def folder_loop(world):
    shutil.rmtree(world / "gta/images")
    (world / "gta/images").symlink_to("images")


def same_stems(world):
    (world / "pictures").mkdir()
    for name in ("a.png", "a.jpg"):
        noise_image((60, 44), 0).save(world / "pictures" / name)


def foreign(path, name="file"):
    """A folder with something in it that none of the scripts made."""

    def make(world):
        (world / path).mkdir(parents=True, exist_ok=True)
        (world / path / name).write_text("precious")

    return make


def labels(folder, image):
    """Replace every label by one picture."""
    return lambda world: [image.save(path) for path in (world / folder).rglob("*.png")]


def net(**weights_or_shape):
    return lambda world: save_net(world / "other.pth", **weights_or_shape)


def state(world):
    torch.save({"conv.weight": torch.zeros(3)}, world / "state.pth")


def claiming(path="run/latest.pth", **changes):
    """A checkpoint that says something impossible about itself."""

    def claim(world):
        content = torch.load(world / path, weights_only=True)
        torch.save(content | changes, world / path)

    return claim


def widen(world):
    """A checkpoint whose configuration is another architecture than its weights."""
    content = torch.load(world / "run/latest.pth", weights_only=True)
    content["config"]["network"]["base_channels_list"] = [16, 8, 8]
    torch.save(content, world / "run/latest.pth")


# --- files of weights and pictures -----------------------------------------------------------------------------------

RESNET = {"model": "DeepLabV2", "backbone": "resnet18", "backbone_weights": "vgg.pth"}
VGG = {"vgg_weights": "vgg.pth", "content_layers": 3, "style_layers": 3}
# Every flag that names a file of weights. They share one reader, which meets every way to spoil a file once.
LOADERS = (
    ("train_procst", "latest.pth", "run/latest.pth", CONTINUE),
    ("train_procst", "--vgg_weights", "vgg.pth", train(**VGG)),
    ("train_procst", "net.pth", "net.pth", train_with_labels()),
    ("create_sit_dataset", "latest.pth", "run/latest.pth", export()),
    ("train_semseg_on_source", "latest.pth", "source_run/latest.pth", CONTINUE_SOURCE),
    ("train_semseg_on_source", "--backbone_weights", "vgg.pth", train_source(**RESNET)),
    ("evaluate", "net.pth", "net.pth", score()),
    ("measure_domain_distance", "--vgg_weights", "vgg.pth", measure(vgg_weights="vgg.pth")),
)
WEIGHTS = [
    Case(script, f"{name}-{way.__name__}", flags, (name, part), spoiling(path, way))
    for index, (script, name, path, flags) in enumerate(LOADERS)
    for way, part in hostile.WEIGHTS.items()
    if index in (0, 2) or way in (hostile.flip_a_bit, hostile.execute)
]
# Every script that reads pictures; they share one reader, too.
READERS = (
    ("train_procst", IMAGE, train()),
    ("train_procst", TARGET, train()),
    ("train_procst", VAL, train_with_labels()),
    ("create_sit_dataset", IMAGE, export()),
    ("train_semseg_on_source", IMAGE, train_source()),
    ("evaluate", VAL, score(save_predictions="out", json="out.json")),
    ("measure_domain_distance", TARGET, measure()),
)
PICTURES = [
    Case(script, f"{path}-{way.__name__}", flags, (path, part), spoiling(path, way))
    for index, (script, path, flags) in enumerate(READERS)
    for way, part in hostile.IMAGES.items()
    if index == 0 or way is hostile.truncate
]
PICTURES += [
    Case("train_procst", f"{LABEL}-{way.__name__}", train_with_labels(), (LABEL, part), spoiling(LABEL, way))
    for way, part in hostile.LABELS.items()
]

# --- flags -----------------------------------------------------------------------------------------------------------

PROCST_FLAGS = [
    (train(crop_size=(53, 36)), "--crop_size 53 36", "--src_resize 52 40"),
    (train(crop_size=(48, 38)), "--crop_size 48 38", "--trg_resize 48 36"),
    (train(crop_size=(24, 16), style_layers=(3, 22)), "--crop_size 24 16", "8 a side", "layer 22"),
    (train(crop_size=(0, 16)), "--crop_size is 0 16"),
    (train(batch_size_list=(2, 2)), "--batch_size_list has 2 values", "needs 3"),
    (train(batch_size_list=(2, 0, 1)), "--batch_size_list 2 0 1"),
    (train(batch_size_list=(9, 2, 1)), "--batch_size_list: 9 images"),
    (train(batch_size=2), "--batch_size and --batch_size_list contradict"),
    (train(epochs_per_scale=2), "--epochs_per_scale", "--steps_per_scale"),
    (train(debug_run=()), "--debug_run", "--steps_per_scale"),
    (train(debug_stop_epoch=1), "--debug_run"),
    (train(resume_to_epoch=2), "--resume_to_epoch", "--continue_train_from_path"),
    (train(manual_seed=10**23), "--manual_seed"),
    (train(save_checkpoint_minutes="nan"), "--save_checkpoint_minutes"),
    (train(lr_g=0), "--lr_g is 0"),
    (train(beta1=1), "--beta1 is 1"),
    (train(lambda_style=-1), "--lambda_style is -1"),
    (train(scale_factor=1), "--scale_factor is 1"),
    (train(num_scales=-1), "--num_scales is -1"),
    (train(body_layers=1), "--body_layers is 1"),
    (train(ker_size=4), "--ker_size is 4"),
    (train(stride=2), "--stride 2"),
    (train(padd_size=3), "--padd_size 3"),
    (train(nc_im=1), "--nc_im 1"),
    (train(norm="layer"), "--norm layer"),
    (train(norm=("batch", "group")), "--norm: 2 values for 3 scales"),
    (train(gpus="²"), "--gpus ²"),
    (train(gpus=99), "--gpus 99"),
    (train(gpus=("0", "0")), "--gpus 0 0", "twice"),
    (train(no_such_flag=1), "--no_such_flag", "--help"),
    (train(lr_g="fast"), "--lr_g", "fast"),
    (train(src_data_dir=NOT_UTF8), "--src_data_dir", "caf", "UTF-8"),
    (train(src_data_dir="a\0b"), "--src_data_dir", "no such folder"),
    (train(trg_data_dir="nowhere"), "--trg_data_dir", "nowhere"),
    (train(trg_data_dir="gta"), "--trg_data_dir", "no images", "leftImg8bit"),
    (train(src_list="missing.txt"), "missing.txt"),
    (train(style_layers=(3, 7)), "[7]", "--style_layers"),
    (train(vgg_weights="missing.pth"), "--vgg_weights", "missing.pth"),
    (train(vgg_weights="vgg.pth", style_layers=(3, 8, 11)), "vgg.pth", "features.7", "--style_layers"),
    (train(lambda_labels=2), "--lambda_labels", "--no_semseg"),
    (train(**{"weight-decay": 1e-3}), "--weight-decay", "--no_semseg"),
    (train(run_dir="new"), "--run_dir", "--checkpoints_dir"),
    (train(run_dir="gta", checkpoints_dir=None), "--run_dir", "no checkpoint"),
    (train(run_dir="net.pth", checkpoints_dir=None), "--run_dir", "net.pth"),
    (train(tb_logs_dir="net.pth"), "--tb_logs_dir"),
    ([*CONTINUE, "--run_dir", "run"], "--run_dir", "--continue_train_from_path"),
    (CONTINUE_SOURCE, "source_run/latest.pth", "another training (source)"),
    (["--continue_train_from_path", "missing"], "--continue_train_from_path", "missing"),
    (["--continue_train_from_path", "run/scale_0.pth"], "run/scale_0.pth", "latest.pth"),
    ([*CONTINUE, "--vgg_weights", "vgg.pth"], "perceptual net"),
    (train_with_labels(semseg_weights="missing.pth"), "missing.pth", "--semseg_weights", "train_semseg_on_source.py",
     "UNet", "--no_semseg"),
    (train_with_labels(semseg_weights="gta"), "--semseg_weights", "no run folder"),
    (train_with_labels(semseg_weights="run"), "run/latest.pth holds no segmentation net"),
    (train_with_labels(num_classes=7), "--num_classes is 7", "gta5", "0..18"),
    (train_with_labels(num_classes=1), "--num_classes is 1"),
    (train_with_labels(backbone="resnet18"), "--backbone resnet18", "UNet"),
    (train_with_labels(backbone_weights="x.pth", no_pretrained_backbone=()), "--backbone_weights", "contradict"),
    (train_with_labels(backbone_weights="net.pth"), "--backbone_weights", "no ImageNet weights"),
    (train_with_labels(backbone_weights="x.pth"), "--backbone_weights", "no ImageNet weights"),
    (train_with_labels(momentum=1), "--momentum is 1"),
    (train_with_labels(select_by="none"), "--validation_rate", "--select_by"),
    (train_with_labels(source="folder", src_data_dir="gta/images"), "--source folder", "--no_semseg"),
]  # fmt: skip
SOURCE_FLAGS = [
    (train_source(val_count=4), "--val_count 4", "1 to 3"),
    (train_source(val_count=None), "--val_count 500", "4 images"),
    (train_source(val_list="list.txt"), "--val_list", "--val_count"),
    (train_source(val_list="all.txt", val_count=None), "all.txt", "none is left"),
    (train_source(val_list="empty.txt", val_count=None), "empty.txt", "no image"),
    (train_source(val_list="list.txt", src_list="all.txt", val_count=None), "list.txt", "training would see it"),
    (train_source(batch_size=9), "--batch_size 9"),
    (train_source(power=-1), "--power is -1"),
    (train_source(crop_size=(48, 15)), "--crop_size 48 15", "at least 16"),
    (train_source(num_classes=7), "--num_classes is 7", "gta5", "0..18"),
    (train_source(src_label_dir="nowhere"), "--src_label_dir", "nowhere"),
    (train_source(output="gta"), "--output", "folder"),
    (train_source(output="net.pth"), "--output", "net.pth", "not of this run"),
    (train_source(source="folder", src_data_dir="gta/images"), "--source folder", "no labels"),
    (train_source(select_by="none", validation_rate=2), "--validation_rate", "--select_by"),
    ([*CONTINUE_SOURCE, "--model", "VGG"], "--model changes the run's configuration"),
    ([*CONTINUE_SOURCE, "--lr_semseg", 0.5], "--lr_semseg", "0.01", "0.5"),
    (CONTINUE, "run/latest.pth", "another training (procst)"),
]
OTHER_FLAGS = [
    ("create_sit_dataset", export(max_pixels=100), "--max_pixels", "9216"),
    ("create_sit_dataset", export(png_compression=10), "--png_compression is 10"),
    ("create_sit_dataset", export(gpus=("0", "0")), "--gpus 0 0", "twice"),
    ("create_sit_dataset", export(scale_factor=0.7), "--scale_factor 0.7", "0.5"),
    ("create_sit_dataset", export(batch_size=0), "--batch_size is 0"),
    ("create_sit_dataset", export(source="synthia"), "--source synthia", "--src_data_dir"),
    ("create_sit_dataset", export(trained_procst_path="net.pth"), "--trained_procst_path", "net.pth"),
    ("create_sit_dataset", export(trained_procst_path="gta"), "--trained_procst_path", "gta"),
    ("create_sit_dataset", export(sit_output_path="gta"), "--sit_output_path", "gta", "overwrite"),
    ("create_sit_dataset", export(sit_output_path="net.pth/sit"), "--sit_output_path"),
    ("evaluate", score(scales=0), "--scales 0"),
    ("evaluate", score(list="list.txt", val_count=2), "--list", "--val_count"),
    ("evaluate", score(prediction_format="colour"), "--prediction_format", "--save_predictions"),
    ("evaluate", score(save_predictions="gta"), "--save_predictions", "gta", "not empty"),
    ("evaluate", score(json="gta"), "--json", "gta", "folder"),
    ("evaluate", score(resize=(32, 0)), "--resize is 32 0"),
    ("evaluate", score(absent_classes="one"), "--absent_classes", "one", "zero_if_predicted"),
    ("evaluate", score(image_summary="gta"), "--image_summary", "gta", "not empty"),
    ("evaluate", score(image_summary="net.pth"), "--image_summary", "net.pth"),
    ("evaluate", score(data_set="gta5", data_dir="gta", val_count=9), "--val_count 9", "4 images"),
    ("measure_domain_distance", measure(size=(8, 8)), "--size", "16"),
    ("measure_domain_distance", measure(layer=4), "layer [4]"),
    ("measure_domain_distance", measure(max_images=0), "--max_images"),
    ("measure_domain_distance", measure(json="net.pth/x.json"), "--json", "net.pth"),
    ("measure_domain_distance", measure(sit_data_dir="nowhere"), "--sit_data_dir", "nowhere"),
    ("make_toy_data", toy(count=0), "--count is 0"),
    ("make_toy_data", toy(size=(8, 8)), "--size is 8 8"),
    ("make_toy_data", toy(split="val"), "--split", "gta5"),
    ("make_toy_data", toy(out="net.pth"), "--out", "net.pth"),
    ("make_demo", demo(gpus=0), "--gpus"),
    ("make_demo", demo(out=NOT_UTF8), "--out", "UTF-8"),
    ("make_demo", demo(out="gta"), "--out", "gta", "something else"),
]


MAXSQUARE_FLAGS = [
    (uda("maxsquare", IW_ratio=0.3), "--IW_ratio acts only with iw_maxsquare and iw_entropy"),
    (uda("iw_entropy", IW_ratio=1.2), "--IW_ratio is 1.2; it must be in [0, 1]"),
    (uda("hard", threshold=-0.1), "--threshold is -0.1; it must be in [0, 1]"),
    (uda("maxsquare", threshold=0.3), "--threshold acts only with hard or --multi"),
    (uda("hard", lambda_seg=0.3), "--lambda_seg acts only with --multi"),
    (uda("entropy", lambda_target=-1), "--lambda_target is -1"),
    (uda("entropy", lambda_target="nan"), "--lambda_target is nan"),
    (uda("maxsquare", momentum=0.5, optim="Adam"), "--momentum acts only with --optim SGD"),
    (uda("maxsquare", mode="reference", optim="Adam"), "--mode reference", "omit --optim Adam"),
    (uda("maxsquare", optim="AdamW"), "--optim", "AdamW"),
    (uda("maxsquare", micro_batch=-1), "--micro_batch is -1"),
    (uda("maxsquare", micro_batch=1, lambda_restitution=0.1), "--lambda_restitution", "--micro_batch"),
    (uda("maxsquare", restitution_domains="both"), "--restitution_domains acts only with"),
    (uda("maxsquare", restitution_per_pixel=()), "--restitution_per_pixel acts only with"),
    (uda("maxsquare", lambda_restitution=0.01), "--lambda_restitution 0.01 needs a net of", "UNet with"),
    (uda("maxsquare", multi=()), "--multi needs a net of DeepLabV2Multi", "is UNet with 19 classes"),
    (uda("maxsquare", init=None), "--init is required"),
    (uda("maxsquare", init="missing.pth"), "--init", "missing.pth: no such file"),
    (uda("maxsquare", aspp_branches=4), "--aspp_branches 4"),
    (uda("maxsquare", model="DeepLabV2Multi"), "--backbone none: DeepLabV2Multi is built on"),
    (uda("maxsquare", model="SNR"), "--model SNR: no such net"),
    (uda("maxsquare", batch_size=4), "--batch_size 4: there are 3 target images"),
    (uda("maxsquare", round_num=0), "--round_num is 0"),
    (uda("maxsquare", power=-1), "--power is -1"),
    (uda("maxsquare", crop_size=(64, 20)), "--crop_size 64 20 does not fit into --src_resize 60 44"),
    (uda("maxsquare", crop_size=(12, 32)), "both sides must be at least 16"),
    (uda("maxsquare", num_round=3), "--num_round", "--help"),
    (uda("maxsquare", preset="gta5-cityscapes-cbst"), "--preset"),
    ([*CONTINUE, "--method", "maxsquare"], "run/latest.pth", "another training (procst)"),
]
ALL_FLAGS = [
    *(("train_procst", flags, *parts) for flags, *parts in PROCST_FLAGS),
    *(("train_semseg_on_source", flags, *parts) for flags, *parts in SOURCE_FLAGS),
    *(("train_uda", flags, *parts) for flags, *parts in MAXSQUARE_FLAGS),
    *OTHER_FLAGS,
]
FLAGS = [
    Case(script, f"flags-{index}-{parts[0].split()[0].strip('-')}", flags, tuple(parts))
    for index, (script, flags, *parts) in enumerate(ALL_FLAGS)
]

# --- files and folders -----------------------------------------------------------------------------------------------

BLACK_16 = Image.fromarray(np.zeros((44, 60), np.uint16))
FOLDERS = [
    Case("train_uda", "net", adapt(init="missing.pth"), ("--init", "missing.pth", "no such file"),
         own_process=True),
    Case("train_uda", "target", adapt(trg_data_dir="nowhere"), ("--trg_data_dir", "nowhere", "no such folder")),
    Case("train_uda", "ddb-net", adapt(method="ddb-cut", init="missing.pth"), ("--init", "missing.pth", "no such")),
    Case("train_uda", "ddb-target", adapt(method="ddb-class", trg_data_dir="nowhere"), ("--trg_data_dir", "nowhere")),
    Case("train_uda", "ddb-image", adapt(method="ddb-class"), (IMAGE, "truncated"), spoiling(IMAGE, hostile.truncate)),
    Case("generate_pseudo_labels", "net", pseudo_labels(weights="missing.pth"), ("--weights", "missing.pth"),
         own_process=True),
    Case("generate_pseudo_labels", "target", pseudo_labels(trg_data_dir="nowhere"), ("--trg_data_dir", "nowhere")),
    Case("generate_pseudo_labels", "foreign", pseudo_labels(), ("--output", "labels", "another folder"),
         foreign("labels")),
    Case("generate_pseudo_labels", "prior", pseudo_labels(spatial_prior="net.pth"), ("net.pth", "no MATLAB file")),
    Case("generate_pseudo_labels", "portion", pseudo_labels(portion=2), ("--portion is 2",)),
    Case("calculate_prototypes", "net", prototypes(weights="missing.pth"), ("--weights", "missing.pth"),
         own_process=True),
    Case("calculate_prototypes", "target", prototypes(trg_data_dir="nowhere"), ("--trg_data_dir", "nowhere")),
    Case("calculate_prototypes", "features", prototypes(weights="other.pth"), ("other.pth", "without features"),
         net(model="DeepLab", backbone="resnet18")),
    Case("calculate_prototypes", "foreign", prototypes(output="net.pth"), ("--output", "net.pth", "no file of"), None),
    Case("calculate_prototypes", "output", prototypes(output="gta"), ("--output", "gta", "folder")),
    Case("calculate_prototypes", "several", prototypes(gpus=("cpu", "cpu")), ("--gpus", "one device")),
    Case("calculate_prototypes", "size", prototypes(trg_resize=(0, 2)), ("--trg_resize is 0 2",)),
    Case("make_spatial_prior", "source", prior(src_data_dir="nowhere"), ("--src_data_dir", "nowhere"),
         own_process=True),
    Case("make_spatial_prior", "palette", prior(), (LABEL, "id 200"), spoiling(LABEL, hostile.unknown_id)),
    Case("train_procst", "names", train(), ("--src_data_dir", "no images", "images/*.png"),
         renamed("gta/images", "image")),
    Case("train_procst", "labels", train_with_labels(), ("1 of 4", IMAGE[4:], LABEL[4:]),
         renamed(LABEL, "00002_label.png")),
    Case("train_procst", "folder-loop", train(), ("gta/images", "symbolic links"), folder_loop),
    Case("train_procst", "root-loop", train(src_data_dir="loop"), ("--src_data_dir", "loop"), link_to_itself("loop")),
    Case("train_procst", "file-name", train(), ("gta", "caf", "UTF-8"), spoiling(IMAGE, hostile.not_utf8)),
    Case("train_procst", "synthia", train_with_labels(source="synthia", src_data_dir="synthia"),
         ("GT/LABELS", "16-bit"), labels("synthia/GT/LABELS", noise_image((48, 32), 0))),
    Case("train_procst", "palette", train_with_labels(), (LABEL, "id 200"), spoiling(LABEL, hostile.unknown_id)),
    Case("train_procst", "16-bit", train_with_labels(), ("gta/labels", "16-bit"), labels("gta/labels", BLACK_16)),
    Case("train_procst", "target-labels", train_with_labels(), ("gtFine/val", "8-bit grey or palette"),
         labels("cityscapes/gtFine/val", Image.new("RGB", (64, 40)))),
    Case("train_procst", "list", train(src_list="lines.txt"), ("lines.txt line 2",),
         text("lines.txt", b"00001.png\n../secret.png\n")),
    Case("train_procst", "list-bytes", train(trg_list="lines.txt"), ("lines.txt",),
         text("lines.txt", b"caf\xe9.png\n")),
    Case("train_procst", "list-long", train(src_list="lines.txt"), ("lines.txt line 1",),
         text("lines.txt", b"x" * 5000)),
    Case("train_procst", "output", train(checkpoints_dir="net.pth/models"), ("--checkpoints_dir",)),
    Case("train_procst", "no-labels", train_with_labels(), ("--validation_rate", "no labelled val split", "label_free"),
         removed("cityscapes/gtFine")),
    Case("train_procst", "no-miou", train_with_labels(select_by="miou"), ("--select_by miou", "label_free"),
         removed("cityscapes/gtFine")),
    Case("train_procst", "no-val", train_with_labels(select_by="miou"), ("--select_by miou", "val split"),
         removed("cityscapes/leftImg8bit/val")),
    Case("train_procst", "some-labels", train_with_labels(), ("--trg_data_dir", "1 of its 2 images have no label"),
         removed(VAL_LABEL)),
    Case("train_procst", "other-list", CONTINUE, ("list of source images",), removed(IMAGE, LABEL)),
    Case("train_procst", "widened", CONTINUE, ("latest.pth", "Dst.0", "(8, 3, 3, 3)"), widen),
    Case("train_procst", "other-net", train_with_labels(semseg_weights="other.pth"),
         ("other.pth", "DeepLab on resnet18", "--model, --backbone"),
         net(model="DeepLab", backbone="resnet18")),
    Case("train_procst", "other-classes", train_with_labels(semseg_weights="other.pth"),
         ("other.pth", "UNet with 7 classes", "--num_classes"), net(num_classes=7)),
    Case("train_procst", "few-classes", train_with_labels(semseg_weights="other.pth", num_classes=7),
         ("--num_classes is 7", "gta5", "0..18"), net(num_classes=7)),
    Case("train_procst", "not-finite", train_with_labels(semseg_weights="other.pth"), ("other.pth", "not finite"),
         net(**{"head.classify.bias": torch.full((19,), float("nan"))})),
    Case("train_procst", "no-net", train_with_labels(semseg_weights="state.pth"), ("state.pth", "segmentation net"),
         state),
    Case("create_sit_dataset", "loop", export(sit_output_path="loop"), ("--sit_output_path", "loop"),
         link_to_itself("loop")),
    Case("create_sit_dataset", "foreign", export(), ("--sit_output_path", "sit", "did not write"),
         foreign("sit/images", "00001.png")),
    Case("create_sit_dataset", "stems", export(source="folder", src_data_dir="pictures"), ("a.jpg", "a.png"),
         same_stems),
    Case("create_sit_dataset", "widened", export(), ("latest.pth", "(16, 3, 3, 3)"), widen),
    Case("train_semseg_on_source", "palette", train_source(), (LABEL, "id 200"), spoiling(LABEL, hostile.unknown_id)),
    Case("train_semseg_on_source", "labels", train_source(), ("1 of 2", LABEL[4:]), renamed(LABEL, "00002_label.png")),
    Case("train_semseg_on_source", "no-val",
         train_source(source="cityscapes", src_data_dir="cityscapes", val_count=None),
         ("no images found", "leftImg8bit/val"), removed("cityscapes/leftImg8bit/val")),
    # Every weight is finite, and the logits overflow.
    Case("evaluate", "overflow", score(weights="other.pth", json="out.json"), ("not finite",),
         net(**{"head.classify.weight": torch.full((19, 16, 1, 1), 3e38)})),
    Case("make_toy_data", "foreign", toy(), ("--out", "toy", "images"), foreign("toy/images")),
    Case("make_demo", "loop", demo(out="loop"), ("--out", "loop"), link_to_itself("loop")),
]  # fmt: skip
UNREADABLE = [
    Case("train_procst", "unreadable-folder", train(), ("gta/images", "Permission"), locked("gta/images"), True),
    Case("create_sit_dataset", "unreadable-run", export(), ("latest.pth", "Permission"), locked("run/latest.pth"),
         True),
    Case("train_semseg_on_source", "unreadable-label", train_source(), (LABEL, "Permission"), locked(LABEL), True),
    Case("train_semseg_on_source", "unwritable", train_source(output="gta/x.pth"), ("--output", "gta"),
         locked("gta", 0o555), True),
    Case("train_semseg_on_source", "unwritable-by-root", train_source(output="/proc/x.pth"), ("--output", "/proc")),
    Case("evaluate", "unreadable-net", score(), ("net.pth", "Permission"), locked("net.pth"), True),
    Case("measure_domain_distance", "unwritable", measure(json="gta/x.json"), ("--json", "gta"), locked("gta", 0o555),
         True),
    Case("make_toy_data", "unwritable", toy(out="gta"), ("--out", "gta"), locked("gta", 0o555), True),
    Case("make_demo", "unreadable", demo(out="gta"), ("gta", "Permission"), locked("gta"), True),
]  # fmt: skip
# What a checkpoint claims, and what is wrong with it, to those who continue from it and to those who use it.
IMPOSSIBLE = [
    Case(script, f"claims-{name}-{value}", flags, ("latest.pth",), claiming(**{name: value}))
    for script, flags, claims in (
        ("train_procst", CONTINUE, (
            ("stage", 7), ("optimizers", {}), ("modules", {}), ("config", {}), ("version", 99), ("format", "other"),
        )),
        ("create_sit_dataset", export(), (("modules", {}), ("config", {}), ("version", 99))),
    )
    for name, value in claims
]  # fmt: skip
CASES = [*WEIGHTS, *PICTURES, *FLAGS, *FOLDERS, *IMPOSSIBLE, *UNREADABLE]
