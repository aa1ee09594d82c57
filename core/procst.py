"""ProCST as a `Method`: a pyramid of cyclic generators, one stage for each scale (docs/method.md, section 3)."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Adam

from core.config import Norm, ProCSTConfig
from core.contact_sheet import save_contact_sheet
from core.networks import Discriminator, Generator, freeze, init_weights
from core.step import Batch, ScaleNetworks, SegmentationNets, TrainingStep
from data_handlers.domain import DOMAINS, Domain, PairBatch, Samples
from data_handlers.images import PROCST_INPUT, image_pyramid
from models.segmentation import segmentation_optimizer
from training.distributed import Rank
from training.method import Method, Stage
from training.precision import Precision, Runner, channels_last
from training.synchronised_norm import synchronise_batch_norms
from utils.devices import to_device
from utils.seeds import SCALE_WEIGHTS, seed_for
from utils.tensor_files import weights_fingerprint

NETWORKS = ("Dst", "Gst", "Dts", "Gts")
SEG_SIT = "seg_sit"

# How networks are called follows the measurements in benchmarks/RESULTS.md.
# Pixels of a micro-batch. One image of the published size keeps a GPU busy; a CPU gains nothing from more pixels.
MICRO_BATCH_PIXELS = {"cuda": 2**19, "cpu": 2**15}


def penalty_alphas(seed: int, scale: int, step: int) -> Tensor:
    """The interpolation factors of a step's two gradient penalties (2,), uniform in [0,1], from (seed, scale, step)."""
    return torch.from_numpy(np.random.default_rng([seed, 2, scale, step]).random(2, dtype=np.float32))


class ProCST(Method):
    """Trains generators and discriminators scale by scale; at the last scale with label losses if there is a P.

    Args:
        perceptual: frozen feature network, a `PerceptualNet`, on the CPU.
        seg_source: P, frozen, on the CPU; None trains without label losses.
        seg_sit: Q, on the CPU; it is trained at the last scale.
        seg_sit_is_fresh: it holds the weights that its training starts from; otherwise a checkpoint fills it.
    """

    name: ClassVar[str] = "procst"
    config_class: ClassVar[type[ProCSTConfig]] = ProCSTConfig
    batch_flag: ClassVar[str] = "--batch_size_list"
    config: ProCSTConfig

    def __init__(
        self,
        *,
        config: ProCSTConfig,
        rank: Rank,
        source: Domain,
        target: Domain,
        perceptual: nn.Module,
        seg_source: nn.Module | None = None,
        seg_sit: nn.Module | None = None,
        seg_sit_is_fresh: bool = False,
    ) -> None:
        super().__init__(config=config, rank=rank, domains={"source": source, "target": target})
        self.perceptual = perceptual
        self.seg_source = seg_source
        self.seg_sit = seg_sit
        self.shape = config.net.shape() if seg_sit is not None else None
        self.run = procst_runner(config.run.precision)
        self.epoch_length = max(len(source), len(target))
        self.segmentation: SegmentationNets | None = None
        self._images: Mapping[str, Tensor] = {}
        self._inputs = {"perceptual net (--vgg_weights)": weights_fingerprint(perceptual)}
        if seg_source is not None:
            self._inputs["segmentation net (--semseg_weights)"] = weights_fingerprint(seg_source)
        if seg_sit is not None and seg_sit_is_fresh:
            self._inputs["start of the other segmentation net (--backbone_weights)"] = weights_fingerprint(seg_sit)

    def task(self) -> str:
        """End of the name of a new run folder."""
        return "_to_".join(domain.files.data_set.name for domain in self.domains.values())

    def inputs(self) -> dict[str, str]:
        """Fingerprints of lists of images and of the nets that are not trained."""
        return {**super().inputs(), **self._inputs}

    def stages(self) -> list[Stage]:
        """One stage for each scale, coarse to fine."""
        return [self._stage(scale) for scale in range(self.config.network.num_scales + 1)]

    def _stage(self, scale: int) -> Stage:
        config, schedule = self.config, self.config.schedule
        per_epoch, pictures = schedule.steps_per_epoch(scale, self.epoch_length), config.run.pics_per_epoch
        validates = scale == config.network.num_scales and self.seg_sit is not None
        return Stage(
            name=f"scale {scale}",
            steps=schedule.steps(scale, self.epoch_length),
            steps_per_epoch=per_epoch,
            batch_size=schedule.batch_size_list[scale],
            tag=f"Scale{scale}/",
            validate_every=(config.validation.validation_rate or per_epoch) if validates else 0,
            pictures_every=max(1, per_epoch // pictures) if pictures else 0,
            keep_as=f"scale_{scale}.pth",
        )

    # --- networks ----------------------------------------------------------------------------------------------------

    def begin_stage(self, stage: int, resumed: bool) -> None:
        """Add freshly initialised networks of the scale, and make its optimisers."""
        optim, seed = self.config.optim, self.config.run.manual_seed
        channels_last(self.perceptual.to(self.device, self.dtype))
        self.optimizers = {}
        for index, name in enumerate(NETWORKS):
            kind = Discriminator if name.startswith("D") else Generator
            network = kind(self.config.network.shape(stage))
            init_weights(network, torch.Generator().manual_seed(seed_for(seed, SCALE_WEIGHTS, stage, index)))
            network.to(self.device, self.dtype).train()
            self.modules[f"{name}.{stage}"] = network
            rate = optim.lr_d if name.startswith("D") else optim.lr_g
            self.optimizers[name] = Adam(network.parameters(), lr=rate, betas=(optim.beta1, 0.999), fused=True)
        if stage == self.config.network.num_scales and self.seg_sit is not None:
            for net in (self.seg_source, self.seg_sit):
                channels_last(net.to(self.device, self.dtype))
            self.modules[SEG_SIT] = self.seg_sit.train()
            self.optimizers[SEG_SIT] = segmentation_optimizer(self.seg_sit, **vars(self.config.sgd))
            self.segmentation = SegmentationNets(self.seg_source, self.seg_sit, self.optimizers[SEG_SIT])
        for network in self.modules.values() if self.rank.count > 1 else ():
            synchronise_batch_norms(network)

    def end_stage(self, stage: int) -> None:
        """Freeze the networks of the scale."""
        for name in NETWORKS:
            freeze(self.modules[f"{name}.{stage}"])

    def generators(self, name: str, count: int) -> list[Generator]:
        """The generators `Gst` or `Gts` of the first `count` scales."""
        return [self.modules[f"{name}.{scale}"] for scale in range(count)]

    def eval_net(self) -> nn.Module | None:
        """Q, from the last scale on."""
        return self.modules.get(SEG_SIT)

    # --- training ----------------------------------------------------------------------------------------------------

    def batches(self, stage: int, steps: range) -> Iterator[PairBatch]:
        """Source and target samples of each step, with labels where there are label losses."""
        config = self.config
        batch_size = config.schedule.batch_size_list[stage]
        pyramid = partial(
            image_pyramid,
            num_scales=config.network.num_scales,
            scale_factor=config.network.scale_factor,
            up_to=stage,
            resample=config.loader.resample,
        )
        source, target = (
            Samples(
                domain=self.domains[name], stage=stage, epoch_length=self.epoch_length, pyramid=pyramid,
                per_epoch=batch_size * config.schedule.steps_per_epoch(stage, self.epoch_length),
                labels=self.segmentation is not None,
            ).batches(steps, batch_size, self.rank.part(batch_size))
            for name in DOMAINS
        )  # fmt: skip
        for one, other in zip(source, target, strict=True):
            yield PairBatch(one, other)

    def step(self, batch: PairBatch, stage: int, step: int) -> Mapping[str, Tensor]:
        """One update of all networks of the scale (docs/method.md, section 3)."""
        config = self.config
        nets = ScaleNetworks(
            **{name: self.modules[f"{name}.{stage}"] for name in NETWORKS},
            lower_Gst=self.generators("Gst", stage),
            lower_Gts=self.generators("Gts", stage),
        )
        epoch = step // config.schedule.steps_per_epoch(stage, self.epoch_length)
        inputs = self._on_device(batch, penalty_alphas(config.run.manual_seed, stage, step))
        result = TrainingStep(
            nets=nets,
            optimizers=self.optimizers,
            perceptual=self.perceptual,
            batch=inputs,
            loss=config.loss,
            scale_factor=config.network.scale_factor,
            segmentation=self.segmentation,
            warmup=self.segmentation is not None and epoch < config.schedule.warmup_epochs,
            run=self.run,
            recompute=self.device.type == "cuda",
            micro_batch=micro_batch_size(inputs.source[-1].shape, nets.Gst.shape.norm, self.device),
            rank=self.rank,
            fraction=self.rank.fraction(config.schedule.batch_size_list[stage]),
        ).take()
        self._images = result.images
        return result.losses

    def _on_device(self, batch: PairBatch, alphas: Tensor) -> Batch:
        """The input of a step, on the device and normalised."""

        def images(levels: Sequence[Tensor]) -> list[Tensor]:
            return [PROCST_INPUT(to_device(level, self.device), self.dtype).contiguous() for level in levels]

        label = None if batch.source.label is None else to_device(batch.source.label, self.device)
        alphas = to_device(alphas.to(self.dtype), self.device)
        return Batch(images(batch.source.levels), images(batch.target.levels), alphas, label)

    # --- reports -----------------------------------------------------------------------------------------------------

    def images(self) -> Mapping[str, Tensor]:
        """Images of the last step: source, SiT and back, target, TiS and back."""
        return self._images

    def summary(self, losses: Mapping[str, float]) -> str:
        """Sums over both directions of the discriminator, adversarial, cycle and style losses."""

        def both(name: str) -> float:
            return losses[f"ST/{name}"] + losses[f"TS/{name}"]

        cycle = losses["Cyclic/LossSTS"] + losses["Cyclic/LossTST"]
        return (
            f"D {both('Discriminator/LossAdversarial'):.3f} G {both('Generator/LossAdversarial'):.3f} "
            f"cycle {cycle:.3f} style {both('Generator/TotalStyleLoss'):.4f}"
        )

    def write_summary(self, stage: int, folder: Path) -> str:
        """Draw the contact sheet of a finished scale."""
        path = folder / f"contact_sheet_scale_{stage}.png"
        if path.exists():
            return ""
        save_contact_sheet(
            path=path, network=self.config.network, **self.domains, generators=self.generators("Gst", stage + 1),
            device=self.device,
        )  # fmt: skip
        return f"scale {stage} finished, see {path}"

    def describe(self) -> list[str]:
        """See `Method.describe`."""
        config, stages = self.config, self.stages()
        lines = super().describe()
        if self.seg_sit is not None:
            lines.append(f"label losses of the last scale: {self.shape} from {config.labels.semseg_weights}")
            if self.seg_sit.start:
                lines.append(self.seg_sit.start)
            if config.schedule.warmup_epochs * stages[-1].steps_per_epoch >= stages[-1].steps:
                lines.append("WARNING: --warmup_epochs covers the whole last scale: the generators get no label losses")
        if self.rank.count > 1:
            lines.append(f"{self.rank.count} processes share every batch")
        rounded = config.run.precision == "bf16"
        lines.append(f"precision {config.run.precision}{' (discriminators in float32)' if rounded else ''}")
        scales = f"at scales 0..{config.network.num_scales}"
        lines.append(f"norm {scales}: {', '.join(config.network.norm)}")
        lines.append(f"steps {scales}: {', '.join(str(stage.steps) for stage in stages)}")
        if config.loss.vgg_weights == "random":
            lines.append("WARNING: --vgg_weights random: the result will be worse than with ImageNet weights")
        return lines

    def conclusion(self, folder: Path) -> str:
        """The command that exports the translated images."""
        words = ["--trained_procst_path", str(folder), "--sit_output_path", "OUT"]
        return f"export with: python {shlex.join(['create_sit_dataset.py', *words])}"


# --- how networks are called: precision, size of micro-batches -------------------------------------------------------


def procst_runner(precision: Precision) -> Runner:
    """The `Runner` of a ProCST training; in bf16, discriminators stay in float32.

    Rounding them changed their losses by up to 6%, and the translation was worse in three of six runs.
    """
    return Runner(precision, keep_float32=(Discriminator,))


def micro_batch_size(batch: Sequence[int], norm: Norm, device: torch.device) -> int | None:
    """Samples of a micro-batch for a batch of shape (B,3,h,w); None, the whole batch, with batch norm."""
    if norm == "batch":
        return None
    return max(1, MICRO_BATCH_PIXELS[device.type] // (batch[-2] * batch[-1]))
