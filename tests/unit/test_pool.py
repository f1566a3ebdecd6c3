"""Rows that travel together, and the problems that they pose."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from imbalanced_losses._rows.pool import Pool
from tests.helpers.rows import IGNORED

LABELS = torch.tensor([2, 0, IGNORED, 1, 0])
MATRIX = torch.tensor([[1, 0], [IGNORED, 1], [IGNORED, IGNORED], [0, 0], [0, IGNORED]])
WEIGHTS = torch.tensor([1.0, 0, 2, 3, 0.5])
WEIGHTS_OF_LABELS = torch.tensor([[1.0, 2], [5, 0], [2, 2], [3, 0], [0.5, 1]])


def pool(targets: Tensor, num_classes: int) -> Pool:
    logits = torch.arange(5.0 * num_classes).reshape(5, num_classes)
    return Pool(logits, targets, WEIGHTS if targets.dim() == 1 else WEIGHTS_OF_LABELS)


@pytest.mark.parametrize("targets", [LABELS, MATRIX], ids=["classes", "labels"])
def test_select_takes_the_same_rows_of_every_field(targets: Tensor) -> None:
    rows, index = pool(targets, 2), torch.tensor([3, 0, 3])
    for field, selected in zip(rows[:3], rows.select(index)[:3], strict=True):
        assert selected.equal(field[index])


@pytest.mark.parametrize("targets", [LABELS, MATRIX], ids=["classes", "labels"])
def test_extend_puts_the_live_rows_first(targets: Tensor) -> None:
    rows = pool(targets, 2)
    live, rest = rows.select(torch.tensor([4, 1])), rows.select(torch.tensor([0, 2, 3]))
    for field, extended in zip(rows[:3], live.extend(rest)[:3], strict=True):
        assert extended.equal(field[[4, 1, 0, 2, 3]])


def test_rows_without_a_gradient_are_constants_wherever_they_go() -> None:
    rows = pool(LABELS, 2)
    live, rest = rows.select(torch.tensor([4, 1])), rows.select(torch.tensor([0, 2, 3]))
    extended = live.extend(rest)
    assert extended.problems(IGNORED).num_live == 2
    assert extended.select(torch.tensor([1, 2, 4])).problems(IGNORED).num_live == 1
    one = extended.select(torch.arange(3))
    assert one.num_constant == 1
    assert one.select(torch.tensor([0, 1])).num_constant == 0
    moving = rest._replace(logits=rest.logits.requires_grad_())
    assert live.extend(moving).problems(IGNORED).num_live == 5


def test_rows_that_are_present() -> None:
    assert pool(LABELS, 3).is_present(IGNORED).tolist() == [True, False, False, True, True]
    assert pool(MATRIX, 2).is_present(IGNORED).tolist() == [True, False, False, True, True]


def test_another_ignore_index() -> None:
    assert pool(LABELS, 3).is_present(0).tolist() == [True, False, True, True, False]
    assert pool(LABELS, 3).problems(0).weights[0].tolist() == [1, 0, 2, 3, 0]


def test_one_class_is_the_positive_one() -> None:
    problems = pool(torch.tensor([1, 0, IGNORED, 1, 0]), 1).problems(IGNORED)
    assert problems.scores.tolist() == [[0, 1, 2, 3, 4]]
    assert problems.is_positive.tolist() == [[True, False, False, True, False]]
    assert problems.weights.tolist() == [[1, 0, 0, 3, 0.5]]


def test_classes_are_ranked_one_against_the_rest() -> None:
    problems = pool(LABELS, 3).problems(IGNORED)
    assert problems.scores.tolist() == [[c, c + 3, c + 6, c + 9, c + 12] for c in range(3)]
    assert problems.is_positive.int().tolist() == [
        [0, 1, 0, 0, 1],
        [0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0],
    ]
    assert problems.weights.tolist() == [[1, 0, 0, 3, 0.5]] * 3


def test_each_label_ignores_rows_of_its_own() -> None:
    problems = pool(MATRIX, 2).problems(IGNORED)
    assert problems.scores.tolist() == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert problems.is_positive.int().tolist() == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    assert problems.weights.tolist() == [[1, 0, 0, 3, 0.5], [2, 0, 0, 0, 0]]


def test_weights_have_the_dtype_of_the_scores() -> None:
    for dtype in (torch.float32, torch.float64):
        rows = pool(LABELS, 3)
        rows = rows._replace(logits=rows.logits.to(dtype), weights=None)
        weights = rows.problems(IGNORED).weights
        assert weights is not None
        assert weights.dtype == dtype
        assert weights[0].tolist() == [1, 1, 0, 1, 1]
