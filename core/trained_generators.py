"""The trained generators a user names: a run folder, a checkpoint of this toolkit, or the authors' `Gst.pth`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from core.checkpoint import FORMAT, LATEST, load_checkpoint, load_generators
from core.config import ProCSTConfig
from core.legacy import load_legacy_generators
from core.networks import Generator
from utils.errors import UserError
from utils.tensor_files import read_tensor_file, weights_fingerprint


@dataclass(frozen=True)
class TrainedGenerators:
    """Frozen source-to-target generators, coarse to fine, on the CPU.

    Attributes:
        config: of the run they come from; None for a file of the authors, which holds no configuration.
        note: a line for the user, or ''.
    """

    generators: list[Generator]
    config: ProCSTConfig | None
    note: str = ""

    def fingerprint(self) -> str:
        """SHA-256 over all weights: tells whether two exports come from the same generators."""
        return weights_fingerprint(*self.generators)


def load_trained_generators(path: Path) -> TrainedGenerators:
    """Load what `--trained_procst_path` names.

    Raises:
        UserError: missing, damaged, none of the three kinds, or a run that has not reached its last scale.
    """
    file = path
    if path.is_dir():
        file = path / LATEST
        if not file.is_file():
            raise UserError(f"--trained_procst_path {path}: this folder holds no {LATEST}, so it is no run folder")
    content = read_tensor_file(file)
    if content is None:
        return TrainedGenerators(load_legacy_generators(file), config=None)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UserError(f"--trained_procst_path {file}: neither a ProCST checkpoint nor the authors' Gst.pth")
    checkpoint = load_checkpoint(file)
    generators = load_generators(checkpoint, "Gst", file)
    if not all(parameter.isfinite().all() for generator in generators for parameter in generator.parameters()):
        raise UserError(f"--trained_procst_path {file}: the weights are not finite, the training diverged")
    note = "" if checkpoint.scale_finished else f"the last scale is still in training (step {checkpoint.step})"
    return TrainedGenerators(generators, checkpoint.config, note)
