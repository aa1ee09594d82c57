"""The one rule by which labelled images are split into those trained on and those validated on."""

import posixpath
from dataclasses import replace
from pathlib import Path

from data_handlers.datasets import DataSet
from data_handlers.lists import FileList, has_images, list_images, located, require_labels
from utils.errors import UserError


def validation_images(
    data_set: DataSet,
    root: Path | str,
    flag: str,
    *,
    val_list: str = "",
    val_count: int = 0,
    train: FileList | None = None,
) -> FileList:
    """The images a segmentation net is scored on. Raises `UserError`.

    These are the images of the text file `val_list`; without it, the last `val_count` training images; without either,
    the data set's own `val` split; and where it declares none, its last `held_out` training images.

    Args:
        flag: command line flag that names `root`, for messages.
        train: the training images, None for all of the data set's.
    """
    has_split = "val" in data_set.images
    if val_list or (has_split and not val_count):
        return list_images(data_set, root, flag, split="val" if has_split else "train", list_file=val_list)
    files = train or list_images(data_set, root, flag)
    count = val_count or (data_set.held_out if data_set.held_out >= 1 else round(data_set.held_out * len(files)))
    if count < 1:
        raise UserError(f"{data_set.name} declares no val split: say which images to score with a list or --val_count")
    if count > len(files):
        default = "" if val_count else f" (the default for {data_set.name})"
        raise UserError(
            f"--val_count {count}{default}: there are {len(files)} images in {files.root}; give a lower number"
        )
    return replace(files, images=files.images[-count:])


def train_and_validation(
    data_set: DataSet,
    root: Path | str,
    flag: str,
    *,
    list_file: str = "",
    val_list: str = "",
    val_count: int = 0,
    label_root: Path | str = "",
) -> tuple[FileList, FileList]:
    """The labelled images to train on and to validate on, by the rule of `validation_images`; no image is in both.

    Args:
        list_file: text file with the images, what `--src_list` says; '' takes all of the training split.
        label_root: folder that holds the labels, what `--src_label_dir` says; '' for `root`.

    Raises:
        UserError: as `validation_images`, an image of `list_file` is validated on as well, no image is left to train
            on, or a label is missing.
    """
    if label_root and not Path(label_root).is_dir():
        raise UserError(f"--src_label_dir {label_root}: no such folder")
    train = list_images(data_set, root, flag, list_file=list_file)
    val = validation_images(data_set, root, flag, val_list=val_list, val_count=val_count, train=train)
    # Compared without suffixes: a SiT set, which holds PNGs, may list an image under another than a text file does.
    validated = {posixpath.splitext(image)[0] for image in val.images}
    shared = {image for image in train.images if posixpath.splitext(image)[0] in validated}
    is_held_out = not val_list and (val_count or "val" not in data_set.images)
    if list_file and shared and not is_held_out:
        origin = f"--val_list {val_list}" if val_list else f"the val split of {data_set.name}"
        raise UserError(f"{origin}: {min(shared)} is in --src_list {list_file}, too; training would see it")
    train = replace(train, images=tuple(image for image in train.images if image not in shared))
    if not train.images:
        if val_list:
            raise UserError(f"--val_list {val_list} names every image of {root}; none is left to train on")
        raise UserError(
            f"--val_count {len(val)}: of {len(val)} images in {root}, 1 to {len(val) - 1} can be kept for validation"
        )
    labels = Path(label_root) if label_root else None
    train, val = (located(replace(files, label_root=labels)) for files in (train, val))
    for files in (train, val):
        require_labels(files, "--src_label_dir" if labels else flag)
    return train, val


def val_split(target: FileList) -> FileList | None:
    """The val split of the target's data set, None where there is none. Raises `UserError` as `list_images`."""
    if not has_images(target.data_set, target.root, "val"):
        return None
    return list_images(target.data_set, target.root, "--trg_data_dir", split="val", training=False)
