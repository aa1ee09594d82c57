"""What prepares every method: lists of images, domains and validators, made of the shared groups of flags and checked.

All of it raises a `UserError`, which names the file or the flag, before anything is written.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_handlers.datasets import DataSet, find_data_set, for_net_of, with_labels, with_split
from data_handlers.domain import Domain
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images, missing_labels, require_images, require_labels
from data_handlers.splits import val_split, validation_images
from models.segmentation import require_classes
from training.config import SourceFiles, TargetImages
from training.distributed import Rank
from training.validation import Validator, scored_classes
from utils.devices import workers_for
from utils.errors import UserError
from utils.sizes import evenly_spaced

LABEL_FREE_IMAGES = 100  # target images of the label-free score where there is no val split


def source_set(
    data: SourceFiles, num_classes: int | None, origin: str = "", otherwise: str = "choose a labelled data set"
) -> DataSet:
    """The source as its flags describe it.

    Args:
        num_classes: of the net that learns its labels; None where labels are not read.
        origin: the file that says this number; '' if `--num_classes` says it.
        otherwise: what to do where the source has no labels.
    """
    data_set = with_split(find_data_set(data.source, "--source"), data.src_split)
    data_set = with_labels(data_set, data.src_labels, "--src_labels")
    if num_classes is None:
        return data_set
    if not data_set.has_labels:
        raise UserError(f"--source {data.source} has no labels to train on; {otherwise}")
    data_set = for_net_of(data_set, num_classes)
    require_classes(num_classes, data_set.name, data_set.value_map, origin)
    return data_set


def source_files(data: SourceFiles, num_classes: int | None, label_dir: str = "", **described: str) -> FileList:
    """The source images, with labels in `label_dir` if they are not below the root; for the others see `source_set`."""
    data_set = source_set(data, num_classes, **described)
    root = data.src_data_dir or data_set.default_root
    files = list_images(data_set, root, "--src_data_dir", list_file=data.src_list)
    if label_dir:
        files = replace(files, label_root=Path(label_dir))
    if num_classes is not None:
        require_labels(files, "--src_label_dir" if label_dir else "--src_data_dir")
    return files


def target_files(
    data: TargetImages, num_classes: int | None = None, split: str = "train", labels: str = ""
) -> FileList:  # fmt: skip
    """The target images of a split, with the classes that a net of `num_classes` knows; `labels`: `--trg_labels`."""
    data_set = with_labels(find_data_set(data.target, "--target"), labels, "--trg_labels")
    data_set = data_set if num_classes is None else for_net_of(data_set, num_classes)
    root = data.trg_data_dir or data_set.default_root
    return list_images(data_set, root, "--trg_data_dir", split=split, list_file=data.trg_list)


def scored_target(data: Any, source: DataSet, num_classes: int) -> FileList:
    """The labelled images that score a net which source alone trains.

    Args:
        data: with the fields `target`, `trg_data_dir` and `trg_labels` of the flags.
    """
    data_set = with_labels(find_data_set(data.target, "--target"), data.trg_labels, "--trg_labels")
    data_set = for_net_of(data_set, num_classes)
    if not data_set.has_labels or data_set.class_names != source.class_names:
        lacks = "other classes than" if data_set.has_labels else "no labels of the classes of"
        raise UserError(f"--target {data.target} has {lacks} --source {source.name}, so it scores nothing; omit it")
    files = validation_images(data_set, data.trg_data_dir or data_set.default_root, "--trg_data_dir")
    require_labels(files, "--trg_data_dir")
    return files


def make_domain(
    config: Any, rank: Rank, files: FileList, name: str, *, image_roots: Sequence[str] = (), **reading: Any
) -> Domain:
    """A domain of a method; some of its files are checked.

    Args:
        config: with the sections `run` and `loader`.
        image_roots: `--source_images`.
        reading: further fields of `Domain`: at least `resize` and `crop`.
    """
    domain = Domain(
        files=files, name=name, seed=config.run.manual_seed, resample=config.loader.resample,
        skips=config.loader.on_bad_image == "skip", cache_dir=config.loader.cache_dir,
        num_workers=workers_for(config.loader.num_workers, rank.device, rank.count),
        image_roots=tuple(map(Path, image_roots)), **reading,
    )  # fmt: skip
    for listed in domain.lists:
        if image_roots:
            require_images(listed, "--source_images")
        check_samples(listed, labels=domain.labels, flag="--src_labels", skip=domain.skips)
    return domain


def make_pair(
    config: Any, rank: Rank, *, source: FileList, target: FileList, sizes: Any, batch: int, image_roots: Sequence[str]
) -> dict[str, Domain]:
    """Labelled source and target images, mirrored at random, each list with at least a batch, as `make_domain`.

    Args:
        sizes: with the fields `src_resize`, `trg_resize` and `crop_size` of the flags; None as crop for whole images.
    """
    domains = {}
    for name, files, resize, roots in (
        ("source", source, sizes.src_resize, image_roots), ("target", target, sizes.trg_resize, ())
    ):  # fmt: skip
        if len(files) < batch:
            raise UserError(f"--batch_size {batch}: there are {len(files)} {name} images")
        domains[name] = make_domain(
            config, rank, files, name, resize=resize, crop=sizes.crop_size or resize, flip=True,
            labels=name == "source", image_roots=roots,
        )  # fmt: skip
    return domains


def make_validator(
    config: Any, rank: Rank, files: FileList, *, flag: str = "--trg_labels", with_labels: bool, **fields: Any
) -> tuple[Validator, str]:
    """A validator on `files`, some of which are checked, and a line that describes it.

    Args:
        flag: says how the labels are read, for messages.
        fields: `select_by`, `classes` and `num_classes` of `Validator`.
    """
    skip = config.loader.on_bad_image == "skip"
    check_samples(files, labels=with_labels, flag=flag, skip=skip)
    workers = workers_for(config.loader.num_workers, rank.device, rank.count)
    validator = Validator(
        files=files, with_labels=with_labels, num_workers=workers, rank=rank, skip_unusable=skip, **fields
    )
    chosen = "which chooses nothing" if validator.select_by == "none" else f"best by {validator.select_by}"
    return validator, f"validating on {files.describe()}, {chosen}"


def target_validator(
    config: Any, rank: Rank, source: DataSet, target: FileList, num_classes: int, select_by: str, always: bool = False
) -> tuple[Validator | None, str]:
    """What validates a net on the target's val split, or None, and a line that says so.

    Args:
        select_by: `auto` means `miou` where the split has labels, else `none`.
        always: with `none`, validate all the same where there is a split, and choose nothing.
    """
    files = val_split(target)
    missing = len(missing_labels(files)) if files else 0
    has_labels = bool(files and target.data_set.has_labels and missing < len(files))
    labelled = has_labels and not missing
    if select_by == "auto":
        select_by = "miou" if has_labels else "none"
    if select_by == "miou" and not labelled:
        found = f"{missing} of its {len(files)} images have no label" if missing else "there is none"
        raise UserError(
            f"--select_by miou needs a labelled val split in --trg_data_dir {target.root}, and {found}; use "
            "--select_by label_free, which needs no labels, or none"
        )
    if select_by == "none" and not (always and files):
        return None, f"no validation: {'--select_by is none' if labelled else 'the target has no labelled val split'}"
    if labelled and target.data_set.class_names != source.class_names:
        raise UserError(
            f"--target {target.data_set.name} has other classes than --source {source.name}, so its labels score "
            "nothing; use --select_by none or label_free, or describe it with the same class names"
        )
    if files is None:
        files = replace(target, images=tuple(evenly_spaced(target.images, LABEL_FREE_IMAGES)))
    if not labelled:  # predictions are of the source's classes
        kinds = {name: getattr(source, name) for name in ("class_names", "colours", "classes")}
        files = replace(files, data_set=replace(files.data_set, id_map={}, **kinds))
    classes = scored_classes(num_classes, files.data_set, source)
    validator, line = make_validator(
        config, rank, files, with_labels=labelled, select_by=select_by, classes=classes, num_classes=num_classes
    )
    return validator, f"{line}, without mIoU: {missing} of them have no label" if has_labels and missing else line
