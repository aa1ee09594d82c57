"""Configuration of a ProCST run; the module imports no PyTorch."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from data_handlers.datasets import find_data_set
from models.shapes import VGG16_POOLINGS
from training.config import (
    LoaderConfig,
    NetConfig,
    RunConfig,
    SGDConfig,
    SourceConfig,
    StartFlags,
    TargetConfig,
    ValidationConfig,
    check_common,
    check_crop,
    check_crop_fits,
    default_semseg_weights,
    resolve_common,
)
from training.flags import Config, as_given, check, check_not_negative, check_positive, flag_of, option, path_option
from utils.sizes import level_size

Norm = Literal["batch", "group"]
BATCH_NORM_FROM_IMAGES_PER_GPU = 16
PUBLISHED_BATCHES = (32, 16, 3)
PUBLISHED_WIDTH = 64


@dataclass(frozen=True)
class NetworkShape:
    """Everything that decides the parameters of one scale's generator and discriminator (docs/method.md, section 2).

    Attributes:
        scale: 0 is the coarsest, whose generator has no second input.
        channels: width C of all inner blocks.
        layers: number L of convolutions.
        norm: with `group`, blocks whose input channels `groups` does not divide have no norm.
        kernel_size: odd; padding keeps the image size.
    """

    scale: int
    channels: int
    layers: int
    norm: Norm
    groups: int = 8
    kernel_size: int = 3


def published_norm(images_per_gpu: int) -> Norm:
    """The published rule: batch norm from 16 images per GPU on, group norm below."""
    return "batch" if images_per_gpu >= BATCH_NORM_FROM_IMAGES_PER_GPU else "group"


def layers_at_scale(scale: int, num_scales: int, body_layers: int) -> int:
    """Number of convolutions: `body_layers`, and two more at the two finest scales (s >= N - 1)."""
    return body_layers + 2 if scale >= num_scales - 1 else body_layers


@dataclass(frozen=True)
class NetworkConfig:
    """Shapes of all networks of the pyramid. `norm` is `batch` or `group` for each scale, once it is resolved."""

    num_scales: int = option(2, "index N of the finest scale: N + 1 scales")
    scale_factor: float = option(0.5, "size ratio of neighbouring scales")
    base_channels_list: tuple[int, ...] = option(
        (), "width of the networks at each scale (default: 64 64 64)", type=int, nargs="+"
    )
    body_layers: int = option(5, "convolutions of a network; the two finest scales get 2 more")
    norm: tuple[str, ...] = option(
        ("auto",), "auto: batch norm where a GPU gets 16 images or more, group norm elsewhere; decided once when the "
        "run starts", type=str, nargs="+", metavar="auto|batch|group",
    )  # fmt: skip
    groups_num: int = option(8, "groups of the group norm")
    nc_im: int = option(3, "image channels; only 3 is possible", hidden=True)
    ker_size: int = option(3, "kernel size, odd")
    stride: int = option(1, "stride; only 1 keeps the image size", hidden=True)
    padd_size: int | None = option(None, "padding; must keep the image size", type=int, hidden=True)

    def __post_init__(self) -> None:
        check_not_negative(self, "num_scales")
        check_positive(self, "groups_num")
        check(0.0 < self.scale_factor < 1.0, f"--scale_factor is {self.scale_factor}; it must be between 0 and 1")
        require_one_per_scale("base_channels_list", self.base_channels_list, self.num_scales)
        check(self.body_layers >= 2, f"--body_layers is {self.body_layers}; head and tail alone are 2 layers")
        odd = self.ker_size > 0 and self.ker_size % 2 == 1
        check(odd, f"--ker_size is {self.ker_size}; it must be odd and positive to keep the image size")
        fixed = {"nc_im": 3, "stride": 1, "padd_size": (self.ker_size - 1) // 2}
        for name, value in fixed.items():
            check(getattr(self, name) == value, f"--{name} {getattr(self, name)}: only {value} is possible here")
        for norm in self.norm:
            check(norm in ("batch", "group"), f"--norm {norm}: must be one of auto, batch, group")

    def shape(self, scale: int) -> NetworkShape:
        """Shape of the networks of `scale`."""
        return NetworkShape(
            scale=scale,
            channels=self.base_channels_list[scale],
            layers=layers_at_scale(scale, self.num_scales, self.body_layers),
            norm=self.norm[scale],
            groups=self.groups_num,
            kernel_size=self.ker_size,
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms and the VGG16 layers they compare (positions in torchvision's `features`)."""

    lambda_adversarial: float = option(1.0, "weight of the adversarial terms")
    lambda_grad: float = option(0.1, "weight of the gradient penalty inside them")
    lambda_cyclic: float = option(1.0, "weight of the cycle terms")
    lambda_style: float = option(10.0, "weight of the sum of the content, style and total variation terms")
    content_weight: float = option(1.0 / 30.0, "weight of the content term")
    style_weight: float = option(1.0, "weight of the Gram matrix term")
    tv_weight: float = option(1.0 / 30.0, "weight of the total variation")
    lambda_labels: float = option(1.0, "weight of the cyclic label loss")
    content_layers: tuple[int, ...] = option((15,), "layers of VGG16's features", type=int, nargs="+")
    style_layers: tuple[int, ...] = option((3, 8, 15, 22), "layers of VGG16's features", type=int, nargs="+")
    vgg_weights: str = path_option(
        "imagenet", "weights of the perceptual net: torchvision's ImageNet weights, seeded random ones, or a state "
        "dict that reaches the layers asked for", keywords=("imagenet", "random"), metavar="imagenet|random|PATH",
        may_change=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_not_negative(self, *(f.name for f in dataclasses.fields(self) if f.metadata["type"] is float))
        named = bool(self.content_layers and self.style_layers)
        check(named, "--content_layers, --style_layers: name at least one each")

    @property
    def perceptual_layers(self) -> tuple[int, ...]:
        """Every layer that some term compares, ascending."""
        return tuple(sorted({*self.content_layers, *self.style_layers}))


@dataclass(frozen=True)
class OptimConfig:
    """Adam of generators and discriminators; beta2 is 0.999 and there is no weight decay."""

    lr_g: float = option(1e-4, "learning rate of the generators")
    lr_d: float = option(1e-4, "learning rate of the discriminators")
    beta1: float = option(0.9, "beta1 of Adam")

    def __post_init__(self) -> None:
        check_positive(self, "lr_g", "lr_d")
        check(0.0 <= self.beta1 < 1.0, f"--beta1 is {self.beta1}; it must be in [0, 1)")


@dataclass(frozen=True)
class ScheduleConfig:
    """How long each scale trains; an epoch has floor(max(source images, target images) / batch) steps."""

    batch_size: int = option(0, "one batch size for every scale, instead of --batch_size_list")
    batch_size_list: tuple[int, ...] = option(
        (), "image pairs in a step of each scale, over all GPUs (default: the published 32 16 3)", type=int, nargs="+"
    )
    epochs_per_scale: int = option(40, "epochs of each scale")
    steps_per_scale: tuple[int, ...] = option(
        (), "steps of each scale (one number for all, or one each), instead of epochs", type=int, nargs="+"
    )
    warmup_epochs: int = option(0, "epochs of the last scale without label losses")
    debug_run: bool = option(False, "short run: stop every epoch and scale early, as the next two say")
    debug_stop_iteration: int = option(15, "steps of an epoch with --debug_run")
    debug_stop_epoch: int = option(0, "last epoch, from 0, with --debug_run")

    def __post_init__(self) -> None:
        check_positive(self, "epochs_per_scale", "debug_stop_iteration")
        check_not_negative(self, "warmup_epochs", "debug_stop_epoch")

    def steps_per_epoch(self, scale: int, epoch_length: int) -> int:
        """Steps of an epoch of `epoch_length` samples. Raises `UserError` where a batch is larger."""
        batch = self.batch_size_list[scale]
        check(
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
class LabelLossConfig:
    """The label losses of the last scale and P, the net that they need."""

    no_semseg: bool = option(False, "train the last scale without label losses, and so without segmentation nets")
    semseg_weights: str = path_option(
        "", "net trained on source: a file of the authors (.pth, CBST's .params) or of train_semseg_on_source.py, or "
        "its run folder (default: pretrained/pretrained_semseg_on_<source>.pth)", may_change=True,
    )  # fmt: skip


@dataclass(frozen=True)
class ProCSTConfig(Config):
    """The whole configuration of a training run."""

    run: RunConfig
    loader: LoaderConfig
    source: SourceConfig
    target: TargetConfig
    network: NetworkConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    labels: LabelLossConfig
    net: NetConfig
    sgd: SGDConfig
    validation: ValidationConfig

    groups: ClassVar[Mapping[str, Sequence[type]]] = {
        "run": (StartFlags, RunConfig),
        "data": (SourceConfig, TargetConfig, LoaderConfig),
        "networks": (NetworkConfig,),
        "losses": (LossConfig,),
        "schedule and optimisers": (ScheduleConfig, OptimConfig),
        "segmentation nets of the last scale": (LabelLossConfig, NetConfig, SGDConfig, ValidationConfig),
    }
    first: ClassVar[Sequence[str]] = (
        "gpus", "source", "src_data_dir", "target", "trg_data_dir", "no_semseg", "batch_size_list", "crop_size",
        "run_dir", "dry_run",
    )  # fmt: skip

    def __post_init__(self) -> None:
        scales, crop = self.network.num_scales, self.source.crop_size
        require_one_per_scale("batch_size_list", self.schedule.batch_size_list, scales)
        check(len(self.network.norm) == scales + 1, f"--norm: {len(self.network.norm)} values for {scales + 1} scales")
        if self.schedule.steps_per_scale:
            require_one_per_scale("steps_per_scale", self.schedule.steps_per_scale, scales)
        check_crop_fits(crop, "trg_resize", self.target.trg_resize)
        coarsest = level_size(crop, scales, self.network.scale_factor)
        # Every 2x2 pooling before the deepest feature layer halves the image; losses compare at least 4x4 pixels.
        deepest = max(self.loss.perceptual_layers)
        needed = max(4, 2 ** sum(pooling < deepest for pooling in VGG16_POOLINGS))
        check(
            min(coarsest) >= needed,
            f"--crop_size {as_given(crop)} gives {as_given(coarsest)} at scale 0; {needed} a side are needed for layer "
            f"{deepest}: raise the crop, or lower --num_scales or the layers",
        )
        if not self.labels.no_semseg:
            check_crop(crop)

    @classmethod
    def check_given(cls, given: Mapping[str, Any]) -> None:
        """Refuse flags that contradict each other or could not act. Raises `UserError`, which names them."""
        check_common(given)
        check(
            not ("batch_size" in given and "batch_size_list" in given),
            "--batch_size and --batch_size_list contradict each other; give one",
        )
        check(
            "steps_per_scale" not in given or not given.keys() & {"debug_run", "epochs_per_scale"},
            "--steps_per_scale contradicts --epochs_per_scale and --debug_run; give one of them",
        )
        check(
            "debug_run" in given or not given.keys() & {"debug_stop_iteration", "debug_stop_epoch"},
            "--debug_stop_iteration and --debug_stop_epoch act only with --debug_run",
        )
        if given.get("no_semseg"):
            refuse_label_flags(given)

    @classmethod
    def resolve(cls, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags with defaults that depend on the data sets, the scales and the GPUs filled in."""
        flags = resolve_common(flags)
        scales = max(flags["num_scales"], 0) + 1
        if flags["batch_size"]:
            flags["batch_size_list"], flags["batch_size"] = (flags["batch_size"],) * scales, 0
        elif not flags["batch_size_list"]:
            flags["batch_size_list"] = PUBLISHED_BATCHES
        weights = flags["semseg_weights"] or default_semseg_weights(flags["source"])
        norm, target = flags["norm"], find_data_set(flags["target"], "--target")
        if norm == ("auto",):
            gpus = flags.get("num_processes") or max(1, len(flags["gpus"]))
            norm = tuple(published_norm(batch // gpus) for batch in flags["batch_size_list"])
        return {
            **flags,
            "trg_resize": flags["trg_resize"] or target.resize,
            "trg_data_dir": flags["trg_data_dir"] or target.default_root,
            "base_channels_list": _per_scale(flags["base_channels_list"] or (PUBLISHED_WIDTH,), scales),
            "steps_per_scale": _per_scale(flags["steps_per_scale"], scales),
            "norm": _per_scale(norm, scales),
            "padd_size": (flags["ker_size"] - 1) // 2 if flags["padd_size"] is None else flags["padd_size"],
            "semseg_weights": "" if flags["no_semseg"] else weights,
        }

    def continued(self, given: Mapping[str, Any]) -> "ProCSTConfig":
        """See `Config.continued`; `--norm auto` means the stored norms."""
        if self.labels.no_semseg:
            refuse_label_flags(given)
        return super().continued({name: value for name, value in given.items() if (name, value) != ("norm", ("auto",))})


def refuse_label_flags(given: Mapping[str, Any]) -> None:
    """Raise `UserError` for flags of the segmentation nets, which a run without label losses does not have."""
    sections = (LabelLossConfig, NetConfig, SGDConfig, ValidationConfig)
    names = {field.name for section in sections for field in dataclasses.fields(section)} - {"no_semseg"}
    idle = [flag_of(name) for name in given if name in names | {"warmup_epochs", "lambda_labels"}]
    check(not idle, f"{', '.join(idle)}: has no effect with --no_semseg; remove it")


def _per_scale(values: tuple[Any, ...], scales: int) -> tuple[Any, ...]:
    """One value applies to every scale."""
    return values * scales if len(values) == 1 else values


def require_one_per_scale(name: str, values: tuple[int, ...], num_scales: int) -> None:
    """Raise `UserError` unless a per-scale flag has one positive value for each of the scales 0..num_scales."""
    check(
        len(values) == num_scales + 1,
        f"--{name} has {len(values)} values; --num_scales {num_scales} needs {num_scales + 1}, one for each scale",
    )
    check(all(value > 0 for value in values), f"--{name} {as_given(values)}: values must be greater than 0")
