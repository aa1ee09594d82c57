"""Training a segmentation net on labelled source images (docs/method.md, section 4): P of the label loss.

Random crops and mirroring, SGD with a poly schedule, validation on held-out source images, the best net kept.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from data_handlers.domain import Domain, DomainBatch
from models.losses import cross_entropy
from models.segmentation import HEAD_RATE, segmentation_optimizer
from training.checkpoint import load_checkpoint
from training.distributed import LocalBatch, Rank, backward_and_step
from training.method import Method, Stage
from training.precision import Runner, channels_last
from training.segmentation_files import is_of_run
from training.synchronised_norm import synchronise_batch_norms
from uda.config import SourceTrainingConfig
from utils.devices import to_device
from utils.errors import UserError
from utils.files import make_folder
from utils.locks import say

NET = "net"


def poly_rate(step: int, num_steps: int, power: float) -> float:
    """Factor on the learning rate at `step` (from 0): (1 - step / num_steps) ** power."""
    return (1.0 - step / num_steps) ** power


class SourceTraining(Method):
    """Trains a net on one labelled domain, in a single stage.

    Args:
        source: images with labels.
        net: on the CPU.
    """

    name: ClassVar[str] = "source"
    config: SourceTrainingConfig

    def __init__(self, *, config: SourceTrainingConfig, rank: Rank, source: Domain, net: nn.Module) -> None:
        super().__init__(config=config, rank=rank, domains={"source": source})
        self.net = net
        self.shape = config.net.shape()
        self.run = Runner(config.run.precision)
        self.steps_per_epoch = len(source) // config.poly.batch_size
        self.published = False

    @staticmethod
    def task(config: SourceTrainingConfig) -> str:
        """End of the name of a new run folder."""
        return f"semseg_on_{config.source.source}"

    def stages(self) -> list[Stage]:
        """One stage of `--num_steps` steps."""
        config = self.config
        validates = 0 if config.validation.select_by == "none" else config.validation.validation_rate
        return [Stage(
            name="training", steps=config.poly.num_steps, steps_per_epoch=self.steps_per_epoch,
            batch_size=config.poly.batch_size, validate_every=validates,
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
        size = self.config.poly.batch_size
        return self.domains["source"].stream(
            stage=stage, steps=steps, batch_size=size, part=self.rank.part(size), steps_per_epoch=self.steps_per_epoch,
            epoch_length=len(self.domains["source"]), pyramid=lambda image: [image],
        )  # fmt: skip

    def step(self, batch: DomainBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """Cross-entropy at the rate of the poly schedule."""
        poly, optimizer = self.config.poly, self.optimizers[NET]
        rate = self.config.sgd.lr_semseg * poly_rate(step, poly.num_steps, poly.power)
        for group, multiple in zip(optimizer.param_groups, (1.0, HEAD_RATE), strict=True):
            group["lr"] = rate * multiple
        image = self.net.network_input(to_device(batch.levels[0], self.device), self.dtype)
        label = to_device(batch.label, self.device)
        local = LocalBatch.of(self.rank, poly.batch_size)
        loss = local.labelled_fraction(label) * cross_entropy(self.run(self.net, image), label)
        backward_and_step(loss, local, optimizer)
        return {"Semseg/SemsegLoss": loss.detach()}

    # --- the net for use ---------------------------------------------------------------------------------------------

    def publish(self, path: Path, info: Mapping[str, Any]) -> None:
        """Copy the net to the configured output, unless a file of another run is there by now."""
        output = Path(self.config.held_out.output)
        if not self.config.held_out.output:
            return
        self.published = False
        if output.exists() and not is_of_run(output, info):
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
        if config.net.backbone_weights == "random" and config.net.backbone != "none":
            lines.append("WARNING: the backbone starts from random weights; the published nets start from ImageNet")
        return [*lines, f"precision {config.run.precision}"]

    def conclusion(self, folder: Path) -> str:
        """The flags of train_procst.py that use the net."""
        weights = self.config.held_out.output if self.published else str(folder)
        words = ["train_procst.py", *self.shape.flags(), "--semseg_weights", weights]
        return f"use the net with: python {shlex.join(words)}"
