"""Checkpoints: state dicts and configuration, loadable with `weights_only=True`, written atomically.

A run folder holds `config.json`, `latest.pth` (everything needed to go on), `previous.pth` (the one before it),
`scale_<s>.pth` (the same, at the end of each scale) and the contact sheets.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from core.config import NetworkConfig, ProCSTConfig
from core.networks import Generator, freeze
from utils.errors import UserError
from utils.files import atomic_write
from utils.locks import say
from utils.tensor_files import DamagedFileError, load_network, read_tensor_file

FORMAT = "procst-checkpoint"
VERSION = 1
LATEST = "latest.pth"
PREVIOUS = "previous.pth"
DAMAGED = "damaged.pth"
CONFIG = "config.json"
State = TypeVar("State")
NETWORK_NAMES = ("Dst", "Gst", "Dts", "Gts")


@dataclass(frozen=True)
class Checkpoint:
    """A training state, complete: everything else follows from the configuration and the step, randomness included.

    Attributes:
        config: of the run.
        scale: scale in training.
        step: finished steps of that scale.
        scale_finished: whether the scale's networks are final.
        networks: for each of `NETWORK_NAMES`, the state dicts of scales 0..scale.
        optimizers: state dicts of the optimisers of the scale in training, by network name.
        inputs: fingerprints of what the run learns from (file lists, perceptual net), by a name for messages.
        segmentation: state dicts `target_net` and `optimizer` where the last scale trains with label losses.
        skipped: what was wrong with images that were left out (`--on_bad_image skip`).
        validations: what the validations of the last scale found, in order: `step`, `miou` (None without target
            labels), `label_free`, `mean_confidence`, `iou` (by class name), the `score` selected by, and whether it was
            the `best` so far.
    """

    config: ProCSTConfig
    scale: int
    step: int
    scale_finished: bool
    networks: Mapping[str, Sequence[Mapping[str, Any]]]
    optimizers: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, str] = field(default_factory=dict)
    segmentation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    validations: Sequence[Mapping[str, Any]] = ()
    skipped: Sequence[str] = ()

    def size(self) -> int:
        """Bytes of its tensors, which is nearly the size of its file."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, with names that tell them apart."""
        return _tensors("", [self.networks, self.optimizers, self.segmentation])

    def save(self, path: Path, keep: Path | None = None) -> None:
        """Write to `path` atomically; what stood there stays under the name `keep`."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "scale": self.scale,
            "step": self.step,
            "scale_finished": self.scale_finished,
            "networks": {name: [dict(state) for state in states] for name, states in self.networks.items()},
            "optimizers": {name: dict(state) for name, state in self.optimizers.items()},
            "inputs": dict(self.inputs),
            "segmentation": {name: dict(state) for name, state in self.segmentation.items()},
            "validations": [dict(validation) for validation in self.validations],
            "skipped": list(self.skipped),
        }
        atomic_write(path, lambda file: torch.save(content, file), keep)


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(f"{name}/{key}", inner)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _tensors(f"{name}/{index}", inner)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this toolkit.

    Raises:
        UserError: missing, damaged, of another program or of another version.
    """
    content = read_tensor_file(path)
    if content is None:  # no file of this toolkit holds anything but tensors and plain values
        raise DamagedFileError(f"{path} is not a checkpoint of train_procst.py, or damaged")
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of train_procst.py")
    version = content.get("version")
    if not isinstance(version, int) or version != VERSION:
        raise UserError(f"{path} has checkpoint version {version}; this program reads {VERSION}")
    try:
        checkpoint = Checkpoint(
            config=ProCSTConfig.from_json(content["config"], path),
            scale=int(content["scale"]),
            step=int(content["step"]),
            scale_finished=bool(content["scale_finished"]),
            networks=content["networks"],
            optimizers=content["optimizers"],
            inputs=content["inputs"],
            segmentation=content["segmentation"],
            validations=content.get("validations", ()),
            skipped=[str(reason) for reason in content.get("skipped", ())],
        )
        counts = [len(checkpoint.networks[name]) for name in NETWORK_NAMES]
        optimizers = sorted(checkpoint.optimizers)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is incomplete: {error}") from None
    if not 0 <= checkpoint.scale <= checkpoint.config.network.num_scales or checkpoint.step < 0:
        raise UserError(f"{path} claims step {checkpoint.step} of scale {checkpoint.scale}; its run has none such")
    if counts != [checkpoint.scale + 1] * 4 or optimizers != sorted(NETWORK_NAMES):
        raise UserError(f"{path} does not hold the networks and optimisers of scale {checkpoint.scale}")
    return checkpoint


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a state to go on from."""
    return (folder / LATEST).is_file() or (folder / PREVIOUS).is_file()


def read_newest(folder: Path, read: Callable[[Path], State]) -> tuple[State, Path]:
    """What `read` makes of a run's newest checkpoint that is whole, and its path.

    A line on stderr says where that is not the newest. Changes nothing; a damaged newest one has to be set aside
    before the next save: see `set_damaged_aside`.

    Raises:
        UserError: there is none that can be read.
    """
    latest, previous = folder / LATEST, folder / PREVIOUS
    problem = f"{latest} is missing"  # stopped between the two names of a save
    if latest.is_file() or not previous.is_file():
        try:
            return read(latest), latest
        except DamagedFileError as error:
            if not previous.is_file():
                raise
            problem = str(error)
    try:
        state = read(previous)
    except DamagedFileError as error:
        raise UserError(
            f"{problem}; {error}; the last scale_<s>.pth of the run, copied into an empty folder as {LATEST}, "
            "is a state to go on from"
        ) from None
    say(f"WARNING: {problem}; going on from the checkpoint before it, {previous}")
    return state, previous


def set_damaged_aside(used: Path) -> None:
    """Rename the `latest.pth` that `read_newest` could not use: the next save would put it in the good one's place."""
    latest = used.parent / LATEST
    if used.name == PREVIOUS and latest.is_file():
        os.replace(latest, used.parent / DAMAGED)


def load_generators(checkpoint: Checkpoint, name: str, origin: Path | str) -> list[Generator]:
    """The frozen generators of one direction (`Gst` or `Gts`), scales 0..N, on the CPU.

    Raises:
        UserError: the run has not reached its last scale, or the weights do not fit their configuration.
    """
    network: NetworkConfig = checkpoint.config.network
    states = checkpoint.networks[name]
    if len(states) < network.num_scales + 1:
        raise UserError(
            f"{origin} has trained scale {checkpoint.scale} of 0..{network.num_scales} so far; images can be "
            "translated once the last scale is in training: continue the run with --continue_train_from_path"
        )
    generators = []
    for scale, state in enumerate(states):
        generator = Generator(network.shape(scale))
        load_network(generator, state, f"{origin}, {name} of scale {scale},")
        generators.append(freeze(generator))
    return generators
