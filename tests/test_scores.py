"""Scores of confusion matrices, by hand and against a slow loop; see also test_evaluate_scores.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scoring import SUBSETS, slow_scores
from training.metrics import COLUMNS, confusion_matrix, scores_of


@pytest.mark.parametrize(
    ("label", "prediction", "matrix", "iou", "accuracy"),
    [
        ((0, 0, 1, 1, 2, 255), (0, 1, 1, 1, 0, 0), [[1, 1, 0], [0, 2, 0], [1, 0, 0]], (1 / 3, 2 / 3, 0), 3 / 5),
        (
            ((0, 0, 1, 255), (1, 2, 2, 2)), ((0, 1, 1, 2), (1, 2, 0, 2)), [[1, 1, 0], [0, 2, 0], [1, 0, 2]],
            (1 / 3, 2 / 3, 2 / 3), 5 / 7,
        ),
    ],
)  # fmt: skip
def test_hand_cases(label, prediction, matrix, iou, accuracy):
    for kind in (torch.uint8, torch.int64):
        found = confusion_matrix(torch.tensor(prediction), torch.tensor(label, dtype=kind), 3)
        assert found.tolist() == matrix
        assert found.dtype == torch.int64
    scores = scores_of(found, range(3))
    assert scores.by_class["iou"] == pytest.approx(iou)
    assert scores.means["miou"] == pytest.approx(sum(iou) / 3)
    assert scores.means["pixel_accuracy"] == pytest.approx(accuracy)
    assert scores.absent == ()


def test_subsets_ignored_pixels_and_absent_classes_against_a_slow_loop():
    rng = np.random.default_rng(0)
    predictions = [rng.integers(0, 19, (9, 13)) for _ in range(3)]
    labels = [rng.choice([0, 1, 3, 9, 10, 13, 16, 255], (9, 13)) for _ in range(3)]  # 2, 4, ... are predicted, absent
    matrix = torch.zeros(19, 19, dtype=torch.int64)
    for prediction, label in zip(predictions, labels, strict=True):
        right = (rng.random(label.shape) < 0.4) & (label != 255)
        prediction[right] = label[right]
        matrix += confusion_matrix(torch.tensor(prediction), torch.tensor(label), 19)
    for subset in (range(19), sorted(SUBSETS[16]), sorted(SUBSETS[13]), (13, 2, 0)):
        iou, mean, accuracy, counts = slow_scores(predictions, labels, set(subset))
        assert all(matrix[t, p] == n for (t, p), n in counts.items() if t != 255)
        assert matrix.sum() == sum(n for (t, _), n in counts.items() if t != 255)
        scores = scores_of(matrix, subset)
        assert scores.classes == tuple(subset)
        assert scores.absent == tuple(c for c in subset if c not in iou)
        found = zip(subset, scores.by_class["iou"], strict=True)
        assert {c: value for c, value in found if value is not None} == pytest.approx(iou)
        assert (scores.means["miou"], scores.means["pixel_accuracy"]) == pytest.approx((mean, accuracy))


def test_predictions_outside_the_subset_are_errors_of_the_labelled_class():
    label, prediction = torch.tensor([0, 0, 0, 2, 2, 1]), torch.tensor([0, 2, 1, 0, 2, 2])
    scores = scores_of(confusion_matrix(prediction, label, 3), (0, 1))
    # Class 0: one right, two called 2 and 1. Class 1: one pixel, called 2. Pixels labelled 2 do not count for 0.
    assert scores.by_class["iou"] == (pytest.approx(1 / 3), 0.0)
    assert scores.means["pixel_accuracy"] == pytest.approx(1 / 4)


def test_the_means_by_convention():
    # Class 1 is absent and predicted, class 3 is absent and never predicted.
    matrix = confusion_matrix(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 0, 2, 2]), 4)
    scores = scores_of(matrix, range(4))
    assert scores.by_class["iou"] == (0.5, None, 1.0, None)
    assert scores.means["miou"] == 0.75
    assert scores.mean_iou_by_convention == {"left_out": 0.75, "zero_if_predicted": 0.5, "zero": 0.375}
    for convention, mean in scores.mean_iou_by_convention.items():
        assert scores_of(matrix, range(4), absent=convention).means["miou"] == mean


def test_no_labelled_pixel_gives_no_score():
    matrix = confusion_matrix(torch.tensor([0, 2]), torch.tensor([255, 3]), 3)
    scores = scores_of(matrix, (0, 1))
    assert scores.absent == (0, 1)
    assert set(scores.means.values()) == {None}
    assert {column: set(values) for column, values in scores.by_class.items()} == {column: {None} for column in COLUMNS}


def test_every_score_of_a_matrix_with_an_absent_class():
    """Class 2 is predicted and never labelled, class 3 neither."""
    matrix = torch.tensor([[6, 2, 1, 0], [1, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    nothing = scores_of(matrix, range(4))
    assert nothing.by_class["iou"] == (pytest.approx(6 / 10), pytest.approx(4 / 7), None, None)
    assert nothing.by_class["accuracy"] == (pytest.approx(6 / 9), pytest.approx(4 / 5), None, None)
    assert nothing.by_class["precision"] == (pytest.approx(6 / 7), pytest.approx(4 / 6), None, None)
    assert nothing.by_class["label_share"] == pytest.approx((9 / 14, 5 / 14, 0, 0))
    assert nothing.by_class["predicted_share"] == pytest.approx((7 / 14, 6 / 14, 1 / 14, 0))
    assert nothing.means["mean_precision"] == pytest.approx((6 / 7 + 4 / 6) / 2)
    predicted, always = (scores_of(matrix, range(4), absent=name) for name in ("zero_if_predicted", "zero"))
    for column, if_predicted in (("iou", (0, None)), ("accuracy", (None, None)), ("precision", (0, None))):
        assert predicted.by_class[column] == (*nothing.by_class[column][:2], *if_predicted)
        assert always.by_class[column] == (*nothing.by_class[column][:2], 0, 0)
    assert predicted.means["mean_precision"] == pytest.approx((6 / 7 + 4 / 6) / 3)
    assert predicted.means["mean_accuracy"] == pytest.approx((6 / 9 + 4 / 5) / 2)
    assert always.means["mean_accuracy"] == pytest.approx((6 / 9 + 4 / 5) / 4)
    for scores in (nothing, predicted, always):
        assert scores.means["pixel_accuracy"] == pytest.approx(10 / 14)
        assert scores.means["frequency_weighted_iou"] == pytest.approx(6 / 10 * 9 / 14 + 4 / 7 * 5 / 14)
        assert scores.absent == (2, 3)


def test_the_labels_that_count_may_be_of_more_classes_than_the_mean_goes_over():
    matrix = torch.tensor([[2, 0, 1], [0, 3, 0], [1, 1, 2]])
    scores = scores_of(matrix, (0, 1), range(3))
    assert scores.by_class["iou"] == pytest.approx((2 / 4, 3 / 4))
    assert scores.means["pixel_accuracy"] == pytest.approx(7 / 10)
    assert scores.by_class["label_share"] == pytest.approx((3 / 10, 3 / 10))
    assert scores.means["frequency_weighted_iou"] == pytest.approx(0.3 * (2 / 4 + 3 / 4))
