"""The labelling pass of a round of self-training: thresholds and pseudo-labels of all target images (docs/uda.md).

The net sees every image three times: the thresholds take two passes and nothing is kept but counters, the third writes
the labels. A folder holds the labels of a round and `manifest.json`: what they were made from, the thresholds, and,
when all are written, the checksum of each.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from data_handlers.classes import IGNORE
from data_handlers.images import NetworkInput, image_size, read_label
from data_handlers.labelled import open_labelled
from data_handlers.lists import FileList
from training.confidence_maps import confidence_map
from training.distributed import CPU, Rank
from training.precision import exact_convolutions
from training.validation import in_eval_mode
from uda.pseudo_labels import select, with_prior
from uda.thresholds import LowerCounts, Policy, UpperCounts
from utils.errors import UserError
from utils.files import atomic_write, atomic_write_json, read_json, remove_leftovers
from utils.locks import LOCK
from utils.tensor_files import weights_fingerprint

MANIFEST = "manifest.json"
LOST = "the pseudo-labels of this round are missing or were changed"
RESTORE = "restore them, or start again"
Check = Callable[[], None]
Probabilities = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """The labels of a round.

    Attributes:
        files: the images that have one.
        folder: of the PNGs, trainIds with 255 = not labelled.
        made: plain values: what they were made from, the thresholds (None for a class without one), and the sizes of
            the classes among the predictions.
        share: of the pixels that are labelled.
        skipped: what was wrong with images that have none.
    """

    files: FileList
    folder: Path
    made: dict[str, Any]
    share: float
    skipped: tuple[str, ...]

    def describe(self) -> str:
        """The labelled share, the thresholds, and the classes that have none."""
        names, thresholds = dict(enumerate(self.files.data_set.class_names)), dict(enumerate(self.made["thresholds"]))
        listed = [f"{names.get(c, f'class {c}')} {value:.3f}" for c, value in thresholds.items() if value is not None]
        if self.made["made_from"]["policy"] == "global":
            listed = [f"threshold {value:.3f}" for value in list(thresholds.values())[:1] if value is not None]
        without = [names.get(c, f"class {c}") for c, value in thresholds.items() if value is None]
        if without:
            listed.append(f"no label for {', '.join(without) if len(without) < 6 else f'{len(without)} classes'}")
        return f"{100 * self.share:.1f}% of the target's pixels labelled; {', '.join(listed)}"

    def read(self, name: str, size: tuple[int, int]) -> np.ndarray:
        """The label of an image of (W,H), uint8 (H,W). Raises `UserError` as `read_label`."""
        return read_label(label_path(self.folder, name), replace(self.files.data_set, labels="trainids"), size)


def label_path(folder: Path, name: str) -> Path:
    """The label of an image; images that differ in their suffix alone have two."""
    return folder / (name if name.endswith(".png") else f"{name}.png")


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """How a net labels images.

    Attributes:
        files: the images.
        classes: C, of the net.
        stride: of its output.
        normalise: makes its input.
        longer_side: of the images that it sees; None keeps their sizes.
        policy, reference: see `uda.thresholds`.
        prior: float32 (C,H,W) or None; resized bilinearly to images of another size.
        prior_name: tells one prior from another.
        rank: this process among those that share the images.
        skips: images that cannot be used get no label, instead of an error.
    """

    files: FileList
    classes: int
    stride: int
    normalise: NetworkInput
    longer_side: int | None
    policy: Policy
    reference: bool
    prior: Tensor | None
    prior_name: str
    rank: Rank
    num_workers: int
    skips: bool

    def run(
        self, net: nn.Module, probabilities: Probabilities, folder: Path, portion: float, check: Check,
        made: Mapping[str, Any] | None = None,
    ) -> PseudoLabels:  # fmt: skip
        """Label all images. What an interrupted pass of the same net has left in `folder` is kept.

        Args:
            probabilities: of the net, for `confidence_map`.
            portion: of the pixels to label.
            check: called for every image; may raise.
            made: of a finished pass of this net, whose labels are made again where they are missing or changed.

        Raises:
            UserError: an image cannot be used, none can, or the net has diverged; the labels are not those of `made`.
        """
        made_from = self.made_from(net, portion)
        wanted = {"made_from": made_from} if made is None else made
        manifest = self.rank.broadcast(read_manifest(folder))
        recorded = manifest.get("labels", {})
        with exact_convolutions(), in_eval_mode(net):
            if wanted["made_from"] != made_from:
                raise UserError(f"{folder}: {LOST} by another net; {RESTORE}")
            if not wanted.items() <= manifest.items():
                recorded, manifest = {}, {**wanted, **({} if made else self._thresholds(probabilities, portion, check))}
                if self.rank.is_main:
                    _empty(folder)
                    atomic_write_json(folder / MANIFEST, manifest)
            if self.rank.is_main:
                for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                    remove_leftovers(path)
            self.rank.barrier()
            parts = self.rank.gather(self._write(probabilities, folder, manifest, check))
        labels = {name: found for part in parts for name, found in part.items()}
        if made and any(recorded.get(name, entry) != entry for name, entry in labels.items()):
            raise UserError(f"{folder}: {LOST}, and come out differently; {RESTORE}")
        manifest |= {"labels": {name: labels[name] for name in self.files.images}}
        if self.rank.is_main:
            atomic_write_json(folder / MANIFEST, manifest)
        self.rank.barrier()
        return self._found(folder, manifest)

    def read(self, folder: Path, made: Mapping[str, Any]) -> PseudoLabels | None:
        """The labels of a finished pass, None where some are not those that `made` tells of."""
        manifest = read_manifest(folder)
        labels = manifest.get("labels", {})
        sound = set(labels) == set(self.files.images) and made.items() <= manifest.items()
        sums = {name: labels[name]["sha256"] for name in labels if sound and "sha256" in labels[name]}
        own = [name for name in sums if name in set(self.files.images[self.rank.index :: self.rank.count])]
        sound = sound and all(checksum(label_path(folder, name)) == sums[name] for name in own)
        return None if self.rank.all_reduce_max(int(not sound)) else self._found(folder, manifest)

    def measure(self, probabilities: Probabilities, net: nn.Module) -> str:
        """A line about the time that a pass takes, from one image; nothing is written."""
        started = time.perf_counter()
        with exact_convolutions(), in_eval_mode(net):
            for _ in self._maps(probabilities, self.files.images[:1], {}, lambda: None):
                pass
        minutes = 3 * (time.perf_counter() - started) * len(self.files) / self.rank.count / 60
        return f"labelling {len(self.files)} images: {minutes:.1f} min"

    def made_from(self, net: nn.Module, portion: float) -> dict[str, Any]:
        """What labels follow from, as the manifest says it."""
        return {
            "weights": weights_fingerprint(net), "images": self.files.fingerprint(), "portion": portion,
            "policy": self.policy, "reference": self.reference, "longer_side": self.longer_side,
            "spatial_prior": self.prior_name,
        }  # fmt: skip

    def _maps(
        self, probabilities: Probabilities, names: tuple[str, ...], skipped: dict[str, str], check: Check
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and confidences, float32 (C,H,W), of some images; the messages about others go to `skipped`."""
        files = replace(self.files, images=names)
        images = open_labelled(files, self.num_workers, CPU, with_labels=False, skip=self.skips)
        for name, image in zip(names, images, strict=True):
            check()
            if isinstance(image, UserError):
                skipped[name] = str(image)
                continue
            confidences = confidence_map(
                probabilities, image.pixels.numpy(), longer_side=self.longer_side, stride=self.stride,
                normalise=self.normalise, device=self.rank.device,
            )  # fmt: skip
            yield name, with_prior(confidences, self._prior_of(confidences))

    def _prior_of(self, confidences: Tensor) -> Tensor | None:
        if self.prior is None or self.prior.shape == confidences.shape:
            return self.prior
        size = confidences.shape[1:]
        return F.interpolate(self.prior[None], size, mode="bilinear", align_corners=False, antialias=True)[0]

    def _thresholds(self, probabilities: Probabilities, portion: float, check: Check) -> dict[str, Any]:
        """Thresholds and sizes of the classes over all images of all processes; plain values, None for infinity."""
        own, skipped = self.files.images[self.rank.index :: self.rank.count], {}
        upper = UpperCounts(self.classes, device=self.rank.device)
        for _, confidences in self._maps(probabilities, own, skipped, check):
            upper.add(confidences)
        self.rank.all_reduce([upper.counters])
        if not upper.counters.any():
            raise UserError(f"none of the {len(self.files)} target images of {self.files.root} can be used")
        try:
            plan = upper.plan(portion=portion, policy=self.policy, reference=self.reference)
            lower = LowerCounts(plan)
            for _, confidences in self._maps(probabilities, own, skipped, check):
                lower.add(confidences)
            self.rank.all_reduce([lower.counters])
            thresholds = lower.thresholds().tolist()
        except ValueError as error:
            raise UserError(
                f"the target cannot be labelled: {error}; lower --base_lr if the net has diverged, else --deterministic"
            ) from None
        return {"thresholds": [t if math.isfinite(t) else None for t in thresholds], "sizes": plan.sizes().tolist()}

    def _write(
        self, probabilities: Probabilities, folder: Path, manifest: Mapping[str, Any], check: Check
    ) -> dict[str, dict[str, Any]]:
        """Write the labels of this process's images that are not there: of each image what the manifest says of it."""
        thresholds = _thresholds_of(manifest).float().to(self.rank.device)
        known, found, skipped = manifest.get("labels", {}), {}, {}
        own = self.files.images[self.rank.index :: self.rank.count]
        for name in own:
            if (there := self._entry(label_path(folder, name))) and there == known.get(name, there):
                found[name] = there
        missing = tuple(name for name in own if name not in found)
        for name, confidences in self._maps(probabilities, missing, skipped, check):
            path = label_path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            label = Image.fromarray(select(confidences, thresholds).labels.cpu().numpy())
            atomic_write(path, partial(label.save, format="PNG", compress_level=1))
            found[name] = self._entry(path)
        return found | {name: {"skipped": reason} for name, reason in skipped.items()}

    def _entry(self, path: Path) -> dict[str, Any]:
        """Checksum and numbers of pixels of a label; empty where it is missing or damaged."""
        try:
            label = read_label(path, replace(self.files.data_set, labels="trainids"), image_size(path))
        except UserError:
            return {}
        return {"sha256": checksum(path), "labelled": int((label != IGNORE).sum()), "pixels": label.size}

    def _found(self, folder: Path, manifest: Mapping[str, Any]) -> PseudoLabels:
        labels = manifest["labels"]
        images = tuple(name for name in self.files.images if "sha256" in labels[name])
        labelled, pixels = (sum(labels[name][key] for name in images) for key in ("labelled", "pixels"))
        return PseudoLabels(
            files=replace(self.files, images=images), folder=folder, share=labelled / max(pixels, 1),
            made={name: value for name, value in manifest.items() if name != "labels"},
            skipped=tuple(entry["skipped"] for entry in labels.values() if "skipped" in entry),
        )  # fmt: skip


def _empty(folder: Path) -> None:
    """Make a folder, which may be a link, or remove what it holds but its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def checksum(path: Path) -> str:
    """SHA-256 of a file; '' where it is missing."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where it is missing or damaged."""
    try:
        return dict(read_json(folder / MANIFEST))
    except (UserError, TypeError, ValueError):
        return {}


def _thresholds_of(manifest: Mapping[str, Any]) -> Tensor:
    values = manifest.get("thresholds", [])
    return torch.tensor([math.inf if value is None else value for value in values], dtype=torch.float64)
