"""Validation of a segmentation net on whole images: predictions, scores, and their reports."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_handlers.datasets import DataSet
from data_handlers.images import resized, resized_label
from data_handlers.label_maps import colourise
from data_handlers.labelled import LabelledImage, open_labelled, samples
from data_handlers.lists import FileList
from data_handlers.resampling import Size
from models.resnet38 import OUTPUT_STRIDE, ResNet38
from training.confidence_maps import confidence_map
from training.distributed import Rank
from training.metrics import MEANS, PredictionStatistics, Scores, confusion_matrix, scores_of
from training.precision import exact_convolutions
from utils.errors import UserError

VALIDATIONS = "validations.json"
PICTURE_WIDTH = 512
OVERLAP = 1 / 3  # of neighbouring windows
OnPrediction = Callable[[LabelledImage, Tensor], object]
Forward = Callable[[Tensor], Tensor]  # images (B,3,h,w) -> logits (B,C,h,w)


@torch.no_grad()
def predict(net: Forward, image: Tensor, scales: Sequence[float] = (1.0,), flip: bool = False) -> Tensor:
    """Class probabilities at the image's own size, averaged over rescaled and mirrored inputs.

    Args:
        net: a net in eval mode.
        image: (1,3,H,W), from the net's `network_input`.
        scales: input sizes relative to the image; probabilities are resized bilinearly to the image's size.
        flip: predict the mirror image at every scale, too.

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


@torch.no_grad()
def in_windows(net: Forward, image: Tensor, window: Size) -> Tensor:
    """Logits (B,C,H,W) of images (B,3,H,W), averaged over windows (w,h) that overlap by a third and cover them."""
    width, height = (min(side, whole) for side, whole in zip(window, image.shape[:1:-1], strict=True))
    total, count = None, image.new_zeros(image.shape[2:])
    for top in _starts(image.shape[2], height):
        for left in _starts(image.shape[3], width):
            part = (..., slice(top, top + height), slice(left, left + width))
            logits = net(image[part])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *image.shape[2:])
            total[part] += logits
            count[part] += 1
    return total / count


def _starts(whole: int, window: int) -> list[int]:
    """Where the windows along a line begin; the last one ends with the line."""
    stride, last = max(1, round(window * (1 - OVERLAP))), whole - window
    return [min(start, last) for start in range(0, last + stride, stride)]


@dataclass(frozen=True)
class Validation:
    """Result of one pass over the validation images.

    Attributes:
        scores: None where the images have no labels.
        confusion: int64 (C,C) on the net's device, rows are labels.
        statistics: of the predictions, which need no labels.
        pictures: uint8 (h,w,3) rows by the image's name: image, label where there is one, prediction.
        skipped: what was wrong with images that this process skipped.
    """

    scores: Scores | None
    confusion: Tensor
    statistics: PredictionStatistics
    pictures: dict[str, np.ndarray]
    skipped: tuple[str, ...] = ()

    @property
    def mean_iou(self) -> float | None:
        """mIoU, None without labels or when every scored class is absent."""
        return None if self.scores is None else self.scores.means["miou"]


def scored_classes(num_classes: int, *data_sets: DataSet) -> tuple[int, ...]:
    """The trainIds that all data sets are scored on and the net can predict."""
    return tuple(c for c in data_sets[0].classes if c < num_classes and all(c in d.classes for d in data_sets))


@dataclass(frozen=True, kw_only=True)
class Validator:
    """Predicts a fixed list of images with a net and scores the predictions.

    Attributes:
        with_labels: whether the images have labels and scores are wanted.
        select_by: `miou` or `label_free`: what picks the best net; `none`: scores are reported alone.
        classes: trainIds the mean goes over.
        rank: this process among those that share the images, and the device of the net.
        skip_unusable: skip images that cannot be used, instead of raising; None as of `check_samples`.
        size: (W,H) to which images and labels are resized before everything else; None keeps their own.
        pictures: how many pictures are made at most, of evenly spaced images and the last one.
        scales, flip: see `predict`.
        long_side: resize images so that the longer side is this, see `confidence_map`; None keeps the size.
        window: (w,h) of the windows that the net is given, see `in_windows`; None gives it whole images.
    """

    files: FileList
    with_labels: bool
    select_by: str = "miou"
    classes: Sequence[int]
    num_classes: int
    num_workers: int
    rank: Rank
    skip_unusable: bool | None = None
    size: Size | None = None
    pictures: int = 4
    scales: Sequence[float] = (1.0,)
    flip: bool = False
    long_side: int | None = None
    window: Size | None = None

    def __call__(self, net: nn.Module, on_prediction: OnPrediction = lambda image, prediction: None) -> Validation:
        """Predict every image once, each process its share.

        Args:
            net: has a `network_input`. It is in eval mode meanwhile and in its former mode afterwards.
            on_prediction: called with every image of this process and its predicted trainIds, uint8 (H,W); what it
                raises ends the validation.

        Raises:
            UserError: an image or label, or with `skip_unusable` none of them, can be used, or the net has diverged.
        """
        rank, skipped = self.rank, []
        files = replace(self.files, images=self.files.images[rank.index :: rank.count])
        images = open_labelled(files, self.num_workers, rank.device, self.with_labels, self.skip_unusable, self.size)
        statistics, pictures = PredictionStatistics(self.num_classes, rank.device), {}
        pictured = samples(files, self.pictures - 1)
        matrix = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=rank.device)
        finite = torch.ones((), dtype=torch.bool, device=rank.device)
        # Nothing is read back to the host before the end, except for pictures.
        with exact_convolutions(), in_eval_mode(net):
            for image in images:
                if isinstance(image, UserError):
                    skipped.append(str(image))
                    continue
                probability = self._probability(net, image.pixels)
                finite &= probability.isfinite().all()
                statistics.add(probability)
                prediction = probability.argmax(dim=0)
                if image.label is not None:
                    matrix += confusion_matrix(prediction, image.label, self.num_classes)
                prediction = prediction.to(torch.uint8)
                if image.name in pictured:
                    pictures[image.name] = _picture(image, prediction, self.files.data_set.colours)
                on_prediction(image, prediction)
        if not bool(finite):
            raise UserError("the segmentation net's predictions are not finite: its training diverged, lower its rate")
        rank.all_reduce([matrix])
        statistics.all_reduce(rank.all_reduce)
        if not statistics.pixels:
            raise UserError(f"none of the {len(self.files)} validation images of {self.files.root} can be used")
        return Validation(
            scores=scores_of(matrix, self.classes) if self.with_labels else None, confusion=matrix,
            statistics=statistics, pictures=pictures, skipped=tuple(skipped),
        )  # fmt: skip

    def _probability(self, net: nn.Module, pixels: Tensor) -> Tensor:
        """Class probabilities (C,H,W) of pixels uint8 (H,W,3)."""
        forward = partial(in_windows, net, window=self.window) if self.window else net
        if self.long_side is None:
            image = net.network_input(pixels[None], next(net.parameters()).dtype)
            return predict(forward, image, self.scales, self.flip)
        coarse = isinstance(net, ResNet38) and not self.window  # the published test upsamples probabilities
        logits, stride = (net.coarse_logits, OUTPUT_STRIDE) if coarse else (forward, 1)
        maps = confidence_map(
            lambda image: logits(image).softmax(dim=1), pixels.cpu().numpy(), longer_side=self.long_side,
            stride=stride, normalise=net.network_input, device=self.rank.device, flip=self.flip,
        )  # fmt: skip
        return maps.clamp(min=0.0)

    def score(self, validation: Validation) -> float | None:
        """The value that selects the best net, or None."""
        if self.select_by == "none":
            return None
        return validation.mean_iou if self.select_by == "miou" else validation.statistics.mutual_information()


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """Inside the block the net is in eval mode; afterwards each of its modules has its former mode."""
    in_training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _picture(sample: LabelledImage, prediction: Tensor, colours: Sequence[Sequence[int]]) -> np.ndarray:
    pixels = sample.pixels.cpu().numpy()
    width = min(PICTURE_WIDTH, pixels.shape[1])
    size = (width, max(1, round(pixels.shape[0] * width / pixels.shape[1])))
    labels = [prediction] if sample.label is None else [sample.label, prediction]
    coloured = [colourise(resized_label(label.cpu().numpy(), size), colours) for label in labels]
    return np.concatenate([resized(pixels, size, "exact"), *coloured], axis=1)


def _iou_by_name(scores: Scores | None, names: Sequence[str]) -> dict[str, float | None]:
    return {names[c]: value for c, value in zip(scores.classes, scores.by_class["iou"], strict=True)} if scores else {}


def summary(validation: Validation, names: Sequence[str]) -> str:
    """One line: mIoU and IoU of the classes, or the label-free scores."""
    statistics = validation.statistics
    confidence = f"mean confidence {statistics.mean_confidence():.3f}"
    free = f"label-free score {statistics.mutual_information():.4f}, {confidence}"
    if validation.scores is None:
        return free
    if validation.mean_iou is None:
        return f"no pixel of the scored classes is labelled; {free}"
    iou = _iou_by_name(validation.scores, names)
    parts = [f"{name} {100 * value:.1f}" for name, value in iou.items() if value is not None]
    return f"mIoU {100 * validation.mean_iou:.2f} ({', '.join(parts)}); {free}"


def report(validation: Validation, names: Sequence[str]) -> dict[str, Any]:
    """Plain values of a validation, for files."""
    scores = validation.scores
    return {
        **(scores.means if scores else dict.fromkeys(MEANS)),
        "miou_by_convention": scores and dict(scores.mean_iou_by_convention),
        "label_free": validation.statistics.mutual_information(),
        "mean_confidence": validation.statistics.mean_confidence(),
        "iou": _iou_by_name(scores, names),
        "absent": [names[c] for c in scores.absent] if scores else [],
    }
