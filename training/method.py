"""The interface of a training method: networks, optimisers, batches and one step. `training.loop` trains it.

A new method is one class that derives from `Method`; `uda/source.py` is the shortest example.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data_handlers.domain import Domain
from models.shapes import SegmentationShape
from training.distributed import Rank
from training.flags import Config
from training.validation import Validator


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a training: a scale, a round, a phase.

    Attributes:
        name: for messages, such as `scale 0`.
        batch_size: samples in a step, over all processes.
        tag: prefix of its losses' names in TensorBoard, such as `Scale0/`.
        validate_every: steps between two validations, 0 for none; the last step is validated, too.
        pictures_every: steps between two rows of pictures in TensorBoard, 0 for none.
        keep_as: file name of the checkpoint that is kept at its end, '' for none.
    """

    name: str
    steps: int
    steps_per_epoch: int
    batch_size: int
    tag: str = ""
    validate_every: int = 0
    pictures_every: int = 0
    keep_as: str = ""


class Batch(Protocol):
    """What `Method.batches` yields and `Method.step` takes."""

    skipped: Sequence[str]  # what was wrong with images that were replaced


class Method:
    """Base class of training methods.

    All random numbers of a step must follow from the run's seed, the stage and the step, so that an interrupted run
    continues bit for bit. The loop seeds PyTorch's generators before each step.

    Attributes:
        name: for checkpoints.
        config_class: of its configuration.
        batch_flag: the flag of its batch size, for messages.
        rank: this process among those that share every batch, and its device.
        modules: all networks with state, by name: those in training, finished ones, teachers. They are saved, checked
            for finite values and compared between processes.
        optimizers: those of the stage in training, by name.
        domains: the lists of images that are read, by name.
        shape: of the segmentation net that `eval_net` returns, or None.
        dtype: of weights and network inputs; tests train in float64.
        validator: validates the net of `eval_net`; None for no validation.
        validation_line: says what validates it, or why nothing does, or ''.
        unused: names of trainable tensors (`module.parameter`) that no loss reaches in this configuration, each with
            the reason; a name may end in `*`.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[Config]]
    batch_flag: ClassVar[str] = "--batch_size"

    def __init__(self, *, config: Config, rank: Rank, domains: Mapping[str, Domain]) -> None:
        self.config = config
        self.rank = rank
        self.domains = dict(domains)
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.shape: SegmentationShape | None = None
        self.unused: dict[str, str] = {}
        self.dtype = torch.float32
        self.validator: Validator | None = None
        self.validation_line = ""

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The flags given for a new run with those that files named by them decide. Raises `UserError`."""
        return given

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.rank.device

    def task(self) -> str:
        """End of the name of a new run folder."""
        raise NotImplementedError

    def stages(self) -> Sequence[Stage]:
        """The stages in order."""
        raise NotImplementedError

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Make the networks that the stage adds and its optimisers.

        Args:
            resumed: a checkpoint of this stage or of a later one will be loaded next, so nothing is computed or written
                here that the checkpoint holds.
        """
        raise NotImplementedError

    def prepare_stage(self, stage: int, folder: Path | None, check: Callable[[], None]) -> str:
        """Make what the batches of the stage need of its networks, such as pseudo-labels, and write it to `folder`.

        Called before `batches`, with the weights of a checkpoint where one was loaded; what was made before is kept.
        All processes call it with the same folder.

        Args:
            folder: of the run; None for a dry run, which writes nothing and makes as much as a measurement needs.
            check: called now and then; raises what ends the run where a stop was requested.

        Returns:
            A line to print, or ''.
        """
        return ""

    def batches(self, stage: int, steps: range) -> Iterator[Batch]:
        """The batches of these steps of the stage, in order; a batch depends only on the number of its step."""
        raise NotImplementedError

    def step(self, batch: Batch, stage: int, step: int) -> Mapping[str, Tensor]:
        """Train on a batch: losses, backward, optimisers, EMA, without reading back to the host and without I/O.

        Returns:
            The losses to be logged, scalars on the device without gradient. The loop sums them over the processes, so
            the method multiplies each by the fraction of the global batch that it is a mean over (`Rank`).
        """
        raise NotImplementedError

    def end_stage(self, stage: int) -> None:
        """Freeze networks that are final after the stage; also called for finished stages when a run is resumed."""

    def write_summary(self, stage: int, folder: Path) -> str:
        """Write pictures at the end of a stage, unless they are there; returns a line to print, or ''."""
        return ""

    def eval_net(self) -> nn.Module | None:
        """The segmentation net that is validated and used afterwards, one of `modules`; None before there is one."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Small state beside modules and optimisers: tensors and plain values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the inputs, by a name for messages; a continued run must have the same."""
        lists = {f"list of {name} images": domain.files.fingerprint() for name, domain in self.domains.items()}
        drawn = {name: domain.image_roots for name, domain in self.domains.items() if domain.image_roots}
        folders = {f"number of folders of {name} images": str(len(roots)) for name, roots in drawn.items()}
        described = {name: domain.files.data_set.fingerprint for name, domain in self.domains.items()}
        descriptions = {f"description of the {name} data set": value for name, value in described.items() if value}
        return {**lists, **folders, **descriptions}

    def images(self) -> Mapping[str, Tensor]:
        """Images of the last step for TensorBoard, (B,3,h,w) in [-1,1], shown side by side in this order."""
        return {}

    def summary(self, losses: Mapping[str, float]) -> str:
        """Part of the progress bar's text, from the mean losses since the last log entry."""
        names = list(losses)[:3]
        ends = [name.rpartition("/")[2] for name in names]
        shown = ends if len(set(ends)) == len(ends) else names
        return " ".join(f"{name} {losses[of]:.4f}" for name, of in zip(shown, names, strict=True))

    def describe(self) -> list[str]:
        """Lines about the data, the networks and the precision."""
        return [files.describe() for domain in self.domains.values() for files in domain.lists]

    def publish(self, path: Path, info: Mapping[str, Any]) -> None:
        """Copy the net at `path`, a new best state or the last one, to the output; `info`: see `Checkpoint.info`."""

    def conclusion(self, folder: Path) -> str:
        """A line that says what to do with a finished run."""
        return ""
