"""Images with their labels, one at a time at native size, as evaluation reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_handlers.images import check_label_header, normalise, read_image, read_label
from data_handlers.lists import FileList
from data_handlers.stream import LabelUse
from utils.errors import UserError
from utils.loaders import load_in_order
from utils.transfer import to_device


@dataclass(frozen=True)
class LabelledImage:
    """An image at native size.

    Attributes:
        name: relative path in its data set.
        image: (1,3,H,W) in [-1,1], on the device asked for.
        label: trainIds uint8 (H,W), 255 = ignore, on the same device; None where labels are not read.
    """

    name: str
    image: Tensor
    label: Tensor | None


class _Files(Dataset):
    def __init__(self, files: FileList, with_labels: bool) -> None:
        self.files = files
        self.with_labels = with_labels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, np.ndarray, np.ndarray | None] | UserError:
        name = self.files.images[index]
        try:
            image = read_image(self.files.root / name)
            label = None
            if self.with_labels:
                label = read_label(self.files.label_file(name), self.files.data_set, image.size)
            return name, np.array(image), label
        except UserError as error:
            return error


def check_samples(files: FileList, labels: LabelUse = "read", or_else: str = "", count: int = 5) -> None:
    """Decode a few images spread evenly over a list, and look at their labels.

    Files of a wrong kind are a mistake about the whole data set; this finds it before anything is written, and before
    hours of training do.

    Args:
        or_else: what else there is to do about it, as the end of the message.

    Raises:
        UserError: a file cannot be used.
    """
    try:
        for index in sorted({k * (len(files) - 1) // max(1, count - 1) for k in range(count)}):
            _check_sample(files, files.images[index], labels)
    except UserError as error:
        raise UserError(f"{error}{or_else}") from None


def _check_sample(files: FileList, name: str, labels: LabelUse) -> None:
    image = read_image(files.root / name)
    if files.data_set.label_path and labels == "check":
        check_label_header(files.label_file(name), files.data_set, image.size)
    elif labels == "read":
        read_label(files.label_file(name), files.data_set, image.size)


def open_labelled(
    files: FileList,
    num_workers: int,
    device: torch.device,
    with_labels: bool = True,
    or_else: str = "",
    skipped: list[str] | None = None,
) -> Iterator[LabelledImage]:
    """Yield every image of the list in order, loading a few ahead, so memory does not grow with the list.

    Args:
        or_else: what else there is to do about a file that cannot be used, as the end of the message.
        skipped: such files are left out, and what is wrong with them goes in here; None raises instead.

    Raises:
        UserError: in the main process, when a file cannot be used, or, with `skipped`, too many one after the other.
        LoaderDied: a loader process died; see `load_in_order`.
    """
    samples = load_in_order(
        _Files(files, with_labels),
        range(len(files)),
        num_workers=num_workers,
        skip_unusable=skipped is not None,
        or_else=or_else,
    )
    for sample in samples:
        if isinstance(sample, UserError):
            skipped.append(str(sample))
            continue
        name, pixels, label = sample
        image = normalise(to_device(torch.from_numpy(pixels), device)).permute(2, 0, 1)[None].contiguous()
        yield LabelledImage(name, image, None if label is None else to_device(torch.from_numpy(label), device))
