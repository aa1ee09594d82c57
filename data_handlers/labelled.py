"""Images with their labels, one at a time, as evaluation reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_handlers.choices import OR_SKIP
from data_handlers.classes import CITYSCAPES_IDS, IGNORE, LABEL_IDS
from data_handlers.images import image_size, label_values_to_train_ids, read_image, read_label, read_label_values
from data_handlers.lists import FileList
from utils.devices import to_device
from utils.errors import UserError
from utils.loaders import load_in_order
from utils.locks import say
from utils.sizes import evenly_spaced

CHECKED_IMAGES = 5
CHECKED_LABELS = 20  # a multiple of the number of images, so that these are among them


@dataclass(frozen=True)
class LabelledImage:
    """An image at native size, or at the size asked for.

    Attributes:
        name: relative path in its data set.
        pixels: RGB uint8 (H,W,3), on the device asked for.
        label: trainIds uint8 (H,W), 255 = ignore, on the same device; None where labels are not read.
    """

    name: str
    pixels: Tensor
    label: Tensor | None


def check_samples(
    files: FileList, *, labels: bool = True, flag: str = "--src_labels", skip: bool | None = None
) -> None:
    """Decode up to 6 images and 21 labels of a list, and check that the labels are encoded as they are read.

    A wrong kind of file or of label is a mistake about the whole data set. This check finds it in seconds, before
    anything is written.

    Args:
        labels: whether labels are read.
        flag: command line flag that says how this list's labels are read, for messages.
        skip: ignore files that cannot be used (`--on_bad_image skip`), and only check the encoding of the labels; None
            for a command without that flag.

    Raises:
        UserError: a file cannot be used, or the labels look like trainIds and are read as label ids.
    """
    images = samples(files, CHECKED_IMAGES)
    occurs = np.zeros(2**24, dtype=bool)  # by value
    for name in samples(files, CHECKED_LABELS if labels else CHECKED_IMAGES):
        path = files.image_file(name)
        try:
            size = read_image(path).size if name in images else image_size(path)
            if labels:
                values = read_label_values(files.label_file(name), files.data_set, size)
                occurs[values] = True
                label_values_to_train_ids(values, files.label_file(name), files.data_set)
        except UserError as error:
            if not skip:
                raise UserError(f"{error}{'' if skip is None else OR_SKIP}") from None
    if labels:
        _check_encoding(files, np.flatnonzero(occurs), flag)


def samples(files: FileList, count: int) -> dict[str, None]:
    """Evenly spaced images and the last one, as an interrupted copy damages the end; in order, each once."""
    return dict.fromkeys([*evenly_spaced(files.images, count), *files.images[-1:]])


def _check_encoding(files: FileList, values: np.ndarray, flag: str) -> None:
    """Refuse trainIds that are read as Cityscapes' or GTA5's label ids, which would silently become other classes.

    Every trainId is a known id of these data sets: the trainId 7 (traffic sign) is the id of road. The check is not
    needed for SYNTHIA, where ids are stored in 16 bits and trainIds in 8. A flag that says what the labels hold is
    believed.

    Args:
        values: sorted values that occur in the sampled labels.
    """
    data_set = files.data_set
    if data_set.labels != "ids" or data_set.labels_flag or data_set.id_map not in LABEL_IDS.values():
        return
    known = values[values != IGNORE]
    if not len(known) or known.max() > max(CITYSCAPES_IDS.values()):
        return
    where = f"labels in {files.label_root or files.root}"
    found = f"hold only the values {', '.join(map(str, values))}"
    if IGNORE in values:
        raise UserError(
            f"{where} {found}: these look like trainIds, but {data_set.name} labels are read as label ids; say "
            f"{flag} trainids, or {flag} ids if they are ids"
        )
    if ((known >= 1) & (known <= 6)).any():
        say(
            f"WARNING: {where} {found}, of which 1 to 6 are no classes as label ids; if these are trainIds, say "
            f"{flag} trainids, otherwise {flag} ids"
        )


def open_labelled(
    files: FileList, num_workers: int, device: torch.device, with_labels: bool, skip: bool | None,
    size: tuple[int, int] | None = None,
) -> Iterator[LabelledImage | UserError]:  # fmt: skip
    """Yield every image of the list in order. A few are loaded ahead, so memory does not grow with the list.

    Args:
        skip: yield the error for an image that cannot be used, instead of raising it; None as of `check_samples`.
        size: (W,H) to which images and labels are resized; None keeps their own.

    Raises:
        UserError: in the main process, when a file cannot be used, or, with `skip`, too many one after the other.
        LoaderDied: a loader process died; see `load_in_order`.
    """

    def load(name: str) -> tuple[str, np.ndarray, np.ndarray | None]:
        image = read_image(files.image_file(name))
        label = read_label(files.label_file(name), files.data_set, image.size, size) if with_labels else None
        return name, np.array(image.resize(size, Image.Resampling.BICUBIC) if size else image), label

    reading = {"num_workers": num_workers, "skip_unusable": bool(skip), "or_else": "" if skip is None else OR_SKIP}
    for sample in load_in_order(load, files.images, **reading):
        if isinstance(sample, UserError):
            yield sample
        else:
            name, *arrays = sample
            yield LabelledImage(name, *(a if a is None else to_device(torch.from_numpy(a), device) for a in arrays))
