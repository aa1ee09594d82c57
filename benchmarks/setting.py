"""What the benchmarks of the training step run on: networks of a configuration, and batches of random images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from core.config import ProCSTConfig
from core.networks import Discriminator, Generator, freeze, init_weights
from core.step import Batch, ScaleNetworks, SegmentationNets
from models.segmentation import build_segmentation_net, segmentation_optimizer
from models.vgg import VGGFeatures, build_vgg
from training.precision import channels_last
from utils.sizes import level_size


@dataclass(frozen=True)
class Setting:
    """Everything a step of one scale needs."""

    networks: ScaleNetworks
    optimizers: Mapping[str, Optimizer]
    perceptual: VGGFeatures
    segmentation: SegmentationNets | None
    batch: Batch


def build_setting(config: ProCSTConfig, scale: int, device: torch.device, fused: bool) -> Setting:
    """Networks with seeded random weights in training at `scale`, on `device`, and one batch.

    Args:
        fused: make the optimisers and lay out the frozen nets as the trainer does; the yardstick has neither.
    """

    def network(kind: type, at: int) -> Generator | Discriminator:
        built = kind(config.network.shape(at))
        init_weights(built, torch.Generator().manual_seed(at))
        return _placed(built.train(), device)

    kinds = {"Dst": Discriminator, "Gst": Generator, "Dts": Discriminator, "Gts": Generator}
    trained = {name: network(kind, scale) for name, kind in kinds.items()}
    lower = {f"lower_{name}": [freeze(network(Generator, k)) for k in range(scale)] for name in ("Gst", "Gts")}
    optim = config.optim
    optimizers = {
        name: Adam(net.parameters(), lr=optim.lr_g, betas=(optim.beta1, 0.999), fused=fused or None)
        for name, net in trained.items()
    }
    perceptual = _placed(build_vgg(config.loss.vgg_weights, config.loss.perceptual_layers), device)
    segmentation = None
    if not config.labels.no_semseg and scale == config.network.num_scales:
        torch.manual_seed(0)
        seg_source = _placed(freeze(build_segmentation_net(config.net.shape())), device)
        seg_sit = _placed(build_segmentation_net(config.net.shape()), device)
        optimizer = segmentation_optimizer(seg_sit, **vars(config.sgd))
        segmentation = SegmentationNets(seg_source, seg_sit, optimizer)
    if fused:
        for network in (perceptual, *([segmentation.seg_source, segmentation.seg_sit] if segmentation else [])):
            channels_last(network)
    return Setting(
        ScaleNetworks(**trained, **lower), optimizers, perceptual, segmentation,
        random_batch(config, scale, device, segmentation is not None),
    )  # fmt: skip


def _placed(network: nn.Module, device: torch.device) -> nn.Module:
    # Networks of fake tensors, which only follow shapes, cannot be moved and need not be.
    return network if device.type == "cpu" else network.to(device)


def random_batch(config: ProCSTConfig, scale: int, device: torch.device, with_label: bool) -> Batch:
    """Smooth random pyramids in [-1,1], the same for every caller, and a label of all classes."""
    generator = torch.Generator().manual_seed(scale)
    size = config.schedule.batch_size_list[scale]
    last = config.network.num_scales

    def level(k: int) -> Tensor:
        width, height = level_size(config.source.crop_size, last - k, config.network.scale_factor)
        coarse = torch.rand(size, 3, max(height // 4, 1), max(width // 4, 1), generator=generator)
        image = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
        return (2.0 * image - 1.0).to(device)

    width, height = config.source.crop_size
    label = None
    if with_label:
        shape = (size, height, width)
        label = torch.randint(0, config.net.num_classes, shape, generator=generator, dtype=torch.uint8).to(device)
    return Batch(
        source=[level(k) for k in range(scale + 1)],
        target=[level(k) for k in range(scale + 1)],
        alphas=torch.rand(2, generator=generator).to(device),
        label=label,
    )
