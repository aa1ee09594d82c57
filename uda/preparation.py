"""Checking the input of a training of a segmentation net, before anything is written."""

from dataclasses import replace
from pathlib import Path

from data_handlers.cache import OR_SKIP
from data_handlers.datasets import DATA_SETS, with_labels
from data_handlers.domain import Domain
from data_handlers.labelled import check_samples
from data_handlers.lists import require_images
from data_handlers.splits import train_and_validation
from models.segmentation import require_classes
from training.checkpoint import BEST, DAMAGED, LATEST, PREVIOUS
from training.distributed import Rank
from training.run import Continued, Prepared
from training.segmentation_files import is_of_run, net_to_train
from training.validation import Validator, scored_classes
from uda.config import SourceTrainingConfig
from uda.source import SourceTraining
from utils.devices import workers_for
from utils.errors import UserError
from utils.files import check_output_file


def prepare_source(config: SourceTrainingConfig, rank: Rank, continued: Continued | None) -> Prepared:
    """Check the input of a training on source and build its net.

    Raises:
        UserError: names the file or flag.
    """
    data, held_out, net_config = config.source, config.held_out, config.net
    data_set = with_labels(DATA_SETS[data.source], data.src_labels, "--src_labels")
    if not data_set.label_path:
        raise UserError(f"--source {data.source} has no labels to train on; choose a labelled data set")
    require_classes(net_config.num_classes, data_set.name, data_set.value_map)
    train, val = train_and_validation(
        data_set, data.src_data_dir, "--src_data_dir", list_file=data.src_list, val_list=held_out.val_list,
        val_count=held_out.val_count, label_root=held_out.src_label_dir,
    )  # fmt: skip
    image_roots = tuple(Path(root) for root in held_out.source_images)
    for root in image_roots:
        require_images(train.with_images_of(root), "--source_images")
    if image_roots:
        val = val.with_images_of(image_roots[0])
        require_images(val, "--source_images")
    if len(train) < config.poly.batch_size:
        raise UserError(f"--batch_size {config.poly.batch_size}: there are {len(train)} images to train on")
    skip = config.loader.on_bad_image == "skip"
    for files in (*(train.with_images_of(root) for root in image_roots or (train.root,)), val):
        check_samples(files, labels=True, flag="--src_labels", or_else=OR_SKIP, skip=skip)
    _check_output(held_out.output, continued)
    net = net_to_train(net_config, config.run.manual_seed, fresh=continued is None)
    workers = workers_for(config.loader.num_workers, rank.device, rank.count)
    validation = config.validation
    select_by = "miou" if validation.select_by == "auto" else validation.select_by
    rate = validation.validation_rate or len(train) // config.poly.batch_size
    config = replace(config, validation=replace(validation, select_by=select_by, validation_rate=rate))
    source = Domain(
        files=train, name="source", seed=config.run.manual_seed, resize=data.src_resize, crop=data.crop_size,
        labels=True, flip=True, resample=config.loader.resample, skips=skip,
        num_workers=workers, cache_dir=config.loader.cache_dir, image_roots=image_roots,
    )  # fmt: skip
    method = SourceTraining(config=config, rank=rank, source=source, net=net)
    if select_by == "none":
        return Prepared(method=method, validation_line="no validation, as --select_by none says")
    validator = Validator(
        files=val, with_labels=True, select_by=select_by, classes=scored_classes(net_config.num_classes, data_set),
        num_classes=net_config.num_classes, num_workers=workers, rank=rank, skip_unusable=skip,
    )  # fmt: skip
    line = f"validating on {val.describe()}, best by {select_by}"
    return Prepared(method=method, validator=validator, validation_line=line)


def _check_output(output: str, continued: Continued | None) -> None:
    """Check that the output is no file of another run, or of the authors: those are never overwritten.

    Raises:
        UserError: it is, or it cannot be written.
    """
    if not output:
        return
    path = Path(output)
    check_output_file(path, "--output")
    if path.name in (LATEST, PREVIOUS, BEST, DAMAGED):
        # In the run's own folder, the net would take the place of the training state.
        raise UserError(f"--output {path}: {path.name} is the name of a file of run folders; choose another name")
    own = continued and {**continued.checkpoint.info, "run": str(continued.origin.parent)}
    if path.exists() and not (own and is_of_run(path, own)):
        raise UserError(
            f"--output {path} exists and is not of this run; continue the run that wrote it "
            "(--continue_train_from_path), move it away, or name another file"
        )
