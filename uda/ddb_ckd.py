"""The second step of deliberated domain bridging (docs/uda.md, section DDB): two teachers are distilled into one net.

The nets of `ddb-cut` and of `ddb-class`, frozen, label clean target images together; a net that begins anew learns
these labels on strongly augmented images, and those of source images.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from data_handlers.domain import Domain
from models.segmentation import require_features
from training.distributed import Rank
from training.precision import channels_last
from training.run_folder import Continued
from training.segmentation_files import load_segmentation_net, net_to_train
from uda.cbst_config import DDB_CKD
from uda.ddb import NET, DDBTraining, prepare_pair
from uda.ddb_ckd_config import PATHS, DistillationTrainingConfig
from uda.ddb_losses import weight_map
from uda.distillation import Prediction, ensemble, hard_labels, soft_loss
from uda.prototypes import load_prototypes, rectification
from utils.errors import UserError
from utils.tensor_files import weights_fingerprint


class FrozenTeacher(nn.Module):
    """A trained net with its prototypes. Raises `UserError`, which names `--<name>_teacher` or `--<name>_prototypes`.

    Attributes:
        vectors, known: prototypes (C,D), and bool (C,), which classes have one; None for a teacher without prototypes.
        inputs: fingerprints by a name for messages.
    """

    def __init__(self, name: str, file: str, prototypes: str, num_classes: int) -> None:
        super().__init__()
        flag = f"--{name}_teacher"
        self.shape, self.net = load_segmentation_net(Path(file), flag)
        if self.shape.num_classes != num_classes:
            raise UserError(f"{flag} {file} is {self.shape}, and the net has {num_classes} (--num_classes)")
        self.inputs = {f"{name} teacher": weights_fingerprint(self.net)}
        vectors, known, self.line = None, None, f"{name} teacher: {self.shape} of {file}"
        if prototypes:
            require_features(self.net, f"{flag} {file}")
            flag, found = f"--{name}_prototypes", load_prototypes(Path(prototypes), f"--{name}_prototypes")
            if not found.finished:
                raise UserError(f"{flag} {prototypes} is not finished; continue it by calculate_prototypes.py")
            if found.made_from["weights"] != self.inputs[f"{name} teacher"]:
                raise UserError(f"{flag} {prototypes} was made from another net than --{name}_teacher {file}")
            vectors, known = found.vectors, found.counts > 0
            self.inputs[f"{name} prototypes"] = hashlib.sha256(vectors.numpy().tobytes()).hexdigest()
            self.line += f", prototypes of {int(known.sum())} classes"
        self.register_buffer("vectors", vectors)
        self.register_buffer("known", known)


class Distillation(DDBTraining):
    """Trains a net (on the CPU) with two frozen teachers, which checkpoints do not hold, in a single stage."""

    name: ClassVar[str] = DDB_CKD
    config_class: ClassVar[type[DistillationTrainingConfig]] = DistillationTrainingConfig
    config: DistillationTrainingConfig

    def __init__(
        self, *, config: DistillationTrainingConfig, rank: Rank, source: Domain, target: Domain, net: nn.Module,
        teachers: Sequence[FrozenTeacher],
    ) -> None:  # fmt: skip
        super().__init__(config=config, rank=rank, source=source, target=target, net=net)
        self.teachers = teachers

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Method.completed`: without `--init` and `--model` the net is one like `--cut_teacher`."""
        if given.get("init") or given.get("model") or not given.get("cut_teacher"):
            return super().completed(given)
        return {**vars(load_segmentation_net(Path(given["cut_teacher"]), "--cut_teacher")[0]), **given}

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """As the first step, with its own teachers."""
        super().begin_stage(stage, resumed)
        self.teacher, self.modules = None, {NET: self.net}
        for teacher in self.teachers:
            channels_last(teacher.to(self.device, self.dtype).net)

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the net."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""

    def inputs(self) -> dict[str, str]:
        """As of every method, and the teachers with their prototypes."""
        return super().inputs() | {name: value for teacher in self.teachers for name, value in teacher.inputs.items()}

    def follow(self) -> None:
        """Frozen teachers follow nobody."""

    def learn_target(
        self, source: Tensor, label: Tensor, target: Tensor, draws: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """Add the gradients of the teachers' labels, or probabilities, on augmented images; see `DDBTraining`."""
        given, teachers, pixels = self.config.teacher, self.predictions(target), self.augmented(target, draws)
        probability = ensemble(teachers, given.rectify == "logits", self.reference)
        pseudo, confidence = hard_labels(probability, self.reference)
        self.shown = {"source": source, "target": target, "augmented": pixels, "pseudo_labels": pseudo}
        if given.soft_distill:
            logits = self.run(self.net, self.net.network_input(pixels, self.dtype))
            loss = given.soft_distill_w * soft_loss(logits, teachers, given.temp, self.reference)
            loss = self.rank.fraction(self.config.schedule.batch_size) * loss
            loss.backward()
            return {"Target/Distillation": loss.detach()}
        if not given.use_pl_weight:
            return self._learn("Target", pixels, pseudo)
        share = self.confident(confidence)
        losses = self._learn("Target", pixels, pseudo, weight_map(share, confidence, 0, 0))
        return {**losses, "Target/Confident": self.rank.fraction(self.config.schedule.batch_size) * share}

    @torch.no_grad()
    def predictions(self, target: Tensor) -> list[Prediction]:
        """What the teachers predict for target images, pixels uint8 (B,h,w,3)."""
        found = []
        for teacher in self.teachers:
            image, near = teacher.net.network_input(target, self.dtype), None
            if teacher.vectors is None:
                logits = self.run(teacher.net, image)
            else:
                features, logits = self.run(teacher.net.features_and_logits, image)
                known = None if self.reference else teacher.known
                near = rectification(features, teacher.vectors, known, logits.shape[2:])
            found.append((logits, near))
        return found

    def describe(self) -> list[str]:
        """As of the first step, with the teachers."""
        return [*super().describe(), *(teacher.line for teacher in self.teachers)]


def prepare_distillation(
    config: DistillationTrainingConfig, rank: Rank, continued: Continued | None
) -> Distillation:  # fmt: skip
    """Check the input of a distillation and make its net. Raises `UserError`, which names file or flag."""
    given, teachers = config.teacher, []
    for name in PATHS:
        file, prototypes = (getattr(given, f"{name}_{kind}") for kind in ("teacher", "prototypes"))
        if not file:
            raise UserError(f"--{name}_teacher is required, a net of --method ddb-{name}")
        if not prototypes and given.rectify != "none":
            raise UserError(f"--{name}_prototypes is required: run calculate_prototypes.py, or give --rectify none")
        teachers.append(FrozenTeacher(name, file, prototypes, config.net.num_classes))

    def method(**domains: Domain) -> Distillation:
        net = net_to_train(config.net, config.run.manual_seed, fresh=continued is None, init=given.init)
        return Distillation(config=config, rank=rank, net=net, teachers=teachers, **domains)

    return prepare_pair(config, rank, method)
