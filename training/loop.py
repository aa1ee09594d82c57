"""The training loop of every method: stages, steps, checkpoints, validation, resume, stop requests."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from training.checkpoint import BEST, LATEST, PREVIOUS, Checkpoint
from training.config import RunConfig
from training.method import Method, Stage
from training.progress import Diverged, Progress
from training.validation import VALIDATIONS, report
from utils.errors import UserError
from utils.files import atomic_write_json
from utils.locks import say
from utils.seeds import STEP, seed_for
from utils.stopping import LoaderDied, Stopped, is_loader_death
from utils.tensor_files import is_finite, load_network, weights_fingerprint

CONTINUE, SAVE, STOP = range(3)


class Loop:
    """Trains a method through its stages and keeps the run folder.

    Args:
        folder: existing folder for checkpoints.
        info: plain values for the checkpoints; see `Checkpoint.info`.
        stop: called after every step; whether to save and stop.
    """

    def __init__(
        self, *, method: Method, folder: Path, info: Mapping[str, Any] | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        self.method = method
        self.rank = method.rank
        self.run_config: RunConfig = method.config.run
        self.folder = folder
        self.info = dict(info or {})
        self.stop = stop
        self.stages = list(method.stages())
        self.stage = 0
        self.step = 0
        self.stage_finished = False
        self.has_begun = False
        self.validations: list[Mapping[str, Any]] = []
        self.skipped: list[str] = []
        self.saved = (0, 0)
        self._saved_at = time.monotonic()

    # --- state -------------------------------------------------------------------------------------------------------

    def checkpoint(self) -> Checkpoint:
        """The present state, whose tensors are those of the networks: save it before the next step."""
        method, net, segmentation = self.method, self.method.eval_net(), {}
        if net is not None:
            (name,) = (name for name, module in method.modules.items() if module is net)
            segmentation = {"module": name, "shape": vars(method.shape)}
        return Checkpoint(
            method=method.name,
            config=method.config.to_json(),
            stage=self.stage,
            step=self.step,
            stage_finished=self.stage_finished,
            modules={name: module.state_dict() for name, module in method.modules.items()},
            optimizers={name: optimizer.state_dict() for name, optimizer in method.optimizers.items()},
            method_state=method.state_dict(),
            inputs=method.inputs(),
            segmentation=segmentation,
            info=self.info,
            validations=self.validations,
            skipped=self.skipped,
        )

    def restore(self, checkpoint: Checkpoint, origin: Path) -> None:
        """Continue from a checkpoint. Raises `UserError`, which names `origin`, if it or an input does not fit."""
        inputs = self.method.inputs()
        for name, fingerprint in checkpoint.inputs.items():
            if inputs.get(name, fingerprint) != fingerprint:
                raise UserError(f"{origin}: the {name} is not the one the run was started with; restore it to continue")
        try:
            for stage in range(checkpoint.stage + 1):
                self.begin_stage(stage, resumed=True)
                if stage < checkpoint.stage or checkpoint.stage_finished:
                    self.method.end_stage(stage)
            for name, module in self.method.modules.items():
                load_network(module, checkpoint.modules[name], f"{origin}, {name},")
            for name, optimizer in self.method.optimizers.items():
                _load_optimizer(optimizer, checkpoint.optimizers[name])
            self.method.load_state_dict(checkpoint.method_state)
        except (LookupError, ValueError) as error:
            raise UserError(f"{origin} does not fit its configuration ({error})") from None
        self.step, self.stage_finished = checkpoint.step, checkpoint.stage_finished
        self.info = {**checkpoint.info, **self.info}
        self.validations, self.skipped = list(checkpoint.validations), list(checkpoint.skipped)
        if not (self.folder / BEST).is_file():  # as where only latest.pth was copied: the next validation is the best
            self.validations = [{**found, "best": False} for found in self.validations]
        self.saved = (self.stage, self.step)

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Begin a stage of the method; `resumed`: see `Method.begin_stage`."""
        self.stage, self.step, self.stage_finished, self.has_begun = stage, 0, False, True
        self.method.begin_stage(stage, resumed)

    def move_to_epoch(self, epoch: int) -> None:
        """Set the step counter to the start of `epoch` (from 1) of this stage. Raises `UserError` if there is none."""
        stage = self.stages[self.stage]
        step = (epoch - 1) * stage.steps_per_epoch
        if self.stage_finished:
            raise UserError(f"--resume_to_epoch {epoch}: {stage.name} is finished; remove the flag")
        if epoch < 1 or step >= stage.steps:
            raise UserError(f"--resume_to_epoch {epoch}: {stage.name} has {stage.steps} steps, and epochs count from 1")
        self.step = step
        best = self.best()  # its state stays in the folder, so it stays the one to beat
        self.validations = [v for v in self.validations if (v["stage"], v["step"]) <= (self.stage, step) or v is best]

    def _save(self, progress: Progress, *names: str) -> None:
        """Write the state under each name; all processes call it. Raises `Diverged` where a value is not finite."""
        progress.read_losses(self.stage, self.step)
        self.skipped = list(dict.fromkeys(reason for part in self.rank.gather(self.skipped) for reason in part))
        if self.rank.is_main:
            for name, module in self.method.modules.items():
                if not is_finite(module):
                    where = f"step {self.step} of {self.stages[self.stage].name}"
                    raise Diverged(f"{name} has weights that are not finite after {where}")
            checkpoint = self.checkpoint()
            for name in names:
                if name == BEST:
                    checkpoint.for_use().save(self.folder / BEST)
                else:
                    checkpoint.save(self.folder / name, self.folder / PREVIOUS if name == LATEST else None)
        self.saved, self._saved_at = (self.stage, self.step), time.monotonic()

    # --- training ----------------------------------------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """Train from the present state to the end of the last stage.

        Raises:
            UserError: an image or label cannot be used, the run folder cannot be written to, or the training diverged.
            Stopped: a stop was requested, or a loader process died; the state is saved.
            LoaderDied, RuntimeError: a loader process died where the state cannot be saved (`is_loader_death`).
        """
        try:
            self._run(progress)
        except Diverged as error:
            stage, step = self.saved
            raise UserError(
                f"training diverged: {error}; the last good checkpoint, {self.folder / LATEST} of step {step} of "
                f"{self.stages[stage].name}, is kept; start again with lower learning rates"
            ) from None

    def _run(self, progress: Progress) -> None:
        if not self.has_begun:
            self.begin_stage(0, resumed=False)
            self._save(progress, LATEST)
        while True:
            stage = self.stages[self.stage]
            if not self.stage_finished:
                self._train_stage(stage, progress)
                self.method.end_stage(self.stage)
                self.stage_finished = True
                self._save(progress, *([stage.keep_as] if stage.keep_as else []), LATEST)
            if self.rank.is_main and (line := self.method.write_summary(self.stage, self.folder)):
                progress.say(line)
            if self.stage == len(self.stages) - 1:
                self._publish(BEST if self.best() else LATEST)
                return
            self.begin_stage(self.stage + 1, resumed=False)

    def _train_stage(self, stage: Stage, progress: Progress) -> None:
        self._require_equal_weights()
        validated = {(found["stage"], found["step"]) for found in self.validations}
        if self._is_validation_step(stage) and (self.stage, self.step) not in validated:
            self._validate(progress)  # the run was stopped during this validation
        alone = self.rank.count == 1  # several processes have to finish it together
        line = self.method.prepare_stage(self.stage, self.folder, lambda: self._stop_if(alone and self.stop()))
        progress.restart_clock()
        if line:
            progress.say(line)
        batches = iter(self.method.batches(self.stage, range(self.step, stage.steps)))
        while self.step < stage.steps:
            try:
                batch = next(batches)
            except (LoaderDied, RuntimeError) as error:
                if self.rank.count > 1 or not is_loader_death(error):
                    raise  # other processes are in a step that this one cannot take
                self._save(progress, LATEST)
                raise Stopped(f"{error}; {self._how_to_continue()}") from None
            # The seed depends on the step, so that dropout of a continued run equals that of an uninterrupted one.
            # Other processes draw for other samples; the main one's seed is that of a single process.
            others = (self.rank.index,) if self.rank.index else ()
            torch.manual_seed(seed_for(self.run_config.manual_seed, STEP, self.stage, self.step, *others))
            losses = self.method.step(batch, self.stage, self.step)
            self.step += 1
            progress.step(self.stage, self.step, losses)
            self._note_skipped(progress, *batch.skipped)
            if stage.pictures_every and self.step % stage.pictures_every == 0:
                progress.pictures(self.stage, self.step, self.method.images())
            validates = self._is_validation_step(stage)
            action = self.rank.all_reduce_max(self._action(stage))
            if validates or action >= SAVE:
                self._save(progress, LATEST)
            self._stop_if(action == STOP)
            if validates:
                self._validate(progress)

    def _how_to_continue(self) -> str:
        return (
            f"stopped at step {self.step} of {self.stages[self.stage].name}, and saved; continue with "
            f"--continue_train_from_path {self.folder}"
        )

    def _stop_if(self, wanted: bool) -> None:
        """End the training after the state has been saved."""
        if wanted:
            raise Stopped(self._how_to_continue())

    def _action(self, stage: Stage) -> int:
        """What this process wants after a step; all processes take the largest value."""
        if self.stop():
            return STOP
        if self.step == stage.steps:
            return CONTINUE  # the finished stage is about to be saved
        minutes = (time.monotonic() - self._saved_at) / 60.0
        due = self.step % self.run_config.save_checkpoint_rate == 0 or minutes > self.run_config.save_checkpoint_minutes
        return SAVE if due else CONTINUE

    def _note_skipped(self, progress: Progress, *reasons: str) -> None:
        for reason in reasons:
            if reason not in self.skipped:
                self.skipped.append(reason)
                progress.say(f"skipped: {reason}")

    def _require_equal_weights(self) -> None:
        """Check that all processes start from the same weights; they apply the same updates from then on."""
        if self.rank.count > 1:
            weights = {f"weights of {name}": weights_fingerprint(net) for name, net in self.method.modules.items()}
            self.rank.require_equal({"checkpoint's step": (self.stage, self.step), **weights})

    # --- validation --------------------------------------------------------------------------------------------------

    def _is_validation_step(self, stage: Stage) -> bool:
        if self.method.validator is None or not stage.validate_every or self.method.eval_net() is None:
            return False
        return self.step > 0 and (self.step % stage.validate_every == 0 or self.step == stage.steps)

    def _validate(self, progress: Progress) -> None:
        """Validate the method's net; save this state as the best one if it is the best so far."""
        validator = self.method.validator
        alone = self.rank.count == 1  # several processes have to finish it together
        # The state was saved before; an interrupted validation is repeated.
        validation = validator(self.method.eval_net(), lambda *_: self._stop_if(alone and self.stop()))
        progress.restart_clock()
        score = validator.score(validation)
        names = validator.files.data_set.class_names
        self._note_skipped(progress, *validation.skipped)
        if score is None and validator.select_by != "none":
            say(f"WARNING: the labels of {validator.files.root} hold no pixel of a scored class: no best state")
        earlier = self.best()
        best = score is not None and (earlier is None or score > earlier["score"])
        where, found = {"stage": self.stage, "step": self.step, "score": score, "best": best}, report(validation, names)
        self.validations.append({**where, **found})
        self._save(progress, *([BEST] if best else []), LATEST)
        # After the checkpoint: a run killed before it validates again, and would log the same validation twice.
        progress.validation(self.stage, self.step, validation, names)
        if self.rank.is_main:
            atomic_write_json(self.folder / VALIDATIONS, self.validations)
        if best:
            self._publish(BEST)
        self._stop_if(bool(self.rank.all_reduce_max(int(self.stop()))))

    def best(self) -> Mapping[str, Any] | None:
        """The validation of the best state, None before there is one."""
        return next((found for found in reversed(self.validations) if found["best"]), None)

    def _publish(self, name: str) -> None:
        if self.rank.is_main and (self.folder / name).is_file():
            self.method.publish(self.folder / name, self.info)


def _load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict`, with every buffer in the memory layout of its weight, which fused optimisers require."""
    optimizer.load_state_dict(dict(state))
    for weight, held in optimizer.state.items():
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                held[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
