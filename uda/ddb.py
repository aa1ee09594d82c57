"""The first step of deliberated domain bridging (docs/uda.md, section DDB): self-training on mixed images.

A teacher, the moving average of the net, labels target images. Parts of source images are pasted into them, rectangles
(`ddb-cut`) or classes (`ddb-class`), and the net learns the labels of both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from data_handlers.classes import IGNORE
from data_handlers.domain import DOMAINS, Domain, PairBatch
from models.segmentation import HEAD_RATE, parameter_groups
from training.distributed import Rank, all_reduce_and_step, zero_gradients
from training.method import Method, Stage
from training.precision import Runner, channels_last
from training.preparation import make_pair, source_files, target_files, target_validator
from training.run_folder import Continued
from training.segmentation_files import net_to_train
from training.synchronised_norm import synchronise_batch_norms
from uda.cbst import of_source
from uda.ddb_config import DDBConfig, ScheduleConfig
from uda.ddb_losses import correct, feature_distance, pseudo_labels, weight_map, weighted_cross_entropy
from uda.ddb_samples import DDBSamples
from uda.mixing import VALUES, class_masks, cut_box, cut_mask
from uda.source import SourceTraining, poly_rate
from uda.strong_augmentation import draw_strong, strongly_augmented
from uda.teacher import Teacher, ramped
from utils.devices import to_device
from utils.errors import UserError
from utils.seeds import MIXING

NET, TEACHER, IMAGENET = "net", "teacher", "imagenet_backbone"


def warmed_up_rate(config: ScheduleConfig, step: int) -> float:
    """Learning rate of the backbone at `step` (from 0)."""
    rate = config.lr_semseg * poly_rate(step, config.num_steps, config.power)
    if step < config.warmup_steps:
        rate *= 1.0 - (1.0 - step / config.warmup_steps) * (1.0 - config.warmup_ratio)
    return rate


class DDBTraining(Method):
    """Trains a net (on the CPU) with its teacher, in a single stage.

    Args:
        imagenet: frozen backbone whose features the net is to keep, or None.
    """

    name: ClassVar[str] = "ddb"
    config_class: ClassVar[type[DDBConfig]] = DDBConfig
    config: DDBConfig

    def __init__(
        self, *, config: DDBConfig, rank: Rank, source: Domain, target: Domain, net: nn.Module,
        imagenet: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config, rank=rank, domains={"source": source, "target": target})
        self.net, self.imagenet, self.shape = net, imagenet, config.net.shape()
        self.run = Runner(config.run.precision)
        self.reference = config.teacher.mode == "reference"
        self.steps_per_epoch = max(len(source), len(target)) // config.schedule.batch_size
        self.teacher: Teacher | None = None
        self.shown: dict[str, Tensor] = {}
        if hasattr(net, "idle"):
            self.unused = {f"{NET}.{name}": why for name, why in net.idle(False).items()}

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Method.completed`: the net of `--init` decides the flags of its shape."""
        return SourceTraining.completed(given)

    def task(self) -> str:
        """End of the name of a new run folder."""
        return f"{self.config.method.method}_{self.config.source.source}_to_{self.config.samples.target}"

    def stages(self) -> list[Stage]:
        """One stage of `--num_steps` steps."""
        schedule, pictures = self.config.schedule, self.config.run.pics_per_epoch
        return [Stage(
            name="training", steps=schedule.num_steps, steps_per_epoch=self.steps_per_epoch,
            batch_size=schedule.batch_size, validate_every=schedule.validation_rate,
            pictures_every=max(1, self.steps_per_epoch // pictures) if pictures else 0,
        )]  # fmt: skip

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Move the networks to the device, and make the teacher and the optimiser."""
        config = self.config.schedule
        channels_last(self.net.to(self.device, self.dtype).train())
        if self.rank.count > 1:
            synchronise_batch_norms(self.net)
        self.teacher = Teacher(self.net, batch_statistics=self.reference)
        self.modules = {NET: self.net, TEACHER: self.teacher.net}
        if self.imagenet is not None:
            channels_last(self.imagenet.to(self.device, self.dtype))
            self.modules[IMAGENET] = self.imagenet
        groups = parameter_groups(self.net, config.lr_semseg)
        self.optimizers = {NET: AdamW(groups, weight_decay=config.weight_decay, fused=True)}

    def eval_net(self) -> nn.Module | None:
        """The student."""
        return self.modules.get(NET)

    def state_dict(self) -> dict[str, Any]:
        """How often the teacher followed the student."""
        return {"teacher_updates": 0 if self.teacher is None else self.teacher.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        self.teacher.updates = state["teacher_updates"]

    def batches(self, stage: int, steps: range) -> Iterator[PairBatch]:
        """Source crops with labels, and target crops; each domain has its own order."""
        size, given = self.config.schedule.batch_size, self.config.samples
        source, target = (
            DDBSamples(
                domain=domain, stage=stage, per_epoch=len(domain) // size * size, epoch_length=len(domain),
                reference=self.reference, cat_max_ratio=given.cat_max_ratio,
                distorts=given.photometric_distortion and domain.labels,
            ).batches(steps, size, self.rank.part(size))
            for domain in map(self.domains.get, DOMAINS)
        )  # fmt: skip
        for one, other in zip(source, target, strict=True):
            yield PairBatch(one, other)

    # --- a step ------------------------------------------------------------------------------------------------------

    def step(self, batch: PairBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """The teacher follows; the gradients of source and mixed images add up, each with its own batch statistics."""
        schedule, optimizer = self.config.schedule, self.optimizers[NET]
        for group, multiple in zip(optimizer.param_groups, (1.0, HEAD_RATE), strict=True):
            group["lr"] = warmed_up_rate(schedule, step) * multiple
        source, target = (to_device(part.levels[0], self.device) for part in (batch.source, batch.target))
        label = to_device(batch.source.label, self.device).long()
        self.follow()
        zero_gradients(optimizer)
        losses = self._learn("Source", source, label)
        part = self.rank.part(schedule.batch_size)
        seeds = ([self.config.run.manual_seed, MIXING, stage, step * schedule.batch_size + place] for place in part)
        losses |= self.learn_target(source, label, target, [np.random.default_rng(seed) for seed in seeds])
        all_reduce_and_step(self.rank, optimizer)
        return losses

    def follow(self) -> None:
        """Let the teacher follow the net."""
        self.teacher.follow(self.net, ramped(self.teacher.updates, self.config.teacher.teacher_alpha))

    def learn_target(
        self, source: Tensor, label: Tensor, target: Tensor, draws: Sequence[np.random.Generator]
    ) -> dict[str, Tensor]:
        """Add the gradients of mixed images.

        Args:
            source, target: pixels uint8 (B,h,w,3); `label`, trainIds (B,h,w), is source's.
            draws: random numbers of each sample.
        """
        pseudo, weight, share = self._labelled(target)
        mask = self._mask(label, draws)
        mixed, mixed_label = torch.where(mask[..., None], source, target), torch.where(mask, label, pseudo)
        mixed = self.augmented(mixed, draws)
        losses = self._learn("Mixed", mixed, mixed_label, torch.where(mask, 1.0, weight))
        self.shown = {"source": source, "target": target, "pseudo_labels": pseudo, "mixed": mixed,
                      "mixed_labels": mixed_label}  # fmt: skip
        return {**losses, "Target/Confident": self.rank.fraction(self.config.schedule.batch_size) * share}

    def augmented(self, pixels: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        """Images (B,h,w,3) in levels of 0..255, strongly augmented."""
        given = self.config.samples
        strong = [draw_strong(rng, given.jitter_p, given.blur_p) for rng in draws]
        if not any(one.order or one.sigma for one in strong):
            return pixels
        image = pixels.movedim(-1, 1).to(self.dtype) / 255.0
        return 255.0 * strongly_augmented(image, strong, self.reference).movedim(1, -1)

    def _learn(self, name: str, pixels: Tensor, label: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        """Add the gradients of a loss on images (B,h,w,3) in levels of 0..255 with labels (B,h,w)."""
        image = self.net.network_input(pixels, self.dtype)
        fraction, losses = self.rank.fraction(self.config.schedule.batch_size), {}
        if self.imagenet is not None and weight is None:
            logits, features = self.run(self.net.with_features, image)
            losses["Source/FeatureDistance"] = self._distance(features, image, label)
        else:
            logits = self.run(self.net, image)
        losses[f"{name}/Loss"] = fraction * weighted_cross_entropy(logits, label, weight)
        sum(losses.values()).backward()
        counted = label.new_full((), label.numel()) if self.reference else (label != IGNORE).sum()
        share = fraction if self.reference else self.rank.labelled_fraction(label)
        losses[f"{name}/Accuracy"] = share * correct(logits, label) / counted.clamp(min=1)
        return {name: loss.detach() for name, loss in losses.items()}

    def _distance(self, features: Tensor, image: Tensor, label: Tensor) -> Tensor:
        given = self.config.teacher
        with torch.no_grad():
            wanted = self.run(self.imagenet, image)
        distance, counts = feature_distance(
            features, wanted, label, num_classes=self.shape.num_classes, classes=given.feature_classes,
            min_ratio=given.feature_min_ratio,
        )  # fmt: skip
        cells = counts.sum().double()
        self.rank.all_reduce([cells])
        # As published, no cell at all makes the loss NaN.
        return given.lambda_features * (distance * counts).sum() / (cells if self.reference else cells.clamp(min=1))

    @torch.no_grad()
    def _labelled(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pseudo-labels and weights (B,h,w) of target images, and the share of confident pixels in the global batch."""
        given = self.config.teacher
        label, confidence = pseudo_labels(self.run(self.teacher.net, self.net.network_input(target, self.dtype)))
        share = self.confident(confidence)
        return label, weight_map(share, confidence, given.ignore_top, given.ignore_bottom), share

    def confident(self, confidence: Tensor) -> Tensor:
        """Share of the pixels (B,h,w) of the global batch that pass the threshold."""
        share = (confidence >= self.config.teacher.pseudo_threshold).double().mean()
        share = share * self.rank.fraction(self.config.schedule.batch_size)
        self.rank.all_reduce([share])
        return share

    def _mask(self, label: Tensor, draws: Sequence[np.random.Generator]) -> Tensor:
        """Which pixels (B,h,w) of the mixed images are source's."""
        if self.config.method.method == "ddb-cut":
            boxes = (cut_box(rng.random(3), *label.shape[1:]) for rng in draws)
            return torch.stack([cut_mask(box, one) for box, one in zip(boxes, label, strict=True)])
        order = torch.from_numpy(np.stack([rng.random(VALUES) for rng in draws]))
        return class_masks(label, to_device(order, self.device), self.reference)

    # --- what is shown -----------------------------------------------------------------------------------------------

    def images(self) -> Mapping[str, Tensor]:
        """What the last step learned from."""
        colours = torch.zeros(VALUES, 3)
        found = torch.tensor(self.domains["source"].files.data_set.colours, dtype=torch.float32)
        colours[: len(found)] = found
        shown = {name: x if x.ndim == 4 else colours.to(x.device)[x] for name, x in self.shown.items()}
        return {name: x.movedim(-1, 1) / 127.5 - 1.0 for name, x in shown.items()}

    def describe(self) -> list[str]:
        """What is adapted on what."""
        config = self.config
        lines = [*super().describe(), f"{self.shape}, trained by {config.method.method}", self.net.start]
        lines.append(f"{config.schedule.num_steps} steps, {self.steps_per_epoch} an epoch")
        if self.rank.count > 1:
            lines.append(f"{self.rank.count} processes share every batch")
        if config.net.backbone_weights == "random" and not config.teacher.init:
            lines.append("WARNING: the net starts from random weights; the published one from ImageNet")
        return [*filter(None, lines), f"precision {config.run.precision}"]

    def conclusion(self, folder: Path) -> str:
        """The command that scores the net."""
        return f"score the net with: python evaluate.py --weights {folder / 'latest.pth'}"


# --- checks of the input, before anything is written ------------------------------------------------------------------


def prepare_ddb(config: DDBConfig, rank: Rank, continued: Continued | None) -> DDBTraining:
    """Check the input of a training and make its net. Raises `UserError`, which names file or flag."""
    given, make = config.teacher, partial(net_to_train, config.net, config.run.manual_seed, fresh=continued is None)

    def method(**domains: Domain) -> DDBTraining:
        net, imagenet = make(init=given.init), None
        if given.lambda_features:
            if not hasattr(net, "with_features") or config.net.backbone_weights == "random":
                raise UserError("--lambda_features needs --model DeepLabV2 or DeepLab with --backbone_weights")
            imagenet = (deepcopy(net) if not given.init else make()).backbone.requires_grad_(False).eval()
        return DDBTraining(config=config, rank=rank, net=net, imagenet=imagenet, **domains)

    return prepare_pair(config, rank, method)


def prepare_pair(config: DDBConfig, rank: Rank, make: Callable[..., DDBTraining]) -> DDBTraining:
    """Check source and target images, and give the method that `make` makes of their domains its validator."""
    classes, given, images = config.net.num_classes, config.teacher, config.images
    origin = f"--init {given.init}" if given.init else ""
    files = source_files(config.source, classes, images.src_label_dir, origin=origin)
    target = target_files(config.samples, classes, labels=config.samples.trg_labels)
    target = replace(target, data_set=of_source(target.data_set, files.data_set, classes))
    domains = make_pair(
        config, rank, source=files, target=target, sizes=config.samples, batch=config.schedule.batch_size,
        image_roots=images.source_images,
    )  # fmt: skip
    method = make(**domains)
    known = replace(files.data_set, class_names=target.data_set.class_names)
    method.validator, method.validation_line = target_validator(
        config, rank, known, target, classes, given.select_by, always=True
    )
    return method
