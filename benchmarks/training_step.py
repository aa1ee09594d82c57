"""Time one training step at every scale, side by side with the literal step.

    python benchmarks/training_step.py --gpus 0 --batch_size_list 32 16 3
    python benchmarks/training_step.py --gpus cpu --crop_size 160 80 --batch_size_list 16 8 4 --model UNet

Takes the flags of train_procst.py; images, labels and weights are random, so nothing is downloaded. The variants are
timed in turns, so that a machine that slows down slows all of them. `--memory` computes nothing and runs anywhere: it
follows the tensors of one step at the given sizes and prints how many bytes are alive at once, and the work in it.
`--penalty` times the gradient penalty alone, with core/double_backward.py and with PyTorch's own operators.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode  # PyTorch documents it under this name alone

# The scripts of this folder are run by path, and then their own folder is where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from benchmarks.literal_step import collect_gradients, literal_step
from benchmarks.meters import Meter, copy_ceiling, matmul_ceiling, seconds_of, synchronise
from benchmarks.setting import Setting, build_setting
from benchmarks.waiting import picture_domains, procst_at, share_waiting
from core.config import ProCSTConfig
from core.double_backward import RECOMPUTES
from core.losses import gradient_penalty
from core.procst import micro_batch_size, procst_runner
from core.step import Run, TrainingStep
from data_handlers.domain import Domain
from training.flags import build_parser, option, parse, section_from
from training.precision import Runner, computes_in_bf16, set_convolution_precision
from utils.devices import resolve_device
from utils.errors import run_cli

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Variant:
    """A way to make a step: `literal`, or ours in a precision.

    Attributes:
        autograd_penalty: the gradient penalty without core/double_backward.py.
    """

    name: str
    precision: str
    autograd_penalty: bool = False

    @property
    def literal(self) -> bool:
        return self.name.startswith("literal")

    def step_of(self, setting: Setting, config: ProCSTConfig, recompute: bool) -> Callable[[], object]:
        """A function that makes one step in `setting`; the literal step knows no `recompute`."""
        segmentation = setting.segmentation
        arguments = {
            "nets": setting.networks, "optimizers": setting.optimizers, "perceptual": setting.perceptual,
            "batch": setting.batch, "loss": config.loss, "scale_factor": config.network.scale_factor,
            "segmentation": segmentation,
        }  # fmt: skip
        if self.literal:
            collect_gradients(setting.perceptual, *([segmentation.seg_source] if segmentation else []))
            return partial(literal_step, **arguments)
        norm = setting.networks.Gst.shape.norm
        # With `recompute`, which --memory sets on any device, layout and micro-batches are those of a GPU.
        device = torch.device("cuda" if recompute else "cpu")
        micro_batch = micro_batch_size(setting.batch.source[-1].shape, norm, device)
        run = self.runner(recompute)
        arguments |= {"run": run, "recompute": recompute, "micro_batch": micro_batch}
        return lambda: TrainingStep(**arguments).take()

    def runner(self, as_on_gpu: bool) -> Run:
        """Calls networks as a ProCST run on a GPU or CPU does."""
        run: Run = procst_runner(self.precision)
        if as_on_gpu:
            run = Runner(run.precision, keep_float32=run.keep_float32)
        return with_autograd_penalty(run) if self.autograd_penalty else run


def with_autograd_penalty(run: Run) -> Run:
    """`run` for discriminators that are not told that a gradient is to be differentiated twice."""

    def run_without_flag(network: nn.Module, *inputs: object) -> object:
        return run(network, *(x for x in inputs if x is not True))

    return run_without_flag


@dataclass(frozen=True)
class BenchmarkFlags:
    """What is measured."""

    rounds: int = option(5, "timed steps of every variant; the fastest counts")
    scales: tuple[int, ...] = option((), "scales to measure (default: all)", type=int, nargs="+")
    memory: bool = option(False, "count bytes and work of a step instead of timing it")
    penalty: bool = option(False, "time the gradient penalty alone, with core/double_backward.py and without it")


def variants(device: torch.device) -> list[Variant]:
    """The literal step first, then ours in every precision of the device."""
    ours = [Variant("fp32", "fp32"), Variant("fp32, autograd's penalty", "fp32", autograd_penalty=True)]
    if device.type == "cuda":
        ours.append(Variant("tf32", "tf32"))
    if computes_in_bf16(device):
        ours.append(Variant("bf16", "bf16"))
    found = [Variant("literal", "fp32")]
    if device.type == "cuda":
        found.append(Variant("literal tf32", "tf32"))  # PyTorch's own default for convolutions
    return [*found, *ours]


def arithmetic_floor(flops: Mapping[torch.dtype, int], ceilings: Mapping[str, float], variant: Variant) -> float:
    """Seconds that counted operations take at the ceilings of the types they are computed in."""
    rounded = "tf32" if variant.precision != "fp32" and "tf32" in ceilings else "fp32"
    names = {torch.bfloat16: "bf16", torch.float32: rounded}
    return sum(count / ceilings[names[dtype]] for dtype, count in flops.items())


def count_step(config: ProCSTConfig, scale: int, variant: Variant) -> Meter:
    """What a second step does as a GPU makes it; its peak is beyond networks and batch.

    Only Adam differs: on a GPU it is fused, here each weight's operators count.
    """
    as_on_a_gpu = mock.patch.dict(RECOMPUTES, cpu=RECOMPUTES["cuda"])
    with as_on_a_gpu, FakeTensorMode(allow_non_fake_inputs=True):
        setting = build_setting(config, scale, torch.device("cpu"), fused=False)
        step = variant.step_of(setting, config, recompute=True)
        step()  # gradients and optimiser states are allocated
        with Meter() as meter:
            step()
    return meter


def print_memory(config: ProCSTConfig, scales: list[int]) -> None:
    """A table of `count_step` for every scale."""
    print(
        "| scale | step | most alive, GB | of literal | read and written, GB | TFLOP in float32 | in bfloat16 "
        "| operators |\n" + "| --- " * 8 + "|"
    )
    for scale in scales:
        found = {}
        autograd = Variant("fp32, autograd's penalty", "fp32", autograd_penalty=True)
        for variant in (Variant("literal", "fp32"), Variant("fp32", "fp32"), autograd, Variant("bf16", "bf16")):
            found[variant.name] = meter = count_step(config, scale, variant)
            flops = " | ".join(f"{meter.flops[dtype] / 1e12:.1f}" for dtype in (torch.float32, torch.bfloat16))
            print(
                f"| {scale} | {variant.name} | {meter.peak / 1e9:.2f} | {meter.peak / found['literal'].peak:.0%} "
                f"| {meter.moved / 1e9:.0f} | {flops} | {meter.operators} |",
                flush=True,
            )


def time_scale(
    config: ProCSTConfig, scale: int, device: torch.device, compared: list[Variant], rounds: int
) -> dict[str, tuple[float, int | None]]:
    """Seconds of the fastest step and, on a GPU, its peak memory in bytes, for every variant."""
    # On a GPU one variant at a time holds memory, so that each peak is its own.
    settings = {v.name: build_setting(config, scale, device, fused=not v.literal) for v in compared}
    steps = {v.name: v.step_of(settings[v.name], config, device.type == "cuda") for v in compared}
    times: dict[str, list[float]] = {v.name: [] for v in compared}
    peaks: dict[str, int | None] = {}
    for turn in range(-2, rounds):  # two steps of each to warm up
        for variant in compared:
            set_convolution_precision(variant.precision)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                held = torch.cuda.memory_allocated(device)
            seconds = seconds_of(steps[variant.name], device)
            if turn >= 0:
                times[variant.name].append(seconds)
                peaks[variant.name] = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
    return {name: (min(values), peaks[name]) for name, values in times.items()}


def main() -> None:
    """Command line entry."""
    groups = {"benchmark": [BenchmarkFlags], **ProCSTConfig.groups}
    given = parse(build_parser(__doc__, groups))
    flags = section_from(BenchmarkFlags, given)
    config = ProCSTConfig.from_flags({"vgg_weights": "random", "no_pretrained_backbone": True, **given})
    device = resolve_device(config.run.gpus)
    torch.backends.cudnn.benchmark = True
    scales = list(flags.scales) or list(range(config.network.num_scales + 1))
    if flags.memory:
        print_memory(config, scales)
        return
    if flags.penalty:
        print_penalty(config, scales, device, flags.rounds)
        return
    compared = variants(device)
    ceilings = {v.precision: matmul_ceiling(device, DTYPES[v.precision], v.precision == "tf32") for v in compared}
    copy = copy_ceiling(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    shown = ", ".join(f"{precision} {value / 1e12:.2f} TFLOP/s" for precision, value in ceilings.items())
    print(f"{name}, torch {torch.__version__}; measured ceilings: {shown}, copy {copy / 1e9:.1f} GB/s\n")
    print(
        "| scale, batch | step | ms | pairs/s | speed-up | TFLOP/s | of matmul ceiling | of copy ceiling | floor ms "
        "| peak GB | waiting | with cache |\n" + "| --- " * 12 + "|"
    )
    with tempfile.TemporaryDirectory() as folder:
        domains = picture_domains(Path(folder), config, device)
        for scale in scales:
            waiting = {v.name: waiting_shares(config, scale, device, v, domains, flags.rounds) for v in compared}
            _print_scale(config, scale, device, compared, flags.rounds, ceilings, copy, waiting)


def penalty_of(setting: Setting, samples: int, variant: Variant, as_on_gpu: bool) -> Callable[[], None]:
    """A function that computes the gradient penalty of some samples and its gradients."""
    discriminator, run = setting.networks.Dst, variant.runner(as_on_gpu)
    real, fake = setting.batch.target[-1][:samples], setting.batch.source[-1][:samples]

    def compute() -> None:
        penalty = gradient_penalty(lambda image: run(discriminator, image, True), real, fake, setting.batch.alphas[0])
        penalty.backward(inputs=list(discriminator.parameters()))

    return compute


def print_penalty(config: ProCSTConfig, scales: list[int], device: torch.device, rounds: int) -> None:
    """A table of the gradient penalty of a micro-batch in float32, with core/double_backward.py and without it.

    Both are timed in turns, and the shortest time counts. Memory is beyond network and images; a CPU does not recompute
    as a GPU does, whose memory `--memory` counts.
    """
    print("| scale, samples | penalty | ms | most alive, GB | operators |\n" + "| --- " * 5 + "|")
    compared = [Variant("double_backward.py", "fp32"), Variant("autograd", "fp32", autograd_penalty=True)]
    for scale in scales:
        setting = build_setting(config, scale, device, fused=True)
        shape = setting.batch.target[-1].shape
        samples = min(shape[0], micro_batch_size(shape, setting.networks.Dst.shape.norm, device) or shape[0])
        runs = {v.name: penalty_of(setting, samples, v, device.type == "cuda") for v in compared}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(-2, rounds):  # two of each to warm up
            for name, compute in runs.items():
                seconds = seconds_of(compute, device)
                if turn >= 0:
                    times[name].append(seconds)
        for name, compute in runs.items():
            with Meter() as meter:
                compute()
            fastest = 1e3 * min(times[name])
            print(f"| {scale}, {samples} | {name} | {fastest:.1f} | {meter.peak / 1e9:.3f} | {meter.operators} |")


def waiting_shares(
    config: ProCSTConfig,
    scale: int,
    device: torch.device,
    variant: Variant,
    domains: Mapping[str, Domain],
    rounds: int,
) -> tuple[str, str]:
    """Share of time waiting for data without and with the cache; the literal step has no loader of ours."""
    if variant.literal or variant.autograd_penalty:
        return "", ""
    set_convolution_precision(variant.precision)
    config = replace(config, run=replace(config.run, precision=variant.precision))
    plain = {name: replace(domain, cache_dir="") for name, domain in domains.items()}
    shares = [
        share_waiting(procst_at(config, scale, used, device), scale, rounds)
        for used in (plain, domains)
    ]
    return f"{shares[0]:.0%}", f"{shares[1]:.0%}"


def _print_scale(
    config: ProCSTConfig,
    scale: int,
    device: torch.device,
    compared: list[Variant],
    rounds: int,
    ceilings: dict[str, float],
    copy: float,
    waiting: Mapping[str, tuple[str, str]],
) -> None:
    batch = config.schedule.batch_size_list[scale]
    results = time_scale(config, scale, device, compared, rounds)
    counted = {}
    for variant in compared:
        setting = build_setting(config, scale, device, fused=not variant.literal)
        step = variant.step_of(setting, config, device.type == "cuda")
        step()  # gradients and optimiser states are allocated
        with Meter() as meter:
            step()
        synchronise(device)
        counted[variant.name] = meter.flops, meter.peak, meter.moved
    base = results["literal"][0]
    for variant in compared:
        seconds, peak = results[variant.name]
        flops, alive, moved = counted[variant.name]
        arithmetic = arithmetic_floor(flops, ceilings, variant)
        bound = "arithmetic" if arithmetic > moved / copy else "memory"
        print(
            f"| {scale}, {batch} | {variant.name} | {1e3 * seconds:.1f} | {batch / seconds:.2f} | {base / seconds:.2f} "
            f"| {flops.total() / seconds / 1e12:.3f} | {arithmetic / seconds:.0%} "
            f"| {moved / seconds / copy:.0%} | {1e3 * max(arithmetic, moved / copy):.1f} ({bound}) "
            f"| {(alive if peak is None else peak) / 1e9:.2f} | {' | '.join(waiting[variant.name])} |",
            flush=True,
        )


if __name__ == "__main__":
    run_cli(main)
