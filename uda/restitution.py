"""The dual restitution loss of SNR, in the form for segmentation (docs/uda.md, section SNR).

What is restored to normalised features should make predictions more certain, and the rest of it less certain.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import at_least_float32, cross_entropy
from models.restitution import Restituted
from training.distributed import Rank

SMALLEST_PROBABILITY = 1e-6  # smaller ones are left out of the entropy


class RestitutionHeads(nn.ModuleList):
    """For each stage a 1x1 convolution to the classes, the same for all parts of a restitution; for training alone."""

    def __init__(self, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(nn.Conv2d(inputs, num_classes, 1) for inputs in channels)


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean of -sum p ln p over all pixels of logits (N,C,...), without probabilities below 1e-6."""
    log = at_least_float32(logits).log_softmax(dim=1)
    probability = log.exp()
    return -(probability * log * (probability >= SMALLEST_PROBABILITY)).sum(dim=1).mean()


def dual_loss(logits: Restituted, mean: Callable[[Tensor], Tensor] = lambda value: value) -> tuple[Tensor, Tensor]:
    """Softplus of restored less normalised entropy, and of normalised less contaminated entropy; scalars.

    Args:
        logits: of the three parts of a restitution.
        mean: of an entropy over the processes that share a batch.
    """
    normalised, restored, contaminated = (mean(mean_entropy(part)) for part in logits)
    return F.softplus(restored - normalised), F.softplus(normalised - contaminated)


def restitution_loss(
    heads: RestitutionHeads, parts: Sequence[Restituted], label: Tensor, *, rank: Rank, fraction: float
) -> tuple[Tensor, Tensor]:
    """Sums over the stages of the dual loss of the global batch, and of the heads' cross-entropy on restored features.

    Args:
        parts: of each stage, of the local samples.
        label: their trainIds (B,H,W), 255 = ignore; they are read at the stage's resolution.
        fraction: of the global batch in the local samples.

    Returns:
        Two scalars: the dual loss, the same in all processes with the gradient of the local samples, and their share
        of the cross-entropy.
    """

    def mean(value: Tensor) -> Tensor:
        here = fraction * value
        total = here.detach().clone()
        rank.all_reduce([total])
        return total + (here - here.detach())

    dual, supervised = [], []
    for head, features in zip(heads, parts, strict=True):
        logits = Restituted(*(head(part) for part in features))
        dual += dual_loss(logits, mean)
        small = F.interpolate(label[:, None].float(), size=logits.restored.shape[2:], mode="nearest")[:, 0]
        supervised.append(rank.labelled_fraction(small) * cross_entropy(logits.restored, small))
    return torch.stack(dual).sum(), torch.stack(supervised).sum()
