"""The flags of `evaluate.py`. Nothing here imports PyTorch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_handlers.choices import ABSENT_CLASSES, LABELS
from data_handlers.datasets import find_data_set
from training.config import ROOT_HELP
from training.flags import Size, check, check_not_negative, check_positive, data_set_option, option, size_option

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
    data_set: str = data_set_option(
        "cityscapes", "what it is scored on; a folder of any pictures: they are predicted without scores"
    )
    data_dir: str = option("", ROOT_HELP, metavar="DIR")
    labels: str = option("", "what its label files hold (default: what the data set declares)", choices=LABELS)
    gpus: tuple[str, ...] = option(
        (), "index of the CUDA device, or cpu (default: the first GPU, or the CPU where there is none)", type=str,
        nargs="+", metavar="GPU",
    )  # fmt: skip
    split: str = option("val", "the images to score; train: the whole train split", choices=("train", "val"))
    list: str = option("", "text file with the images to score, instead of the split", metavar="FILE")
    classes: str = option(
        "", "what the mean goes over: all classes, those of SYNTHIA, of these 16 the 13 other than wall, "
        "fence and pole, or Cityscapes' seven categories (default: the data set's classes, 16 for synthia)",
        choices=("19", "16", "13", "categories"),
    )  # fmt: skip
    absent_classes: str = option(
        "", "the IoU of a class without a labelled pixel: none, so that it does not count in the mean; 0 where it was "
        "predicted, as in cityscapesScripts, mmseg, MaxSquare and SNR; or 0, as in CBST's log (default: left_out)",
        choices=ABSENT_CLASSES,
    )  # fmt: skip
    resize: Size | None = size_option(
        "resize images to this size, and labels by taking the nearest pixel, and score there, as MaxSquare and SNR "
        "do at 1024 512 (default: native size)"
    )
    scales: tuple[float, ...] = option(
        (1.0,), "predict at these sizes relative to the native one, probabilities averaged", type=float, nargs="+",
        metavar="S",
    )  # fmt: skip
    flip: bool = option(False, "average with the prediction of the mirror image, at every scale")
    long_side: int | None = option(
        None, "resize the images so that the longer side is N, and the probabilities back; with --flip and 2048 the "
        "published test of CBST", type=int,
    )  # fmt: skip
    window: Size | None = size_option(
        "predict in windows of this size, which overlap by a third, logits averaged, for images larger than the net "
        "can take (default: whole images)"
    )
    image_summary: str = option(
        "", "write TensorBoard pictures of 25 evenly spaced images, labels and predictions, and the scores, into this "
        "new folder", metavar="DIR",
    )  # fmt: skip
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
    error_maps: bool = option(False, "write NAME_errors.png, too: wrong pixels in the predicted class's colour, "
        "others white, those without a label, too")
    num_workers: int | None = option(
        None, "loader processes (default: 6, or as many as CPUs; half of them on a CPU)", type=int
    )

    first: ClassVar[Sequence[str]] = (
        "weights", "data_set", "data_dir", "labels", "gpus", "split", "list", "classes", "scales", "flip", "json",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for scale in self.scales:
            usable = math.isfinite(scale) and 0.05 <= scale <= 8.0
            check(usable, f"--scales {scale}: every scale must be between 0.05 and 8")
        check(len(set(self.scales)) == len(self.scales), "--scales names a scale twice")
        check(not self.long_side or self.scales == (1.0,), "--long_side and --scales contradict each other; give one")
        check_not_negative(self, "val_count", "num_workers")
        check_positive(self, "resize", "long_side", "window")
        check(not self.val_count or self.split == "val", "--split train and --val_count contradict each other")
        check(not (self.list and self.val_count), "--list and --val_count contradict each other; give one")
        check(
            not self.prediction_format or bool(self.save_predictions),
            "--prediction_format acts only with --save_predictions",
        )
        check(not self.error_maps or bool(self.save_predictions), "--error_maps acts only with --save_predictions")
        labelled = find_data_set(self.data_set, "--data_set").has_labels
        for name in () if labelled else ("classes", "absent_classes", "val_count", "error_maps"):
            check(not getattr(self, name), f"--{name}: {self.data_set} has no labels; omit the flag")
