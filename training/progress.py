"""What a person sees of a run: a progress bar, TensorBoard, and `metrics.jsonl` with one line for each log entry."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from training.method import Method, Stage
from training.tensorboard import TensorBoardLog
from training.validation import Validation, log_validation, report, summary
from utils.errors import UserError
from utils.files import atomic_write_bytes

METRICS = "metrics.jsonl"


class Diverged(Exception):
    """A loss or a weight is not finite; the message names it and the step."""


class MetricsFile:
    """`metrics.jsonl` in the run folder: one JSON object a line, each with `stage`, `step` and `overall_step`.

    Lines after the step that a run continues from are dropped when it is opened.
    """

    def __init__(self, path: Path, overall_step: int) -> None:
        self.path = path
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if _is_up_to(line, overall_step)]
        if kept != lines:
            atomic_write_bytes(path, "".join(kept).encode())

    def write(self, entry: Mapping[str, object]) -> None:
        """Append a line.

        Raises:
            UserError: the disk is full, or the folder is gone.
        """
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; free some space") from None


def _is_up_to(line: str, overall_step: int) -> bool:
    """Whether a line is whole and of a step up to the given one."""
    try:
        return line.endswith("\n") and int(json.loads(line)["overall_step"]) <= overall_step
    except (ValueError, KeyError, TypeError):
        return False


class Progress:
    """Bar, TensorBoard and metrics of a run. Losses stay on the device and are read once every `print_rate` steps.

    Args:
        method: of the run; names its losses and pictures.
        done: (stage, step) the run starts from.
        folder: of the run, for `metrics.jsonl`; None writes nothing.
        log_dir: TensorBoard folder, or None for no TensorBoard.
        print_rate: steps between two readings of the losses; logged values are means over these steps.
        quiet: draw no bar (tests, and all processes but the main one).
    """

    def __init__(
        self,
        *,
        method: Method,
        done: tuple[int, int],
        folder: Path | None,
        log_dir: Path | None,
        print_rate: int,
        quiet: bool = False,
    ) -> None:
        self.method = method
        self.stages: Sequence[Stage] = method.stages()
        self.print_rate = print_rate
        all_reduce: Callable[[Sequence[Tensor]], None] = method.rank.all_reduce
        self.all_reduce = all_reduce
        first = self.overall(*done)
        self.bar = tqdm(
            total=sum(stage.steps for stage in self.stages), initial=first, disable=quiet, unit="step",
            dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )  # fmt: skip
        # purge_step drops what an interrupted run logged after the checkpoint that this one continues from.
        self.writer = TensorBoardLog(log_dir, purge_step=first + 1) if log_dir else None
        self.metrics = MetricsFile(folder / METRICS, first) if folder else None
        self._names: list[str] = []
        self._unread: list[Tensor] = []
        self._window_started = time.perf_counter()

    def overall(self, stage: int, step: int) -> int:
        """Steps of the whole run up to `step` of `stage`."""
        return sum(earlier.steps for earlier in self.stages[:stage]) + step

    def step(self, stage: int, step: int, losses: Mapping[str, Tensor]) -> None:
        """Count a finished step: `step` of `stage`, 1 for the first.

        Raises:
            Diverged: a loss is not finite.
        """
        if list(losses) != self._names:
            self.read_losses(stage, step - 1)  # a term was added or ended, as after a warm-up
            self._names = list(losses)
        self._unread.append(torch.stack([loss.detach() for loss in losses.values()]))
        self.bar.update(1)
        if len(self._unread) == self.print_rate or step in (1, self.stages[stage].steps):
            self.read_losses(stage, step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done inside does not count as time of a step."""
        started = time.perf_counter()
        yield
        self._window_started += time.perf_counter() - started

    def read_losses(self, stage: int, step: int) -> None:
        """Log the means of the losses since the last reading; `step` is the last of these steps.

        Where several processes share the batches, all of them have to call it.

        Raises:
            Diverged: one of them is not finite.
        """
        if not self._unread:
            return
        losses = torch.stack(self._unread)
        self.all_reduce([losses])
        losses = losses.cpu()
        # Reading waits for the device, so this is the true time of the steps since the last reading.
        now = time.perf_counter()
        seconds = (now - self._window_started) / len(losses)
        self._window_started = now
        self._unread = []
        _require_finite(losses, self._names, self.stages[stage], step)
        values = dict(zip(self._names, losses.double().mean(dim=0).tolist(), strict=True))
        self._log(stage, step, seconds, values)

    def _log(self, index: int, step: int, seconds: float, values: Mapping[str, float]) -> None:
        stage, overall = self.stages[index], self.overall(index, step)
        rates = {name: o.param_groups[0]["lr"] for name, o in self.method.optimizers.items()}
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(tag_of(stage, name), value, overall)
            for name, rate in rates.items():
                self.writer.add_scalar(f"{stage.tag}LearningRate/{name}", rate, overall)
            self.writer.add_scalar(f"{stage.tag}Time/SecondsPerStep", seconds, overall)
        if self.metrics:
            self.metrics.write({
                **self._where(index, step), "seconds_per_step": seconds, "losses": values, "learning_rates": rates,
            })  # fmt: skip
        eta = tqdm.format_interval(int(seconds * (stage.steps - step)))
        name = f"{stage.name}, " if len(self.stages) > 1 else ""
        left = f"{eta} to its end" if len(self.stages) > 1 else f"ETA {eta}"
        self.bar.set_postfix_str(f"{name}{seconds:.3g} s/step, {left}, {self.method.summary(values)}")

    def _where(self, stage: int, step: int) -> dict[str, int]:
        return {"stage": stage, "step": step, "overall_step": self.overall(stage, step)}

    def pictures(self, stage: int, step: int, images: Mapping[str, Tensor]) -> None:
        """Log the first sample of the batch as a row of pictures; images (B,3,h,w) in [-1,1] by name."""
        if self.writer and images:
            row = torch.cat([((image[0].float() + 1.0) / 2.0).clamp(0.0, 1.0) for image in images.values()], dim=2)
            self.writer.add_image(f"{self.stages[stage].tag}{'-'.join(images)}", row, self.overall(stage, step))

    def validation(self, stage: int, step: int, validation: Validation, names: Sequence[str]) -> None:
        """Print and log a validation of the segmentation net."""
        self.say(f"{self.stages[stage].name}, step {step}: {summary(validation, names)}")
        if self.writer:
            log_validation(self.writer, validation, self.overall(stage, step), names)
        if self.metrics:
            self.metrics.write({**self._where(stage, step), "validation": report(validation, names)})

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            tqdm.write(text)

    def close(self) -> None:
        """Finish the bar and flush TensorBoard."""
        self.bar.close()
        if self.writer:
            self.writer.close()


def tag_of(stage: Stage, loss_name: str) -> str:
    """TensorBoard tag of a logged loss; those of a segmentation net stand outside the stages."""
    return loss_name if loss_name.startswith("Semseg/") else f"{stage.tag}{loss_name}"


def _require_finite(losses: Tensor, names: Sequence[str], stage: Stage, step: int) -> None:
    """Check losses (steps, names), of which the last row is that of `step`."""
    for row, values in enumerate(losses.tolist()):
        for name, value in zip(names, values, strict=True):
            if not math.isfinite(value):
                at = step - len(losses) + 1 + row
                raise Diverged(f"{tag_of(stage, name)} is {value} at step {at} of {stage.name}")
