"""The reports of a run: a progress bar, TensorBoard, and `metrics.jsonl` with one line for each log entry."""

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from training.board import Board, log_validation
from training.method import Method, Stage
from training.validation import Validation, report, summary
from utils.errors import UserError
from utils.files import atomic_write_bytes

METRICS = "metrics.jsonl"


class Diverged(Exception):
    """A loss or a weight is not finite; the message names it and the step."""


class Progress:
    """Bar, TensorBoard and metrics of a run. Losses stay on the device and are read once every `print_rate` steps.

    Args:
        method: of the run; names its losses and pictures.
        done: (stage, step) the run starts from.
        folder: of the run; its `metrics.jsonl` gets JSON objects with `stage`, `step` and `overall_step`, one a line,
            and lines after `done` are dropped. None writes nothing.
        log_dir: TensorBoard folder, or None for no TensorBoard.
        print_rate: steps between two readings of the losses; logged values are means over these steps.
        quiet: draw no bar (tests, and all processes but the main one).
    """

    def __init__(
        self, *, method: Method, done: tuple[int, int], folder: Path | None, log_dir: Path | None, print_rate: int,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        self.method = method
        self.stages: Sequence[Stage] = method.stages()
        self.print_rate = print_rate
        first = self._overall(*done)
        self.bar = tqdm(
            total=sum(stage.steps for stage in self.stages), initial=first, disable=quiet, unit="step",
            dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )  # fmt: skip
        self.board = Board(log_dir, purge_step=first + 1)  # hides what was logged after the checkpoint
        self.metrics = folder / METRICS if folder else None
        if self.metrics and self.metrics.exists():
            lines = self.metrics.read_text(errors="replace").splitlines(keepends=True)
            whole = (line for line in lines if line.endswith("}\n"))  # a killed run may leave half a line
            kept = [line for line in whole if json.loads(line)["overall_step"] <= first]
            atomic_write_bytes(self.metrics, "".join(kept).encode())
        self._names: list[str] = []
        self._unread: list[Tensor] = []
        self._window_started = time.perf_counter()

    def _overall(self, stage: int, step: int) -> int:
        """Steps of the whole run up to `step` of `stage`."""
        return sum(earlier.steps for earlier in self.stages[:stage]) + step

    def step(self, stage: int, step: int, losses: Mapping[str, Tensor]) -> None:
        """Count a finished step of `stage`, 1 for the first. Raises `Diverged` for losses that are not finite."""
        if list(losses) != self._names:
            self.read_losses(stage, step - 1)  # a term was added or ended, as after a warm-up
            self._names = list(losses)
        self._unread.append(torch.stack([loss.detach() for loss in losses.values()]))
        self.bar.update(1)
        if len(self._unread) == self.print_rate or step in (1, self.stages[stage].steps):
            self.read_losses(stage, step)

    def restart_clock(self) -> None:
        """Leave out what was done since the losses were read last, such as a validation, from the time of a step."""
        self._window_started = time.perf_counter()

    def read_losses(self, stage: int, step: int) -> None:
        """Log the means of the losses since the last reading; `step` is the last of these steps.

        Where several processes share the batches, all of them have to call it.

        Raises:
            Diverged: one of them is not finite.
        """
        if not self._unread:
            return
        losses = torch.stack(self._unread)
        self.method.rank.all_reduce([losses])
        losses = losses.cpu()
        # Reading waits for the device, so this is the true time of the steps since the last reading.
        now = time.perf_counter()
        seconds = (now - self._window_started) / len(losses)
        self._window_started = now
        self._unread = []
        for at, row in enumerate(losses.tolist(), start=step - len(losses) + 1):
            for name, value in zip(self._names, row, strict=True):
                if not math.isfinite(value):
                    where = self.stages[stage]
                    raise Diverged(f"{_tag(where, name)} is {value} at step {at} of {where.name}")
        self._log(stage, step, seconds, dict(zip(self._names, losses.double().mean(dim=0).tolist(), strict=True)))

    def _log(self, index: int, step: int, seconds: float, values: Mapping[str, float]) -> None:
        stage, overall = self.stages[index], self._overall(index, step)
        rates = {name: o.param_groups[0]["lr"] for name, o in self.method.optimizers.items()}
        logged = {_tag(stage, name): value for name, value in values.items()}
        logged |= {f"{stage.tag}LearningRate/{name}": rate for name, rate in rates.items()}
        for name, value in {**logged, f"{stage.tag}Time/SecondsPerStep": seconds}.items():
            self.board("add_scalar", name, value, overall)
        self._write(index, step, {"seconds_per_step": seconds, "losses": values, "learning_rates": rates})
        eta = tqdm.format_interval(int(seconds * (stage.steps - step)))
        text = f"{seconds:.3g} s/step, ETA {eta}"
        if len(self.stages) > 1:
            text = f"{stage.name}, {seconds:.3g} s/step, {eta} to its end"
        self.bar.set_postfix_str(f"{text}, {self.method.summary(values)}")

    def _write(self, stage: int, step: int, entry: Mapping[str, object]) -> None:
        """Append a line to `metrics.jsonl`."""
        if self.metrics is None:
            return
        where = {"stage": stage, "step": step, "overall_step": self._overall(stage, step)}
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({**where, **entry}) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.metrics}: {error.strerror}; free some space") from None

    def pictures(self, stage: int, step: int, images: Mapping[str, Tensor]) -> None:
        """Log the first sample of the batch as a row of pictures; images (B,3,h,w) in [-1,1] by name."""
        if images:
            row = torch.cat([((image[0].float() + 1.0) / 2.0).clamp(0.0, 1.0) for image in images.values()], dim=2)
            tag = f"{self.stages[stage].tag}{'-'.join(images)}"
            self.board("add_image", tag, row, self._overall(stage, step))

    def validation(self, stage: int, step: int, validation: Validation, names: Sequence[str]) -> None:
        """Print and log a validation of the segmentation net; `names` are those of the classes."""
        self.say(f"{self.stages[stage].name}, step {step}: {summary(validation, names)}")
        log_validation(self.board, validation, self._overall(stage, step), names)
        self._write(stage, step, {"validation": report(validation, names)})

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            tqdm.write(text)

    def close(self) -> None:
        """Finish the bar and flush TensorBoard."""
        self.bar.close()
        self.board("close")


def _tag(stage: Stage, loss_name: str) -> str:
    """TensorBoard tag of a logged loss; those of a segmentation net have no stage in their tag."""
    return loss_name if loss_name.startswith("Semseg/") else f"{stage.tag}{loss_name}"
