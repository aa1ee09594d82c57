"""Training a segmentation net on labelled source images (docs/method.md, section 4): P of the label loss.

Random crops and mirroring, SGD with a poly schedule, validation on held-out source images, the best net kept.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from data_handlers.domain import Domain, DomainBatch, Samples
from data_handlers.lists import require_images
from data_handlers.splits import train_and_validation
from models.losses import cross_entropy
from models.segmentation import HEAD_RATE, segmentation_optimizer
from training.checkpoint import BEST, LATEST, PREVIOUS, load_checkpoint
from training.distributed import Rank, all_reduce_and_step, backward_in_passes, zero_gradients
from training.method import Method, Stage
from training.precision import Runner, channels_last
from training.preparation import make_domain, make_validator, scored_target, source_set
from training.run_folder import Continued
from training.segmentation_files import load_segmentation_net, net_to_train
from training.synchronised_norm import synchronise_batch_norms
from training.validation import scored_classes
from uda.config import SourceTrainingConfig
from utils.devices import to_device
from utils.errors import UserError
from utils.files import check_output_file, make_folder
from utils.locks import say

NET = "net"


def poly_rate(step: int, num_steps: int, power: float) -> float:
    """Factor on the learning rate at `step` (from 0): (1 - step / num_steps) ** power."""
    return (1.0 - step / num_steps) ** power


class SourceTraining(Method):
    """Trains a net (on the CPU) on one domain of images with labels, in a single stage."""

    name: ClassVar[str] = "source"
    config_class: ClassVar[type[SourceTrainingConfig]] = SourceTrainingConfig
    config: SourceTrainingConfig

    def __init__(self, *, config: SourceTrainingConfig, rank: Rank, source: Domain, net: nn.Module) -> None:
        super().__init__(config=config, rank=rank, domains={"source": source})
        self.net = net
        self.shape = config.net.shape()
        self.run = Runner(config.run.precision)
        self.steps_per_epoch = len(source) // config.poly.batch_size
        self.published = False
        if hasattr(net, "idle"):
            self.unused = {f"{NET}.{name}": why for name, why in net.idle(config.auxiliary.multi).items()}

    @classmethod
    def completed(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Method.completed`: the net of `--init` decides the flags of its shape."""
        if not (init := given.get("init")):
            return given
        shape = load_segmentation_net(Path(init), "--init")[0]
        for name, value in vars(shape).items():
            if given.get(name, value) != value:
                raise UserError(f"--{name} {given[name]}: the net of --init {init} is {shape}; omit the flag")
        return {**given, **vars(shape)}

    def task(self) -> str:
        """End of the name of a new run folder."""
        return f"semseg_on_{self.domains['source'].files.data_set.name}"

    def stages(self) -> list[Stage]:
        """One stage of `--num_steps` steps."""
        config = self.config
        return [Stage(
            name="training", steps=config.poly.num_steps, steps_per_epoch=self.steps_per_epoch,
            batch_size=config.poly.batch_size, validate_every=config.validation.validation_rate or self.steps_per_epoch,
        )]  # fmt: skip

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Move the net to the device and make its optimiser."""
        channels_last(self.net.to(self.device, self.dtype).train())
        if self.rank.count > 1:
            synchronise_batch_norms(self.net)
        self.modules = {NET: self.net}
        self.optimizers = {NET: segmentation_optimizer(self.net, **vars(self.config.sgd))}

    def eval_net(self) -> nn.Module | None:
        """The net in training."""
        return self.modules.get(NET)

    def batches(self, stage: int, steps: range) -> Iterator[DomainBatch]:
        """Crops with labels."""
        source, size = self.domains["source"], self.config.poly.batch_size
        samples = Samples(
            domain=source, stage=stage, per_epoch=self.steps_per_epoch * size, epoch_length=len(source)
        )
        return samples.batches(steps, size, self.rank.part(size))

    def step(self, batch: DomainBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """Cross-entropy, of both heads with `--multi`, at the rate of the poly schedule."""
        poly, optimizer = self.config.poly, self.optimizers[NET]
        rate = self.config.sgd.lr_semseg * poly_rate(step, poly.num_steps, poly.power)
        for group, multiple in zip(optimizer.param_groups, (1.0, HEAD_RATE), strict=True):
            group["lr"] = rate * multiple
        image = self.net.network_input(to_device(batch.levels[0], self.device), self.dtype)
        label = to_device(batch.label, self.device)
        zero_gradients(optimizer)
        passes = self.rank.passes(poly.batch_size, poly.micro_batch)
        loss = backward_in_passes(self._loss, image, label, rank=self.rank, passes=passes)
        all_reduce_and_step(self.rank, optimizer)
        return {"Semseg/SemsegLoss": loss}

    def _loss(self, image: Tensor, label: Tensor) -> Tensor:
        given = self.config.auxiliary
        if not given.multi:
            return cross_entropy(self.run(self.net, image), label)
        main, aux = self.run(self.net.both_logits, image)
        return cross_entropy(main, label) + given.lambda_seg * cross_entropy(aux, label)

    # --- the net for use ---------------------------------------------------------------------------------------------

    def publish(self, path: Path, info: Mapping[str, Any]) -> None:
        """Copy the net to the configured output."""
        output = Path(self.config.held_out.output)
        if not self.config.held_out.output:
            return
        self.published = False
        if output.exists() and not _is_of_run(output, info["run"]):
            say(f"{output} is now a file of another run and stays; the best net is {path}")
            return
        try:
            best = load_checkpoint(path).for_use()
        except UserError as error:
            # This is no reason to end the training: the next better net is written anew.
            say(f"WARNING: {output} is not updated: {error}")
            return
        make_folder(output.parent, "--output")
        replace(best, info=dict(info)).save(output)  # where the run's folder was renamed, the file knows its new name
        self.published = True

    def describe(self) -> list[str]:
        """What is trained on what."""
        config = self.config
        parameters = sum(parameter.numel() for parameter in self.net.parameters())
        lines = [*super().describe(), f"{self.shape}, {parameters:,} parameters, epoch of {self.steps_per_epoch} steps"]
        if self.net.start:
            lines.append(self.net.start)
        if self.rank.count > 1:
            lines.append(f"{self.rank.count} processes share every batch")
        if config.net.backbone_weights == "random" and not config.start.init and config.net.backbone != "none":
            lines.append("WARNING: the backbone starts from random weights; the published nets start from ImageNet")
        return [*lines, f"precision {config.run.precision}"]

    def conclusion(self, folder: Path) -> str:
        """The commands that use the net."""
        weights = self.config.held_out.output if self.published else str(folder)
        source = self.config.source.source
        words = ["train_procst.py", "--source", source, *self.shape.flags(source), "--semseg_weights", weights]
        return (
            f"use the net with: python {shlex.join(words)}\n"
            f"score it with: python evaluate.py --weights {weights}\n"
            f"adapt it with: python train_uda.py --init {weights}"
        )


# --- checks of the input, before anything is written ------------------------------------------------------------------


def prepare_source(config: SourceTrainingConfig, rank: Rank, continued: Continued | None) -> SourceTraining:
    """Check the input of a training on source and build its net. Raises `UserError`, which names file or flag."""
    data, held_out, classes = config.source, config.held_out, config.net.num_classes
    data_set = source_set(data, classes)
    train, val = train_and_validation(
        data_set, data.src_data_dir, "--src_data_dir", list_file=data.src_list, val_list=held_out.val_list,
        val_count=held_out.val_count, label_root=held_out.src_label_dir,
    )  # fmt: skip
    if len(train) < config.poly.batch_size:
        raise UserError(f"--batch_size {config.poly.batch_size}: there are {len(train)} images to train on")
    if held_out.source_images:
        val = val.with_images_of(Path(held_out.source_images[0]))
        require_images(val, "--source_images")
    source = make_domain(
        config, rank, train, "source", resize=data.src_resize, crop=data.crop_size, labels=True, flip=True,
        image_roots=held_out.source_images,
    )  # fmt: skip
    _check_output(held_out.output, continued)
    net = net_to_train(config.net, config.run.manual_seed, fresh=continued is None, init=config.start.init)
    method = SourceTraining(config=config, rank=rank, source=source, net=net)
    select_by = config.validation.select_by
    if config.scored.target:
        select_by = "none" if select_by == "auto" else select_by
        val = scored_target(config.scored, data_set, classes)
    elif select_by == "auto":
        select_by = "miou"
    elif select_by == "none":
        method.validation_line = "no validation, as --select_by none says"
        return method
    method.validator, method.validation_line = make_validator(
        config, rank, val, flag="--trg_labels" if config.scored.target else "--src_labels", with_labels=True,
        select_by=select_by, num_classes=classes, classes=scored_classes(classes, val.data_set, data_set),
    )  # fmt: skip
    return method


def _check_output(output: str, continued: Continued | None) -> None:
    """Require an output that can be written and is no file of another run: these stay."""
    if not output:
        return
    path = Path(output)
    check_output_file(path, "--output")
    if path.name in (LATEST, PREVIOUS, BEST):
        # In the run's own folder, the net would take the place of the training state.
        raise UserError(f"--output {path}: {path.name} is the name of a file of run folders; choose another name")
    if path.exists() and not (continued and _is_of_run(path, str(continued.origin.parent))):
        raise UserError(
            f"--output {path} exists and is not of this run; continue the run that wrote it "
            "(--continue_train_from_path), move it away, or name another file"
        )


def _is_of_run(path: Path, folder: str) -> bool:
    """Whether the run in `folder` wrote a file; it may have been in a folder that is renamed by now."""
    try:
        writer = load_checkpoint(path).info.get("run")
    except UserError:
        return False
    return writer == folder or bool(writer and not Path(writer).exists())
