"""Inputs: those whose Average Precision is known exactly, and random batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Case(NamedTuple):
    """One ranking problem and its answer."""

    name: str
    scores: Tensor  # [M] float64, exact in float32 too
    is_positive: Tensor  # [M] bool
    temperature: float
    ap: float  # NaN where not defined


def _case(name: str, scores: list[float], is_positive: list[bool], ap: float) -> Case:
    """Scores that differ do so by 1 at least, so that at τ = 0.01 a comparison is a whole count."""
    labels = torch.tensor(is_positive, dtype=torch.bool)
    return Case(name, torch.tensor(scores, dtype=torch.float64), labels, 0.01, ap)


def perfect(positives: int, negatives: int) -> Case:
    """Every positive above every negative: 1."""
    count = positives + negatives
    scores = [float(count - i) for i in range(count)]
    is_positive = [i < positives for i in range(count)]
    return _case(f"perfect {positives}+{negatives}", scores, is_positive, 1.0)


def reversed_ranking(positives: int, negatives: int) -> Case:
    """Every positive below every negative: the k-th positive has precision k / (N + k)."""
    count = positives + negatives
    scores = [float(count - i) for i in range(count)]
    is_positive = [i >= negatives for i in range(count)]
    ap = sum(k / (negatives + k) for k in range(1, positives + 1)) / positives
    return _case(f"reversed {positives}+{negatives}", scores, is_positive, ap)


def all_equal(positives: int, negatives: int) -> Case:
    """Constant scores: (n + 1) / (n + N + 1)."""
    count = positives + negatives
    is_positive = [i < positives for i in range(count)]
    ap = (positives + 1) / (count + 1)
    return _case(f"all equal {positives}+{negatives}", [3.0] * count, is_positive, ap)


def one_positive(rank: int, count: int) -> Case:
    """A single positive at a rank: 1 / rank."""
    scores = [float(-i) for i in range(1, count + 1)]
    is_positive = [i == rank for i in range(1, count + 1)]
    return _case(f"one positive at {rank} of {count}", scores, is_positive, 1 / rank)


def one_negative(rank: int, count: int) -> Case:
    """A single negative at a rank: the positives below it have precision (i − 1) / i at rank i."""
    scores = [float(-i) for i in range(1, count + 1)]
    is_positive = [i != rank for i in range(1, count + 1)]
    precision = [1.0 if i < rank else (i - 1) / i for i in range(1, count + 1) if i != rank]
    ap = sum(precision) / (count - 1)
    return _case(f"one negative at {rank} of {count}", scores, is_positive, ap)


def no_positive(count: int) -> Case:
    return _case(
        f"no positive of {count}", [float(i) for i in range(count)], [False] * count, math.nan
    )


def all_positive(count: int) -> Case:
    return _case(
        f"all positive of {count}", [float(i) for i in range(count)], [True] * count, math.nan
    )


def empty_pool() -> Case:
    return _case("empty pool", [], [], math.nan)


def tied_pair() -> Case:
    """A positive tied with a negative, above a positive: R = 1½ and 3, R⁺ = 1 and 2."""
    return _case("tied pair", [2.0, 2.0, 0.0], [True, False, True], (1 / 1.5 + 2 / 3) / 2)


def two_clusters(name: str, gap: float, high: tuple[int, int], low: tuple[int, int]) -> Case:
    """(positives, negatives) all at +gap, and all at −gap: constant scores within each cluster."""
    (high_positives, high_negatives), (low_positives, low_negatives) = high, low
    above = high_positives + high_negatives
    scores = [gap] * above + [-gap] * (low_positives + low_negatives)
    is_positive = [True] * high_positives + [False] * high_negatives
    is_positive += [True] * low_positives + [False] * low_negatives
    at_high = (high_positives + 1) / (above + 1)
    at_low = (high_positives + (low_positives + 1) / 2) / (
        above + (low_positives + low_negatives + 1) / 2
    )
    ap = (high_positives * at_high + low_positives * at_low) / (high_positives + low_positives)
    return _case(name, scores, is_positive, ap)


def cases() -> Iterator[Case]:
    for positives, negatives in ((1, 1), (1, 9), (4, 7), (9, 1)):
        yield perfect(positives, negatives)
        yield reversed_ranking(positives, negatives)
        yield all_equal(positives, negatives)
    for rank in (1, 2, 5, 9):
        yield one_positive(rank, 9)
        yield one_negative(rank, 9)
    for count in (1, 6):
        yield no_positive(count)
        yield all_positive(count)
    yield empty_pool()
    yield tied_pair()
    yield two_clusters("far clusters, good", 1000.0, high=(5, 2), low=(1, 30))
    yield two_clusters("far clusters, bad", 1000.0, high=(1, 20), low=(6, 3))
    huge = 2.0**100  # about 1e30
    yield two_clusters("huge logits, good", huge, high=(3, 2), low=(2, 8))
    yield two_clusters("huge logits, reversed", huge, high=(0, 8), low=(3, 0))


class Batch(NamedTuple):
    logits: Tensor  # [N, C] float64, exact in float32 too
    targets: Tensor  # [N] or [N, C]
    sample_weight: Tensor | None  # [N]


def random_batch(
    generator: torch.Generator,
    num_rows: int,
    num_classes: int,
    *,
    multilabel: bool = False,
    weights: str = "none",
    ties: bool = False,
) -> Batch:
    """A batch with 30 % positives and 15 % ignored entries.

    Args:
        weights: "none", "real" numbers, or "counts": small integers, 0 among them.
        ties: whether logits take few different values.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    logits = torch.randn(num_rows, num_classes, generator=generator, dtype=torch.float64)
    logits = (2 * logits).round() / 2 if ties else logits.float().double()
    if multilabel or num_classes == 1:
        shape = (num_rows, num_classes) if multilabel else (num_rows,)
        targets = (uniform(*shape) < 0.3).long()
    else:
        targets = torch.randint(num_classes, (num_rows,), generator=generator)
    targets[uniform(*targets.shape) < 0.15] = IGNORED
    sample_weight = {
        "none": None,
        "real": (0.1 + 3 * uniform(num_rows)).float().double(),
        "counts": (4 * uniform(num_rows)).floor(),
    }[weights]
    return Batch(logits, targets, sample_weight)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
