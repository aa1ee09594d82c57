"""The authors' `Gst.pth`: a pickled list of their generators, read without executing what it names."""

from pathlib import Path

from core.config import NetworkShape
from core.networks import Generator, freeze
from utils.errors import UserError
from utils.pickled_modules import Record, read_pickled_modules
from utils.tensor_files import load_network


def load_legacy_generators(path: Path) -> list[Generator]:
    """The frozen generators, coarse to fine, of the authors' `Gst.pth` (docs/method.md, section 5).

    Raises:
        UserError: the file is not a pickled list of ProCST generators.
    """
    records = read_pickled_modules(path, ("core.models.ProCSTGenerator", "core.models.ConvBlockProCST"))
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: holds a {type(records).__name__}, not the list of generators of a Gst.pth")
    generators = []
    for scale, record in enumerate(records):
        if not isinstance(record, Record) or record.class_name != "ProCSTGenerator":
            raise UserError(f"{path}: entry {scale} is not a ProCST generator")
        generator = Generator(_shape_of(record, scale, f"{path}: the generator of scale {scale}"))
        load_network(generator, record.state_dict(), f"{path}, scale {scale},")
        generators.append(freeze(generator))
    return generators


def _shape_of(record: Record, scale: int, what: str) -> NetworkShape:
    """Read a generator's shape off its weights and norms."""
    try:
        channels, inputs, kernel = record.state_dict()["head.conv.weight"].shape[:3]
        blocks = [record.child("head"), *dict(record.child("body").children()).values()]
        blocks.append(next(block for _, block in record.child("tail").children()))
        norms = [norm for norm in (block.child("norm") for block in blocks) if norm is not None]
        kinds = {norm.class_name for norm in norms}
        # Without any norm, `groups` must be a number that divides no width.
        groups = next((n.attributes["num_groups"] for n in norms if n.class_name == "GroupNorm"), channels + inputs)
    except (KeyError, AttributeError, ValueError, StopIteration) as error:
        raise UserError(f"{what} is not complete ({error})") from None
    if not (kinds <= {"BatchNorm2d"} or kinds <= {"GroupNorm"}):
        raise UserError(f"{what} mixes norms: {', '.join(sorted(kinds))}")
    if not isinstance(groups, int) or groups < 1:
        raise UserError(f"{what} has a group norm of {groups!r} groups")
    return NetworkShape(
        scale=scale,
        channels=channels,
        layers=len(blocks),
        norm="batch" if "BatchNorm2d" in kinds else "group",
        groups=groups,
        kernel_size=kernel,
    )
