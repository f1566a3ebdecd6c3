"""Which backend, from sizes alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking import backends, sigmoid_sums
from imbalanced_losses._ranking import choose as choosing
from imbalanced_losses._ranking.choose import choose, choose_fused
from imbalanced_losses.functional import smooth_ap
from tests.helpers.cases import seeded

FLOATS = (torch.float32, torch.float64)
SIZES = [0, 1, 10, 1000, 10**5, 10**6, 10**7, 10**9, 10**12]


@pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])
@pytest.mark.parametrize("num_rows", [1, 1000, 10**6])
def test_monotone_in_pairs(num_rows: int, dtype: torch.dtype) -> None:
    """Dense for few pairs, panels from some number on, with a single change between."""
    chosen = [choose("cpu", dtype, pairs, 1, num_rows) for pairs in (0, *(2**k for k in range(50)))]
    changes = [a != b for a, b in itertools.pairwise(chosen)]
    assert chosen[0] == "dense"
    assert chosen[-1] == "panel"
    assert sum(changes) == 1


def test_many_small_problems_are_dense() -> None:
    """Each problem has convolutions of its own: pairs enough for one are too few for a thousand."""
    assert choose("cpu", torch.float32, 10**8, 1, 10**5) == "panel"
    assert choose("cpu", torch.float32, 10**8, 1000, 10**5) == "dense"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which backends were built, in turn."""
    built: list[str] = []
    for name in ("DensePlan", "DenseRanks", "DenseRanksOfMany", "PanelPlan", "PanelRanks"):
        whole = getattr(backends, name)

        def note(*arguments: object, whole: type = whole, name: str = name) -> object:
            built.append(name)
            return whole(*arguments)

        monkeypatch.setattr(backends, name, note)
        for backend, plan in backends.PLANS.items():
            if plan is whole:
                monkeypatch.setitem(backends.PLANS, backend, note)
    return built


def _problem(num_rows: int, num_positives: int) -> tuple[Tensor, Tensor]:
    scores = torch.randn(num_rows, generator=seeded(0))
    return scores.requires_grad_(), torch.arange(num_rows) < num_positives


def test_auto_takes_the_chosen_one(made: list[str]) -> None:
    """Small pools are ranked by the definition, large ones in linear time, by name as told."""
    for num_rows, backend, expected in (
        (50, "auto", "DenseRanks"),
        (50, "panel", "PanelRanks"),
        (9000, "auto", "PanelRanks"),
        (5000, "dense", "DenseRanks"),
    ):
        made.clear()
        smooth_ap(*_problem(num_rows, num_rows // 5), 0.01, backend=backend)
        assert made == [expected]


def test_choice_counts_the_pairs_of_positives(
    made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen from is Q·M, C and C·M + Q of this call."""
    asked: list[tuple[object, ...]] = []

    def note(*arguments: object) -> str:
        asked.append(arguments)
        return "dense"

    monkeypatch.setattr(backends, "choose", note)
    scores, is_positive = torch.randn(3, 40), torch.arange(120).view(3, 40) % 4 == 0
    smooth_ap(scores, is_positive, 0.1)
    problem = torch.zeros(7, dtype=torch.int64)
    sigmoid_sums(torch.randn(7), problem, scores, torch.ones(3, 40, 1), 0.1)
    assert asked == [
        ("cpu", torch.float32, 30 * 40, 3, 120 + 30),
        ("cpu", torch.float32, 7 * 40, 3, 120 + 7),
    ]
    assert made == ["DenseRanksOfMany", "DensePlan"]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("num_rows", "num_positives"), [(0, 0), (1, 0), (1, 1), (9, 0), (9, 9)], ids=str
)
def test_nothing_to_rank_goes_to_dense(
    made: list[str], num_rows: int, num_positives: int, order: int
) -> None:
    """Panels asked for by name, and no positive or no negative: AP and gradients are exactly 0."""
    scores, is_positive = _problem(num_rows, num_positives)
    ap, valid = smooth_ap(scores, is_positive, 0.1, backend="panel")
    (gradient,) = torch.autograd.grad(ap, scores, create_graph=order == 2)
    assert not valid
    assert ap == 0
    assert (gradient == 0).all()
    if order == 2:
        (curvature,) = torch.autograd.grad(gradient.sum(), scores, allow_unused=True)
        assert curvature is None or (curvature == 0).all()
    assert not {"PanelPlan", "PanelRanks"} & set(made)


def test_kernels_compare_all_pairs_up_to_a_number() -> None:
    few_rows, rows = choosing.FEW_FUSED_ROWS, 1 << 14
    most_problems = choosing.MOST_FUSED_PAIRS // rows**2
    assert choose_fused(1_000_000, few_rows) == "dense"
    assert choose_fused(1_000_000, few_rows + 1) == "panel"
    assert choose_fused(most_problems, rows) == "dense"
    assert choose_fused(most_problems + 1, rows) == "panel"
    assert choose_fused(1, rows, is_captured=True) == "dense"
    assert choose_fused(2, rows, is_captured=True) == "panel"
