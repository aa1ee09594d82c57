"""The trained generators a user names: a run folder, a checkpoint of this toolkit, or the authors' `Gst.pth`."""

from dataclasses import dataclass
from pathlib import Path

from core.config import NetworkShape, ProCSTConfig
from core.networks import Generator, freeze
from training.checkpoint import LATEST, Checkpoint, checkpoint_from, is_checkpoint
from utils.errors import UserError
from utils.pickled_modules import Record, read_pickled_modules
from utils.tensor_files import is_finite, load_network, read_tensor_file

FLAG = "--trained_procst_path"


@dataclass(frozen=True)
class TrainedGenerators:
    """Frozen source-to-target generators, coarse to fine, on the CPU.

    `config` is None for a file of the authors, which holds no configuration; `note` is a line for the user, or ''.
    """

    generators: list[Generator]
    config: ProCSTConfig | None
    note: str = ""


def load_trained_generators(path: Path) -> TrainedGenerators:
    """Load what `--trained_procst_path` names.

    Raises `UserError`: missing, damaged, none of the three kinds, or of a run that has not reached its last scale.
    """
    file = path
    if path.is_dir():
        file = path / LATEST
        if not file.is_file():
            raise UserError(f"{FLAG} {path}: this folder holds no {LATEST}, so it is no run folder")
    if not file.is_file():
        raise UserError(f"{FLAG} {file}: no such file")
    content = read_tensor_file(file)
    if content is None:
        return TrainedGenerators(load_legacy_generators(file), config=None)
    if not is_checkpoint(content):
        raise UserError(f"{FLAG} {file}: neither a ProCST checkpoint nor the authors' Gst.pth")
    checkpoint = checkpoint_from(content, file)
    if checkpoint.method != "procst":
        raise UserError(
            f"{FLAG} {file}: a checkpoint of another training ({checkpoint.method}), which has no generators"
        )
    config = ProCSTConfig.from_json(checkpoint.config, file)
    generators = _generators(checkpoint, config, file)
    if not all(map(is_finite, generators)):
        raise UserError(f"{FLAG} {file}: the weights are not finite, the training diverged")
    note = "" if checkpoint.stage_finished else f"the last scale is still in training (step {checkpoint.step})"
    return TrainedGenerators(generators, config, note)


def _generators(checkpoint: Checkpoint, config: ProCSTConfig, origin: Path) -> list[Generator]:
    scales = range(config.network.num_scales + 1)
    if missing := [scale for scale in scales if f"Gst.{scale}" not in checkpoint.modules]:
        raise UserError(
            f"{origin} has trained scale {missing[0] - 1} of 0..{scales[-1]} so far; images can be translated once the "
            "last scale is in training: continue the run with --continue_train_from_path"
        )
    generators = []
    for scale in scales:
        generator = Generator(config.network.shape(scale))
        load_network(generator, checkpoint.modules[f"Gst.{scale}"], f"{origin}, Gst of scale {scale},")
        generators.append(freeze(generator))
    return generators


# --- the authors' `Gst.pth`: a pickled list of their generators, read without executing what it names -----------------


def load_legacy_generators(path: Path) -> list[Generator]:
    """The frozen generators, coarse to fine, of the authors' `Gst.pth` (docs/method.md, section 5).

    Raises `UserError`: the file is not a pickled list of ProCST generators.
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
    return NetworkShape(
        scale=scale,
        channels=channels,
        layers=len(blocks),
        norm="batch" if "BatchNorm2d" in kinds else "group",
        groups=groups,
        kernel_size=kernel,
    )
