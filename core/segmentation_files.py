"""Files of segmentation nets: ours, the authors', and the ones inside ProCST checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from core.checkpoint import FORMAT as PROCST_FORMAT
from core.checkpoint import LATEST, load_checkpoint
from core.networks import freeze
from models.legacy import load_legacy_segmentation
from models.segmentation import SegmentationShape, build_segmentation_net
from utils.errors import UserError
from utils.files import atomic_write
from utils.tensor_files import DamagedFileError, UnavailableFileError, load_network, read_tensor_file

FORMAT = "procst-segmentation"
VERSION = 1
BEST = "best.pth"


@dataclass(frozen=True)
class SegmentationFile:
    """A segmentation net with what is known about it.

    Attributes:
        weights: state dict.
        info: plain values that tell where it comes from (`run`, `run_id`, `data_set`, `step`, `miou`), as far as known.
        training: what continuing its training needs, empty in files for use.
    """

    shape: SegmentationShape
    weights: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path, keep: Path | None = None) -> None:
        """Write to `path` atomically; what stood there stays under the name `keep`."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "shape": asdict(self.shape),
            "weights": dict(self.weights),
            "info": dict(self.info),
            "training": dict(self.training),
        }
        atomic_write(path, lambda file: torch.save(content, file), keep)

    def net(self, origin: str) -> nn.Module:
        """The net, frozen and in eval mode, on the CPU.

        Raises:
            UserError: the weights do not fit the shape.
        """
        net = build_segmentation_net(self.shape)
        load_network(net, self.weights, origin)
        return freeze(net)


def read_segmentation_file(path: Path) -> SegmentationFile:
    """Read a file that `SegmentationFile.save` wrote.

    Raises:
        UserError: missing, damaged, of another program or of another version.
    """
    content = read_tensor_file(path)
    if content is None:
        raise DamagedFileError(f"{path} is not a segmentation net of this toolkit, or damaged")
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a segmentation net of this toolkit")
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise UserError(f"{path} has version {version}; this program reads {VERSION}")
    try:
        shape = SegmentationShape(**content["shape"])
        return SegmentationFile(shape, content["weights"], content["info"], content["training"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is incomplete: {error}") from None


def run_identity(folder: Path, info: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the files of a source training from those of others, by its folder and the `info` of its checkpoint.

    The folder's name alone may be another run's, too; the number alone may be a copied folder's.
    """
    return {"run": folder.name, "run_id": info.get("run_id")}


def is_of_run(path: Path, run: Mapping[str, Any]) -> bool:
    """Whether a file was written by the source training of this `run_identity`.

    Raises:
        UnavailableFileError: it cannot be read at the moment.
    """
    try:
        info = read_segmentation_file(path).info
    except UnavailableFileError:
        raise
    except UserError:
        return False
    return all(info.get(name) == value for name, value in run.items())


def load_segmentation_net(path: Path, flag: str) -> tuple[SegmentationShape, nn.Module]:
    """Load a trained net, whichever of the known files holds it.

    Args:
        path: a file of this toolkit, a ProCST checkpoint (its net trained on SiT), the authors' pickle, or the run
            folder of `train_semseg_on_source.py` (its best net) or `train_procst.py` (its latest).
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
    shape, net = _load(path, flag)
    if not all(bool(tensor.isfinite().all()) for tensor in net.state_dict().values()):
        raise UserError(f"{flag} {path}: the weights are not finite, the training diverged")
    return shape, net


def _load(path: Path, flag: str) -> tuple[SegmentationShape, nn.Module]:
    content = read_tensor_file(path)
    if content is None:
        return load_legacy_segmentation(path)
    kind = content.get("format") if isinstance(content, Mapping) else None
    if kind == PROCST_FORMAT:
        return _net_of_run(path)
    if kind != FORMAT:
        raise UserError(
            f"{flag} {path}: holds no segmentation net this program knows (its own, a ProCST checkpoint, or the "
            "authors' pretrained_semseg_on_*.pth)"
        )
    file = read_segmentation_file(path)
    return file.shape, file.net(f"{flag} {path}")


def _net_of_run(path: Path) -> tuple[SegmentationShape, nn.Module]:
    checkpoint = load_checkpoint(path)
    if not checkpoint.segmentation:
        raise UserError(
            f"{path} holds no segmentation net: the run trains without label losses or has not reached its last scale"
        )
    shape = checkpoint.config.semseg.shape()
    return shape, SegmentationFile(shape, checkpoint.segmentation["target_net"]).net(str(path))
