"""The checkpoint format: state dicts, plain values and the configuration, loadable with `weights_only=True`.

A run folder holds `latest.pth` (everything needed to continue), `previous.pth` (the one before it), the checkpoints
that a method keeps at the end of its stages, and `best.pth` (the best state by validation, without optimisers).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from utils.errors import UserError
from utils.files import atomic_write
from utils.locks import say
from utils.tensor_files import DamagedFileError, read_tensor_file

FORMAT = "procst-checkpoint"
VERSION = 2
LATEST = "latest.pth"
PREVIOUS = "previous.pth"
BEST = "best.pth"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state of a training; all random numbers follow from the configuration and the step.

    Attributes:
        method: name of the method that wrote it.
        config: of the run, as `Config.to_json` gives it.
        stage: index of the stage in training.
        step: finished steps of that stage.
        modules: state dicts of all networks of the stages so far, by name.
        optimizers: state dicts of the optimisers of the stage in training; empty in a file for use.
        method_state: `Method.state_dict`.
        inputs: fingerprints of what the run learns from (file lists, starting weights), by a name for messages.
        segmentation: the segmentation net that is validated: its `module` in `modules` and its `shape`, or empty.
        info: `run`, the folder of the run that wrote it.
        validations: results of the validations, in order; see `training.validation.report`.
        skipped: what was wrong with images that were replaced (`--on_bad_image skip`).
    """

    method: str
    config: Mapping[str, Any]
    stage: int
    step: int
    stage_finished: bool
    modules: Mapping[str, Mapping[str, Any]]
    optimizers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    method_state: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    segmentation: Mapping[str, Any] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    validations: Sequence[Mapping[str, Any]] = ()
    skipped: Sequence[str] = ()

    def for_use(self) -> "Checkpoint":
        """The same without the state that only a continued training needs."""
        return dataclasses.replace(self, optimizers={}, method_state={})

    def write(self, file: BinaryIO) -> None:
        """Write to an open file."""
        torch.save({"format": FORMAT, "version": VERSION, **vars(self)}, file)

    def save(self, path: Path, keep: Path | None = None) -> None:
        """Write to `path` atomically; a file that was there is kept under the name `keep`. Raises `UserError`."""
        atomic_write(path, self.write, keep)


def is_checkpoint(content: object) -> bool:
    """Whether a tensor file with this content is a checkpoint of this toolkit."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        UserError: missing, of another version, or incomplete.
        DamagedFileError: damaged, or of another program.
    """
    content = read_tensor_file(path)
    if content is None:  # checkpoints hold nothing but tensors and plain values
        raise DamagedFileError(f"{path} is not a checkpoint of this toolkit, or damaged")
    return checkpoint_from(content, path)


def checkpoint_from(content: Any, path: Path) -> Checkpoint:
    """The checkpoint in the content of a tensor file. Raises `UserError` for other content."""
    if not is_checkpoint(content):
        raise UserError(f"{path} is not a checkpoint of this toolkit")
    if content.get("version") != VERSION:
        raise UserError(f"{path} has checkpoint version {content.get('version')}; this program reads {VERSION}")
    try:
        return Checkpoint(**{f.name: content[f.name] for f in dataclasses.fields(Checkpoint)})
    except KeyError as error:
        raise UserError(f"{path} is incomplete: {error} is missing") from None


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint to continue from."""
    return (folder / LATEST).is_file() or (folder / PREVIOUS).is_file()


def read_newest(folder: Path) -> tuple[Checkpoint, Path]:
    """A run's newest undamaged checkpoint, and its path; a line on stderr says if that is not `latest.pth`.

    Raises `UserError`: none can be read.
    """
    problems = []
    for path in (folder / LATEST, folder / PREVIOUS):
        if not path.is_file():  # as where the run was killed between the two names of a save
            problems.append(f"{path} is missing")
            continue
        try:
            checkpoint = load_checkpoint(path)
        except DamagedFileError as error:
            problems.append(str(error))
            continue
        if problems:
            say(f"WARNING: {problems[0]}; continuing from the checkpoint before it, {path}")
        return checkpoint, path
    raise UserError(
        f"{'; '.join(problems)}; a checkpoint that the run kept at the end of a stage, copied into an empty folder as "
        f"{LATEST}, is a state to continue from"
    )
