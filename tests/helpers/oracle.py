"""What the library should compute, as plain float64 loops to be checked by eye.

Never imports the package. Slow by intent: pools of some 40 rows.

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


def sigmoid_slope(x: float) -> float:
    return sigmoid(-abs(x)) * sigmoid(abs(x))  # near 0 a small number, not a difference from 1


def difference(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two equal infinities tie


def smooth_ap(
    scores: Floats,
    is_positive: Sequence[bool],
    tau: float,
    weights: Floats | None = None,
    value: Floats | None = None,
) -> float:
    """Average Precision of one class with sigmoids for steps; NaN where it is not defined.

    >>> smooth_ap([2.0, 1.0, 0.5, -1.0], [True, False, True, False], 0.001)  # (1/1 + 2/3) / 2
    0.8333333333333333
    """
    rows = _rows_of_problem(scores, is_positive, weights)
    precision = {i.index: _precision_at(i, rows, tau) for i in rows if i.is_positive}
    return _mean_of_positives(rows, value, precision)


class Gradient(NamedTuple):
    scores: list[float]  # [M]
    tau: float


def smooth_ap_gradient(
    scores: Floats, is_positive: Sequence[bool], tau: float, weights: Floats | None = None
) -> Gradient:
    """Derivatives of AP, pair by pair; zero where AP is not defined.

    The pair (i, j) enters AP through x = (s_j − s_i) / τ alone:
    ∂AP/∂x = ω_i / Σω · (ω_j [j∈P] / R_i − ω_j R⁺_i / R_i²) · σ′(x).
    """
    rows = _rows_of_problem(scores, is_positive, weights)
    gradient, tau_gradient = [0.0] * len(scores), 0.0
    if not _is_valid(rows):
        return Gradient(gradient, 0.0)
    positive_weight = sum(i.weight for i in rows if i.is_positive)
    for i in rows:
        if not i.is_positive:
            continue
        rank, rank_among_positives = _ranks(i, rows, tau)
        for j in rows:
            x = difference(j.score, i.score) / tau
            through_rank = -j.weight * rank_among_positives / rank**2
            through_positives = j.weight / rank if j.is_positive else 0.0
            of_x = i.weight / positive_weight * (through_rank + through_positives)
            of_x *= sigmoid_slope(x)
            gradient[j.index] += of_x / tau
            gradient[i.index] -= of_x / tau
            if of_x != 0.0:  # 0 · inf for far pairs
                tau_gradient -= of_x * x / tau
    return Gradient(gradient, tau_gradient)


def average_precision(
    scores: Floats, is_positive: Sequence[bool], weights: Floats | None = None
) -> float:
    """The limit of smooth_ap for τ → 0: whole counts, a tie counts half."""
    return smooth_ap(scores, is_positive, tau=1e-300, weights=weights)


def recall_at_k(
    scores: Floats,
    is_positive: Sequence[bool],
    tau: float,
    weights: Floats | None = None,
    value: Floats | None = None,
    *,
    k: int | float,
    softness: float = 0.25,
) -> float:
    """The share of positives among the k highest; NaN where it is not defined."""
    rows = _rows_of_problem(scores, is_positive, weights)
    found = {}
    for i in rows:
        budget = _budget(rows, k)
        rank = _soft_rank(i, rows, tau)
        found[i.index] = sigmoid((budget + 0.5 * i.weight - rank) / (softness * budget))
    return _mean_of_positives(rows, value, found)


def recall_at_fpr(
    scores: Floats,
    is_positive: Sequence[bool],
    tau: float,
    weights: Floats | None = None,
    value: Floats | None = None,
    *,
    max_fpr: float,
    softness: float = 0.25,
) -> float:
    """The share of positives with at most so many of the negatives above them."""
    rows = _rows_of_problem(scores, is_positive, weights)
    negatives = [j for j in rows if not j.is_positive]
    found = {}
    for i in rows:
        if i.is_positive and negatives:
            budget, one = max_fpr * _mass(negatives), _mass(negatives) / len(negatives)
            above = sum(j.weight * sigmoid(difference(j.score, i.score) / tau) for j in negatives)
            found[i.index] = sigmoid((budget + 0.5 * one - above) / (softness * max(budget, one)))
    return _mean_of_positives(rows, value, found)


def partial_auc(
    scores: Floats,
    is_positive: Sequence[bool],
    tau: float,
    weights: Floats | None = None,
    value: Floats | None = None,
    *,
    max_fpr: float,
    min_fpr: float = 0.0,
    softness: float = 0.25,
) -> float:
    """Positives above a negative, averaged over the negatives of a range of ranks."""
    rows = _rows_of_problem(scores, is_positive, weights)
    negatives = [j for j in rows if not j.is_positive]
    worth = {i.index: i.weight * _value(value, i) for i in rows if i.is_positive}
    if not (_is_valid(rows) and sum(worth.values()) > 0):
        return math.nan
    last = max(max_fpr * _mass(negatives), _mass(negatives) / len(negatives))
    first = min_fpr * _mass(negatives)
    total = counted = 0.0
    for j in negatives:
        rank = _soft_rank(j, negatives, tau)
        share = 1.0
        if max_fpr < 1:
            share = sigmoid((last + 0.5 * j.weight - rank) / (softness * last))
        if min_fpr > 0:
            share -= sigmoid((first + 0.5 * j.weight - rank) / (softness * first))
        above = 0.0
        for i in rows:
            if i.is_positive:
                above += worth[i.index] * sigmoid(difference(i.score, j.score) / tau)
        total += j.weight * share * above
        counted += j.weight * share
    return total / (sum(worth.values()) * max(counted, last - first))


def ndcg(
    scores: Floats,
    grades: Sequence[int],
    tau: float,
    weights: Floats | None = None,
    value: Floats | None = None,
    *,
    k: int | float | None = None,
    softness: float = 0.25,
) -> float:
    """Discounted gains of rows at their ranks over those in the best order."""
    rows = _rows_of_problem(scores, [grade > 0 for grade in grades], weights)
    gain = {}
    for i in rows:
        given = 2.0 ** grades[i.index] - 1 if value is None else float(value[i.index])
        gain[i.index] = given if grades[i.index] > 0 else 0.0
    if len(set(gain.values())) < 2:
        return math.nan
    budget = math.inf if k is None else _budget(rows, k)
    total = ideal = place = 0.0
    for i in rows:
        rank = _soft_rank(i, rows, tau)
        within = 1.0
        if k is not None:
            within = sigmoid((budget + 0.5 * i.weight - rank) / (softness * budget))
        total += i.weight * gain[i.index] / math.log2(1 + rank) * within
    for i in sorted(rows, key=lambda i: (-gain[i.index], i.weight)):
        place += i.weight
        if place <= budget + 0.5 * i.weight or place == i.weight:
            ideal += i.weight * gain[i.index] / math.log2(1 + place)
    return total / ideal


def _budget(rows: list[_ProblemRow], k: int | float) -> float:
    if isinstance(k, int):
        return k
    return max(k * _mass(rows), _mass(rows) / len(rows))


def _mass(rows: list[_ProblemRow]) -> float:
    return sum(i.weight for i in rows)


def _value(value: Floats | None, i: _ProblemRow) -> float:
    return 1.0 if value is None else float(value[i.index])


def _soft_rank(i: _ProblemRow, rows: list[_ProblemRow], tau: float) -> float:
    """Of a row among rows that it is one of."""
    terms = (j.weight * sigmoid(difference(j.score, i.score) / tau) for j in rows)
    return 0.5 * i.weight + sum(terms)


def _mean_of_positives(
    rows: list[_ProblemRow], value: Floats | None, found: dict[int, float]
) -> float:
    """By weight and value; NaN where it is not defined."""
    shares = {i.index: i.weight * _value(value, i) for i in rows if i.is_positive}
    if not (_is_valid(rows) and sum(shares.values()) > 0):
        return math.nan
    return sum(share * found[i] for i, share in shares.items()) / sum(shares.values())


def spread(scores: Floats, weights: Floats | None = None) -> float:
    """√(Σω(s − μ)² / Σω) over the finite scores of weight > 0; 1 where they do not vary."""
    kept = _rows_of_problem(scores, [False] * len(scores), weights)
    kept = [i for i in kept if math.isfinite(i.score)]
    if len({i.score for i in kept}) < 2:
        return 1.0
    total = sum(i.weight for i in kept)
    mean = sum(i.weight / total * i.score for i in kept)
    # hypot is the root of a sum of squares that neither overflows nor underflows
    return math.hypot(*(math.sqrt(i.weight / total) * (i.score - mean) for i in kept))


def spread_gradient(scores: Floats, weights: Floats | None = None) -> list[float]:
    """∂spread/∂s_k = ω_k (s_k − μ) / (spread · Σω)."""
    gradient = [0.0] * len(scores)
    kept = _rows_of_problem(scores, [False] * len(scores), weights)
    kept = [i for i in kept if math.isfinite(i.score)]
    if len({i.score for i in kept}) < 2:
        return gradient
    total = sum(i.weight for i in kept)
    mean = sum(i.weight / total * i.score for i in kept)
    for i in kept:
        gradient[i.index] = i.weight / total * (i.score - mean) / spread(scores, weights)
    return gradient


def sigmoid_sum(query: float, sources: Floats, weights: Floats, tau: float) -> float:
    """Σ_m weights[m] · σ((sources[m] − query) / τ)."""
    total = 0.0
    for source, weight in zip(sources, weights, strict=True):
        total += weight * sigmoid(difference(source, query) / tau)
    return total


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
        classes = range(self.num_classes)
        results = [self._one_class(live, c) for c in classes]
        if store:
            self.queue.extend(row for row in live if self._is_worth_storing(row))

        per_class = [loss for loss, _ in results]
        valid = [not math.isnan(loss) for loss in per_class]
        per_class_gradient = np.zeros((len(live), self.num_classes))
        for c in classes:
            per_class_gradient[:, c] = results[c][1]
        total = sum(loss for loss in per_class if not math.isnan(loss))
        divisor = max(1, sum(valid)) if self.reduction == "mean" else 1
        loss = per_class if self.reduction == "none" else total / divisor
        return Result(loss, per_class, valid, per_class_gradient, per_class_gradient / divisor)

    def _one_class(self, live: list[Row], c: int) -> tuple[float, list[float]]:
        """(loss, its gradient in logits[:, c] of the live rows)."""
        pool = live + list(self.queue)
        scores = [row.logits[c] for row in pool]
        is_positive = [self._label(row, c) == 1 for row in pool]
        weights = [0.0 if self._label(row, c) is None else row.weight for row in pool]

        tau, tau_gradient = self.temperature, [0.0] * len(pool)
        if self.temperature_unit == "spread":
            tau = self.temperature * spread(scores, weights)
            tau_gradient = [self.temperature * g for g in spread_gradient(scores, weights)]

        loss = 1 - smooth_ap(scores, is_positive, tau, weights)
        of_ap = smooth_ap_gradient(scores, is_positive, tau, weights)
        gradient = [
            -direct - of_ap.tau * through_tau
            for direct, through_tau in zip(of_ap.scores, tau_gradient, strict=True)
        ]
        live_gradient, queue_gradient = gradient[: len(live)], gradient[len(live) :]
        if self.queue_follows_shift:
            moving = [
                n
                for n, row in enumerate(live)
                if weights[n] > 0 and math.isfinite(row.logits[c])  # the rows of the mean
            ]
            for n in moving:
                live_gradient[n] += sum(queue_gradient) / len(moving)
        return loss, live_gradient

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


class _ProblemRow(NamedTuple):
    index: int
    score: float
    is_positive: bool
    weight: float


def _rows_of_problem(
    scores: Floats, is_positive: Sequence[bool], weights: Floats | None
) -> list[_ProblemRow]:
    """The rows of weight > 0: those of weight 0 are in neither sum."""
    weights = [1.0] * len(scores) if weights is None else weights
    return [
        _ProblemRow(index, float(scores[index]), bool(is_positive[index]), float(weights[index]))
        for index in range(len(scores))
        if weights[index] > 0
    ]


def _is_valid(rows: list[_ProblemRow]) -> bool:
    return len({row.is_positive for row in rows}) == 2


def _ranks(i: _ProblemRow, rows: list[_ProblemRow], tau: float) -> tuple[float, float]:
    """(R_i, R⁺_i)."""
    rank = rank_among_positives = 0.5 * i.weight
    for j in rows:
        term = j.weight * sigmoid(difference(j.score, i.score) / tau)
        rank += term
        if j.is_positive:
            rank_among_positives += term
    return rank, rank_among_positives


def _precision_at(i: _ProblemRow, rows: list[_ProblemRow], tau: float) -> float:
    rank, rank_among_positives = _ranks(i, rows, tau)
    return rank_among_positives / rank


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
        above = torch.sigmoid((scores[c] - scores[c, rows, None]) / tau[c])  # [Q, M]
        ranks = {}
        for name in among:
            own = omega * sets[name]
            ranks[name] = (above * own).sum(1) + 0.5 * own[rows]
        totals.append((omega[rows] * worth(RanksOfProblem(ranks, c, rows))).sum())
    return torch.stack(totals)
