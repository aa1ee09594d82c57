"""What a person sees of a run: one bar over all scales with an ETA, and TensorBoard scalars and pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from core.config import LossConfig, NetworkConfig, ProCSTConfig
from core.networks import Discriminator, Generator
from core.cascade import to_unit_range
from data_handlers.pyramid import level_size
from training.tensorboard import TensorBoardLog
from training.validation import Validation, log_validation, summary
from models.segmentation import build_segmentation_net
from models.vgg import VGG16_CONVS, VGG16_POOLINGS

# Rough number of passes a network sees in a step, a backward counted as two forwards and the double backward of the
# gradient penalty as six. Only ratios between scales matter, and only to the ETA.
GENERATOR_PASSES, DISCRIMINATOR_PASSES, PERCEPTUAL_PASSES = 12, 28, 8
# At the last scale with label losses: P forward and backward to its input, Q forward and backward to both, Gst again.
SEGMENTATION_PASSES, SEGMENTATION_GENERATOR_PASSES = 5, 3
PICTURES = ("source", "sit", "sitis", "target", "tis", "tisit")
PICTURE_TAG = "source-SiT-SiTiS-target-TiS-TiSiT"


@dataclass(frozen=True)
class ScalePlan:
    """Steps of a scale and the cost of one of them in an arbitrary unit shared by all scales."""

    steps: int
    step_cost: float


def scale_plans(config: ProCSTConfig, epoch_length: int) -> list[ScalePlan]:
    """Steps and relative cost of a step for every scale.

    Raises:
        UserError: a batch is larger than the data.
    """
    crop, last = config.data.crop_size, config.network.num_scales
    costs = [
        relative_step_cost(config.network, scale, config.schedule.batch_size_list[scale], crop, config.loss)
        for scale in range(last + 1)
    ]
    if not config.run.no_semseg:
        costs[last] += segmentation_cost(config, crop)
    return [ScalePlan(config.schedule.steps(scale, epoch_length), cost) for scale, cost in enumerate(costs)]


def segmentation_cost(config: ProCSTConfig, crop: tuple[int, int]) -> float:
    """What the segmentation nets add to a step of the last scale, in the unit of `relative_step_cost`."""
    width, height = crop
    last = config.network.num_scales
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = build_segmentation_net(config.semseg.shape()).eval()
        with torch.no_grad():
            net(torch.empty(1, 3, height, width))
        generator = Generator(config.network.shape(last))
    macs = SEGMENTATION_PASSES * counter.get_total_flops() / 2
    macs += SEGMENTATION_GENERATOR_PASSES * _weights(generator) * width * height
    return float(config.schedule.batch_size_list[last] * macs)


def relative_step_cost(
    network: NetworkConfig, scale: int, batch_size: int, crop: tuple[int, int], loss: LossConfig
) -> float:
    """Multiply-adds of a step, roughly: image pairs times pixels times multiply-adds for each pixel."""
    width, height = level_size(crop, network.num_scales - scale, network.scale_factor)
    shape = network.shape(scale)
    with torch.device("meta"):
        generator, discriminator = Generator(shape), Discriminator(shape)
    macs = GENERATOR_PASSES * _weights(generator) + DISCRIMINATOR_PASSES * _weights(discriminator)
    for position, (inputs, outputs) in VGG16_CONVS.items():
        if position < max(loss.perceptual_layers):
            poolings = sum(pooling < position for pooling in VGG16_POOLINGS)
            macs += PERCEPTUAL_PASSES * 9 * inputs * outputs / 4**poolings
    return float(batch_size * width * height * macs)


def _weights(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


class Diverged(Exception):
    """A loss is not finite; the message names it and the step."""


def _require_finite(losses: Tensor, names: Sequence[str], scale: int, step: int) -> None:
    """Check losses (steps, names), of which the last row is that of `step`."""
    broken = (~losses.isfinite()).nonzero()
    if len(broken):
        row, column = broken[0].tolist()
        value = float(losses[row, column])
        at = step - len(losses) + 1 + row
        raise Diverged(f"{tag_of(scale, names[column])} is {value} at step {at} of scale {scale}")


def tag_of(scale: int, loss_name: str) -> str:
    """TensorBoard tag of a logged loss, as the reference names it."""
    return loss_name if loss_name.startswith("Semseg/") else f"Scale{scale}/{loss_name}"


class RunProgress:
    """Bar, ETA and TensorBoard of a run. Losses stay on the device and are read once every `print_rate` steps.

    Args:
        plans: of all scales, coarse to fine.
        done: (scale, step) the run starts from.
        log_dir: TensorBoard folder, or None for no TensorBoard.
        print_rate: steps between two readings of the losses; scalars are means over these steps.
        quiet: no bar (tests, and all processes but the first).
        add_up: sums tensors in place over processes that each bring their part of the losses; all of them must then
            count the same steps. None for a single process.
    """

    def __init__(
        self,
        plans: Sequence[ScalePlan],
        done: tuple[int, int],
        log_dir: Path | None,
        print_rate: int,
        quiet: bool = False,
        add_up: Callable[[Sequence[Tensor]], None] | None = None,
    ) -> None:
        self.plans = plans
        self.print_rate = print_rate
        self.add_up = add_up
        first = self._steps_before(*done)
        total = sum(plan.steps for plan in plans)
        self.bar = tqdm(
            total=total, initial=first, disable=quiet, unit="step", dynamic_ncols=True,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]",
        )  # fmt: skip
        # purge_step drops what an interrupted run logged after the checkpoint this one continues from, or starts again.
        self.writer = TensorBoardLog(log_dir, purge_step=first + 1) if log_dir else None
        self._names: list[str] = []
        self._unread: list[Tensor] = []
        self._window_started = time.perf_counter()

    def _steps_before(self, scale: int, step: int) -> int:
        return sum(plan.steps for plan in self.plans[:scale]) + step

    def step(self, scale: int, step: int, losses: Mapping[str, Tensor]) -> None:
        """Count a finished step: `step` of `scale`, 1 for the first."""
        if list(losses) != self._names:
            self.read_losses(scale, step - 1)  # as after the warm-up, where a term is added
            self._names = list(losses)
        self._unread.append(torch.stack(list(losses.values())))
        self.bar.update(1)
        if len(self._unread) == self.print_rate or step in (1, self.plans[scale].steps):
            self.read_losses(scale, step)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done inside does not count as time of a step."""
        started = time.perf_counter()
        yield
        self._window_started += time.perf_counter() - started

    def read_losses(self, scale: int, step: int) -> None:
        """Log the means of the losses since the last reading; `step` is the last of these steps.

        Where several processes share the batches, all of them have to call it.

        Raises:
            Diverged: one of them is not finite.
        """
        if not self._unread:
            return
        losses = torch.stack(self._unread)
        if self.add_up is not None:
            self.add_up([losses])
        losses = losses.cpu()
        # Reading waits for the device, so this is the true time of the steps since the last reading.
        now = time.perf_counter()
        seconds = (now - self._window_started) / len(losses)
        self._window_started = now
        self._unread = []
        _require_finite(losses, self._names, scale, step)
        values = dict(zip(self._names, losses.mean(dim=0).tolist(), strict=True))
        overall = self._steps_before(scale, step)
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(tag_of(scale, name), value, overall)
            self.writer.add_scalar(f"Scale{scale}/Time/SecondsPerStep", seconds, overall)
        self._show(scale, step, seconds, values)

    def _show(self, scale: int, step: int, seconds: float, values: Mapping[str, float]) -> None:
        style = values["ST/Generator/TotalStyleLoss"] + values["TS/Generator/TotalStyleLoss"]
        cycle = values["Cyclic/LossSTS"] + values["Cyclic/LossTST"]
        critic = values["ST/Discriminator/LossAdversarial"] + values["TS/Discriminator/LossAdversarial"]
        adversarial = values["ST/Generator/LossAdversarial"] + values["TS/Generator/LossAdversarial"]
        eta = tqdm.format_interval(int(self._eta(scale, step, seconds)))
        self.bar.set_postfix_str(
            f"scale {scale}/{len(self.plans) - 1}, {seconds:.3g} s/step, ETA {eta}, "
            f"D {critic:.3f} G {adversarial:.3f} cycle {cycle:.3f} style {style:.4f}"
        )

    def _eta(self, scale: int, step: int, seconds: float) -> float:
        """Seconds to the end of the run; scales not measured yet are taken from the cost of a step."""
        plan = self.plans[scale]
        later = sum(other.steps * other.step_cost for other in self.plans[scale + 1 :]) / plan.step_cost
        return seconds * (plan.steps - step + later)

    def pictures(self, scale: int, step: int, images: Mapping[str, Tensor]) -> None:
        """Log the first sample of the batch as a row of six pictures."""
        if self.writer:
            row = torch.cat([to_unit_range(images[name][0]) for name in PICTURES], dim=2)
            self.writer.add_image(f"Scale{scale}/{PICTURE_TAG}", row, self._steps_before(scale, step))

    def validation(self, scale: int, step: int, validation: Validation, names: Sequence[str]) -> None:
        """Print and log a validation of the segmentation net."""
        self.say(f"scale {scale}, step {step}: {summary(validation, names)}")
        if self.writer:
            log_validation(self.writer, validation, self._steps_before(scale, step), names)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if not self.bar.disable:
            tqdm.write(text)

    def close(self) -> None:
        """Finish the bar and flush TensorBoard."""
        self.bar.close()
        if self.writer:
            self.writer.close()
