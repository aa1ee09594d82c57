"""Class prototypes: the mean feature of each class over a target, and how near pixels are to them (docs/uda.md)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import at_least_float32
from utils.errors import UserError
from utils.files import atomic_write
from utils.tensor_files import read_tensor_file

LEAST_PIXELS = 10  # of a class in an image that counts for it
MOST_IMAGES = 3000  # in a mean; from then on it is an exponential one
KIND = "procst-prototypes"


@dataclass(kw_only=True)
class Prototypes:
    """Prototypes of C classes, and what they were made from.

    Attributes:
        vectors: float32 (C,D); 0 for a class that no image counted for.
        counts: int64 (C,), images in each, at most `MOST_IMAGES`.
        images: of the list that are done.
        made_from: plain values.
    """

    vectors: Tensor
    counts: Tensor
    images: int
    made_from: Mapping[str, Any]

    @classmethod
    def empty(cls, classes: int, channels: int, made_from: Mapping[str, Any]) -> "Prototypes":
        """Of no image."""
        counts = torch.zeros(classes, dtype=torch.int64)
        return cls(vectors=torch.zeros(classes, channels), counts=counts, images=0, made_from=made_from)

    def add(self, features: Tensor, label: Tensor) -> None:
        """Count an image: its mean feature of every class that at least `LEAST_PIXELS` pixels are labelled with.

        A mean of 0 does not count.

        Args:
            features: (D,h,w), upsampled bilinearly to the label's size.
            label: integer (H,W), classes below C.

        Raises:
            UserError: a mean is not finite.
        """
        means, pixels = (values.cpu() for values in class_means(features, label, len(self.counts)))
        if not means.isfinite().all():
            raise UserError("the net's features are not finite: its training diverged")
        for k in range(len(self.counts)):
            if pixels[k] >= LEAST_PIXELS and means[k].sum() != 0:
                count = self.counts[k]
                self.vectors[k] = (self.vectors[k] * count + means[k]) / (count + 1)
                self.counts[k] = min(count + 1, MOST_IMAGES)

    def save(self, path: Path) -> None:
        """Write them to a file, atomically. Raises `UserError`."""
        atomic_write(path, partial(torch.save, {"kind": KIND, **vars(self)}))

    @property
    def finished(self) -> bool:
        """Whether all images are done."""
        return self.images == self.made_from["number_of_images"]


def load_prototypes(path: Path, flag: str) -> Prototypes:
    """The prototypes in a file that `flag` names. Raises `UserError`: missing, damaged, or holding another thing."""
    try:
        content = read_tensor_file(path)
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    known = Prototypes.__dataclass_fields__.keys()
    if not isinstance(content, Mapping) or content.get("kind") != KIND or not known <= content.keys():
        raise UserError(f"{flag} {path}: no file of calculate_prototypes.py")
    return Prototypes(**{name: content[name] for name in known})


def class_means(features: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean features (C,D) and numbers of pixels (C,) of the classes of an image; see `Prototypes.add`."""
    classes = F.one_hot(label.flatten().long(), num_classes).to(torch.float32)
    pixels = classes.sum(dim=0)
    sums = classes.mT @ upsampled(features[None], label.shape)[0].flatten(1).mT
    return sums / pixels.clamp(min=1)[:, None], pixels


def distances(features: Tensor, prototypes: Tensor) -> Tensor:
    """Euclidean distances (B,C,h,w) of features (B,D,h,w) to prototypes (C,D), of an image at a time."""
    points = features.flatten(2).mT
    # As one matrix product, a distance near 0 would be a difference of large numbers.
    found = [torch.cdist(x, prototypes, compute_mode="donot_use_mm_for_euclid_dist") for x in points]
    return torch.stack(found).mT.reshape(len(features), -1, *features.shape[2:])


def rectification(features: Tensor, prototypes: Tensor, known: Tensor | None, size: tuple[int, int]) -> Tensor:
    """How near each pixel is to each class, (B,C,H,W): the softmax of the negative distances, summing to 1 over C.

    Args:
        features: (B,D,h,w), upsampled bilinearly to `size` (H,W).
        known: bool (C,), the classes that have a prototype; the others get 0. None takes all, as published.
    """
    near = torch.cat([-distances(upsampled(x[None], size), prototypes) for x in features])
    if known is not None:
        near = near.masked_fill(~known[:, None, None], -torch.inf)
    return near.softmax(dim=1)


def upsampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B,C,h,w) -> (B,C,H,W), bilinearly, in float32 at least."""
    x = at_least_float32(x)
    return x if x.shape[2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
