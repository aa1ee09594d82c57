"""Scoring a trained segmentation net on a labelled data set, or predicting pictures: the command `evaluate.py`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_handlers.choices import AbsentClasses
from data_handlers.classes import CLASS_NAMES, IGNORE, LABEL_IDS, SUBSETS
from data_handlers.datasets import DataSet, find_data_set, for_net_of, with_labels
from data_handlers.label_maps import colourise, to_data_set_ids
from data_handlers.labelled import LabelledImage, check_samples
from data_handlers.lists import FileList, list_images, require_labels
from data_handlers.splits import validation_images
from models.segmentation import require_classes
from training.board import Board, log_validation
from training.distributed import Rank
from training.evaluation_flags import EvaluationFlags
from training.metrics import Scores, merged, scores_of
from training.precision import channels_last
from training.score_table import ABSENT, CONVENTION, class_scores, score_table, subset_lines
from training.segmentation_files import load_segmentation_net
from training.validation import Validation, Validator, report, summary
from utils.devices import resolve_device, workers_for
from utils.errors import UserError, out_of_memory_means
from utils.files import atomic_write, atomic_write_json, check_folder, check_output_file, make_folder

PICTURES = 25  # of --image_summary


def evaluate(flags: EvaluationFlags) -> None:
    """Print a net's scores; write them (`--json`) and its predictions (`--save_predictions`). Raises `UserError`."""
    if flags.json:
        check_output_file(Path(flags.json), "--json")
    predictions = _new_folder(flags.save_predictions, "--save_predictions")
    pictures = _new_folder(flags.image_summary, "--image_summary")
    device = resolve_device(flags.gpus)
    data_set = with_labels(find_data_set(flags.data_set, "--data_set"), flags.labels, "--labels")
    shape, net = load_segmentation_net(Path(flags.weights), "--weights")
    described, data_set = data_set, for_net_of(data_set, shape.num_classes)
    encode = _encoder(flags.prediction_format, data_set, shape.num_classes, described)
    labelled = data_set.has_labels
    root = flags.data_dir or data_set.default_root
    files = _images(data_set, root, flags)
    require_classes(shape.num_classes, data_set.name, data_set.value_map, f"--weights {flags.weights}")
    if labelled and shape.num_classes > len(data_set.class_names):
        raise UserError(
            f"--weights {flags.weights}: the net has {shape.num_classes} classes, {data_set.name} has "
            f"{len(data_set.class_names)}"
        )
    validator = Validator(
        files=files, with_labels=labelled, classes=_scored_classes(flags.classes, data_set, shape.num_classes),
        num_classes=shape.num_classes, num_workers=workers_for(flags.num_workers, device), rank=Rank(device=device),
        scales=flags.scales, flip=flags.flip, long_side=flags.long_side, window=flags.window, size=flags.resize,
        pictures=PICTURES if pictures else 1,
    )  # fmt: skip
    check_samples(files, labels=labelled, flag="--labels")
    net.to(device)
    if device.type == "cpu":
        channels_last(net)
    for folder, flag in ((predictions, "--save_predictions"), (pictures, "--image_summary")):
        if folder:
            make_folder(folder, flag)
    if flags.json:
        make_folder(Path(flags.json).parent, "--json")
    print(f"{shape} on {files.describe()}", flush=True)
    with tqdm(total=len(files), unit="img", dynamic_ncols=True) as bar:

        def on_prediction(image: LabelledImage, prediction: Tensor) -> None:
            if predictions:
                path = predictions / PurePosixPath(image.name).with_suffix(".png")
                _save(path, encode(prediction.cpu().numpy()))
            if flags.error_maps:
                _save(path.with_name(f"{path.stem}_errors.png"), _errors(image.label, prediction, data_set))
            bar.update()

        with out_of_memory_means(lambda: "; use smaller --scales or --long_side, --window, or --gpus cpu"):
            found = validator(net, on_prediction)
    content = {"net": str(shape), "data_set": data_set.name, "data_dir": root, "images": len(files)}
    content |= {n: getattr(flags, n) for n in ("weights", "scales", "flip", "long_side", "window", "resize")}
    _report(found, flags, data_set, validator.classes, content)


def _report(
    found: Validation, flags: EvaluationFlags, data_set: DataSet, classes: Sequence[int], content: dict[str, Any]
) -> None:
    """Print the scores, and write them to TensorBoard and, after `content`, to the file of `--json`.

    Args:
        classes: trainIds that the mean goes over, unless it goes over categories.
    """
    names, of, absent = data_set.class_names, "classes", flags.absent_classes or "left_out"
    matrix, counted, subsets = found.confusion, (), _subset_scores(found.confusion, data_set, absent)
    if flags.classes == "categories":
        of, subsets = flags.classes, {}
        names, groups = zip(*data_set.categories.items(), strict=True)
        matrix, classes = merged(matrix, groups), range(len(names))
    elif flags.classes == "13":
        counted = _subset("16", names)
    size = "{} x {}".format(*flags.resize) if flags.resize else "native size"
    convention = CONVENTION.format(size=size, absent=ABSENT[absent])
    if data_set.has_labels:
        found = replace(found, confusion=matrix, scores=scores_of(matrix, classes, counted, absent))
        print("\n".join([score_table(found.scores, names, of), *subset_lines(subsets, len(matrix)), convention]))
    else:
        print(f"{data_set.name} has no labels, so there are no scores; {summary(found, names)}")
    if flags.image_summary:
        board = Board(Path(flags.image_summary))
        log_validation(board, found, 0, names)
        board("close")
    if flags.json:
        content |= report(found, names) | {
            "classes": class_scores(found.scores, names) if found.scores else {},
            "subsets": {name: scores.means for name, scores in subsets.items()},
            "convention": convention, "confusion": matrix.tolist(),
        }  # fmt: skip
        atomic_write_json(Path(flags.json), content)


def _subset_scores(matrix: Tensor, data_set: DataSet, absent: AbsentClasses) -> dict[str, Scores]:
    """By their number: scores over all classes and over SYNTHIA's 16 and 13, if these are classes of the data set.

    All labelled pixels count, as in the published MaxSquare and SNR.
    """
    names, every = data_set.class_names, range(len(matrix))
    if len(names) != len(matrix) or names not in LABEL_IDS:
        return {}
    subsets = {str(len(every)): every, "16": _subset("16", names), "13": _subset("13", names)}
    return {name: scores_of(matrix, classes, every, absent) for name, classes in subsets.items() if classes}


def _new_folder(value: str, flag: str) -> Path | None:
    """The folder that a flag names, if it does. Raises `UserError` unless it is empty or can be made."""
    if not value:
        return None
    folder = Path(value)
    check_folder(folder, flag)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{flag} {folder} is not empty; nothing is overwritten, name a new folder")
    return folder


def _images(data_set: DataSet, root: str, flags: EvaluationFlags) -> FileList:
    """The images to predict, with their labels where the data set has some."""
    if flags.split == "val" and data_set.has_labels:
        files = validation_images(data_set, root, "--data_dir", val_list=flags.list, val_count=flags.val_count)
    else:
        files = list_images(data_set, root, "--data_dir", list_file=flags.list)
    require_labels(files, "--data_dir")
    if flags.save_predictions and len({PurePosixPath(name).with_suffix("") for name in files.images}) < len(files):
        raise UserError(f"--save_predictions: two images in {root} differ in their ending alone; rename one")
    return files


def _errors(label: Tensor, prediction: Tensor, data_set: DataSet) -> np.ndarray:
    """RGB uint8 (H,W,3): the predicted class's colour where the label is another class, else white."""
    colours = colourise(prediction.cpu().numpy(), data_set.colours)
    colours[((label == prediction) | (label == IGNORE)).cpu().numpy()] = 255
    return colours


def _scored_classes(wanted: str, data_set: DataSet, num_classes: int) -> tuple[int, ...]:
    """The trainIds that the mean goes over, from `--classes`."""
    if wanted == "categories" and not data_set.categories:
        raise UserError(f"--classes categories: {data_set.name} declares no categories; omit the flag")
    if wanted in ("19", "categories"):
        return tuple(range(num_classes))
    if not wanted:
        return tuple(c for c in data_set.classes if c < num_classes)
    if not (found := _subset(wanted, data_set.class_names[:num_classes])):
        raise UserError(f"--classes {wanted}: a subset of Cityscapes' classes, which the net on {data_set.name} lacks")
    return found


def _subset(wanted: str, names: Sequence[str]) -> tuple[int, ...]:
    """The trainIds of SYNTHIA's `16` or `13` classes among classes with these names; () where one is missing."""
    kept = [CLASS_NAMES[c] for c in SUBSETS[f"synthia{wanted}"]]
    return tuple(map(names.index, kept)) if set(kept) <= set(names) else ()


def _encoder(
    wanted: str, data_set: DataSet, num_classes: int, described: DataSet
) -> Callable[[np.ndarray], np.ndarray]:  # fmt: skip
    """What makes the pixels of a file from predicted trainIds, from `--prediction_format`.

    Args:
        described: the data set before `for_net_of`; written trainIds are its own, as its label files are read.
    """
    ids = LABEL_IDS.get(data_set.class_names) if num_classes == len(data_set.class_names) else None
    if wanted == "labelids" and not ids:
        raise UserError(f"--prediction_format labelids: {data_set.name} has other classes; use trainids or colour")
    if wanted == "colour":
        return partial(colourise, colours=data_set.colours)
    if wanted == "trainids" and described != data_set:
        ids = {described.class_names.index(name): k for k, name in enumerate(data_set.class_names)}
    elif wanted == "trainids":
        return np.asarray
    return partial(to_data_set_ids, id_map=ids) if ids else np.asarray


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, partial(Image.fromarray(pixels).save, format="PNG", compress_level=1))
