"""What the library should compute, as plain float64 loops to be checked by eye.

Gradients are autograd's, of the same sums over all pairs. Never imports the package. Slow by
intent: pools of some 40 rows.

    R_i  = ½ω_i + Σ_j ω_j σ((s_j − s_i) / τ)          soft rank of i among all rows
    R⁺_i = ½ω_i + Σ_{j∈P} ω_j σ((s_j − s_i) / τ)      soft rank of i among the positives
    AP   = Σ_{i∈P} ω_i R⁺_i / R_i  ÷  Σ_{i∈P} ω_i     loss = 1 − AP
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Floats = Sequence[float]


def sigmoid(x: float) -> float:
    if x < 0:
        return math.exp(x) / (1 + math.exp(x))
    return 1 / (1 + math.exp(-x))


def difference(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two equal infinities tie


class ProblemRow(NamedTuple):
    score: float
    grade: int  # 0 for a negative
    weight: float
    value: float | None

    @property
    def worth(self) -> float:
        return self.weight * (1.0 if self.value is None else self.value)


class Problem:
    """Rows that are ranked together; those of weight 0 are in no sum."""

    def __init__(
        self,
        scores: Floats,
        grades: Sequence[int],
        tau: float,
        weights: Floats | None = None,
        value: Floats | None = None,
    ) -> None:
        weights = [1.0] * len(scores) if weights is None else weights
        values = [None] * len(scores) if value is None else value
        rows = map(ProblemRow, scores, grades, weights, values)
        self.tau = tau
        self.rows = [row for row in rows if row.weight > 0]
        self.positives = [row for row in self.rows if row.grade > 0]
        self.negatives = [row for row in self.rows if row.grade == 0]

    def above(self, i: ProblemRow, rows: list[ProblemRow]) -> float:
        return sum(j.weight * sigmoid(difference(j.score, i.score) / self.tau) for j in rows)

    def rank(self, i: ProblemRow, rows: list[ProblemRow]) -> float:
        """The soft rank of a row among rows that it is one of."""
        return 0.5 * i.weight + self.above(i, rows)

    def budget(self, k: int | float) -> float:
        return k if isinstance(k, int) else max(k * mass(self.rows), mean_weight(self.rows))

    def mean_over_positives(self, found: Callable[[ProblemRow], float]) -> float:
        """By weight and value; NaN where it is not defined."""
        total = sum(i.worth for i in self.positives)
        if not (self.negatives and total > 0):
            return math.nan
        return sum(i.worth * found(i) for i in self.positives) / total


def mass(rows: list[ProblemRow]) -> float:
    return sum(i.weight for i in rows)


def mean_weight(rows: list[ProblemRow]) -> float:
    return mass(rows) / len(rows)


def smooth_ap(of: Problem) -> float:
    """Average Precision with sigmoids for steps; NaN where it is not defined, as all of these.

    >>> smooth_ap(Problem([2.0, 1.0, 0.5, -1.0], [1, 0, 1, 0], 0.001))  # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    return of.mean_over_positives(lambda i: of.rank(i, of.positives) / of.rank(i, of.rows))


def recall_at_k(of: Problem, k: int | float, softness: float = 0.25) -> float:
    """The share of positives among the k highest."""

    def found(i: ProblemRow) -> float:
        budget = of.budget(k)
        return sigmoid((budget + 0.5 * i.weight - of.rank(i, of.rows)) / (softness * budget))

    return of.mean_over_positives(found)


def recall_at_fpr(of: Problem, max_fpr: float, softness: float = 0.25) -> float:
    """The share of positives with at most so many of the negatives above them."""

    def found(i: ProblemRow) -> float:
        budget, one = max_fpr * mass(of.negatives), mean_weight(of.negatives)
        above = of.above(i, of.negatives)
        return sigmoid((budget + 0.5 * one - above) / (softness * max(budget, one)))

    return of.mean_over_positives(found)


def partial_auc(of: Problem, max_fpr: float, min_fpr: float = 0.0, softness: float = 0.25) -> float:
    """Positives above a negative, averaged over the negatives of a range of ranks."""
    worth = sum(i.worth for i in of.positives)
    if not (of.negatives and worth > 0):
        return math.nan
    last = max(max_fpr * mass(of.negatives), mean_weight(of.negatives))
    first = min_fpr * mass(of.negatives)
    total = counted = 0.0
    for j in of.negatives:
        rank = of.rank(j, of.negatives)
        share = 1.0
        if max_fpr < 1:
            share = sigmoid((last + 0.5 * j.weight - rank) / (softness * last))
        if min_fpr > 0:
            share -= sigmoid((first + 0.5 * j.weight - rank) / (softness * first))
        for i in of.positives:
            above = sigmoid(difference(i.score, j.score) / of.tau)
            total += j.weight * share * i.worth * above
        counted += j.weight * share
    return total / (worth * max(counted, last - first))


def ndcg(of: Problem, k: int | float | None = None, softness: float = 0.25) -> float:
    """Discounted gains of rows at their ranks over those in the best order."""

    def gain(i: ProblemRow) -> float:
        given = 2.0**i.grade - 1 if i.value is None else i.value
        return given if i.grade > 0 else 0.0

    if len(set(map(gain, of.rows))) < 2:
        return math.nan
    budget = math.inf if k is None else of.budget(k)
    total = ideal = place = 0.0
    for i in of.rows:
        rank = of.rank(i, of.rows)
        within = 1.0
        if k is not None:
            within = sigmoid((budget + 0.5 * i.weight - rank) / (softness * budget))
        total += i.weight * gain(i) / math.log2(1 + rank) * within
    for i in sorted(of.rows, key=lambda i: (-gain(i), i.weight)):
        place += i.weight
        if place <= budget + 0.5 * i.weight or place == i.weight:
            ideal += i.weight * gain(i) / math.log2(1 + place)
    return total / ideal


def spread(scores: Tensor, weights: Tensor) -> Tensor:
    """√(Σω(s − μ)² / Σω) over the finite scores [M] of weight > 0; 1 where they do not vary."""
    kept = (weights > 0) & scores.isfinite()
    scores, weights = scores[kept], weights[kept] / weights[kept].sum()
    if len(scores.unique()) < 2:
        return torch.ones((), dtype=torch.float64)
    return (weights * (scores - weights @ scores) ** 2).sum().sqrt()


class Row(NamedTuple):
    """One row of a batch or of the queue."""

    logits: list[float]  # [C]
    target: int | list[int]  # a class, or [C] labels in multi-label
    weight: float


class Result(NamedTuple):
    loss: float | list[float]  # [C] for reduction "none", with NaN where not valid
    per_class: list[float]  # [C], NaN where not valid
    valid: list[bool]  # [C]
    # [N, C], of per_class[c] in logits[n, c]: a class depends on no other column. 0 where not valid
    per_class_gradient: np.ndarray
    gradient: np.ndarray  # [N, C], of the loss; for "none" of the sum of its valid entries


class OracleLoss:
    """The loss with its queue: a deque of rows, newest last.

    One step ranks the live rows together with the rows of earlier steps, then stores those that
    are not ignored, have weight > 0 and are finite.
    """

    def __init__(
        self,
        num_classes: int,
        queue_size: int = 0,
        temperature: float = 0.01,
        reduction: str = "mean",
        ignore_index: int = -100,
        *,
        multilabel: bool = False,
        temperature_unit: str = "score",
        queue_follows_shift: bool = False,
    ) -> None:
        self.num_classes = num_classes
        self.queue: deque[Row] = deque(maxlen=queue_size)
        self.temperature = temperature
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.multilabel = multilabel
        self.temperature_unit = temperature_unit
        self.queue_follows_shift = queue_follows_shift

    def step(
        self,
        logits: Sequence[Floats],
        targets: Sequence[int] | Sequence[Sequence[int]],
        sample_weight: Floats | None = None,
        *,
        store: bool = True,
    ) -> Result:
        live = rows_of_batch(logits, targets, sample_weight)
        results = [self._one_class(live, c) for c in range(self.num_classes)]
        if store:
            self.queue.extend(row for row in live if self._is_worth_storing(row))

        per_class = [loss for loss, _ in results]
        valid = [not math.isnan(loss) for loss in per_class]
        per_class_gradient = torch.stack([slopes for _, slopes in results], dim=1).numpy()
        total = sum(loss for loss in per_class if not math.isnan(loss))
        divisor = max(1, sum(valid)) if self.reduction == "mean" else 1
        loss = per_class if self.reduction == "none" else total / divisor
        return Result(loss, per_class, valid, per_class_gradient, per_class_gradient / divisor)

    def _one_class(self, live: list[Row], c: int) -> tuple[float, Tensor]:
        """(loss, its gradient in logits[:, c] of the live rows)."""
        pool = live + list(self.queue)
        labels = [self._label(row, c) for row in pool]
        weights = torch.tensor([row.weight for row in pool], dtype=torch.float64)
        weights *= torch.tensor([label is not None for label in labels])
        is_positive = torch.tensor([label == 1 for label in labels], dtype=torch.bool)
        scores = torch.tensor([row.logits[c] for row in pool], dtype=torch.float64)
        scores.requires_grad_()
        tau = torch.tensor(self.temperature, dtype=torch.float64)
        if self.temperature_unit == "spread":
            tau = tau * spread(scores, weights)
        ap = smooth_ap_by_pairs(scores[None], is_positive[None], tau[None], weights[None])
        (gradient,) = torch.autograd.grad(1 - ap.sum(), scores)
        live_gradient, queue_gradient = gradient.split([len(live), len(self.queue)])
        # The rows of the mean that a queue follows.
        moving = ((weights > 0) & scores.isfinite())[: len(live)]
        if self.queue_follows_shift and moving.any():
            live_gradient = live_gradient + moving * queue_gradient.sum() / moving.sum()
        problem = Problem(scores.tolist(), is_positive.tolist(), tau.item(), weights.tolist())
        return 1 - smooth_ap(problem), live_gradient

    def _label(self, row: Row, c: int) -> int | None:
        """1 for a positive of class c, 0 for a negative, None for neither."""
        target = row.target if isinstance(row.target, int) else row.target[c]
        if target == self.ignore_index:
            return None
        if self.multilabel or self.num_classes == 1:
            return target
        return int(target == c)

    def _is_worth_storing(self, row: Row) -> bool:
        labels = [self._label(row, c) for c in range(self.num_classes)]
        counts = any(label is not None for label in labels) and row.weight > 0
        return counts and all(math.isfinite(logit) for logit in row.logits)


def rows_of_batch(
    logits: Sequence[Floats],
    targets: Sequence[int] | Sequence[Sequence[int]],
    sample_weight: Floats | None = None,
) -> list[Row]:
    """Nested lists, arrays or tensors [N, C], [N] or [N, C], [N] as rows."""
    logits = np.asarray(logits, dtype=np.float64)
    targets = np.asarray(targets)
    weights = np.ones(len(logits)) if sample_weight is None else np.asarray(sample_weight)
    return [
        Row(scores.tolist(), target.tolist(), float(weight))
        for scores, target, weight in zip(logits, targets, weights, strict=True)
    ]


class RanksOfProblem(NamedTuple):
    """What a metric gets to see of the queries of one problem."""

    ranks: dict[str, Tensor]  # name of a set of rows -> [Q]
    problem: int
    rows: Tensor  # [Q]

    def among(self, rows: str) -> Tensor:
        return self.ranks[rows]

    def of_problem(self, values: Tensor) -> Tensor:
        return values[self.problem]

    def of_row(self, values: Tensor) -> Tensor:
        return values[self.problem, self.rows]


def rows_of(is_positive: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The sets of rows [M] that metrics know of; a row of weight 0 is in none."""
    present = weights > 0
    return {"all": present, "positives": present & is_positive, "negatives": present & ~is_positive}


def ranked_sum(
    scores: Tensor,
    is_positive: Tensor,
    tau: Tensor,
    weights: Tensor,
    worth: Callable[[RanksOfProblem], Tensor],
    queries: str,
    among: Sequence[str],
) -> Tensor:
    """Σ ω · worth(ranks) [C] over the queries of each problem [C, M], from all pairs.

    Weights count in units of the heaviest; 0 without a positive or without a negative.
    """
    totals = []
    for c in range(len(scores)):
        sets = rows_of(is_positive[c], weights[c])
        if not (sets["positives"].any() and sets["negatives"].any()):
            totals.append(0 * scores[c].sum())
            continue
        omega = weights[c] / weights[c].max()
        rows = sets[queries].nonzero()[:, 0]
        apart = scores[c] - scores[c, rows, None]  # [Q, M]; two equal infinities tie
        above = torch.sigmoid(apart.nan_to_num(0.0).clamp(-1e300, 1e300) / tau[c])
        ranks = {}
        for name in among:
            own = omega * sets[name]
            ranks[name] = (above * own).sum(1) + 0.5 * own[rows]
        totals.append((omega[rows] * worth(RanksOfProblem(ranks, c, rows))).sum())
    return torch.stack(totals)


def smooth_ap_by_pairs(scores: Tensor, is_positive: Tensor, tau: Tensor, weights: Tensor) -> Tensor:
    """AP [C] of problems [C, M], to be differentiated; NaN where it is not defined."""
    worths = (
        lambda ranks: ranks.among("positives") / ranks.among("all"),
        lambda ranks: torch.ones_like(ranks.among("all")),
    )
    total, mass = (
        ranked_sum(scores, is_positive, tau, weights, worth, "positives", ("all", "positives"))
        for worth in worths
    )
    return torch.where(mass > 0, total / mass.clamp(min=1e-300), math.nan)
