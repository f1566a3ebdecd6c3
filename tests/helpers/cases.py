"""Inputs: those whose Average Precision is known exactly, and random batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tests.helpers.rows import IGNORED, Batch


class Case(NamedTuple):
    """One ranking problem and its answer."""

    name: str
    scores: Tensor  # [M] float64, exact in float32 too
    is_positive: Tensor  # [M] bool
    temperature: float
    ap: float  # NaN where not defined


def ranking(text: str, gap: float = 1.0) -> Case:
    """Positives and negatives from the highest score down; those without a space between them tie.

    Other scores differ by the gap at least, so that at τ = 0.01 a comparison is a whole count, and
    a tie is a half: (1 + tied) / 2 beside the rows above.
    """
    scores: list[float] = []
    ap = positives_above = 0.0
    for place, tied in enumerate(text.split()):
        rank = len(scores) + (len(tied) + 1) / 2
        positives = tied.count("+")
        ap += positives * (positives_above + (positives + 1) / 2) / rank
        positives_above += positives
        scores += [-gap * place] * len(tied)
    is_positive = torch.tensor([sign == "+" for sign in text if sign != " "], dtype=torch.bool)
    is_defined = "+" in text and "-" in text
    ap = ap / positives_above if is_defined else math.nan
    name = f"{text}, {gap:g} apart"
    return Case(name, torch.tensor(scores, dtype=torch.float64), is_positive, 0.01, ap)


def cases() -> Iterator[Case]:
    for text in ("+-", "+---------", "++++-------", "+++++++++-"):
        yield ranking(text)  # all tied
        yield ranking(" ".join(text))  # perfect
        yield ranking(" ".join(reversed(text)))
    for place in (1, 4):
        for one, others in ("+-", "-+"):
            yield ranking(" ".join(others * place + one + others * (8 - place)))
    for text in ("", "-", "+", "- - - - - -", "+ + + + + +", "+- +"):
        yield ranking(text)
    yield ranking("+++++-- +" + 30 * "-", gap=2000.0)
    yield ranking("+" + 20 * "-" + " ++++++---", gap=2000.0)
    for text in ("+++-- ++--------", "-------- +++"):
        yield ranking(text, gap=2.0**101)  # about 1e30


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
    row_weights = {
        "none": None,
        "real": (0.1 + 3 * uniform(num_rows)).float().double(),
        "counts": (4 * uniform(num_rows)).floor(),
    }[weights]
    return Batch(logits, targets, row_weights)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
