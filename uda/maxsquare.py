"""Adaptation of a segmentation net by a loss on its own predictions (docs/uda.md, section MaxSquare).

A step learns the labels of source images, and from target images MaxSquare, entropy, both with image-wise weights, or
hard pseudo-labels; an auxiliary head may learn the labels that both heads agree on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from data_handlers.domain import DOMAINS, Domain, PairBatch
from models.losses import cross_entropy
from models.restitution import Restituted
from models.segmentation import HEAD_RATE, build_segmentation_net, parameter_groups
from models.shapes import RESTITUTED, TWO_HEADED, SegmentationShape
from training.distributed import Rank, all_reduce_and_step, zero_gradients
from training.method import Method, Stage
from training.precision import Runner, channels_last
from training.preparation import make_pair, source_files, target_files, target_validator
from training.run_folder import Continued
from training.segmentation_files import trainable_net
from training.synchronised_norm import synchronise_batch_norms
from uda.cbst import of_source
from uda.cbst_config import TRAIN_FIRST
from uda.cbst_optimisation import freeze_statistics
from uda.maxsquare_config import MaxSquareConfig, ScheduleConfig
from uda.maxsquare_samples import MaxSquareSamples
from uda.repeated_sgd import RepeatedSGD, repeats_of
from uda.restitution import RestitutionHeads, restitution_loss
from uda.source import poly_rate
from uda.target_losses import (
    confident_label,
    ensemble_label,
    entropy,
    image_wise_entropy,
    image_wise_maxsquare,
    maxsquare,
)
from utils.devices import to_device
from utils.errors import UserError
from utils.seeds import NET_WEIGHTS, seed_for

NET, HEADS = "net", "restitution_heads"
MAIN, AUXILIARY = "Target/Main", "Target/Auxiliary"  # losses on the target, and the labels they read
WeightedLosses = Mapping[str, tuple[float, Tensor]]
SOFT: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "maxsquare": lambda logits, ratio: maxsquare(logits), "entropy": lambda logits, ratio: entropy(logits),
    "iw_maxsquare": image_wise_maxsquare, "iw_entropy": image_wise_entropy,
}  # fmt: skip


def schedule_of(config: ScheduleConfig, source: int, target: int, reference: bool) -> tuple[int, int]:
    """Steps of an epoch, and the step at which the poly schedule would reach 0.

    The published epoch also ends with the source images, and its schedule is made for a step more in each epoch.

    Args:
        source, target: numbers of images.
    """
    batch = config.batch_size
    if reference:
        return min(source, target) // batch, (target + batch) // batch * config.epochs
    return target // batch, target // batch * config.epochs


class MaxSquareTraining(Method):
    """Adapts a net (on the CPU) to the target, in a single stage.

    Attributes:
        horizon: see `schedule_of`.
    """

    name: ClassVar[str] = "maxsquare"
    config_class: ClassVar[type[MaxSquareConfig]] = MaxSquareConfig
    config: MaxSquareConfig

    def __init__(
        self, *, config: MaxSquareConfig, rank: Rank, source: Domain, target: Domain, net: nn.Module,
        shape: SegmentationShape,
    ) -> None:  # fmt: skip
        super().__init__(config=config, rank=rank, domains={"source": source, "target": target})
        self.net, self.shape = net, shape
        self.run = Runner(config.run.precision)
        self.reference = config.adaptation.mode == "reference"
        self.steps_per_epoch, self.horizon = schedule_of(config.schedule, len(source), len(target), self.reference)
        self.passes = rank.passes(config.schedule.batch_size, config.schedule.micro_batch)
        self.heads: RestitutionHeads | None = None
        if config.adaptation.lambda_restitution:
            self.heads = RestitutionHeads(net.backbone.stage_channels, shape.num_classes)
        if hasattr(net, "idle"):
            self.unused = {f"{NET}.{name}": why for name, why in net.idle(config.adaptation.multi).items()}

    def task(self) -> str:
        """End of the name of a new run folder."""
        config = self.config
        return f"{config.method.method}_{config.source.source}_to_{config.target.target}"

    def stages(self) -> list[Stage]:
        """One stage of all rounds, which differ in nothing; it is validated after each epoch."""
        schedule, epoch = self.config.schedule, self.steps_per_epoch
        return [Stage(
            name="training", steps=schedule.epochs * epoch, steps_per_epoch=epoch, batch_size=schedule.batch_size,
            validate_every=epoch,
        )]  # fmt: skip

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Move the networks to the device and make their optimiser."""
        config = self.config.schedule
        self.modules = {NET: self.net} if self.heads is None else {NET: self.net, HEADS: self.heads}
        for module in self.modules.values():
            channels_last(module.to(self.device, self.dtype).train())
        if self.config.adaptation.freeze_bn:
            freeze_statistics(self.net)
        elif self.rank.count > 1:
            synchronise_batch_norms(self.net)
        groups = parameter_groups(self.net, config.lr_semseg)
        groups[1]["params"] += [] if self.heads is None else list(self.heads.parameters())
        settings = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        if self.reference:
            optimizer = RepeatedSGD(groups, repeats_of(self.net.backbone), **settings)
        elif config.optim == "Adam":
            optimizer = Adam(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
        else:
            optimizer = SGD(groups, fused=True, **settings)
        self.optimizers = {NET: optimizer}

    def eval_net(self) -> nn.Module | None:
        """The net in training."""
        return self.modules.get(NET)

    def batches(self, stage: int, steps: range) -> Iterator[PairBatch]:
        """Source images with labels, and target images; of a larger source each epoch has other images."""
        size = self.config.schedule.batch_size
        per_epoch = self.steps_per_epoch * size
        source, target = (
            MaxSquareSamples(
                domain=self.domains[name], stage=stage, per_epoch=per_epoch,
                epoch_length=max(per_epoch, len(self.domains[name])), scales=self.config.target.random_crop,
                blurs=not self.config.target.no_gaussian_blur,
            ).batches(steps, size, self.rank.part(size))
            for name in DOMAINS
        )  # fmt: skip
        for one, other in zip(source, target, strict=True):
            yield PairBatch(one, other)

    def step(self, batch: PairBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """The gradients of source and target add up; each has its own batch statistics."""
        schedule, optimizer = self.config.schedule, self.optimizers[NET]
        rate = schedule.lr_semseg * poly_rate(step, self.horizon, schedule.power)
        for group, multiple in zip(optimizer.param_groups, (1.0, HEAD_RATE), strict=True):
            group["lr"] = rate * multiple
        source, target = (
            self.net.network_input(to_device(domain.levels[0], self.device), self.dtype)
            for domain in (batch.source, batch.target)
        )
        zero_gradients(optimizer)
        losses = self.learn_source(source, to_device(batch.source.label, self.device)) | self.learn_target(target)
        all_reduce_and_step(self.rank, optimizer)
        return losses

    def learn_source(self, image: Tensor, label: Tensor) -> dict[str, Tensor]:
        """Add the gradients of cross-entropy on labelled images (B,3,h,w), with labels (B,h,w)."""
        config, labels, found = self.config.adaptation, label.tensor_split(self.passes), []
        shares = self.rank.labelled_fractions(labels)
        for part, of_part, share in zip(image.tensor_split(self.passes), labels, shares, strict=True):
            main, aux, parts = self._logits(part, self.heads is not None)
            losses = {"Source/Main": (1.0, share * cross_entropy(main, of_part))}
            if config.multi:
                losses["Source/Auxiliary"] = (config.lambda_seg, share * cross_entropy(aux, of_part))
            found.append(self._backward({**losses, **self._restitution("Source", parts, of_part)}))
        return _summed(found)

    def learn_target(self, image: Tensor) -> dict[str, Tensor]:
        """Add the gradients of the losses on images (B,3,h,w) without labels."""
        config, method, found = self.config.adaptation, self.config.method.method, []
        images = image.tensor_split(self.passes)
        labels = self._labels_of_passes(images) if len(images) > 1 else []
        fraction = self.rank.fraction(self.config.schedule.batch_size) / len(image)  # of the batch in an image
        for number, part in enumerate(images):
            main, aux, parts = self._logits(part, self.heads is not None and config.restitution_domains == "both")
            labels, losses = labels or [self._labels(main, aux)], {}
            if method in SOFT:
                losses[MAIN] = (config.lambda_target, len(part) * fraction * SOFT[method](main, config.IW_ratio))
            for head, logits, weight in ((MAIN, main, 1.0), (AUXILIARY, aux, config.lambda_seg)):
                if head in labels[number]:
                    share = self.rank.labelled_fractions([of_pass[head] for of_pass in labels])[number]
                    losses[head] = (weight * config.lambda_target, share * cross_entropy(logits, labels[number][head]))
            found.append(self._backward({**losses, **self._restitution("Target", parts)}))
        return _summed(found)

    def _logits(self, image: Tensor, restitutes: bool = False) -> tuple[Tensor, Tensor | None, list[Restituted]]:
        """Logits of the main head and of an auxiliary one that is trained, and what each restitution makes."""
        parts: list[Restituted] = []
        if self.config.adaptation.multi or restitutes:
            return *self.run(self.net.both_logits, image, parts if restitutes else None), parts
        return self.run(self.net, image), None, parts

    def _restitution(self, domain: str, parts: Sequence[Restituted], label: Tensor | None = None) -> WeightedLosses:
        """Of what the restitutions make of a domain; none of nothing."""
        config, fraction = self.config.adaptation, self.rank.fraction(self.config.schedule.batch_size)
        found = parts and restitution_loss(
            self.heads, parts, label, rank=self.rank, fraction=fraction, per_pixel=config.restitution_per_pixel
        )
        names = (f"{domain}/Restitution", f"{domain}/RestitutionHeads")
        return {name: (config.lambda_restitution, loss) for name, loss in zip(names, found, strict=False)}

    def _labels(self, main: Tensor, aux: Tensor | None) -> dict[str, Tensor]:
        """The labels (B,h,w) that the heads are to learn, by the names of their losses."""
        config, found = self.config.adaptation, {}
        if self.config.method.method not in SOFT:
            found[MAIN] = confident_label(main, config.threshold)
        if config.multi:
            found[AUXILIARY] = ensemble_label(main, aux, config.threshold)
        return found

    @torch.no_grad()
    def _labels_of_passes(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The labels of all passes, ahead of them: their number decides the weight of each. No statistics change."""
        if self.config.method.method in SOFT and not self.config.adaptation.multi:
            return [{}] * len(images)
        before = [buffer.clone() for buffer in self.net.buffers()]
        labels = [self._labels(*self._logits(part)[:2]) for part in images]
        for buffer, value in zip(self.net.buffers(), before, strict=True):
            buffer.copy_(value)
        return labels

    def _backward(self, losses: WeightedLosses) -> dict[str, Tensor]:
        """Add the gradients of weighted losses, and return them without their weights."""
        sum(weight * loss for weight, loss in losses.values()).backward()
        return {name: loss.detach() for name, (_, loss) in losses.items()}

    def describe(self) -> list[str]:
        """What is adapted on what."""
        config, schedule = self.config, self.config.schedule
        two = " with both heads" if config.adaptation.multi else ""
        lines = [*super().describe(), f"{self.shape}, adapted by {config.method.method}{two}", self.net.start]
        lines.append(f"{schedule.epochs} epochs of {self.steps_per_epoch} steps")
        if self.rank.count > 1:
            lines.append(f"{self.rank.count} processes share every batch")
        return [*filter(None, lines), f"precision {config.run.precision}"]

    def conclusion(self, folder: Path) -> str:
        """The command that scores the net: the best state where one was chosen, else the last."""
        return f"score the net with: python evaluate.py --weights {folder}"


def _summed(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([losses[name] for losses in passes]).sum() for name in passes[0]}


# --- checks of the input, before anything is written ------------------------------------------------------------------


def prepare_maxsquare(config: MaxSquareConfig, rank: Rank, continued: Continued | None) -> MaxSquareTraining:
    """Check the input of an adaptation and load the net. Raises `UserError`, which names file or flag."""
    images, sizes, batch = config.images, config.target, config.schedule.batch_size
    torch.manual_seed(seed_for(config.run.manual_seed, NET_WEIGHTS))  # of a new restitution, and of its heads
    shape, net = _net(config, continued)
    files = source_files(
        config.source, shape.num_classes, images.src_label_dir, origin=f"--init {config.adaptation.init}"
    )
    target = target_files(config.target, shape.num_classes, labels=config.target.trg_labels)
    target = replace(target, data_set=of_source(target.data_set, files.data_set, shape.num_classes))
    domains = make_pair(
        config, rank, source=files, target=target, sizes=sizes, batch=batch, image_roots=images.source_images
    )
    method = MaxSquareTraining(config=config, rank=rank, net=net, shape=shape, **domains)
    known = replace(files.data_set, class_names=target.data_set.class_names)
    method.validator, method.validation_line = target_validator(
        config, rank, known, target, shape.num_classes, config.adaptation.select_by, always=True
    )
    return method


def _net(config: MaxSquareConfig, continued: Continued | None) -> tuple[SegmentationShape, nn.Module]:
    """The net to adapt, with what it learns trainable; a continued run gets its weights from the checkpoint."""
    given = config.adaptation
    if continued is not None:
        shape = SegmentationShape(**continued.checkpoint.segmentation["shape"])
        net = build_segmentation_net(shape)
    elif given.init:
        shape, net = trainable_net(Path(given.init), model=given.model, aspp_branches=given.aspp_branches)
    else:
        raise UserError(f"--init is required, the net to adapt; {TRAIN_FIRST}")
    needed = RESTITUTED if given.lambda_restitution else TWO_HEADED
    if (given.multi or given.lambda_restitution) and shape.model not in needed:
        flag = f"--lambda_restitution {given.lambda_restitution:g}" if given.lambda_restitution else "--multi"
        raise UserError(f"{flag} needs a net of {' or '.join(needed)}; that of --init {given.init} is {shape}")
    return shape, net
