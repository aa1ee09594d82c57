"""The authors' `Gst.pth`: a pickled list of their generators, read without executing what it names."""

from __future__ import annotations

from pathlib import Path

from core.config import NetworkShape
from core.networks import Generator, freeze
from utils.errors import UserError
from utils.pickled_modules import Record, read_pickled_modules
from utils.tensor_files import load_network

_CLASSES = (
    "core.models.ProCSTGenerator",
    "core.models.ConvBlockProCST",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.normalization.GroupNorm",
    "torch.nn.modules.activation.LeakyReLU",
    "torch.nn.modules.activation.Tanh",
)


def load_legacy_generators(path: Path) -> list[Generator]:
    """The frozen generators, coarse to fine, of the authors' `Gst.pth` (specification section 5).

    Raises:
        UserError: the file is not a pickled list of ProCST generators.
    """
    records = read_pickled_modules(path, _CLASSES)
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: holds a {type(records).__name__}, not the list of generators of a Gst.pth")
    generators = []
    for scale, record in enumerate(records):
        if not isinstance(record, Record) or record.class_name != "ProCSTGenerator":
            raise UserError(f"{path}: entry {scale} is not a ProCST generator")
        generator = Generator(_shape_of(record, scale, path))
        load_network(generator, record.state_dict(), f"{path}, scale {scale},")
        generators.append(freeze(generator))
    return generators


def _shape_of(record: Record, scale: int, path: Path) -> NetworkShape:
    """Read a generator's shape off its weights and norms."""
    try:
        channels, inputs, kernel = record.state_dict()["head.conv.weight"].shape[:3]
        blocks = [record.child("head"), *dict(record.child("body").children()).values()]
        blocks.append(next(block for _, block in record.child("tail").children()))
        norms = [norm for norm in (block.child("norm") for block in blocks) if norm is not None]
        kinds = {norm.class_name for norm in norms}
        # Where no block has a norm, `groups` is a number that divides no width, so the group rule gives none either.
        groups = next((n.attributes["num_groups"] for n in norms if n.class_name == "GroupNorm"), channels + inputs)
    except (KeyError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(f"{path}: the generator of scale {scale} is not complete ({error})") from None
    if not (kinds <= {"BatchNorm2d"} or kinds <= {"GroupNorm"}):
        raise UserError(f"{path}: the generator of scale {scale} mixes norms: {', '.join(sorted(kinds))}")
    if not isinstance(groups, int) or groups < 1:
        raise UserError(f"{path}: the generator of scale {scale} has a group norm of {groups!r} groups")
    return NetworkShape(
        scale=scale,
        channels=channels,
        layers=len(blocks),
        norm="batch" if "BatchNorm2d" in kinds else "group",
        groups=groups,
        image_channels=inputs if scale == 0 else inputs // 2,
        kernel_size=kernel,
    )
