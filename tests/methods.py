"""Every method of training in a tiny setting, for the contract that `test_methods.py` holds them to.

A new method joins with an entry in `CASES`: its configuration, what checks its input, and a few flags.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from core.config import ProCSTConfig
from core.preparation import prepare as prepare_procst
from data_handlers.spatial_prior import write_spatial_prior
from models.deeplab_multi import PartialSumHead
from models.restitution import Restitution
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from nets import checkpoint_of, save_net, save_prototypes
from training.checkpoint import LATEST
from training.distributed import Rank
from training.loop import Loop
from training.progress import Progress
from uda.cbst import prepare_self_training
from uda.cbst_config import SelfTrainingConfig
from uda.config import SourceTrainingConfig
from uda.ddb import prepare_ddb
from uda.ddb_ckd import prepare_distillation
from uda.ddb_ckd_config import DistillationTrainingConfig
from uda.ddb_config import DDBConfig
from uda.maxsquare import prepare_maxsquare
from uda.maxsquare_config import MaxSquareConfig
from uda.restitution import RestitutionHeads
from uda.source import prepare_source
from utils.seeds import seed_for
from worlds import write_cityscapes, write_gta5

SOURCE_NET, TWO_HEADED_NET = "source_net.pth", "two_headed_net.pth"


def write_world(root: Path) -> Path:
    """Labelled source images, target images with a labelled val split, and a segmentation net for the source."""
    write_gta5(root / "gta", count=7, size=(40, 32))
    write_cityscapes(root / "cityscapes", count=5, size=(40, 32), labels=False)
    write_cityscapes(root / "cityscapes", count=2, size=(40, 32), seed=300, split="val")
    for name, shape in ((SOURCE_NET, ("UNet", "none")), (TWO_HEADED_NET, ("DeepLabV2MultiSNR", "resnet18"))):
        shape = SegmentationShape(*shape)
        torch.manual_seed(5)
        checkpoint_of(shape, build_segmentation_net(shape).state_dict()).save(root / name)
    for name, weights in (("cut", {}), ("class", {"head.classify.bias": torch.linspace(-1, 1, 19)})):
        save_prototypes(root / f"{name}_prototypes.pth", save_net(root / f"{name}.pth", **weights), seed=len(name))
    write_spatial_prior(root / "prior.mat", np.random.default_rng(3).random((19, 16, 20)))
    return root


# Label id -> colour of three classes that a few steps tell apart.
COLOURS = {7: (90, 90, 100), 11: (60, 120, 70), 26: (150, 60, 60)}


def write_learnable_world(root: Path, seed: int) -> Path:
    """Labelled source images of three classes with a colour each, target images in an orange light, of which the
    training images without labels have it in full, and images of any strength of it in a labelled second target."""
    rng = np.random.default_rng(seed)
    source, target = root / "gta", root / "cityscapes" / "leftImg8bit" / "train" / "town"
    for folder in (source / "images", source / "labels", target):
        folder.mkdir(parents=True)
    for k in range(14):
        pixels, ids = _scene(rng)
        Image.fromarray(pixels).save(source / "images" / f"{k:05d}.png")
        Image.fromarray(ids).save(source / "labels" / f"{k:05d}.png")
    for k in range(8):
        _in_light(_scene(rng)[0], 1.0).save(target / f"town_{k:06d}_000019_leftImg8bit.png")
    for split, count in (("train", 16), ("val", 6)):
        folders = [root / "evening" / kind / split / "town" for kind in ("leftImg8bit", "gtFine")]
        for folder in folders:
            folder.mkdir(parents=True)
        for k in range(count):
            pixels, ids = _scene(rng)
            _in_light(pixels, rng.uniform()).save(folders[0] / f"town_{k:06d}_000019_leftImg8bit.png")
            Image.fromarray(ids).save(folders[1] / f"town_{k:06d}_000019_gtFine_labelIds.png")
    return root


def _in_light(pixels: np.ndarray, strength: float) -> Image.Image:
    """The picture in an orange light of a strength in [0,1]."""
    light = 255 - (255 - pixels) * (1 - strength * (1 - np.array([0.3, 0.6, 0.9])))
    return Image.fromarray(light.astype(np.uint8))


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (32,48,3) and label ids (32,48): two areas and a box, with noise."""
    ids = np.full((32, 48), 7, dtype=np.uint8)
    ids[: rng.integers(10, 18)] = 11
    x, y = rng.integers(0, 32), rng.integers(8, 16)
    ids[y : y + 10, x : x + 16] = 26
    pixels = rng.normal(0.0, 20.0, (32, 48, 3))
    for value, colour in COLOURS.items():
        pixels[ids == value] += colour
    return pixels.clip(0, 255).astype(np.uint8), ids


@dataclass(frozen=True, kw_only=True)
class Case:
    """A method in a setting.

    Attributes:
        flags: of its command line, by name; `{world}` in a value is the folder of `write_world`.
        change: is given the method before it is trained.
        has_dropout: several processes do not draw what one process draws.
        learning: flags with which it learns in the world of `write_learnable_world` in a few steps; empty if that is
            not tested in this setting.
        adapts: a source net of a few steps is trained before, which the method starts from.
        stops: (stage, step) after which a run is stopped: within a stage, at the end of one, before a validation.
    """

    config: Any
    prepare: Callable[..., Any]
    flags: Mapping[str, Any]
    stops: tuple[tuple[int, int], ...]
    change: Callable[[Any], None] = lambda method: None
    has_dropout: bool = False
    learning: Mapping[str, Any] = field(default_factory=dict)
    adapts: bool = False

    def prepared(self, world: Path, rank: Rank | None = None, **changes: Any) -> Any:
        """The method, with its validator."""
        flags = {
            name: value.format(world=world) if isinstance(value, str) else value
            for name, value in {**COMMON, **self.flags, **changes}.items()
        }
        method = self.prepare(self.config.from_flags(flags), rank or Rank(), None)
        self.change(method)
        return method


def run_quietly(loop: Loop) -> None:
    """Train to the end, or until the loop is stopped."""
    progress = Progress(
        method=loop.method, done=(loop.stage, loop.step), folder=None, log_dir=None, print_rate=2, quiet=True
    )
    try:
        loop.run(progress)
    finally:
        progress.close()


def steps_of(method: Any, stage: int, count: int, folder: Path) -> Any:
    """Begin a stage and yield (step, batch) of its first steps; the caller takes the steps."""
    method.begin_stage(stage, resumed=False)
    method.prepare_stage(stage, folder, lambda: None)
    for step, batch in enumerate(method.batches(stage, range(count))):
        torch.manual_seed(seed_for(method.config.run.manual_seed, 4, stage, step))
        yield step, batch


def _with_dropout(method: Any) -> None:
    head = method.net.head
    head.classify = nn.Sequential(nn.Dropout(0.2), head.classify)


def _with_batch_norm(method: Any) -> None:
    for parent in list(method.net.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.GroupNorm):
                setattr(parent, name, nn.BatchNorm2d(norm.num_channels))


def _narrow(method: Any) -> None:
    """A two-headed net of a few channels, for its size; its weights follow from the run's seed, as those of a new
    restitution do."""
    net = method.net
    for stage in range(1, 5):
        conv = nn.Conv2d(64 if stage == 1 else 16, 16, 3, padding=1, bias=False)
        setattr(net.backbone, f"layer{stage}", nn.Sequential(nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU())))
    net.backbone.snr = nn.ModuleList(Restitution(16, reduction=4) for _ in range(3))
    net.head = nn.ModuleDict({name: PartialSumHead(16, 19, 2) for name in ("main", "aux")})
    if method.heads is not None:
        method.heads = RestitutionHeads((16, 16, 16), 19)


COMMON = {
    "gpus": ("cpu",), "src_data_dir": "{world}/gta", "src_resize": (40, 32), "crop_size": (24, 20), "num_workers": 0,
    "precision": "fp32", "resample": "exact",
}  # fmt: skip
PROCST = {
    "trg_data_dir": "{world}/cityscapes", "trg_resize": (40, 32), "num_scales": 1, "base_channels_list": (8,),
    "batch_size_list": (3, 2), "steps_per_scale": (3, 4), "vgg_weights": "random", "content_layers": (6,),
    "style_layers": (3, 6), "lr_g": 1e-3, "lr_d": 1e-3,
}  # fmt: skip
SOURCE = {
    "num_steps": 6, "batch_size": 3, "val_count": 2, "validation_rate": 2, "output": "", "model": "UNet",
    "lr_semseg": 1e-2,
}  # fmt: skip
LABELS = {"model": "UNet", "semseg_weights": f"{{world}}/{SOURCE_NET}", "lr_semseg": 1e-3, "validation_rate": 2}


def procst(learning: Mapping[str, Any] | None = None, **flags: Any) -> Case:
    """ProCST of two scales."""
    return Case(
        config=ProCSTConfig, prepare=prepare_procst, flags={**PROCST, **flags}, learning=learning or {},
        stops=((0, 1), (0, 3), (1, 2)),
    )  # fmt: skip


def source(
    flags: Mapping[str, Any] | None = None, stops: tuple[tuple[int, int], ...] = ((0, 1), (0, 4)), **more: Any
) -> Case:
    """Training on source."""
    flags = {**SOURCE, **(flags or {})}
    return Case(config=SourceTrainingConfig, prepare=prepare_source, flags=flags, stops=stops, **more)


SELF_TRAINING = {
    "trg_data_dir": "{world}/cityscapes", "init": f"{{world}}/{SOURCE_NET}", "num_round": 2, "batch_size": 3,
    "base_lr": 1e-2, "crop_size": 24, "init_src_port": 0.3, "step_src_port": 0.2, "max_src_port": 1.0,
}  # fmt: skip


def self_training(method: str, flags: Mapping[str, Any] | None = None, **more: Any) -> Case:
    """Self-training of two rounds with 4 and 4 steps."""
    flags = {**SELF_TRAINING, "method": method, **(flags or {})}
    stops = ((0, 1), (0, 4), (1, 2))
    return Case(
        config=SelfTrainingConfig, prepare=prepare_self_training, flags=flags, stops=stops, adapts=True, **more
    )  # fmt: skip


MAXSQUARE = {
    "trg_data_dir": "{world}/cityscapes", "init": f"{{world}}/{SOURCE_NET}", "trg_resize": (40, 32), "round_num": 2,
    "epoch_each_round": 3, "batch_size": 3, "lr_semseg": 1e-2,
}  # fmt: skip


def maxsquare(method: str, flags: Mapping[str, Any] | None = None, **more: Any) -> Case:
    """Adaptation by a loss on predictions, of six epochs with one step."""
    return Case(
        config=MaxSquareConfig, prepare=prepare_maxsquare, flags={**MAXSQUARE, "method": method, **(flags or {})},
        stops=((0, 1), (0, 4)), **more,
    )  # fmt: skip


DDB = {
    "trg_data_dir": "{world}/cityscapes", "model": "UNet", "init": f"{{world}}/{SOURCE_NET}", "trg_resize": (40, 32),
    "num_steps": 6, "batch_size": 3, "lr_semseg": 1e-3, "warmup_steps": 2, "validation_rate": 2,
    "pseudo_threshold": 0.06,
}  # fmt: skip


def ddb(method: str, flags: Mapping[str, Any] | None = None, **more: Any) -> Case:
    """A net that learns from its teacher."""
    return Case(
        config=DDBConfig, prepare=prepare_ddb, flags={**DDB, "method": method, **(flags or {})},
        stops=((0, 1), (0, 4)), adapts=True, **more,
    )  # fmt: skip


DISTILLATION = {
    "method": "ddb-ckd", "model": "UNet", "trg_data_dir": "{world}/cityscapes", "trg_resize": (40, 32), "num_steps": 6,
    "batch_size": 3, "lr_semseg": 1e-3, "validation_rate": 2, "cut_teacher": "{world}/cut.pth",
    "class_teacher": "{world}/class.pth", "cut_prototypes": "{world}/cut_prototypes.pth",
    "class_prototypes": "{world}/class_prototypes.pth",
}  # fmt: skip


def distillation(flags: Mapping[str, Any] | None = None, **more: Any) -> Case:
    """Distillation of two teachers, of six steps."""
    return Case(
        config=DistillationTrainingConfig, prepare=prepare_distillation, flags={**DISTILLATION, **(flags or {})},
        stops=((0, 1), (0, 4)), **more,
    )  # fmt: skip


SHORT = {"batch_size": 4, "val_count": 4, "validation_rate": 15, "lr_semseg": 2e-2}
LEARNABLE = {"src_resize": (48, 32), "crop_size": (48, 32)}
ADAPTABLE = {
    "trg_data_dir": "{world}/evening", "num_round": 4, "batch_size": 4, "base_lr": 2e-2, "crop_size": 32,
    "epoch_per_round": 3, "init_tgt_port": 0.3, "step_tgt_port": 0.2, "max_tgt_port": 0.9, "init_src_port": 1.0,
    "mine_port": 0.5, "select_by": "none",
}  # fmt: skip
BRIDGED = {
    **LEARNABLE, "trg_data_dir": "{world}/evening", "trg_resize": (48, 32), "num_steps": 30, "batch_size": 2,
    "lr_semseg": 3e-3, "warmup_steps": 0, "validation_rate": 30, "pseudo_threshold": 0.8,
}  # fmt: skip
CASES = {
    "procst-group": procst(no_semseg=True, norm=("group",), learning={
        **LEARNABLE, "crop_size": (32, 24), "trg_resize": (48, 32), "num_scales": 0, "batch_size_list": (2,),
        "steps_per_scale": (16,), "lr_g": 2e-3, "lr_d": 2e-3,
    }),
    "procst-batch": procst(no_semseg=True, norm=("batch",)),
    "procst-labels": procst(norm=("group",), **LABELS),
    "source-unet": source(learning={
        **LEARNABLE, "num_steps": 15, **SHORT,
    }),
    "source-dropout": source(change=_with_dropout, has_dropout=True, stops=((0, 3), (0, 6))),
    "source-batchnorm": source(change=_with_batch_norm),
    "source-two-heads": source({
        "model": "UNetMultiSNR", "multi": True, "target": "cityscapes", "trg_data_dir": "{world}/cityscapes",
    }),
    "source-idle-head": source({"model": "UNetMulti"}),
    "st": self_training("st", learning=ADAPTABLE),
    "cbst": self_training("cbst", {"select_by": "miou"}, learning=ADAPTABLE),
    "cbst-dropout": self_training("cbst", change=_with_dropout, has_dropout=True),
    "maxsquare": maxsquare("maxsquare", {"random_crop": True, "src_resize": (28, 20), "crop_size": (24, 24)}),
    "iw_entropy-reference": maxsquare("iw_entropy", {"mode": "reference"}, change=_with_batch_norm),
    "hard-adam": maxsquare("hard", {"optim": "Adam", "lr_semseg": 1e-3, "micro_batch": 1, "threshold": 0.1}),
    "hard-multi": maxsquare("hard", {
        "init": f"{{world}}/{TWO_HEADED_NET}", "multi": True, "threshold": 0.06, "lambda_restitution": 0.1,
        "restitution_domains": "both", "select_by": "miou",
    }, change=_narrow),
    "ddb-cut": ddb("ddb-cut", {"select_by": "miou"}, learning=BRIDGED),
    "ddb-class": ddb("ddb-class", learning=BRIDGED),
    "ddb-cut-batchnorm": ddb("ddb-cut", {"photometric_distortion": True}, change=_with_batch_norm),
    "ddb-class-reference": ddb("ddb-class", {"mode": "reference", "ignore_top": 3}, change=_with_batch_norm),
    "ddb-dropout": ddb("ddb-cut", change=_with_dropout, has_dropout=True),
    "ddb-ckd": distillation({"use_pl_weight": True, "pseudo_threshold": 0.1, "select_by": "miou"}),
    "ddb-ckd-soft-reference": distillation({"soft_distill": True, "mode": "reference"}, change=_with_batch_norm),
    "ddb-ckd-unrectified": distillation({"rectify": "none", "cut_prototypes": "", "class_prototypes": ""}, learning={
        **BRIDGED, "lr_semseg": 3e-3,
        **dict.fromkeys(("cut_teacher", "class_teacher"), f"{{world}}/{SOURCE_NET}"),
    }, adapts=True),
    "cbst-sp-reference": self_training(
        "cbst-sp", {"spatial_prior": "{world}/prior.mat", "mode": "reference"}, change=_with_batch_norm
    ),
}  # fmt: skip


def train_short_source_net(world, seed, **changes):
    """Eight steps on the source, in which a net learns that there are three classes, and hardly more."""
    flags = {**LEARNABLE, **SHORT, "num_steps": 8, "validation_rate": 8, **changes}
    loop = Loop(method=CASES["source-unet"].prepared(world, manual_seed=seed, **flags), folder=world)
    run_quietly(loop)
    (world / LATEST).rename(world / SOURCE_NET)
