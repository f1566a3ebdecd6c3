"""What a ranking is judged by, exactly: over all rows, and per block as in the KDD Cup 2004."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Judged(NamedTuple):
    """The measures of one model.

    Attributes:
        ap: Average Precision over all rows as one list.
        block_ap: the mean over blocks of the Average Precision within the block; APR in the cup.
        top1: the share of blocks whose highest row is a homologue, rows that tie for it shared
            out; TOP1 in the cup.
        last: the mean place of a block's last homologue, 1 being the highest; RKL in the cup.
    """

    ap: float
    block_ap: float
    top1: float
    last: float


def judge(scores: Tensor, labels: Tensor, blocks: Tensor) -> Judged:
    """Judge scores [n] of rows with labels [n] in {0, 1} and blocks [n].

    Blocks without a homologue do not count.
    """
    places, precisions, top = [], [], []
    for block in blocks[labels == 1].unique():
        rows = blocks == block
        own, is_homologue = scores[rows], labels[rows] == 1
        place, precision = _places_and_precisions(own, is_homologue)
        places.append(place.max())
        precisions.append(precision.mean())
        top.append(is_homologue[own == own.max()].double().mean())
    ap = _places_and_precisions(scores, labels == 1)[1].mean().item()
    return Judged(ap, *(_mean(values) for values in (precisions, top, places)))


def _places_and_precisions(scores: Tensor, is_positive: Tensor) -> tuple[Tensor, Tensor]:
    """Of each positive the number of rows no lower than it, and the share of positives in them."""
    found = scores[is_positive]
    places, positives = (
        len(values) - torch.searchsorted(values.sort().values, found) for values in (scores, found)
    )
    return places, positives / places.double()


def _mean(values: list[Tensor]) -> float:
    return torch.stack(values).double().mean().item()
