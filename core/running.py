"""How a ProCST training calls its networks: precision, memory format and size of micro-batches.

The choices follow the measurements in benchmarks/RESULTS.md.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from core.config import Norm
from core.networks import Discriminator, Generator
from training.precision import Precision, Runner

# Pixels of a micro-batch. One image of the published size keeps a GPU busy; a CPU gains nothing from more pixels.
MICRO_BATCH_PIXELS = {"cuda": 2**19, "cpu": 2**15}

# On a CPU images are laid out channels last up to this many pixels an image and from this many channels a group on.
CHANNELS_LAST_PIXELS = 2**15
CHANNELS_LAST_GROUP = 8


def procst_runner(precision: Precision, bf16_discriminators: bool = False) -> Runner:
    """The `Runner` of a ProCST training; in bf16, discriminators stay in float32 unless `bf16_discriminators`.

    Rounding them changed their losses by up to 6%, and the translation was worse in three of six runs.
    """
    keep_float32 = () if bf16_discriminators else (Discriminator,)
    return Runner(precision, keep_float32=keep_float32, layout=image_layout)


def image_layout(network: nn.Module, image: Tensor) -> torch.memory_format | None:
    """Memory format of the images (B,3,h,w) for a generator or discriminator in training; None for other networks.

    Channels last speeds up a CPU's convolutions. Group norms of groups of fewer than eight channels, and batch norm of
    the image, lose more time by it, and group norms are less exact the more pixels there are. GPUs were not measured.
    """
    if not isinstance(network, Generator | Discriminator):
        return None
    shape = network.shape
    few = image.shape[-2] * image.shape[-1] <= CHANNELS_LAST_PIXELS
    wide = shape.norm == "group" and shape.channels // shape.groups >= CHANNELS_LAST_GROUP
    return torch.channels_last if image.device.type == "cpu" and few and wide else torch.contiguous_format


def micro_batch_size(batch: Sequence[int], norm: Norm, device: torch.device) -> int | None:
    """Samples of a micro-batch for a batch of shape (B,3,h,w); None, the whole batch, with batch norm."""
    if norm == "batch":
        return None
    return max(1, MICRO_BATCH_PIXELS[device.type] // (batch[-2] * batch[-1]))
