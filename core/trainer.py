"""The loop over scales: build a scale's networks, train them, freeze them, go on to the next finer scale."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from core.batches import open_streams, penalty_alphas, step_batch
from core.checkpoint import LATEST, NETWORK_NAMES, PREVIOUS, Checkpoint
from core.config import ProCSTConfig
from core.contact_sheet import contact_sheet_path, save_contact_sheet
from core.label_networks import restore_momentum
from core.networks import Discriminator, Generator, freeze, init_weights
from core.progress import Diverged, RunProgress
from core.running import micro_batch_size, procst_runner
from core.step import (
    PerceptualNet,
    ScaleNetworks,
    ScaleOptimizers,
    SegmentationNets,
    StepResult,
    training_step,
)
from training.validation import BEST_PATTERN, VALIDATIONS, Validator, best_name, report
from data_handlers.cache import ImageCache
from data_handlers.lists import FileList
from data_handlers.stream import DomainBatch
from training.synchronised_norm import synchronise_batch_norms
from training.distributed import Rank
from training.local_batch import WHOLE, LocalBatch
from utils.errors import UserError
from utils.files import atomic_write_json
from utils.seeds import seed_for
from utils.stopping import Stopped
from utils.tensor_files import load_network, weights_fingerprint

GO_ON, SAVE, STOP = range(3)


class Trainer:
    """Trains the pyramid of a run and keeps its folder.

    Args:
        config: of the run.
        source, target: the images of the two domains.
        perceptual: frozen feature network on `device`.
        device: where the networks live.
        run_folder: existing folder for checkpoints and contact sheets.
        labels: segmentation networks of the last scale, on `device`; None trains without label losses.
        inputs: fingerprints of what is learnt from, stored in the checkpoints and compared when a run is continued.
        validator: validates the segmentation net trained at the last scale; None goes without.
        caches: of the `source` and `target` images, where there are some.
        stop: asked after every step whether to save and stop.
        rank: of this process among those that share every batch; the first one keeps the run folder.
    """

    def __init__(
        self,
        config: ProCSTConfig,
        source: FileList,
        target: FileList,
        perceptual: PerceptualNet,
        device: torch.device,
        run_folder: Path,
        labels: SegmentationNets | None = None,
        inputs: Mapping[str, str] | None = None,
        validator: Validator | None = None,
        caches: Mapping[str, ImageCache] | None = None,
        stop: Callable[[], bool] = lambda: False,
        rank: Rank | None = None,
    ) -> None:
        self.config = config
        self.source = source
        self.target = target
        self.perceptual = perceptual
        self.device = device
        self.run_folder = run_folder
        self.labels = labels
        self.inputs = dict(inputs or {})
        self.validator = validator
        self.caches = dict(caches or {})
        self.stop = stop
        self.rank = rank or Rank()
        self.validations: list[Mapping[str, Any]] = []
        self.skipped: list[str] = []
        self.saved = (0, 0)
        self._saved_at = time.monotonic()
        compute = config.compute
        self.run_network = procst_runner(compute.precision, compute.bf16_discriminators)
        self.epoch_length = max(len(source), len(target))
        self.scale = 0
        self.step = 0
        self.scale_finished = False
        self.networks: dict[str, list[nn.Module]] = {name: [] for name in NETWORK_NAMES}
        self.optimizers: dict[str, Adam] = {}

    # --- state ---------------------------------------------------------------------------------------------------

    def start_scale(self, scale: int) -> None:
        """Append freshly initialised networks for `scale` and make their optimisers."""
        optim = self.config.optim
        self.scale, self.step, self.scale_finished = scale, 0, False
        for index, name in enumerate(NETWORK_NAMES):
            network = self._build(name, scale)
            generator = torch.Generator().manual_seed(seed_for(self.config.run.manual_seed, 3, scale, index))
            init_weights(network, generator)
            network.to(self.device).train()
            if self.rank.count > 1:
                synchronise_batch_norms(network)
            self.networks[name].append(network)
            rate = optim.lr_d if name.startswith("D") else optim.lr_g
            self.optimizers[name] = Adam(network.parameters(), lr=rate, betas=(optim.beta1, 0.999), fused=True)
        if self.labels is not None and self._is_last_scale():
            self.labels.seg_source.to(self.device)
            self.labels.seg_sit.to(self.device)

    def _build(self, name: str, scale: int) -> nn.Module:
        return (Discriminator if name.startswith("D") else Generator)(self.config.network.shape(scale))

    def finish_scale(self) -> None:
        """Freeze the scale's networks for good."""
        for name in NETWORK_NAMES:
            freeze(self.networks[name][-1])
        self.scale_finished = True

    def move_to_step(self, step: int) -> None:
        """Go on at `step` of the scale in training, thawing its networks if it was finished."""
        self.step, self.scale_finished = step, False
        for name in NETWORK_NAMES:
            self.networks[name][-1].train().requires_grad_(True)

    def checkpoint(self) -> Checkpoint:
        """The present state; tensors are shared with the networks, so save it before the next step."""
        segmentation: Mapping[str, Any] = {}
        if self.labels is not None and self._is_last_scale():
            segmentation = {
                "target_net": self.labels.seg_sit.state_dict(),
                "optimizer": self.labels.optimizer.state_dict(),
            }
        return Checkpoint(
            config=self.config,
            scale=self.scale,
            step=self.step,
            scale_finished=self.scale_finished,
            networks={name: [net.state_dict() for net in nets] for name, nets in self.networks.items()},
            optimizers={name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            inputs=self.inputs,
            segmentation=segmentation,
            validations=self.validations,
            skipped=self.skipped,
        )

    def restore(self, checkpoint: Checkpoint, origin: Path) -> None:
        """Continue from a checkpoint: networks of all scales, optimisers, scale and step.

        Raises:
            UserError: the checkpoint's tensors do not fit the configuration.
        """
        for name, fingerprint in checkpoint.inputs.items():
            if self.inputs.get(name, fingerprint) != fingerprint:
                raise UserError(f"{origin}: the {name} is not the one the run was started with; restore it to go on")
        for scale in range(checkpoint.scale + 1):
            self.start_scale(scale)
            for name in NETWORK_NAMES:
                state = checkpoint.networks[name][scale]
                load_network(self.networks[name][scale], state, f"{origin}, {name} of scale {scale},")
            if scale < checkpoint.scale or checkpoint.scale_finished:
                self.finish_scale()
        self.step = checkpoint.step
        for name, state in checkpoint.optimizers.items():
            try:
                self.optimizers[name].load_state_dict(dict(state))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{origin}: the optimiser of {name} does not fit its network ({error})") from None
        if checkpoint.segmentation and self.labels is not None:
            self._restore_segmentation(checkpoint.segmentation, origin)
        self.validations = list(checkpoint.validations)
        self.skipped = list(checkpoint.skipped)
        self.saved = (self.scale, self.step)

    def _restore_segmentation(self, segmentation: Mapping[str, Any], origin: Path) -> None:
        load_network(self.labels.seg_sit, segmentation.get("target_net"), f"{origin}, segmentation net,")
        try:
            restore_momentum(self.labels.optimizer, segmentation["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{origin}: the segmentation net's optimiser does not fit it ({error})") from None

    def _is_last_scale(self) -> bool:
        return self.scale == self.config.network.num_scales

    def _save(self, progress: RunProgress, *names: str) -> None:
        """Write the state under each name, unless the training has diverged: a good checkpoint must outlive that.

        All processes have to call it; the first one writes.

        Raises:
            Diverged: a loss or a weight is not finite.
        """
        progress.read_losses(self.scale, self.step)
        self.skipped = list(dict.fromkeys(reason for part in self.rank.gather(self.skipped) for reason in part))
        if self.rank.is_first:
            self._require_finite_weights()
            checkpoint = self.checkpoint()
            for name in names:
                checkpoint.save(self.run_folder / name, self.run_folder / PREVIOUS if name == LATEST else None)
        self.saved = (self.scale, self.step)
        self._saved_at = time.monotonic()

    def _require_finite_weights(self) -> None:
        trained = {name: networks[-1] for name, networks in self.networks.items()}
        if self.labels is not None and self._is_last_scale():
            trained["the segmentation net"] = self.labels.seg_sit
        for name, network in trained.items():
            if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
                raise Diverged(f"{name} of scale {self.scale} has weights that are not finite after step {self.step}")

    # --- training ------------------------------------------------------------------------------------------------

    def fit(self, progress: RunProgress) -> None:
        """Train from the present state to the end of the last scale.

        Raises:
            UserError: an image or label cannot be used, the run folder cannot be written to, or the training diverged.
            Stopped: it was asked to.
        """
        try:
            self._fit(progress)
        except Diverged as error:
            scale, step = self.saved
            raise UserError(
                f"training diverged: {error}; the last good checkpoint, {self.run_folder / LATEST} of step {step} of "
                f"scale {scale}, is kept; start again with lower --lr_g and --lr_d"
            ) from None

    def _fit(self, progress: RunProgress) -> None:
        if not self.networks["Gst"]:
            self.start_scale(0)
            self._save(progress, LATEST)
        while True:
            if not self.scale_finished:
                self._train_scale(progress)
                self.finish_scale()
                self._save(progress, f"scale_{self.scale}.pth", LATEST)
                self._draw_contact_sheet(progress)
            elif not contact_sheet_path(self.run_folder, self.scale).exists():
                self._draw_contact_sheet(progress)  # the run was stopped between its checkpoint and its picture
            if self._is_last_scale():
                return
            self.start_scale(self.scale + 1)

    def _draw_contact_sheet(self, progress: RunProgress) -> None:
        if not self.rank.is_first:
            return
        path = save_contact_sheet(
            self.run_folder, self.config, self.source, self.target, self.networks["Gst"], self.device
        )
        progress.say(f"scale {self.scale} finished, see {path}")

    def _train_scale(self, progress: RunProgress) -> None:
        run = self.config.run
        steps = self.config.schedule.steps(self.scale, self.epoch_length)
        per_epoch = self.config.schedule.steps_per_epoch(self.scale, self.epoch_length)
        picture_rate = max(1, per_epoch // run.pics_per_epoch) if run.pics_per_epoch else 0
        nets, optimizers = self.scale_networks(), ScaleOptimizers(**self.optimizers)
        self._require_equal_weights()
        self._keep_best(self._bests())  # the run may have been killed before it could
        if self._is_validation_step(per_epoch, steps) and all(v["step"] != self.step for v in self.validations):
            self._validate(progress)  # the run was stopped in it
        batches = open_streams(
            self.config, self.scale, range(self.step, steps), self.source, self.target, self.caches,
            with_labels=self.labels is not None and self._is_last_scale(), pin_memory=self.device.type == "cuda",
            share=self.rank.share(self.config.schedule.batch_size_list[self.scale]),
        )  # fmt: skip
        for source, target in batches:
            result = self.one_step(nets, optimizers, source, target, self.step // per_epoch)
            self.step += 1
            progress.step(self.scale, self.step, result.losses)
            self._note_skipped(progress, *source.skipped, *target.skipped)
            if picture_rate and (self.step % picture_rate == 0):
                progress.pictures(self.scale, self.step, result.images)
            validates = self._is_validation_step(per_epoch, steps)
            wish = self.rank.agree(self._wish(steps))
            if validates or wish >= SAVE:
                self._save(progress, LATEST)
            self._stop_if(wish == STOP)
            if validates:
                self._validate(progress)

    def _stop_if(self, wanted: bool) -> None:
        """End the training, whose present state is saved."""
        if wanted:
            raise Stopped(
                f"stopped at step {self.step} of scale {self.scale}, and saved; go on with "
                f"--continue_train_from_path {self.run_folder}"
            )

    def _wish(self, steps: int) -> int:
        """What this process wants done after a step; all processes do the most that one of them wants."""
        run = self.config.run
        if self.stop():
            return STOP
        if self.step == steps:
            return GO_ON  # the finished scale is about to be saved
        minutes = (time.monotonic() - self._saved_at) / 60.0
        due = self.step % run.save_checkpoint_rate == 0 or minutes > run.save_checkpoint_minutes
        return SAVE if due else GO_ON

    def _note_skipped(self, progress: RunProgress, *reasons: str) -> None:
        for reason in reasons:
            if reason not in self.skipped:
                self.skipped.append(reason)
                progress.say(f"skipped: {reason}")

    def _is_validation_step(self, per_epoch: int, steps: int) -> bool:
        if self.validator is None or self.labels is None or not self._is_last_scale():
            return False
        due = self.step % (self.config.semseg.validation_rate or per_epoch) == 0 or self.step == steps
        return self.step > 0 and due

    def _validate(self, progress: RunProgress) -> None:
        """Validate the net trained on SiT; keep this state beside the others if it is the best so far."""
        alone = self.rank.count == 1  # several processes have to come to the end of it together
        with progress.untimed():
            # Saved before; a validation that is broken off is made again.
            validation = self.validator(self.labels.seg_sit, lambda: self._stop_if(alone and self.stop()))
        score = validation.mean_iou if self.config.semseg.select_by == "miou" else validation.label_free
        before = [earlier["score"] for earlier in self.validations if earlier["score"] is not None]
        best = score is not None and all(score > earlier for earlier in before)
        progress.validation(self.scale, self.step, validation, self.target.data_set.class_names)
        self._note_skipped(progress, *validation.skipped)
        found = report(validation, self.target.data_set.class_names)
        self.validations.append({"step": self.step, "score": score, "best": best, **found})
        if self.rank.is_first:
            atomic_write_json(self.run_folder / VALIDATIONS, self.validations)
        names = [best_name(self.step, found)] if best else []
        self._save(progress, *names, LATEST)
        self._keep_best(self.run_folder.glob(BEST_PATTERN))
        self._stop_if(bool(self.rank.agree(int(self.stop()))))

    def _bests(self) -> list[Path]:
        """Where the states were written that were the best of their time."""
        return [self.run_folder / best_name(found["step"], found) for found in self.validations if found["best"]]

    def _keep_best(self, others: Iterable[Path]) -> None:
        """Delete other states than the best so far, if there is one."""
        bests = self._bests()
        for path in others if bests and self.rank.is_first else ():
            if path != bests[-1]:
                path.unlink(missing_ok=True)

    def _require_equal_weights(self) -> None:
        """Check that all processes start from the same weights; from then on they compute the same changes."""
        if self.rank.count == 1:
            return
        weights = {f"{name} of scale {self.scale}": weights_fingerprint(*nets) for name, nets in self.networks.items()}
        if self.labels is not None and self._is_last_scale():
            weights["net trained on SiT"] = weights_fingerprint(self.labels.seg_sit)
        self.rank.require_equal({"checkpoint's step": self.step, **weights})

    def _local_batch(self) -> LocalBatch:
        if self.rank.count == 1:
            return WHOLE
        batch = self.config.schedule.batch_size_list[self.scale]
        return LocalBatch(len(self.rank.share(batch)) / batch, self.rank.add_up)

    def scale_networks(self) -> ScaleNetworks:
        """The networks that a step of the present scale works on."""
        finest = {name: nets[-1] for name, nets in self.networks.items()}
        return ScaleNetworks(**finest, lower_Gst=self.networks["Gst"][:-1], lower_Gts=self.networks["Gts"][:-1])

    def one_step(
        self, nets: ScaleNetworks, optimizers: ScaleOptimizers, source: DomainBatch, target: DomainBatch, epoch: int
    ) -> StepResult:
        """Train on a batch; which step it is decides what is drawn at random."""
        labels = self.labels if self._is_last_scale() else None
        if labels is not None:
            # Dropout follows from the step number, so a continued run draws what an uninterrupted one would have drawn.
            # Processes draw for other samples, so each has its own; the first one's is that of a single process.
            others = (self.rank.index,) if self.rank.index else ()
            torch.manual_seed(seed_for(self.config.run.manual_seed, 4, self.scale, self.step, *others))
        alphas = penalty_alphas(self.config.run.manual_seed, self.scale, self.step)
        batch = step_batch(source, target, alphas, self.device)
        warmup = labels is not None and epoch < self.config.schedule.warmup_epochs
        return training_step(
            nets=nets,
            optimizers=optimizers,
            perceptual=self.perceptual,
            batch=batch,
            loss=self.config.loss,
            scale_factor=self.config.network.scale_factor,
            segmentation=labels,
            warmup=warmup,
            run=self.run_network,
            recompute=self.device.type == "cuda",
            micro_batch=micro_batch_size(batch.source[-1].shape, nets.Gst.shape.norm, self.device),
            local=self._local_batch(),
        )
