"""The scores of a confusion matrix as `evaluate.py` prints and stores them."""

from collections.abc import Mapping, Sequence

from training.metrics import COLUMNS, MEANS, Scores

COLUMN_TITLES = (" IoU %", "accuracy", "precision", "labels", "predictions")
MEAN_TITLES = ("mIoU", "mean accuracy", "mean precision", "FWIoU", "pixel accuracy")
CONVENTION = (
    "IoU = right / (labelled + predicted - right), accuracy = right / labelled, precision = right / predicted; labels "
    "and predictions are shares of the pixels; FWIoU is the mean IoU weighted by labels. Everything is summed over all "
    "images at {size}. Pixels labelled 'ignore' or outside the scored classes (for SYNTHIA's 13: outside its 16) do "
    "not count; predictions outside them are errors. Classes without a labelled pixel are absent and {absent}."
)
ABSENT = {
    "left_out": "do not count in the means",
    "zero_if_predicted": "count as 0 where they were predicted",
    "zero": "count as 0",
}


def class_scores(scores: Scores, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """The values of each of `COLUMNS` by the name of the class."""
    rows = zip(*(scores.by_class[column] for column in COLUMNS), strict=True)
    return {names[c]: dict(zip(COLUMNS, row, strict=True)) for c, row in zip(scores.classes, rows, strict=True)}


def score_table(scores: Scores, names: Sequence[str], of: str = "classes") -> str:
    """A table of the classes or categories in percent, the means and the absent classes."""
    width = max(map(len, [*(names[c] for c in scores.classes), *MEAN_TITLES]))
    lines = ["  ".join([f"{'category' if of == 'categories' else 'class':<{width}}", *COLUMN_TITLES])]
    for name, row in class_scores(scores, names).items():
        cells = [_percent(row["iou"], "absent"), *(_percent(row[column]) for column in COLUMNS[1:])]
        cells = [cell.rjust(len(title)) for cell, title in zip(cells, COLUMN_TITLES, strict=True)]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    if not any(scores.by_class["label_share"]):
        return "\n".join([*lines, "no pixel of the scored classes is labelled: there are no means"])
    means = [f"{title:<{width}}  {_percent(scores.means[m])}" for title, m in zip(MEAN_TITLES, MEANS, strict=True)]
    present = sum(value is not None for value in scores.by_class["iou"])
    lines.append(f"{means[0]}  over {present} of {len(scores.classes)} {of}")
    for convention in ("left_out", "zero_if_predicted"):
        mean = scores.mean_iou_by_convention[convention]
        if mean != scores.means["miou"]:
            lines.append(f"{'':<{width}}  {_percent(mean)}  if absent {of} {ABSENT[convention]}")
            break
    lines += means[1:]
    if scores.absent:
        lines.append("absent: " + ", ".join(names[c] for c in scores.absent))
    return "\n".join(lines)


def subset_lines(subsets: Mapping[str, Scores], num_classes: int) -> list[str]:
    """The means over some classes of a matrix of `num_classes`, in percent, a line for each subset."""
    return [
        f"all labels counted, over {name} of {num_classes} classes: "
        + ", ".join(f"{title} {_percent(scores.means[m]).strip()}" for title, m in zip(MEAN_TITLES, MEANS, strict=True))
        for name, scores in subsets.items()
    ]


def _percent(value: float | None, missing: str = "-") -> str:
    return f"{missing:>6}" if value is None else f"{100 * value:6.2f}"
