"""Self-training of a segmentation net on an unlabelled target, class-balanced or not (docs/uda.md, section CBST).

A round is a stage. It begins with a labelling pass, in which the net labels the target's images; then the net is
trained on them and on some source images.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from data_handlers.classes import IGNORE
from data_handlers.datasets import DataSet
from data_handlers.domain import Domain, DomainBatch, Samples
from data_handlers.images import read_label, read_pixels
from data_handlers.lists import FileList
from data_handlers.spatial_prior import read_spatial_prior
from models.resnet38 import OUTPUT_STRIDE, ResNet38
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from training.distributed import Rank, all_reduce_and_step, backward_in_passes, zero_gradients
from training.method import Method, Stage
from training.precision import Runner, channels_last
from training.preparation import make_domain, source_files, target_files, target_validator
from training.run_folder import Continued
from training.segmentation_files import load_segmentation_net, trainable_net
from uda.cbst_config import TRAIN_FIRST, CropsConfig, LabellingConfig, SelfTrainingConfig
from uda.cbst_optimisation import freeze_statistics, mean_cross_entropy, self_training_optimizer
from uda.cbst_schedule import Portion, rate_of_round, source_count, source_seed, source_subset
from uda.labelling import LOST, RESTORE, Labelling, Probabilities, PseudoLabels
from uda.mining import NOMINAL_SIZE, Cropping, MinedClasses, draw, make_sample, mined_classes
from uda.thresholds import Policy
from utils.devices import to_device
from utils.errors import UserError

NET = "net"
LABELS = "pseudo_labels"


@dataclass(frozen=True, kw_only=True)
class RoundSamples(Samples):
    """The samples of a round: of some source images with their labels and of target images with pseudo-labels.

    Attributes:
        chosen: indices of the source images.
        target: the target images, none of which has labels in a dry run.
        labels_of_target: their pseudo-labels; None in a dry run, in which every pixel is ignored.
        cropping: makes the samples; sizes that follow from an image are filled in for each.
        origins: longer sides of source and target images at the factor 1; None for their own.
    """

    chosen: Sequence[int]
    target: FileList
    labels_of_target: PseudoLabels | None
    cropping: Cropping
    origins: tuple[int | None, int | None]

    def __len__(self) -> int:
        return len(self.chosen) + len(self.target)

    def read(self, index: int, position: int) -> tuple[Sequence[np.ndarray], np.ndarray]:
        """Pixels uint8 (K,K,3) and label uint8 (K/stride,K/stride) of a sample. Raises `UserError`."""
        is_target = index >= len(self.chosen)
        files = self.target if is_target else self.drawn(self.domain.lists, position)
        name = files.images[index - len(self.chosen) if is_target else self.chosen[index]]
        pixels = read_pixels(files.image_file(name))
        size = pixels.shape[1::-1]
        if not is_target:
            label = read_label(files.label_file(name), files.data_set, size)
        elif self.labels_of_target is None:
            label = np.full(pixels.shape[:2], IGNORE, np.uint8)
        else:
            label = self.labels_of_target.read(name, size)
        nominal = NOMINAL_SIZE.get(files.data_set.name) if self.cropping.reference else None
        nominal = nominal or pixels.shape[:2]
        cropping = replace(self.cropping, nominal=nominal, origin_size=self.origins[is_target] or max(nominal))
        sample = make_sample(pixels, label, draw(self.generator(1, position), cropping), cropping)
        return [sample.pixels], sample.label


class SelfTraining(Method):
    """Adapts a net (on the CPU) to the target, a round in each stage.

    Attributes:
        labels: of the round in training; None before its labelling pass.
        made: what this pass has made (`PseudoLabels.made`); empty before it.
    """

    name: ClassVar[str] = "cbst"
    config_class: ClassVar[type[SelfTrainingConfig]] = SelfTrainingConfig
    config: SelfTrainingConfig

    def __init__(
        self, *, config: SelfTrainingConfig, rank: Rank, source: Domain, target: Domain, net: nn.Module,
        shape: SegmentationShape, labelling: Labelling,
    ) -> None:  # fmt: skip
        super().__init__(config=config, rank=rank, domains={"source": source, "target": target})
        self.net, self.shape, self.labelling = net, shape, labelling
        self.run = Runner(config.run.precision)
        self.labels: PseudoLabels | None = None
        self.made: dict[str, Any] = {}
        rounds, reference = config.rounds, config.adaptation.mode == "reference"
        target_port = Portion(rounds.init_tgt_port, rounds.step_tgt_port, rounds.max_tgt_port)
        source_port = Portion(rounds.init_src_port, rounds.step_src_port, rounds.max_src_port)
        numbers = range(rounds.num_round)
        self.portions = [target_port.of_round(number, reference) for number in numbers]
        self.counts = [source_count(len(source), source_port.of_round(number, reference)) for number in numbers]

    def task(self) -> str:
        """End of the name of a new run folder."""
        config = self.config
        return f"{config.method.method}_{config.source.source}_to_{config.target.target}"

    def stages(self) -> list[Stage]:
        """The rounds; each is validated at its end, and kept."""
        rounds, found = self.config.rounds, []
        for number, count in enumerate(self.counts):
            per_epoch = (count + len(self.domains["target"])) // rounds.batch_size
            steps = rounds.epoch_per_round * per_epoch
            found.append(Stage(
                name=f"round {number}", steps=steps, steps_per_epoch=per_epoch, batch_size=rounds.batch_size,
                tag=f"Round{number}/", validate_every=steps, keep_as=f"round_{number}.pth",
            ))  # fmt: skip
        return found

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Begin a round without labels: a new optimiser, and batch norms that keep their statistics."""
        rounds = self.config.rounds
        channels_last(self.net.to(self.device, self.dtype).train())
        freeze_statistics(self.net)
        rate = rate_of_round(rounds.base_lr, stage)
        optimizer = self_training_optimizer(
            self.net, rate=rate, weight_decay=rounds.weight_decay, momentum=rounds.momentum
        )
        self.modules, self.optimizers = {NET: self.net}, {NET: optimizer}
        self.labels, self.made = None, {}

    def prepare_stage(self, stage: int, folder: Path | None, check: Callable[[], None]) -> str:
        """The labelling pass; of a round in training the labels that were made, again where they are lost."""
        if folder is None:
            return self.labelling.measure(probabilities_of(self.net, self.dtype), self.net)
        labels, net = folder / LABELS / f"round_{stage}", self.net
        if self.made and (found := self.labelling.read(labels, self.made)):
            self.labels = found
            return ""
        if self.made:
            net = self._start_of(stage, folder, labels)
        self.labels = self.labelling.run(
            net, probabilities_of(net, self.dtype), labels, self.portions[stage], check, self.made or None
        )
        self.made = self.labels.made
        return f"round {stage}: {self.labels.describe()}"

    def _start_of(self, stage: int, folder: Path, labels: Path) -> nn.Module:
        """The net that a round began with, which made its labels."""
        path = folder / self.stages()[stage - 1].keep_as if stage else Path(self.config.adaptation.init)
        try:
            net = load_segmentation_net(path, "the net that made them,")[1]
        except UserError as error:
            raise UserError(f"{labels}: {LOST}; {error}; {RESTORE}") from None
        channels_last(net.to(self.device, self.dtype))
        return net

    def eval_net(self) -> nn.Module | None:
        """The net in training."""
        return self.modules.get(NET)

    def state_dict(self) -> dict[str, Any]:
        """What the labels of the round in training were made from, their thresholds, and the classes' sizes."""
        return {"made": self.made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.made = state["made"]

    def inputs(self) -> dict[str, str]:
        """As of every method, and the prior."""
        prior = self.labelling.prior_name
        return super().inputs() | ({"spatial prior": prior} if prior else {})

    def samples(self, stage: int) -> RoundSamples:
        """The samples of a round."""
        config, source, crops = self.config, self.domains["source"], self.config.crops
        rounds, reference = config.rounds, config.adaptation.mode == "reference"
        seed = source_seed(rounds.source_sample_policy, rounds.seed_int, stage)
        chosen = source_subset(len(source), self.counts[stage], seed).tolist()
        labels, mined = self.labels, MinedClasses((), ())
        target = labels.files if labels else self.domains["target"].files
        if labels:
            mined = mined_classes(np.array(labels.made["sizes"]), number=crops.mine_id_number, share=crops.mine_thresh)
        return RoundSamples(
            domain=source, stage=stage, per_epoch=self.stages()[stage].steps_per_epoch * rounds.batch_size,
            epoch_length=len(chosen) + len(target), chosen=chosen, target=target, labels_of_target=labels,
            cropping=cropping_of(crops, stride_of(self.net), mined, reference),
            origins=(crops.origin_size, crops.origin_size_tgt),
        )  # fmt: skip

    def batches(self, stage: int, steps: range) -> Iterator[DomainBatch]:
        """Crops of source and target images, mixed; the first batch names the target images that have no label."""
        size, skipped = self.config.rounds.batch_size, self.labels.skipped if self.labels else ()
        for batch in self.samples(stage).batches(steps, size, self.rank.part(size)):
            yield replace(batch, skipped=(*batch.skipped, *skipped))
            skipped = ()

    def step(self, batch: DomainBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """Cross-entropy over the labelled cells."""
        rounds, logits, optimizer = self.config.rounds, logits_of(self.net), self.optimizers[NET]
        images = self.net.network_input(to_device(batch.levels[0], self.device), self.dtype)
        label = to_device(batch.label, self.device)
        zero_gradients(optimizer)
        loss = backward_in_passes(
            lambda images, label: mean_cross_entropy(self.run(logits, images), label), images, label, rank=self.rank,
            passes=self.rank.passes(rounds.batch_size, rounds.micro_batch),
        )  # fmt: skip
        all_reduce_and_step(self.rank, optimizer)
        return {"Semseg/SelfTrainingLoss": loss}

    def describe(self) -> list[str]:
        """What is adapted on what."""
        config, stages = self.config, self.stages()
        lines = [*super().describe(), f"{self.shape}, adapted by {config.method.method}"]
        lines.append(
            f"{len(stages)} rounds: {', '.join(map(str, self.counts))} source images, "
            f"{', '.join(f'{p:g}' for p in self.portions)} of the target's pixels"
        )
        if self.rank.count > 1:
            lines.append(f"{self.rank.count} processes share every batch and the labelling; all need the run folder")
        return [*lines, f"precision {config.run.precision}"]

    def conclusion(self, folder: Path) -> str:
        """The command that scores the net."""
        return f"score the last round with: python evaluate.py --weights {folder / 'latest.pth'}"


def logits_of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives the logits that self-training reads, at the stride of the net's output."""
    return net.coarse_logits if isinstance(net, ResNet38) else net


def probabilities_of(net: nn.Module, dtype: torch.dtype = torch.float32) -> Probabilities:
    """What labels images: these logits' softmax."""
    return lambda images: logits_of(net)(images.to(dtype)).softmax(dim=1)


def stride_of(net: nn.Module) -> int:
    """Stride of these logits: those of the published net are not upsampled."""
    return OUTPUT_STRIDE if isinstance(net, ResNet38) else 1


def cropping_of(crops: CropsConfig, stride: int, mined: MinedClasses, reference: bool) -> Cropping:
    """The crops of a round, before the sizes that follow from each image."""
    return Cropping(
        nominal=(1, 1), origin_size=1, scale_range=crops.scale_rate_range, crop_size=crops.crop_size, stride=stride,
        mine_port=crops.mine_port, mined=mined, reference=reference,
    )  # fmt: skip


# --- checks of the input, before anything is written ------------------------------------------------------------------


def prepare_self_training(config: SelfTrainingConfig, rank: Rank, continued: Continued | None) -> SelfTraining:
    """Check the input of a self-training and load the net. Raises `UserError`, which names file or flag."""
    shape, net = _net(config, continued)
    adaptation, images, classes = config.adaptation, config.images, shape.num_classes
    source = source_files(config.source, classes, images.src_label_dir, origin=f"--init {adaptation.init}")
    target = target_files(config.target, classes, adaptation.split_tgt, config.target.trg_labels)
    target = replace(target, data_set=of_source(target.data_set, source.data_set, classes))
    side = (config.crops.crop_size, config.crops.crop_size)
    source_domain = make_domain(
        config, rank, source, "source", resize=side, crop=side, labels=True, image_roots=images.source_images
    )
    target_domain = make_domain(config, rank, target, "target", resize=side, crop=side)
    labelling = labelling_of(
        adaptation, target, net, shape, policy="global" if config.method.method == "st" else "cb", rank=rank,
        num_workers=target_domain.num_workers, skips=target_domain.skips,
    )  # fmt: skip
    method = SelfTraining(
        config=config, rank=rank, net=net, shape=shape, labelling=labelling, source=source_domain, target=target_domain
    )
    _require_images(method)
    known = replace(source.data_set, class_names=target.data_set.class_names)
    method.validator, method.validation_line = target_validator(
        config, rank, known, target, classes, adaptation.select_by, always=True
    )
    return method


def _net(config: SelfTrainingConfig, continued: Continued | None) -> tuple[SegmentationShape, nn.Module]:
    """The net to adapt, with what it learns trainable; a continued run gets its weights from the checkpoint."""
    if continued is not None:
        shape = SegmentationShape(**continued.checkpoint.segmentation["shape"])
        return shape, build_segmentation_net(shape)
    given = config.adaptation.init
    if not given:
        raise UserError(f"--init is required, the net to adapt; {TRAIN_FIRST}")
    if not Path(given).exists():
        raise UserError(f"--init {given}: no such file; it is the net to adapt; {TRAIN_FIRST}")
    return trainable_net(Path(given))


def of_source(target: DataSet, source: DataSet, num_classes: int) -> DataSet:
    """The target's declaration with the source's classes, which the net predicts; labels of others are not read."""
    if target.class_names != source.class_names:
        target = replace(
            target, label_path=(), other_label_paths=(), label_suffix="", id_map={}, classes=source.classes,
            colours=source.colours,
        )  # fmt: skip
    more = (f"class {k}" for k in range(len(source.class_names), num_classes))
    return replace(target, class_names=(*source.class_names, *more))


def labelling_of(
    config: LabellingConfig, files: FileList, net: nn.Module, shape: SegmentationShape, *, policy: Policy, rank: Rank,
    num_workers: int, skips: bool,
) -> Labelling:  # fmt: skip
    """How a net labels images. Raises `UserError` for a spatial prior that is none of its classes."""
    prior, name = None, ""
    if config.spatial_prior:
        found = read_spatial_prior(Path(config.spatial_prior))
        if len(found) != shape.num_classes:
            raise UserError(
                f"--spatial_prior {config.spatial_prior} has {len(found)} classes, the net has {shape.num_classes}"
            )
        prior, name = torch.from_numpy(found).to(rank.device), hashlib.sha256(found.tobytes()).hexdigest()
    return Labelling(
        files=files, classes=shape.num_classes, stride=stride_of(net), normalise=net.network_input,
        longer_side=config.test_scales, policy=policy, reference=config.mode == "reference", prior=prior,
        prior_name=name, rank=rank, num_workers=num_workers, skips=skips,
    )  # fmt: skip


def _require_images(method: SelfTraining) -> None:
    """Check that every round has the source images that its portion asks for, and a batch."""
    rounds, source = method.config.rounds, method.domains["source"]
    if rounds.init_src_port and not method.counts[0]:
        raise UserError(
            f"--init_src_port {rounds.init_src_port:g}: this is no whole one of {len(source)} source images; raise it, "
            "or give 0 for none"
        )
    if not method.stages()[0].steps:
        images = method.counts[0] + len(method.domains["target"])
        raise UserError(f"--batch_size {rounds.batch_size}: there are {images} images to train on in the first round")
