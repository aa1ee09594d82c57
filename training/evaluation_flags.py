"""The flags of `evaluate.py`. Nothing here imports PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_handlers.choices import LABELS
from data_handlers.datasets import DATA_SETS
from training.flags import check, check_not_negative, option

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
    data_set: str = option(
        "cityscapes", "what it is scored on", choices=sorted(name for name, d in DATA_SETS.items() if d.label_path)
    )
    data_dir: str = option("data/cityscapes", "its root folder", metavar="DIR")
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
        "", "Cityscapes label ids, trainIds or class colours (default: labelids)", choices=ENCODINGS
    )
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
        check(not (self.list and self.val_count), "--list and --val_count contradict each other; give one")
        check(
            not self.prediction_format or bool(self.save_predictions),
            "--prediction_format acts only with --save_predictions",
        )
