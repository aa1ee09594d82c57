"""The flags of `evaluate.py`. Nothing here imports PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_handlers.choices import LABELS
from data_handlers.datasets import find_data_set
from training.config import ROOT_HELP
from training.flags import check, check_not_negative, data_set_option, option

ENCODINGS = ("labelids", "trainids", "colour")


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """The net, the data set and how it is scored."""

    weights: str = option(
        "", "a net of train_semseg_on_source.py (file or run folder), of train_procst.py (checkpoint or run folder: "
        "the net trained on SiT), or of the authors (pretrained_semseg_on_*.pth; .params of "
        "CBST's) (required)", metavar="PATH",
        required=True,
    )  # fmt: skip
    data_set: str = data_set_option("cityscapes", "what it is scored on, which must have labels")
    data_dir: str = option("", ROOT_HELP, metavar="DIR")
    labels: str = option("", "what its label files hold (default: what the data set declares)", choices=LABELS)
    gpus: tuple[str, ...] = option(
        (), "index of the CUDA device, or cpu (default: the first GPU, or the CPU where there is none)", type=str,
        nargs="+", metavar="GPU",
    )  # fmt: skip
    list: str = option("", "text file with the images to score, instead of the val split", metavar="FILE")
    classes: str = option(
        "", "what the mean goes over: all classes, those of SYNTHIA, these without wall, fence and pole, or "
        "Cityscapes' seven categories (default: the data set's classes, 16 for synthia)",
        choices=("19", "16", "13", "categories"),
    )  # fmt: skip
    scales: tuple[float, ...] = option(
        (1.0,), "predict at these sizes relative to the native one, probabilities averaged", type=float, nargs="+",
        metavar="S",
    )  # fmt: skip
    flip: bool = option(False, "average with the prediction of the mirror image, at every scale")
    json: str = option("", "write the scores and the confusion matrix to this file", metavar="FILE")
    val_count: int = option(
        0, "score the last N training images, which train_semseg_on_source.py --val_count N keeps out (default: the "
        "val split; GTA5 the last 500, SYNTHIA the last 300)",
    )  # fmt: skip
    save_predictions: str = option("", "write a PNG for every image into this new folder", metavar="DIR")
    prediction_format: str = option(
        "", "Cityscapes label ids, trainIds or class colours (default: labelids; trainids of sets with other classes)",
        choices=ENCODINGS,
    )  # fmt: skip
    num_workers: int | None = option(
        None, "loader processes (default: 6, or as many as CPUs; half of them on a CPU)", type=int
    )

    first: ClassVar[Sequence[str]] = (
        "weights", "data_set", "data_dir", "labels", "gpus", "list", "classes", "scales", "flip", "json",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for scale in self.scales:
            usable = math.isfinite(scale) and 0.05 <= scale <= 8.0
            check(usable, f"--scales {scale}: every scale must be between 0.05 and 8")
        check(len(set(self.scales)) == len(self.scales), "--scales names a scale twice")
        check_not_negative(self, "val_count", "num_workers")
        labelled = find_data_set(self.data_set, "--data_set").has_labels
        check(labelled, f"--data_set {self.data_set} has no labels to score with; name a labelled set or a description")
        check(not (self.list and self.val_count), "--list and --val_count contradict each other; give one")
        check(
            not self.prediction_format or bool(self.save_predictions),
            "--prediction_format acts only with --save_predictions",
        )
