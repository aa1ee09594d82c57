"""The two segmentation nets of the last scale: P, trained on source and frozen, and Q, trained on SiT meanwhile."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from core.config import ProCSTConfig, SemsegConfig, SGDConfig, default_semseg_weights
from core.segmentation_files import load_segmentation_net
from core.step import SegmentationNets
from models.resnet import recompute_blocks
from models.segmentation import build_segmentation_net, load_backbone, parameter_groups
from utils.errors import UserError
from utils.seeds import seed_for


def segmentation_optimizer(net: nn.Module, config: SGDConfig) -> SGD:
    """SGD with the backbone at `lr_semseg` and the head at ten times that."""
    groups = parameter_groups(net, config.lr_semseg)
    return SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)


def _training_command(config: ProCSTConfig) -> str:
    """The command that trains P for a run."""
    semseg, data = config.semseg, config.data
    words = ["--gpus", config.run.gpus.split()[0], "--source", data.source, "--src_data_dir", data.src_data_dir]
    words += semseg.shape().flags()
    if semseg.semseg_weights != default_semseg_weights(data.source):
        words += ["--output", semseg.semseg_weights]
    return shlex.join(["python", "train_semseg_on_source.py", *words])


def load_source_net(run: ProCSTConfig) -> nn.Module:
    """P of a run, frozen, on the CPU.

    Raises:
        UserError: a missing or damaged file, or a net of another shape than configured.
    """
    config = run.semseg
    path = Path(config.semseg_weights)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; the label losses need a segmentation net trained on {run.data.source}: put the "
            "authors' file there, name another with --semseg_weights, go without (--no_semseg), or train one with: "
            f"{_training_command(run)}"
        )
    shape, net = load_segmentation_net(path, "--semseg_weights")
    if shape != config.shape():
        differing = [
            f"--{name} {getattr(shape, name)}"
            for name in ("model", "backbone", "num_classes")
            if getattr(shape, name) != getattr(config, name) and getattr(shape, name) != "none"
        ]
        raise UserError(
            f"--semseg_weights {path} holds {shape}, but the command line asks for {config.shape()}; "
            f"give {' '.join(differing)}, or other weights"
        )
    return net


def restore_momentum(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict` for SGD, with every buffer laid out in memory as its weight is.

    Fused SGD pairs weights and buffers by their place in memory, and a checkpoint may be of a time of another layout.

    Raises:
        KeyError, TypeError, ValueError: the state does not fit.
    """
    optimizer.load_state_dict(dict(state))
    for weight, held in optimizer.state.items():
        if held.get("momentum_buffer") is not None:
            held["momentum_buffer"] = torch.empty_like(weight).copy_(held["momentum_buffer"])


def build_label_networks(
    config: SemsegConfig, source_net: nn.Module, seed: int, pretrained: bool, save_memory: bool = False
) -> SegmentationNets:
    """P with a fresh Q and its optimiser, on the CPU.

    Args:
        pretrained: load Q's backbone weights; not needed where a checkpoint fills Q.
        save_memory: Q computes its residual blocks once more in the backward instead of keeping what they need there.

    Raises:
        UserError: the backbone weights cannot be loaded.
    """
    torch.manual_seed(seed_for(seed, 5))
    target_net = build_segmentation_net(config.shape())
    if pretrained and config.backbone_weights != "random":
        load_backbone(target_net, config.backbone, config.backbone_weights)
    target_net.train()
    if save_memory:
        recompute_blocks(target_net)
    return SegmentationNets(source_net, target_net, segmentation_optimizer(target_net, config))
