"""Score a segmentation net on a labelled data set: IoU of every class, mIoU, pixel accuracy.

    python evaluate.py --gpus 0 --weights pretrained/pretrained_semseg_on_gta5.pth --data_set cityscapes \\
        --data_dir data/cityscapes
"""

from __future__ import annotations

import argparse
import io
import math
from pathlib import Path, PurePosixPath

import numpy as np
from core.segmentation_files import load_segmentation_net
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_handlers.classes import SYNTHIA_13, SYNTHIA_16
from data_handlers.datasets import DATA_SETS, DataSet
from data_handlers.label_maps import colourise, to_label_ids
from data_handlers.labelled import LabelledImage, check_samples, open_labelled
from data_handlers.lists import FileList, require_labels
from data_handlers.splits import validation_images
from models.segmentation import require_classes
from training.metrics import Scores, scores_of
from training.precision import channels_last, set_convolution_precision
from training.prediction import evaluate
from training.validation import CONVENTION, score_table
from utils.devices import loader_workers, resolve_device
from utils.errors import UserError, out_of_memory_means, run_cli
from utils.files import atomic_write_bytes, atomic_write_json, check_folder, check_output_file, make_folder
from utils.flags import OneLineParser, parse_flags

LABELLED = sorted(name for name, data_set in DATA_SETS.items() if data_set.label_path)
SUBSETS = {16: SYNTHIA_16, 13: SYNTHIA_13}
ENCODINGS = {"labelids": to_label_ids, "trainids": np.asarray, "colour": colourise}


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", nargs="+", metavar="GPU", required=True, help="index of the CUDA device, or cpu")
    add("--weights", required=True, metavar="PATH",
        help="a net of train_semseg_on_source.py (file or run folder), of train_procst.py (checkpoint or run folder: "
        "the net trained on SiT), or of the authors (pretrained_semseg_on_*.pth)")  # fmt: skip
    add("--data_set", choices=LABELLED, default="cityscapes", help="what it is scored on (default: %(default)s)")
    add("--data_dir", default="data/cityscapes", help="its root folder (default: %(default)s)")
    add("--list", default="", metavar="FILE", help="text file with the images to score, instead of the val split")
    add("--val_count", type=int, default=0, metavar="N",
        help="score the last N training images, which train_semseg_on_source.py --val_count N keeps out (default: the "
        "val split; GTA5 the last 500, SYNTHIA the last 300)")  # fmt: skip
    add("--classes", type=int, choices=(19, 16, 13), default=None,
        help="classes the mean goes over: all, those of SYNTHIA, or these without wall, fence and pole (default: the "
        "data set's, 16 for synthia)")  # fmt: skip
    add("--scales", type=float, nargs="+", default=[1.0], metavar="S",
        help="predict at these sizes relative to the native one, probabilities averaged (default: 1)")  # fmt: skip
    add("--flip", action="store_true", help="average with the prediction of the mirror image, at every scale")
    add("--save_predictions", default="", metavar="DIR", help="write a PNG for every image into this new folder")
    add("--prediction_format", choices=sorted(ENCODINGS), default="labelids",
        help="Cityscapes label ids, trainIds or class colours (default: %(default)s)")  # fmt: skip
    add("--json", default="", metavar="OUT", help="write the scores and the confusion matrix to this file")
    add("--num_workers", type=int, default=None,
        help="loader processes (default: 6, or the number of CPUs; half of them with --gpus cpu)")  # fmt: skip
    return parser


def _check_flags(flags: argparse.Namespace, given: frozenset[str]) -> None:
    if bad := [scale for scale in flags.scales if not (math.isfinite(scale) and 0.05 <= scale <= 8.0)]:
        raise UserError(f"--scales {bad[0]}: every scale must be between 0.05 and 8")
    if len(set(flags.scales)) != len(flags.scales):
        raise UserError("--scales names a scale twice")
    if flags.num_workers is not None and flags.num_workers < 0:
        raise UserError(f"--num_workers is {flags.num_workers}; it must be 0 or greater")
    if flags.val_count < 0:
        raise UserError(f"--val_count is {flags.val_count}; it must be 0 or greater")
    if flags.list and flags.val_count:
        raise UserError("--list and --val_count contradict each other; give one")
    if "prediction_format" in given and not flags.save_predictions:
        raise UserError("--prediction_format acts only with --save_predictions")
    if flags.json:
        check_output_file(Path(flags.json), "--json")
    if flags.save_predictions:
        folder = Path(flags.save_predictions)
        check_folder(folder, "--save_predictions")
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"--save_predictions {folder} is not empty; nothing is overwritten, name a new folder")


def _scored_classes(flags: argparse.Namespace, data_set: DataSet, num_classes: int) -> tuple[int, ...]:
    if flags.classes == 19:
        return tuple(range(num_classes))
    subset = SUBSETS[flags.classes] if flags.classes else data_set.classes
    if flags.classes and num_classes < 19:
        raise UserError(f"--classes {flags.classes}: a subset of the 19 classes; the net has {num_classes}")
    return tuple(c for c in subset if c < num_classes)


class PredictionFolder:
    """Writes predictions as PNGs under their images' relative paths."""

    def __init__(self, root: Path, encoding: str) -> None:
        self.root = make_folder(root, "--save_predictions")
        self.encode = ENCODINGS[encoding]

    def put(self, sample: LabelledImage, prediction: Tensor) -> None:
        """Write one prediction, trainIds uint8 (H,W)."""
        path = self.root / PurePosixPath(sample.name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(self.encode(prediction.cpu().numpy())).save(buffer, format="PNG", compress_level=1)
        atomic_write_bytes(path, buffer.getvalue())


def _report(flags: argparse.Namespace, files: FileList, scores: Scores, matrix: Tensor, shape: str) -> dict:
    names = files.data_set.class_names
    return {
        "weights": flags.weights,
        "net": shape,
        "data_set": files.data_set.name,
        "data_dir": flags.data_dir,
        "images": len(files),
        "scales": flags.scales,
        "flip": flags.flip,
        "miou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "iou": {names[c]: value for c, value in zip(scores.classes, scores.iou, strict=True)},
        "absent": [names[c] for c in scores.absent],
        "convention": CONVENTION,
        "confusion": matrix.tolist(),
    }


def main() -> None:
    """Command line entry."""
    flags, given = parse_flags(build_parser())
    _check_flags(flags, given)
    device = resolve_device(flags.gpus)
    set_convolution_precision("fp32")
    data_set = DATA_SETS[flags.data_set]
    files = validation_images(
        data_set, flags.data_dir, "--data_dir", val_list=flags.list, val_count=flags.val_count
    )
    require_labels(files, "--data_dir")
    shape, net = load_segmentation_net(Path(flags.weights), "--weights")
    require_classes(shape.num_classes, data_set.name, data_set.value_map, f"--weights {flags.weights}")
    if shape.num_classes > len(data_set.class_names):
        raise UserError(
            f"--weights {flags.weights}: the net has {shape.num_classes} classes, {data_set.name} has "
            f"{len(data_set.class_names)}"
        )
    classes = _scored_classes(flags, data_set, shape.num_classes)
    check_samples(files, flag="--labels")
    net.to(device)
    if device.type == "cpu":
        channels_last(net)
    folder = PredictionFolder(Path(flags.save_predictions), flags.prediction_format) if flags.save_predictions else None
    if flags.json:
        make_folder(Path(flags.json).parent, "--json")
    print(f"{shape} on {files.describe()}", flush=True)
    loaded = open_labelled(files, loader_workers(flags.num_workers, flags.gpus), device)
    samples = tqdm(loaded, total=len(files), unit="img", dynamic_ncols=True)
    on_prediction = folder.put if folder else None
    with out_of_memory_means(lambda: f" for --scales {max(flags.scales)}; use smaller ones, or --gpus cpu"):
        matrix = evaluate(
            net, samples, shape.num_classes, device, flags.scales, flags.flip, on_prediction=on_prediction
        )
    scores = scores_of(matrix, classes)
    print(score_table(scores, data_set.class_names))
    if flags.json:
        atomic_write_json(Path(flags.json), _report(flags, files, scores, matrix, str(shape)))


if __name__ == "__main__":
    run_cli(main)
