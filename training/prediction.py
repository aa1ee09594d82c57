"""Predicting whole images with a segmentation net, and counting what it predicts.

Everything stays on the device and memory does not grow with the number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.metrics import confusion_matrix, count_values
from utils.errors import UserError

CONFIDENCE_BINS = 20


class Sample(Protocol):
    """What evaluation needs of an image: its name, RGB pixels, uint8 (H,W,3), and trainIds (H,W) or None."""

    name: str
    pixels: Tensor
    label: Tensor | None


@torch.no_grad()
def predict(net: nn.Module, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """Class probabilities at the image's own size, averaged over rescaled and mirrored inputs.

    Args:
        net: in eval mode; images (B,3,h,w) -> logits (B,C,h,w).
        image: (1,3,H,W), what the net's `network_input` makes of pixels.
        scales: input sizes relative to the image; probabilities are brought back bilinearly.
        flip: predict the mirror image of every scale, too.

    Returns:
        (C,H,W), summing to 1 over C.
    """
    height, width = image.shape[2:]
    total: Tensor | None = None
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = image
        if size != (height, width):
            scaled = F.interpolate(image, size=size, mode="bilinear", align_corners=False, antialias=True)
        for mirrored in (False, True) if flip else (False,):
            probability = net(scaled.flip(3) if mirrored else scaled).softmax(dim=1)
            if mirrored:
                probability = probability.flip(3)
            if size != (height, width):
                probability = F.interpolate(probability, size=(height, width), mode="bilinear", align_corners=False)
            total = probability if total is None else total.add_(probability)
    return total[0] / (len(scales) * (2 if flip else 1))


class PredictionStatistics:
    """What a net's predictions tell without labels, accumulated over pixels on the device."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.pixels = 0
        self.probability_sum = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.entropy_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.confidence_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.confidence_histogram = torch.zeros(CONFIDENCE_BINS, dtype=torch.float64, device=device)

    def add(self, probability: Tensor) -> None:
        """Count an image's probabilities (C,H,W)."""
        confidence = probability.amax(dim=0)
        self.pixels += confidence.numel()
        self.probability_sum += probability.sum(dim=(1, 2))
        self.entropy_sum += _entropy(probability, dim=0).sum()
        self.confidence_sum += confidence.sum()
        # A net that diverged predicts NaN: that shows in the means, the bins only have to stay bins.
        bins = (confidence.nan_to_num(0.0) * CONFIDENCE_BINS).long().clamp_(max=CONFIDENCE_BINS - 1)
        self.confidence_histogram += count_values(bins, CONFIDENCE_BINS)

    def all_reduce(self, all_reduce: Callable[[Sequence[Tensor]], None]) -> None:
        """Make this the statistics of several processes' images; `all_reduce` sums tensors in place over them."""
        pixels = torch.tensor(float(self.pixels), dtype=torch.float64, device=self.entropy_sum.device)
        sums = (self.probability_sum, self.entropy_sum, self.confidence_sum, self.confidence_histogram)
        all_reduce([pixels, *sums])
        self.pixels = int(pixels)

    def mean_confidence(self) -> float:
        """Mean probability of the predicted class."""
        return float(self.confidence_sum) / self.pixels

    def mutual_information(self) -> float:
        """Entropy of the mean prediction minus mean entropy of the predictions, as a share of the largest possible.

        Between 0 and 1. High where single pixels are decided (confident) and all classes are used (balanced): a net
        that calls everything road is confident, but has no class balance and gets 0.
        """
        mean = self.probability_sum / self.pixels
        information = _entropy(mean, dim=0) - self.entropy_sum / self.pixels
        return float(information) / torch.log(torch.tensor(float(len(mean)))).item()


def _entropy(probability: Tensor, dim: int) -> Tensor:
    return -torch.special.xlogy(probability, probability).sum(dim=dim)


def evaluate(
    net: nn.Module,
    samples: Iterable[Sample],
    num_classes: int,
    device: torch.device,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    statistics: PredictionStatistics | None = None,
    on_prediction: Callable[[Sample, Tensor], None] | None = None,
) -> Tensor:
    """Confusion matrix (num_classes, num_classes), int64 on `device`, over all samples at their native size.

    The net is in eval mode meanwhile and in its former mode afterwards.

    Args:
        net: its `network_input` turns the pixels into what it expects, in the type of its parameters.
        statistics: is given the probabilities of every image.
        on_prediction: is given every sample and its predicted trainIds, uint8 (H,W).

    Raises:
        UserError: a prediction is not finite.
    """
    matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    dtype = next(net.parameters()).dtype
    training = net.training
    net.eval()
    try:
        for sample in samples:
            image = net.network_input(sample.pixels[None], dtype)
            probability = predict(net, image, scales, flip)
            finite &= probability.isfinite().all()
            prediction = probability.argmax(dim=0)
            if statistics is not None:
                statistics.add(probability)
            if sample.label is not None:
                matrix += confusion_matrix(prediction, sample.label, num_classes)
            if on_prediction is not None:
                on_prediction(sample, prediction.to(torch.uint8))
    finally:
        net.train(training)
    if not bool(finite):
        raise UserError("the segmentation net's predictions are not finite: its training diverged, lower --lr_semseg")
    return matrix
