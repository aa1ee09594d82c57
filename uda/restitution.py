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


def entropies(logits: Tensor) -> Tensor:
    """-sum p ln p of each pixel of logits (N,C,...), without probabilities below 1e-6; (N,...)."""
    log = at_least_float32(logits).log_softmax(dim=1)
    probability = log.exp()
    return -(probability * log * (probability >= SMALLEST_PROBABILITY)).sum(dim=1)


def dual_loss(logits: Restituted, mean: Callable[[Tensor], Tensor] | None = Tensor.mean) -> tuple[Tensor, Tensor]:
    """Softplus of restored less normalised entropy, and of normalised less contaminated entropy; scalars.

    Args:
        logits: of the three parts of a restitution.
        mean: of the pixels' entropies, before they are compared; None compares each pixel's.
    """
    normalised, restored, contaminated = (mean(entropies(part)) if mean else entropies(part) for part in logits)
    return F.softplus(restored - normalised).mean(), F.softplus(normalised - contaminated).mean()


def restitution_loss(
    heads: RestitutionHeads, parts: Sequence[Restituted], label: Tensor | None, *, rank: Rank, fraction: float,
    per_pixel: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Sums over the stages of the dual loss of the global batch, and of the heads' cross-entropy on restored features.

    Args:
        parts: of each stage, of the local samples.
        label: their trainIds (B,H,W), 255 = ignore, which are read at the stage's resolution; None: they have none.
        fraction: of the global batch in the local samples.
        per_pixel: see `dual_loss`.

    Returns:
        The local samples' share of each, scalars; of the dual loss alone without labels.
    """

    def mean(values: Tensor) -> Tensor:
        here = fraction * values.mean()
        total = here.detach().clone()
        rank.all_reduce([total])
        return total + (here - here.detach())

    dual, supervised = [], []
    for head, features in zip(heads, parts, strict=True):
        logits = Restituted(*(head(part) for part in features))
        dual += dual_loss(logits, None if per_pixel else mean)
        if label is None:
            continue
        small = F.interpolate(label[:, None].float(), size=logits.restored.shape[2:], mode="nearest")[:, 0]
        supervised.append(rank.labelled_fraction(small) * cross_entropy(logits.restored, small))
    total = torch.stack(dual).sum()
    # A loss of means is that of the global batch in every process, and its gradient here is that of the local samples.
    share = fraction * total if per_pixel else total + (fraction - 1.0) * total.detach()
    return [share, *([torch.stack(supervised).sum()] if supervised else [])]
