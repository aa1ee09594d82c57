"""The segmentation net in a file: a checkpoint of this toolkit, or the authors' pickled net."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from models.legacy import load_legacy_segmentation
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from training.checkpoint import BEST, LATEST, Checkpoint, checkpoint_from, is_checkpoint, load_checkpoint
from utils.errors import UserError
from utils.tensor_files import is_finite, load_network, read_tensor_file


def run_identity(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """The name and number that identify the files of a run; folders may have the same name, and copies the number."""
    return {"run": folder.name, "run_id": info.get("run_id")}


def is_of_run(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether the run of this `run_identity` wrote a file; False for one that cannot be read."""
    try:
        info = load_checkpoint(path).info
    except UserError:
        return False
    return all(info.get(name) == run[name] for name in ("run", "run_id"))


def load_segmentation_net(path: Path, flag: str) -> tuple[SegmentationShape, nn.Module]:
    """Load a trained net.

    Args:
        path: a checkpoint of this toolkit (the net that it validates), the authors' pickle, or a run folder (its best
            state by validation, else its latest).
        flag: names `path` in messages.

    Returns:
        Its shape and the net, frozen and in eval mode, on the CPU.

    Raises:
        UserError: missing, damaged, or holding no segmentation net.
    """
    if path.is_dir():
        found = next((name for name in (BEST, LATEST) if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{flag} {path}: this folder holds neither {BEST} nor {LATEST}, so it is no run folder")
        path = path / found
    content = read_tensor_file(path)
    if content is None:
        shape, net = load_legacy_segmentation(path)
    elif is_checkpoint(content):
        shape, net = _net_of(checkpoint_from(content, path), f"{flag} {path}")
    else:
        raise UserError(
            f"{flag} {path}: holds no segmentation net this program knows (a checkpoint of its own, or the authors' "
            "pretrained_semseg_on_*.pth)"
        )
    if not is_finite(net):
        raise UserError(f"{flag} {path}: the weights are not finite, the training diverged")
    return shape, net


def _net_of(checkpoint: Checkpoint, origin: str) -> tuple[SegmentationShape, nn.Module]:
    if not checkpoint.segmentation:
        raise UserError(
            f"{origin} holds no segmentation net: the run trains without label losses or has not reached its last scale"
        )
    try:
        shape = SegmentationShape(**checkpoint.segmentation["shape"])
        weights = checkpoint.modules[checkpoint.segmentation["module"]]
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin} is incomplete: {error}") from None
    net = build_segmentation_net(shape)
    load_network(net, weights, origin)
    return shape, net.eval().requires_grad_(False)
