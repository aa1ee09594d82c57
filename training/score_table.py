"""The scores of a confusion matrix as `evaluate.py` prints and stores them."""

from collections.abc import Mapping, Sequence

from training.metrics import MEANS, Scores

COLUMNS = {
    "iou": "IoU %", "accuracy": "accuracy", "precision": "precision", "label_share": "labels",
    "predicted_share": "predictions",
}  # fmt: skip
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
    columns = zip(*(getattr(scores, column) for column in COLUMNS), strict=True)
    return {names[c]: dict(zip(COLUMNS, row, strict=True)) for c, row in zip(scores.classes, columns, strict=True)}


def score_table(scores: Scores, names: Sequence[str], of: str = "classes") -> str:
    """A table of the classes or categories in percent, the means and the absent classes."""
    width = max(map(len, [*(names[c] for c in scores.classes), *MEANS.values()]))
    head = "category" if of == "categories" else "class"
    lines = ["  ".join([f"{head:<{width}}", *(f"{title:>6}" for title in COLUMNS.values())])]
    for name, row in class_scores(scores, names).items():
        cells = [_percent(row[c], "absent" if c == "iou" else "-").rjust(len(title)) for c, title in COLUMNS.items()]
        lines.append("  ".join([f"{name:<{width}}", *cells]))
    if scores.pixel_accuracy is None:
        return "\n".join([*lines, "no pixel of the scored classes is labelled: there are no means"])
    present, means = sum(value is not None for value in scores.iou), scores.mean_iou_by_convention
    lines.append(f"{'mIoU':<{width}}  {_percent(scores.mean_iou)}  over {present} of {len(scores.classes)} {of}")
    if means["left_out"] != means["zero_if_predicted"]:
        other = "zero_if_predicted" if scores.mean_iou == means["left_out"] else "left_out"
        lines.append(f"{'':<{width}}  {_percent(means[other])}  if absent {of} {ABSENT[other]}")
    lines += [f"{title:<{width}}  {_percent(getattr(scores, name))}" for name, title in MEANS.items()]
    if scores.absent:
        lines.append("absent: " + ", ".join(names[c] for c in scores.absent))
    return "\n".join(lines)


def subset_lines(subsets: Mapping[str, Scores], num_classes: int) -> list[str]:
    """The means over some classes of a matrix of `num_classes`, in percent, a line for each subset."""
    titles = {"mean_iou": "mIoU", **MEANS}
    return [
        f"all labels counted, mean over {name} of {num_classes} classes: "
        + ", ".join(f"{title} {_percent(getattr(scores, mean)).strip()}" for mean, title in titles.items())
        for name, scores in subsets.items()
    ]


def _percent(value: float | None, missing: str = "-") -> str:
    return f"{missing:>6}" if value is None else f"{100 * value:6.2f}"
