"""Problems of unequal length: each is what it is by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from imbalanced_losses._ranking import Backend, Problems, Ranks
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses._ranking.layout import Layout
from imbalanced_losses._ranking.plan import Listed
from imbalanced_losses._ranking.ragged import parts_of
from tests.helpers.cases import seeded

LENGTHS = {
    "unequal": [5, 1, 40, 3, 7, 300, 41, 6],
    "equal": [20, 20, 20],
    "one": [30],
    "some empty": [0, 21, 0, 0, 9, 0],
}


def partial_auc(problems: Problems, limits: Tensor, values: Tensor) -> Tensor:
    """A sum over negatives, with constants of problems and of rows."""

    def worth(ranks: Ranks) -> Tensor:
        hard = torch.sigmoid(ranks.of_problem(limits) - ranks.among("negatives"))
        return hard * ranks.of_row(values) * ranks.among("positives")

    total = problems.ranked_sum(worth, queries="negatives", among=("positives", "negatives"))
    return total / (problems.mass("positives") * problems.mass("negatives"))


METRICS: dict[str, Callable[[Problems, Tensor, Tensor], Tensor]] = {
    "average precision": lambda problems, *_: average_precision(problems),
    "partial AUC": partial_auc,
}


WAYS: dict[str, tuple[Backend, bool]] = {
    "auto": ("auto", False),
    "dense": ("dense", False),
    "panel": ("panel", False),
    "kernels": ("dense", True),
}


@pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_problem_is_what_it_is_by_itself(
    lengths: list[int],
    metric: Callable[[Problems, Tensor, Tensor], Tensor],
    is_weighted: bool,
    way: tuple[Backend, bool],
    request: pytest.FixtureRequest,
) -> None:
    """Value, validity, and the slopes in scores and in a temperature for each."""
    backend, has_kernels = way
    size, generator = sum(lengths), seeded(0)
    scores = torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
    is_positive = torch.rand(size, generator=generator) < 0.3
    values, weights = torch.rand(2, size, generator=generator, dtype=torch.float64)
    tau = (0.1 + torch.rand(len(lengths), generator=generator).double()).requires_grad_()
    limits = torch.arange(1.0, len(lengths) + 1, dtype=torch.float64)
    alone, valid = [], []
    for c, rows in enumerate(torch.arange(size).split(lengths)):
        problems = Problems(
            scores[None, rows],
            tau[c : c + 1],
            is_positive[None, rows],
            weights[None, rows] if is_weighted else None,
        )
        alone.append(metric(problems, limits[c : c + 1], values[None, rows]))
        valid.append(problems.valid)
    expected = torch.cat(alone)
    pull = torch.rand(len(lengths), generator=generator).double()
    slopes = torch.autograd.grad(expected @ pull, (scores, tau))

    device = request.getfixturevalue("device") if has_kernels else "cpu"
    given = [one.detach().to(device).requires_grad_() for one in (scores, tau)]
    together = Problems(
        given[0][None],
        given[1],
        is_positive[None].to(device),
        weights[None].to(device) if is_weighted else None,
        layout=Layout((1, len(scores)), torch.tensor(lengths, device=device)),
        backend=backend,
    )
    found = metric(together, limits.to(device), values[None].to(device))
    own = torch.autograd.grad(found @ pull.to(device), given)
    assert together.valid.cpu().equal(torch.cat(valid))
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-14)
    for one, other in zip(own, slopes, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-10, atol=1e-13)


def test_rectangles_hold_every_row_once_and_little_else() -> None:
    lengths = torch.randint(1, 5000, (300,), generator=seeded(1))
    size = int(lengths.sum())
    layout = Layout((1, size), lengths)
    assert layout.problem is not None
    row = torch.arange(size)
    parts = list(parts_of(layout, Listed("all", layout.problem, row, None, None, 300)))
    rows = torch.cat([part.rows.flatten() for part in parts])
    assert rows[rows < size].sort().values.equal(row)
    assert torch.cat([part.queries for part in parts]).sort().values.equal(row)
    assert all(part.rows[part.problem, part.row].equal(row[part.queries]) for part in parts)
    assert torch.cat([part.problems for part in parts]).sort().values.equal(torch.arange(300))
    assert rows.numel() <= 1.25 * size
    assert len(parts) < 45
