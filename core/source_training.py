"""Training a segmentation net on labelled source images (specification section 4): P of the label loss.

Random crop, mirroring, SGD with a poly schedule, validation after each epoch, the best net kept.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from core.checkpoint import CONFIG, LATEST, PREVIOUS
from core.config import SGDConfig, Size
from core.execution import PRECISIONS, Execution
from core.label_networks import segmentation_optimizer
from models.losses import cross_entropy
from core.run_folder import log_name
from core.segmentation_files import BEST, SegmentationFile, is_of_run, read_segmentation_file, run_identity
from training.tensorboard import TensorBoardLog
from training.validation import Validator, log_validation, summary
from data_handlers.images import normalise
from data_handlers.lists import FileList
from data_handlers.stream import ON_BAD_IMAGE, DomainBatch, StreamConfig, open_stream
from models.segmentation import HEAD_RATE, SMALLEST_CROP, SegmentationShape
from utils.errors import UserError
from utils.files import atomic_write_json
from utils.locks import say
from utils.seeds import seed_for
from utils.stopping import Stopped
from utils.tensor_files import DamagedFileError, UnavailableFileError, load_network
from utils.transfer import to_device

LOSS_TAG = "Semseg/SemsegLoss"


@dataclass(frozen=True)
class SourceTrainingConfig:
    """Configuration of a run.

    Attributes:
        source, src_data_dir, src_list: the images.
        src_label_dir: folder that holds the labels, or '' for `src_data_dir`.
        val_list, val_count: images validated on: a list, or that many of the last ones; '' and 0 take the data set's
            own split.
        src_resize, crop_size: (W,H).
        shape: of the net.
        backbone_weights: `imagenet`, a file, or `random`.
        sgd: learning rate at the start, weight decay, momentum.
        power: of the poly schedule: rate * (1 - step / num_steps) ** power.
        validation_rate: steps between two validations; 0 means one epoch.
        output: where the best net goes besides the run folder, or ''.
        precision: of the training; validation is float32.
        save_checkpoint_minutes: a checkpoint is also written when the last one is older than this.
        on_bad_image: `stop`, or `skip`: another image takes the place of one that cannot be used.
    """

    source: str
    src_data_dir: str
    src_label_dir: str
    src_list: str
    val_list: str
    val_count: int
    src_resize: Size
    crop_size: Size
    shape: SegmentationShape
    backbone_weights: str
    sgd: SGDConfig
    power: float
    num_steps: int
    batch_size: int
    manual_seed: int
    validation_rate: int
    output: str
    gpus: str
    num_workers: int
    tb_logs_dir: str
    print_rate: int
    save_checkpoint_rate: int
    precision: str = "fp32"
    save_checkpoint_minutes: float = 30.0
    on_bad_image: str = "stop"

    def __post_init__(self) -> None:
        if self.on_bad_image not in ON_BAD_IMAGE:
            raise UserError(f"--on_bad_image {self.on_bad_image}: must be one of {', '.join(ON_BAD_IMAGE)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"--precision {self.precision}: must be one of {', '.join(PRECISIONS)}")
        for name in ("num_steps", "batch_size", "print_rate", "save_checkpoint_rate", "save_checkpoint_minutes"):
            if not 0 < getattr(self, name) < 1e15:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("manual_seed", "validation_rate", "num_workers", "val_count"):
            if not 0 <= getattr(self, name) < 1e15:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be 0 or greater")
        if not 0.0 <= self.power < 100.0:
            raise UserError(f"--power is {self.power}; it must be between 0 and 100")
        if min(self.crop_size) < SMALLEST_CROP:
            raise UserError(
                f"--crop_size {self.crop_size[0]} {self.crop_size[1]}: both sides must be at least {SMALLEST_CROP}"
            )
        if any(c > r for c, r in zip(self.crop_size, self.src_resize, strict=True)):
            raise UserError(
                f"--crop_size {self.crop_size[0]} {self.crop_size[1]} does not fit into --src_resize "
                f"{self.src_resize[0]} {self.src_resize[1]}"
            )

    def to_json(self) -> dict[str, Any]:
        """Nested plain values, readable by `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: Path | str) -> SourceTrainingConfig:
        """Rebuild a configuration from `to_json`'s form.

        Raises:
            UserError: names `origin` when a value is missing, unknown or out of range.
        """
        try:
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
            values |= {"shape": SegmentationShape(**content["shape"]), "sgd": SGDConfig(**content["sgd"])}
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise UserError(f"{origin} is not the configuration of a source training: {error}") from None


def poly_rate(step: int, num_steps: int, power: float) -> float:
    """Factor on the learning rate at `step` (from 0): (1 - step / num_steps) ** power."""
    return (1.0 - step / num_steps) ** power


class SourceTrainer:
    """Trains a net on source and keeps its run folder.

    Args:
        config: of the run.
        net: on `device`.
        train: labelled images to learn from.
        validator: for the held-out images.
        class_names: of trainIds 0, 1, ...
        run_folder: existing folder for `config.json`, `latest.pth`, the `previous.pth` before it, and `best.pth`.
        stop: asked after every step whether to save and stop.
    """

    def __init__(
        self,
        config: SourceTrainingConfig,
        net: nn.Module,
        train: FileList,
        validator: Validator,
        class_names: Sequence[str],
        device: torch.device,
        run_folder: Path,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config = config
        self.stop = stop
        self.skipped: list[str] = []
        self.saved_step = 0
        self._saved_at = time.monotonic()
        self.net = net
        self.train = train
        self.validator = validator
        self.class_names = class_names
        self.device = device
        self.run_folder = run_folder
        self.execution = Execution(config.precision)
        self.optimizer = segmentation_optimizer(net, config.sgd)
        self.run = run_identity(run_folder, {"run_id": secrets.token_hex(8)})
        self.step = 0
        self.validated_step = 0
        self.is_published = False  # the best net so far stands at the configured output, too
        self.best_miou: float | None = None
        self.steps_per_epoch = len(train) // config.batch_size

    # --- state ---------------------------------------------------------------------------------------------------

    def inputs(self) -> dict[str, str]:
        """Fingerprints of what is learnt from and selected by; they must stay when the run is continued."""
        return {"training images": self.train.fingerprint(), "validation images": self.validator.files.fingerprint()}

    def save_latest(self) -> None:
        """Write everything needed to go on to `latest.pth`.

        Raises:
            UserError: the training has diverged; the file before is kept.
        """
        self._require_finite()
        training = {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "validated_step": self.validated_step,
            "best_miou": self.best_miou,
            "config": self.config.to_json(),
            "inputs": self.inputs(),
            "skipped": self.skipped,
        }
        state = SegmentationFile(self.config.shape, self.net.state_dict(), self._info(self.best_miou), training)
        state.save(self.run_folder / LATEST, self.run_folder / PREVIOUS)
        self.saved_step, self._saved_at = self.step, time.monotonic()

    def restore(self, state: SegmentationFile, origin: Path) -> None:
        """Go on from `latest.pth`.

        Raises:
            UserError: the file does not fit the configuration or the data.
        """
        if state.training.get("inputs") != self.inputs():
            raise UserError(f"{origin}: the lists of images are not those the run was started with; restore them")
        load_network(self.net, state.weights, str(origin))
        self.run = run_identity(self.run_folder, state.info)
        try:
            self.optimizer.load_state_dict(state.training["optimizer"])
            self.step, self.best_miou = int(state.training["step"]), state.training["best_miou"]
            self.validated_step = int(state.training["validated_step"])
            self.skipped = list(state.training.get("skipped", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{origin}: the optimiser's state is incomplete ({error})") from None
        self.saved_step = self.step

    def _info(self, miou: float | None) -> dict[str, Any]:
        return {**self.run, "data_set": self.config.source, "step": self.step, "miou": miou}

    def _require_finite(self) -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in self.net.state_dict().values()):
            raise UserError(
                f"training diverged: the weights are not finite at step {self.step}; {self._kept()}, start again with "
                "a lower --lr_semseg"
            )

    def _kept(self) -> str:
        if not self.saved_step:
            return "nothing was saved yet"
        return f"the last good checkpoint, {self.run_folder / LATEST} of step {self.saved_step}, is kept"

    # --- training ------------------------------------------------------------------------------------------------

    def fit(self, quiet: bool = False) -> None:
        """Train from the present step to the last.

        Raises:
            UserError: an image or label cannot be used, the training diverged, or a file cannot be written.
        """
        config = self.config
        atomic_write_json(self.run_folder / CONFIG, config.to_json())
        # purge_step drops what an interrupted run logged after the checkpoint this one continues from, or starts again.
        writer = TensorBoardLog(Path(config.tb_logs_dir) / log_name(self.run_folder), purge_step=self.step + 1)
        bar = tqdm(total=config.num_steps, initial=self.step, disable=quiet, unit="step", dynamic_ncols=True)
        self.net.train()
        try:
            if self.best_miou is not None:
                self._publish()
            if self._is_validation_step() and self.validated_step != self.step:
                self._validate(bar, writer, quiet)  # the run was stopped in it
            unread: list[torch.Tensor] = []
            for batch in self._stream():
                unread.append(self._one_step(batch))
                self.step += 1
                bar.update(1)
                self._note_skipped(batch.skipped)
                stopping = self.stop()
                saves = stopping or self._is_validation_step() or self._save_is_due()
                if saves or len(unread) == config.print_rate or self.step == config.num_steps:
                    self._log_losses(torch.stack(unread).cpu(), bar, writer)
                    unread = []
                if saves:
                    self.save_latest()
                self._stop_if(stopping)
                if self._is_validation_step():
                    self._validate(bar, writer, quiet)
        finally:
            bar.close()
            writer.close()

    def _stop_if(self, wanted: bool) -> None:
        """End the training, whose present state is saved."""
        if wanted:
            raise Stopped(
                f"stopped at step {self.step}, and saved; go on with --continue_train_from_path {self.run_folder}"
            )

    def _save_is_due(self) -> bool:
        minutes = (time.monotonic() - self._saved_at) / 60.0
        return self.step % self.config.save_checkpoint_rate == 0 or minutes > self.config.save_checkpoint_minutes

    def _note_skipped(self, reasons: Sequence[str]) -> None:
        for reason in reasons:
            if reason not in self.skipped:
                self.skipped.append(reason)
                tqdm.write(f"skipped: {reason}")

    def _stream(self) -> Iterator[DomainBatch]:
        config = self.config
        stream = StreamConfig(
            seed=config.manual_seed,
            domain="source",
            scale=0,
            batch_size=config.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            epoch_length=len(self.train),
            resize=config.src_resize,
            crop=config.crop_size,
            labels="read",
            flip=True,
            on_bad_image=config.on_bad_image,
        )
        steps = range(self.step, config.num_steps)
        return open_stream(self.train, stream, _one_level, steps, config.num_workers, self.device.type == "cuda")

    def _one_step(self, batch: DomainBatch) -> torch.Tensor:
        # Dropout follows from the step number, so a continued run draws what an uninterrupted one would have drawn.
        torch.manual_seed(seed_for(self.config.manual_seed, 4, self.step))
        factor = poly_rate(self.step, self.config.num_steps, self.config.power)
        for group, multiple in zip(self.optimizer.param_groups, (1.0, HEAD_RATE), strict=True):
            group["lr"] = self.config.sgd.lr_semseg * multiple * factor
        image = normalise(to_device(batch.levels[0], self.device)).permute(0, 3, 1, 2).contiguous()
        loss = cross_entropy(self.execution(self.net, image), to_device(batch.label, self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _log_losses(self, losses: torch.Tensor, bar: tqdm, writer: TensorBoardLog) -> None:
        """Log the mean of the losses of the last steps, (steps,)."""
        broken = (~losses.isfinite()).nonzero()
        if len(broken):
            first = int(broken[0])
            raise UserError(
                f"training diverged: {LOSS_TAG} is {float(losses[first])} at step "
                f"{self.step - len(losses) + 1 + first}; {self._kept()}, start again with a lower --lr_semseg"
            )
        loss = float(losses.mean())
        rate = self.optimizer.param_groups[0]["lr"]
        writer.add_scalar(LOSS_TAG, loss, self.step)
        writer.add_scalar("Semseg/LearningRate", rate, self.step)
        bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.3g}")

    def _is_validation_step(self) -> bool:
        rate = self.config.validation_rate or self.steps_per_epoch
        return self.step > 0 and (self.step % rate == 0 or self.step == self.config.num_steps)

    def _validate(self, bar: tqdm, writer: TensorBoardLog, quiet: bool) -> None:
        self._require_finite()
        # Saved before; a validation that is broken off is made again.
        validation = self.validator(self.net, lambda: self._stop_if(self.stop()))
        self._note_skipped(validation.skipped)
        log_validation(writer, validation, self.step, self.class_names)
        if not quiet:
            bar.write(f"step {self.step}: {summary(validation, self.class_names)}")
        miou = validation.mean_iou
        if miou is None:
            raise UserError(
                f"the labels of the {len(self.validator.files)} validation images hold no pixel of a scored class, so "
                "no best net can be chosen; check --val_list, --val_count and the labels"
            )
        if self.best_miou is None or miou > self.best_miou:
            self.best_miou = miou
            best = SegmentationFile(self.config.shape, self.net.state_dict(), self._info(miou))
            best.save(self.run_folder / BEST)
            self._publish()
        self.validated_step = self.step
        self.save_latest()

    def best_file(self) -> Path:
        """Where the best net is: the configured output, or the run folder if that belongs to another run."""
        output = Path(self.config.output)
        with suppress(UnavailableFileError):
            if self.is_published and is_of_run(output, self.run):
                return output
        return self.run_folder / BEST

    def _publish(self) -> None:
        """Copy the best net to the configured output, unless a file of another run has come to stand there."""
        output = Path(self.config.output)
        if not self.config.output or not (self.run_folder / BEST).exists():
            return
        self.is_published = False
        try:
            if output.exists() and not is_of_run(output, self.run):
                say(f"{output} is now a file of another run and stays; the best net is {self.run_folder / BEST}")
            else:
                read_segmentation_file(self.run_folder / BEST).save(output)
                self.is_published = True
        except (DamagedFileError, UnavailableFileError) as error:
            # No reason to give the training up: the next better net is written anew.
            say(f"WARNING: {output} is not brought up to date: {error}")


def _one_level(image: np.ndarray) -> list[np.ndarray]:
    """The pyramid of a net that looks at one size."""
    return [image]
