"""The segmentation net in a file: a checkpoint of this toolkit, or a net of the authors, pickled or of MXNet."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.deeplab_multi_files import counters, fill, new_tensors, read_published, traits_of, two_headed
from models.legacy import load_legacy_segmentation
from models.mmseg_files import mmseg_net
from models.resnet38_files import classes_in_file, load_resnet38
from models.segmentation import build_segmentation_net, load_backbone
from models.shapes import TWO_HEADED_DEEPLAB, SegmentationShape
from training.checkpoint import BEST, LATEST, Checkpoint, checkpoint_from, is_checkpoint
from training.config import NetConfig
from utils.errors import UserError
from utils.mxnet_params import is_mxnet_file
from utils.seeds import NET_WEIGHTS, seed_for
from utils.tensor_files import is_finite, load_network, read_tensor_file


def net_to_train(config: NetConfig, seed: int, fresh: bool, init: str = "") -> nn.Module:
    """A net on the CPU, with its starting weights (`UserError` if they cannot be loaded) if it starts `fresh`.

    Args:
        init: file of the whole net, of the configuration's shape, instead of its backbone's weights (`--init`).
    """
    torch.manual_seed(seed_for(seed, NET_WEIGHTS))
    if fresh and init:
        net = trainable_net(Path(init))[1]
        net.start = f"it starts from {init}"
        return net
    net = build_segmentation_net(config.shape())
    if fresh and config.backbone_weights != "random":
        net.start = load_backbone(net, config.backbone, config.backbone_weights)
    return net


def trainable_net(path: Path, **changes: Any) -> tuple[SegmentationShape, nn.Module]:
    """The net of `--init` and its shape, with what it learns trainable; it may get a restitution that is new.

    Args:
        changes: fields of the shape that differ; None and '' leave them.

    Raises:
        UserError: as `load_segmentation_net`, or the weights are of another net than the changed one.
    """
    shape, trained = load_segmentation_net(path, "--init")
    shape = replace(shape, **{name: value for name, value in changes.items() if value})
    net = build_segmentation_net(shape)
    net.start = new_tensors(fill(net, trained.state_dict(), f"--init {path}"), f"--init {path}")
    return shape, net


def load_segmentation_net(path: Path, flag: str) -> tuple[SegmentationShape, nn.Module]:
    """Load a trained net. Raises `UserError`: missing, damaged, or holding no segmentation net.

    Args:
        path: a checkpoint of this toolkit (the net that it validates), the ProCST authors' pickle, the CBST authors'
            `.params`, or a run folder (its best state by validation, else its latest).
        flag: names `path` in messages.

    Returns:
        Its shape and the net, frozen and in eval mode, on the CPU.
    """
    if path.is_dir():
        found = next((name for name in (BEST, LATEST) if (path / name).is_file()), None)
        if found is None:
            raise UserError(f"{flag} {path}: this folder holds neither {BEST} nor {LATEST}, so it is no run folder")
        path = path / found
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    shape, net = _net_in(path, f"{flag} {path}")
    if not is_finite(net):
        raise UserError(f"{flag} {path}: the weights are not finite, the training diverged")
    return shape, net.eval().requires_grad_(False)


def _net_in(path: Path, origin: str) -> tuple[SegmentationShape, nn.Module]:
    if is_mxnet_file(path):
        shape = _shape(origin, model="ResNet38", backbone="resnet38", num_classes=classes_in_file(path))
        net = build_segmentation_net(shape)
        load_resnet38(net, path)
        return shape, net
    content = read_tensor_file(path)
    if is_checkpoint(content):
        return _net_of(checkpoint_from(content, path), origin)
    published = read_published(path)
    if (state := two_headed(published)) is not None:
        backbone, classes, restitutes = traits_of(state, origin)
        shape = _shape(origin, model=TWO_HEADED_DEEPLAB[restitutes], backbone=backbone, num_classes=classes)
        net = build_segmentation_net(shape)
        fill(net, state, origin)
        return shape, net
    if (found := mmseg_net(published, origin)) is not None:
        shape, state = found
        net = build_segmentation_net(shape)
        load_network(net, counters(net) | state, origin)
        return shape, net
    if content is None:
        return load_legacy_segmentation(path)
    raise UserError(
        f"{origin}: holds no segmentation net this program knows (a checkpoint of its own, the ProCST authors' "
        "pretrained_semseg_on_*.pth, the CBST authors' .params, a two-headed net of the MaxSquare, SNR or "
        "AdaptSegNet authors, or mmsegmentation's net of the DDB authors)"
    )


def _shape(origin: str, **fields: Any) -> SegmentationShape:
    try:
        return SegmentationShape(**fields)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _net_of(checkpoint: Checkpoint, origin: str) -> tuple[SegmentationShape, nn.Module]:
    if not checkpoint.segmentation:
        raise UserError(
            f"{origin} holds no segmentation net: the run trains without label losses or has not reached its last scale"
        )
    try:
        shape = _shape(origin, **checkpoint.segmentation["shape"])
        weights = checkpoint.modules[checkpoint.segmentation["module"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{origin} is incomplete: {error}") from None
    net = build_segmentation_net(shape)
    load_network(net, weights, origin)
    return shape, net
