"""Looking at everything that can be wrong with the input of a ProCST run, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.config import ProCSTConfig
from core.execution import (
    Precision,
    channels_last,
    recomputes_blocks,
    resolve_precision,
    set_convolution_precision,
    set_determinism,
)
from core.label_networks import build_label_networks, load_source_net
from core.progress import ScalePlan, scale_plans
from core.step import LabelNetworks, PerceptualNet
from training.validation import Validator, scored_classes
from data_handlers.cache import OR_SKIP, ImageCache
from data_handlers.cache_building import bytes_to_build, open_cache
from data_handlers.datasets import DATA_SETS
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images, missing_labels, require_labels
from models.segmentation import require_classes
from training.synchronised_norm import synchronise_batch_norms
from models.vgg import build_vgg
from training.distributed import Rank
from utils.errors import UserError
from utils.sizes import evenly_spaced
from utils.tensor_files import weights_fingerprint

LABEL_FREE_IMAGES = 100  # target images looked at for the label-free score where there is no val split


@dataclass(frozen=True)
class PreparedRun:
    """A run whose input has been looked at; nothing is written yet.

    Attributes:
        config: with all that `auto` stood for resolved.
        plans: of the scales.
        labels: networks of the label losses, None without.
        validation_line: says what validates the last scale, or why nothing does.
        inputs: fingerprints of what is learnt from.
    """

    config: ProCSTConfig
    source: FileList
    target: FileList
    plans: Sequence[ScalePlan]
    labels: LabelNetworks | None
    validator: Validator | None
    validation_line: str
    perceptual: PerceptualNet
    inputs: dict[str, str]
    rank: Rank


def prepare(config: ProCSTConfig, rank: Rank, fresh_target_net: bool) -> PreparedRun:
    """Look at everything that can be wrong with the input, and build the networks that are not trained.

    Args:
        fresh_target_net: the net trained on SiT starts from its backbone's weights, not from a checkpoint.

    Raises:
        UserError: names the file or flag.
    """
    device = rank.device
    set_determinism(config.compute.deterministic)
    precision = agreed_precision(config.compute.precision, rank)
    config = replace(config, compute=config.compute.in_precision(precision))
    set_convolution_precision(precision)
    source, target = _file_lists(config)
    plans = scale_plans(config, max(len(source), len(target)))
    labels, validator, validation_line = None, None, ""
    inputs = {"list of source images": source.fingerprint(), "list of target images": target.fingerprint()}
    if not config.run.no_semseg:
        require_classes(config.semseg.num_classes, source.data_set.name, source.data_set.value_map)
        config, validator, validation_line = _validation(config, target, device, rank)
        source_net = load_source_net(config)
        inputs["segmentation net (--semseg_weights)"] = weights_fingerprint(source_net)
        labels = build_label_networks(
            config.semseg, source_net, config.run.manual_seed, pretrained=fresh_target_net,
            save_memory=recomputes_blocks(precision, device),
        )  # fmt: skip
        if fresh_target_net:
            inputs["start of the net trained on SiT (--backbone_weights)"] = weights_fingerprint(labels.target_net)
        if rank.count > 1:
            synchronise_batch_norms(labels.target_net)
        channels_last(labels.source_net)
        channels_last(labels.target_net)
    skip = config.data.on_bad_image == "skip"
    labels_used = "check" if config.run.no_semseg else "read"
    check_samples(source, labels=labels_used, flag="--src_labels", or_else=OR_SKIP, skip=skip)
    check_samples(target, labels="none", or_else=OR_SKIP, skip=skip)
    perceptual = build_vgg(config.run.vgg_weights, config.loss.perceptual_layers, config.run.manual_seed).to(device)
    channels_last(perceptual)
    inputs["perceptual net (--vgg_weights)"] = weights_fingerprint(perceptual)
    _require_one_run(config, inputs, rank)
    return PreparedRun(config, source, target, plans, labels, validator, validation_line, perceptual, inputs, rank)


def agreed_precision(wanted: str, rank: Rank) -> Precision:
    """What every process computes in: of `auto`, what pays on the first one's device.

    Raises:
        UserError: this process was asked for another precision, or its device cannot do it.
    """
    rank.require_equal({"--precision": wanted})
    return resolve_precision(rank.from_first(resolve_precision(wanted, rank.device)), rank.device)


def _file_lists(config: ProCSTConfig) -> tuple[FileList, FileList]:
    data = config.data
    source = list_images(DATA_SETS[data.source], data.src_data_dir, "--src_data_dir", list_file=data.src_list)
    target = list_images(DATA_SETS[data.target], data.trg_data_dir, "--trg_data_dir", list_file=data.trg_list)
    require_labels(source, "--src_data_dir")
    if not config.run.no_semseg and not source.data_set.label_path:
        raise UserError(f"--source {data.source} has no labels, which the label losses need: add --no_semseg")
    return source, target


def _validation_list(target: FileList) -> tuple[FileList | None, int]:
    """The target's val split, None where there is none, and how many of its images have no label."""
    patterns = target.data_set.images.get("val", ())
    if not any(True for pattern in patterns for _ in target.root.glob(pattern)):
        return None, 0
    files = list_images(target.data_set, target.root, "--trg_data_dir", split="val", training=False)
    return files, len(missing_labels(files))


def _resolve_selection(select_by: str, files: FileList | None, missing: int, target: FileList) -> str:
    """What `--select_by` comes to with this target.

    Raises:
        UserError: selection by mIoU where labels are missing.
    """
    if select_by in ("none", "label_free"):
        return select_by
    if files is None or missing == len(files):
        if select_by == "auto":
            return "none"
        raise UserError(
            f"--select_by miou needs a labelled val split in --trg_data_dir {target.root}, and there is none; "
            "use --select_by label_free, which needs no labels, or none"
        )
    if missing:
        # Some labels and not others is a broken download, and neither way of going on is what was meant.
        raise UserError(
            f"--trg_data_dir {target.root}: {missing} of the {len(files)} val images have no label, so no mIoU can "
            "be had; complete the labels, or use --select_by label_free or none"
        )
    return "miou"


def _validation(
    config: ProCSTConfig, target: FileList, device: torch.device, rank: Rank
) -> tuple[ProCSTConfig, Validator | None, str]:
    """Resolve `--select_by`, and make what validates the last scale, with a line that says what is done.

    Raises:
        UserError: selection by mIoU where labels are missing, or `--validation_rate` where nothing is validated.
    """
    files, missing = _validation_list(target)
    asked = config.semseg.select_by
    select_by = _resolve_selection(asked, files, missing, target)
    if select_by == "none":
        if config.semseg.validation_rate:
            raise UserError(
                f"--validation_rate: {target.root} has no labelled val split, so nothing is validated; leave it out, "
                "or validate without labels with --select_by label_free"
            )
        reason = "as --select_by none says" if asked == "none" else "the target has no labelled val split"
        return _with_selection(config, "none"), None, f"no validation of the last scale: {reason}"
    labelled = files is not None and not missing
    if files is None:
        files = replace(target, images=tuple(evenly_spaced(target.images, LABEL_FREE_IMAGES)))
    skip = config.data.on_bad_image == "skip"
    check_samples(files, labels="read" if labelled else "none", flag="--trg_labels", or_else=OR_SKIP, skip=skip)
    classes = scored_classes(config.semseg.num_classes, target.data_set, DATA_SETS[config.data.source])
    num_classes, workers = config.semseg.num_classes, config.data.num_workers
    validator = Validator(files, labelled, classes, num_classes, device, workers, rank, skip)
    line = f"validating the last scale on {files.describe()}, best by {select_by}"
    return _with_selection(config, select_by), validator, line


def _with_selection(config: ProCSTConfig, select_by: str) -> ProCSTConfig:
    return replace(config, semseg=replace(config.semseg, select_by=select_by))


def open_caches(config: ProCSTConfig, source: FileList, target: FileList) -> dict[str, ImageCache]:
    """The caches of the `source` and `target` images, built where they are not there yet; none without `--cache_dir`.

    Raises:
        UserError: as of `data_handlers.cache_building.open_cache`.
    """
    data = config.data
    if not data.cache_dir:
        return {}
    building = {"num_workers": data.num_workers, "skip_unusable": data.on_bad_image == "skip"}
    wanted = _wanted_caches(config, source, target)
    return {domain: open_cache(**wanted[domain], **building) for domain in ("source", "target")}


def bytes_to_cache(config: ProCSTConfig, source: FileList, target: FileList) -> int:
    """Disk space that `open_caches` will take.

    Raises:
        UserError: the cache cannot be read.
    """
    return sum(bytes_to_build(**wanted) for wanted in _wanted_caches(config, source, target).values())


def _wanted_caches(config: ProCSTConfig, source: FileList, target: FileList) -> dict[str, dict[str, Any]]:
    """What the caches of both domains hold, as arguments of `open_cache` and `bytes_to_build`."""
    data = config.data
    shared = {"cache_dir": Path(data.cache_dir), "resample": data.resample}
    return {
        "source": {**shared, "files": source, "size": data.src_resize, "with_labels": not config.run.no_semseg},
        "target": {**shared, "files": target, "size": data.trg_resize, "with_labels": False},
    }


def _require_one_run(config: ProCSTConfig, inputs: dict[str, str], rank: Rank) -> None:
    """Check that all processes were asked for the same run and see the same files."""
    plain = config.to_json()
    compared = ("network", "loss", "optim", "schedule", "compute")
    values = {f"configuration ({name})": plain[name] for name in compared}
    paths = ("semseg_weights", "backbone_weights")
    values["configuration (semseg)"] = {name: value for name, value in plain["semseg"].items() if name not in paths}
    values["--manual_seed"] = config.run.manual_seed
    rank.require_equal({**values, **inputs})
