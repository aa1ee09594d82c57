"""A TensorBoard folder, and what a validation writes to it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training.metrics import CONFIDENCE_BINS
from training.validation import Validation, report
from utils.locks import say

LOGGED = {
    "mIoU": "miou", "PixelAccuracy": "pixel_accuracy", "MeanAccuracy": "mean_accuracy",
    "FrequencyWeightedIoU": "frequency_weighted_iou", "LabelFree": "label_free", "MeanConfidence": "mean_confidence",
}  # fmt: skip


class Board:
    """Writes to a TensorBoard folder; None writes nothing. Logging ends, with a line, where the disk is full.

    Args:
        purge_step: what an earlier writer of the folder logged from this step on is hidden.
    """

    def __init__(self, folder: Path | None, purge_step: int | None = None) -> None:
        self.folder, self.purge_step, self.writer = folder, purge_step, None

    def __call__(self, method: str, *arguments: Any, **named: Any) -> None:
        """Call a method of the `SummaryWriter`, which is made first."""
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second, which a command without a log saves

        try:
            if self.writer is None:
                self.writer = SummaryWriter(str(self.folder), purge_step=self.purge_step)
            getattr(self.writer, method)(*arguments, **named)
        except OSError as error:
            self.folder = None
            say(f"WARNING: cannot log to TensorBoard ({error}); the run continues without it")


def log_validation(board: Board, validation: Validation, step: int, names: Sequence[str]) -> None:
    """Write a validation to TensorBoard: scores, IoU of each class, label-free scores, confidences, pictures."""
    found = report(validation, names)
    values = {name: found[key] for name, key in LOGGED.items()} | {f"IoU/{n}": v for n, v in found["iou"].items()}
    for name, value in values.items():
        if value is not None:
            board("add_scalar", f"Validation/{name}", value, step)
    counts = validation.statistics.confidence_histogram.cpu().numpy()
    edges = np.linspace(0.0, 1.0, CONFIDENCE_BINS + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    board(
        "add_histogram_raw", "Validation/Confidence", min=0.0, max=1.0, num=counts.sum(), sum=(counts * centres).sum(),
        sum_squares=(counts * centres**2).sum(), bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(),
        global_step=step,
    )  # fmt: skip
    for name, picture in validation.pictures.items():
        board("add_image", f"Validation/Image-Label-Prediction/{name}", picture, step, dataformats="HWC")
