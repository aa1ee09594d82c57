"""Checks of the input of a ProCST run, before anything is written, and the networks that it does not train."""

from pathlib import Path

from torch import nn

from core.config import ProCSTConfig
from core.procst import ProCST
from models.vgg import build_vgg
from training.distributed import Rank
from training.preparation import make_domain, source_files, target_files, target_validator
from training.run_folder import Continued
from training.segmentation_files import load_segmentation_net, net_to_train
from utils.errors import UserError


def prepare(config: ProCSTConfig, rank: Rank, continued: Continued | None) -> ProCST:
    """Check the input, load the perceptual net and P, build Q. Raises `UserError`, which names file or flag."""
    reads_labels, classes, run = not config.labels.no_semseg, config.net.num_classes, config.run
    source = source_files(config.source, classes if reads_labels else None, otherwise="add --no_semseg")
    target = target_files(config.target, classes, labels=config.target.trg_labels)
    seg_source, seg_sit, validator, line = None, None, None, ""
    fresh = continued is None or "seg_sit" not in continued.checkpoint.modules
    if reads_labels:
        select_by = config.validation.select_by
        validator, line = target_validator(config, rank, source.data_set, target, classes, select_by)
        if validator is None and config.validation.validation_rate:
            raise UserError(f"--validation_rate: {line}; remove the flag, or give --select_by label_free")
        seg_source = _load_seg_source(config)
        seg_sit = net_to_train(config.net, run.manual_seed, fresh)
    crop = config.source.crop_size
    method = ProCST(
        config=config,
        rank=rank,
        source=make_domain(
            config, rank, source, "source", resize=config.source.src_resize, crop=crop, labels=reads_labels
        ),
        target=make_domain(config, rank, target, "target", resize=config.target.trg_resize, crop=crop),
        perceptual=build_vgg(config.loss.vgg_weights, config.loss.perceptual_layers, run.manual_seed),
        seg_source=seg_source,
        seg_sit=seg_sit,
        seg_sit_is_fresh=fresh,
    )
    method.validator, method.validation_line = validator, f"last scale: {line}" if line else ""
    return method


# --- the segmentation nets of the last scale -------------------------------------------------------------------------


def _load_seg_source(config: ProCSTConfig) -> nn.Module:
    """P, frozen, on the CPU."""
    path, wanted = Path(config.labels.semseg_weights), config.net.shape()
    if not path.exists():
        raise UserError(
            f"--semseg_weights {path}: no such file; the label losses need a segmentation net trained on "
            f"{config.source.source}: put the authors' file there, name another, go without (--no_semseg), or train "
            f"a {wanted} with train_semseg_on_source.py"
        )
    shape, net = load_segmentation_net(path, "--semseg_weights")
    if shape != wanted:
        raise UserError(
            f"--semseg_weights {path} holds {shape}, but the command line asks for {wanted}; change --model, "
            "--backbone or --num_classes, or give other weights"
        )
    return net
