"""Configuration of a ProCST run: frozen, validated once, stored as JSON beside the run.

Only plain values live here; loaders, devices and state are made from the configuration and never put into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from core.execution import PRECISIONS
from core.networks import NetworkShape, Norm, layers_at_scale, published_norm
from data_handlers.pyramid import level_size
from data_handlers.choices import ON_BAD_IMAGE, RESAMPLINGS
from data_handlers.datasets import DATA_SETS
from models.segmentation import SMALLEST_CROP, SegmentationShape
from models.vgg import VGG16_POOLINGS
from utils.errors import UserError

Size = tuple[int, int]
LARGEST = 1e15  # no setting is anywhere near; also keeps NaN, infinity and integers beyond floats out


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _require_positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 < value < LARGEST, f"--{name} is {str(value)[:20]}; it must be greater than 0 and below {LARGEST:g}")


def _require_not_negative(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        _require(0 <= value < LARGEST, f"--{name} is {str(value)[:20]}; it must be 0 or greater and below {LARGEST:g}")


@dataclass(frozen=True)
class DataConfig:
    """Where the two domains are and how their images are brought to size.

    Attributes:
        source, target: names of declared data sets.
        src_data_dir, trg_data_dir: their root folders.
        src_list, trg_list: list files that replace the derived image lists, or ''.
        src_resize, trg_resize: (W,H) every image is resized to.
        crop_size: (W,H) of the random crop taken from the resized image of either domain.
        num_workers: loader processes for each domain; 0 loads in the main process.
        cache_dir: folder of caches of the resized images, or ''.
        resample: `exact`, or `fast`, which is at most one level off.
        on_bad_image: `stop`, or `skip`: another image takes the place of one that cannot be used.
    """

    source: str
    target: str
    src_data_dir: str
    trg_data_dir: str
    src_list: str
    trg_list: str
    src_resize: Size
    trg_resize: Size
    crop_size: Size
    num_workers: int
    cache_dir: str = ""
    resample: str = "exact"
    on_bad_image: str = "stop"

    def __post_init__(self) -> None:
        _require(self.resample in RESAMPLINGS, f"--resample {self.resample}: must be one of {', '.join(RESAMPLINGS)}")
        known = self.on_bad_image in ON_BAD_IMAGE
        _require(known, f"--on_bad_image {self.on_bad_image}: must be one of {', '.join(ON_BAD_IMAGE)}")
        for name in (self.source, self.target):
            _require(name in DATA_SETS, f"no data set is called {name}; there are {', '.join(sorted(DATA_SETS))}")
        for name in ("src_resize", "trg_resize", "crop_size"):
            width, height = getattr(self, name)
            _require(width > 0 and height > 0, f"--{name} {width} {height}: both sides must be greater than 0")
        for name in ("src_resize", "trg_resize"):
            resize, crop = getattr(self, name), self.crop_size
            _require(
                crop[0] <= resize[0] and crop[1] <= resize[1],
                f"--crop_size {crop[0]} {crop[1]} does not fit into --{name} {resize[0]} {resize[1]}; "
                "lower the crop or raise the resize",
            )
        _require_not_negative(self, "num_workers")


@dataclass(frozen=True)
class NetworkConfig:
    """Shapes of all networks of the pyramid.

    Attributes:
        norms: `batch` or `group` for each scale. Resolved once when a run starts and stored, so neither the batch
            size nor the number of GPUs changes the networks of an existing run.
    """

    num_scales: int
    scale_factor: float
    base_channels_list: tuple[int, ...]
    body_layers: int
    norms: tuple[Norm, ...]
    groups_num: int = 8
    nc_im: int = 3
    ker_size: int = 3

    def __post_init__(self) -> None:
        _require_not_negative(self, "num_scales")
        _require_positive(self, "groups_num")
        _require(0.0 < self.scale_factor < 1.0, f"--scale_factor is {self.scale_factor}; it must be between 0 and 1")
        require_one_per_scale("base_channels_list", self.base_channels_list, self.num_scales)
        _require(self.body_layers >= 2, f"--body_layers is {self.body_layers}; head and tail alone are 2 layers")
        odd = self.ker_size > 0 and self.ker_size % 2 == 1
        _require(odd, f"--ker_size is {self.ker_size}; it must be odd and positive to keep the image size")
        _require(self.nc_im == 3, f"--nc_im is {self.nc_im}; the perceptual net and the images have 3 channels")
        _require(len(self.norms) == self.num_scales + 1, f"{len(self.norms)} norms for {self.num_scales + 1} scales")

    def shape(self, scale: int) -> NetworkShape:
        """Shape of the networks of `scale`."""
        return NetworkShape(
            scale=scale,
            channels=self.base_channels_list[scale],
            layers=layers_at_scale(scale, self.num_scales, self.body_layers),
            norm=self.norms[scale],
            groups=self.groups_num,
            image_channels=self.nc_im,
            kernel_size=self.ker_size,
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms and the VGG16 layers they look at (positions in torchvision's `features`)."""

    lambda_adversarial: float = 1.0
    lambda_grad: float = 0.1
    lambda_cyclic: float = 1.0
    lambda_style: float = 10.0
    lambda_labels: float = 1.0
    content_layers: tuple[int, ...] = (15,)
    style_layers: tuple[int, ...] = (3, 8, 15, 22)
    content_weight: float = 1.0 / 30.0
    style_weight: float = 1.0
    tv_weight: float = 1.0 / 30.0

    def __post_init__(self) -> None:
        weights = [f.name for f in dataclasses.fields(self) if not f.name.endswith("_layers")]
        _require_not_negative(self, *weights)

    @property
    def perceptual_layers(self) -> tuple[int, ...]:
        """Every layer some term looks at, ascending."""
        return tuple(sorted({*self.content_layers, *self.style_layers}))


@dataclass(frozen=True)
class OptimConfig:
    """Adam of generators and discriminators; beta2 is 0.999 and there is no weight decay."""

    lr_g: float = 1e-4
    lr_d: float = 1e-4
    beta1: float = 0.9

    def __post_init__(self) -> None:
        _require_positive(self, "lr_g", "lr_d")
        _require(0.0 <= self.beta1 < 1.0, f"--beta1 is {self.beta1}; it must be in [0, 1)")


@dataclass(frozen=True)
class SGDConfig:
    """SGD of a segmentation net; its head learns ten times as fast as `lr_semseg`."""

    lr_semseg: float = 1e-4
    weight_decay: float = 5e-4
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _require_positive(self, "lr_semseg")
        shown = str(self.weight_decay)[:20]
        _require(0 <= self.weight_decay < LARGEST, f"--weight-decay is {shown}; it must be 0 or greater")
        _require(0.0 <= self.momentum < 1.0, f"--momentum is {self.momentum}; it must be in [0, 1)")


def default_semseg_weights(source: str) -> str:
    """Where the net trained on a source is looked for, and where training one puts it."""
    return f"pretrained/pretrained_semseg_on_{source}.pth"


@dataclass(frozen=True)
class SemsegConfig(SGDConfig):
    """Segmentation nets of the last scale: P, trained on source beforehand, and Q, trained on SiT meanwhile.

    Attributes:
        model, backbone, num_classes: of both nets.
        semseg_weights: file or run folder of P.
        backbone_weights: what Q's backbone starts from: `imagenet`, a file, or `random`.
        select_by: which validations of Q pick the best checkpoint: by `miou`, which needs target labels, by
            `label_free`, or `none` without validation. `auto` becomes `miou` or `none` when a run starts.
        validation_rate: steps between two validations of the last scale; 0 means one epoch.
    """

    model: str = "DeepLabV2"
    backbone: str = "resnet101"
    num_classes: int = 19
    semseg_weights: str = ""
    backbone_weights: str = "imagenet"
    select_by: str = "none"
    validation_rate: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shape()
        known = ("auto", "miou", "label_free", "none")
        _require(self.select_by in known, f"--select_by {self.select_by}: must be one of {', '.join(known[1:])}")
        _require_not_negative(self, "validation_rate")

    def shape(self) -> SegmentationShape:
        """Shape of both nets."""
        return SegmentationShape(self.model, self.backbone, self.num_classes)


@dataclass(frozen=True)
class ScheduleConfig:
    """How long each scale trains.

    Attributes:
        batch_size_list: image pairs per step, one for each scale.
        epochs_per_scale: epochs of floor(max(source images, target images) / batch) steps.
        steps_per_scale: steps for each scale, replaces `epochs_per_scale` when not empty.
        warmup_epochs: first epochs of the last scale without label losses.
        debug_run: stop each epoch after `debug_stop_iteration` steps and each scale after epoch `debug_stop_epoch`.
    """

    batch_size_list: tuple[int, ...]
    epochs_per_scale: int = 40
    steps_per_scale: tuple[int, ...] = ()
    warmup_epochs: int = 0
    debug_run: bool = False
    debug_stop_iteration: int = 15
    debug_stop_epoch: int = 0

    def __post_init__(self) -> None:
        _require(
            all(b > 0 for b in self.batch_size_list),
            f"--batch_size_list {_listed(self.batch_size_list)}: every batch must be greater than 0",
        )
        _require(
            all(s > 0 for s in self.steps_per_scale),
            f"--steps_per_scale {_listed(self.steps_per_scale)}: every scale needs at least 1 step",
        )
        _require_positive(self, "epochs_per_scale", "debug_stop_iteration")
        _require_not_negative(self, "warmup_epochs", "debug_stop_epoch")

    def steps_per_epoch(self, scale: int, epoch_length: int) -> int:
        """floor(epoch length / batch), where the epoch length is the image number of the larger domain.

        Raises:
            UserError: the batch is larger than both domains.
        """
        batch = self.batch_size_list[scale]
        _require(
            epoch_length >= batch,
            f"--batch_size_list: {batch} images per step at scale {scale}, but the larger domain has {epoch_length}",
        )
        steps = epoch_length // batch
        return min(steps, self.debug_stop_iteration) if self.debug_run else steps

    def steps(self, scale: int, epoch_length: int) -> int:
        """Number of steps the scale trains for."""
        per_epoch = self.steps_per_epoch(scale, epoch_length)
        if self.debug_run:
            return per_epoch * min(self.debug_stop_epoch + 1, self.epochs_per_scale)
        return self.steps_per_scale[scale] if self.steps_per_scale else per_epoch * self.epochs_per_scale


@dataclass(frozen=True)
class ComputeConfig:
    """How the networks are run.

    Attributes:
        precision: `fp32`, `tf32` or `bf16`; `auto` is resolved when a run starts.
        compile: compile all networks but the discriminators and, in fp32, the generators.
        deterministic: the same sums in the same order on a GPU, too, which takes longer.
        bf16_discriminators: with bf16, discriminators compute in it, too.
    """

    precision: str = "fp32"
    compile: bool = False
    deterministic: bool = False
    bf16_discriminators: bool = False

    def __post_init__(self) -> None:
        _require(self.precision in PRECISIONS, f"--precision {self.precision}: must be one of {', '.join(PRECISIONS)}")
        _require(
            not self.bf16_discriminators or self.precision in ("auto", "bf16"),
            f"--bf16_discriminators does nothing in --precision {self.precision}; give bf16, or leave it out",
        )

    def in_precision(self, precision: str) -> ComputeConfig:
        """The same in another precision, such as the one that `auto` stands for on a device."""
        rounded = self.bf16_discriminators and precision in ("auto", "bf16")
        return replace(self, precision=precision, bf16_discriminators=rounded)


@dataclass(frozen=True)
class RunConfig:
    """Machine, seed, outputs and reporting of a run; changing these never changes what is computed, but the seed.

    Attributes:
        gpus: `cpu`, or the index of the CUDA device.
        vgg_weights: `imagenet`, `random` or a file.
        save_checkpoint_minutes: a checkpoint is also written when the last one is older than this.
    """

    gpus: str
    manual_seed: int = 1337
    vgg_weights: str = "imagenet"
    no_semseg: bool = False
    checkpoints_dir: str = "./TrainedModels"
    tb_logs_dir: str = "./runs"
    print_rate: int = 100
    save_checkpoint_rate: int = 1000
    pics_per_epoch: int = 10
    save_checkpoint_minutes: float = 30.0

    def __post_init__(self) -> None:
        _require_positive(self, "print_rate", "save_checkpoint_rate", "save_checkpoint_minutes")
        _require_not_negative(self, "pics_per_epoch", "manual_seed")


@dataclass(frozen=True)
class ProCSTConfig:
    """The whole configuration of a training run."""

    data: DataConfig
    network: NetworkConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    run: RunConfig
    semseg: SemsegConfig = field(default_factory=SemsegConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        scales = self.network.num_scales
        require_one_per_scale("batch_size_list", self.schedule.batch_size_list, scales)
        if self.schedule.steps_per_scale:
            require_one_per_scale("steps_per_scale", self.schedule.steps_per_scale, scales)
        coarsest = level_size(self.data.crop_size, scales, self.network.scale_factor)
        # Every 2x2 pooling before the deepest feature layer halves the image once more; below 4 pixels nothing of a
        # picture is left to compare.
        deepest = max(self.loss.perceptual_layers)
        needed = max(4, 2 ** sum(pooling < deepest for pooling in VGG16_POOLINGS))
        _require(
            min(coarsest) >= needed,
            f"--crop_size {_listed(self.data.crop_size)} gives {_listed(coarsest)} at scale 0; {needed} a side are "
            f"needed for layer {deepest}: raise the crop, or lower --num_scales or the layers",
        )
        _require(
            self.run.no_semseg or min(self.data.crop_size) >= SMALLEST_CROP,
            f"--crop_size {_listed(self.data.crop_size)}: the label losses need {SMALLEST_CROP} a side; raise the crop "
            "or add --no_semseg",
        )

    def to_json(self) -> dict[str, Any]:
        """Nested plain values, readable by `from_json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any], origin: Path | str) -> ProCSTConfig:
        """Rebuild a configuration from `to_json`'s form, JSON lists included.

        Raises:
            UserError: names `origin` when a section or a value is missing, unknown or out of range.
        """
        try:
            sections = {}
            for name, section in SECTIONS.items():
                if name in ("semseg", "compute") and name not in content:
                    continue  # a run of the time before these settings
                values = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in content[name].items()}
                if name == "compute" and values.get("precision") == "bf16":
                    values.setdefault("bf16_discriminators", True)  # a run of the time before there was a choice
                sections[name] = section(**values)
            return cls(**sections)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{origin} is not the configuration of a ProCST run of this version: {error}") from None


SECTIONS = {
    "data": DataConfig,
    "network": NetworkConfig,
    "loss": LossConfig,
    "optim": OptimConfig,
    "schedule": ScheduleConfig,
    "run": RunConfig,
    "semseg": SemsegConfig,
    "compute": ComputeConfig,
}


def _listed(values: tuple[int, ...]) -> str:
    return " ".join(str(value) for value in values)


def require_one_per_scale(flag: str, values: tuple[int, ...], num_scales: int) -> None:
    """Check that a per-scale flag has one positive value for each of the scales 0..num_scales."""
    _require(
        len(values) == num_scales + 1,
        f"--{flag} has {len(values)} values; --num_scales {num_scales} means {num_scales + 1} scales, "
        "so one value for each is needed",
    )
    _require(all(value > 0 for value in values), f"--{flag} {_listed(values)}: values must be greater than 0")


def resolve_norms(norm: str, batch_size_list: tuple[int, ...], num_gpus: int) -> tuple[Norm, ...]:
    """The norm of each scale: `batch` or `group` as given, or by the published rule for `auto`."""
    if norm == "auto":
        return tuple(published_norm(batch // num_gpus) for batch in batch_size_list)
    return tuple(norm for _ in batch_size_list)
