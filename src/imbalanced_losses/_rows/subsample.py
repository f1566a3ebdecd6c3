"""A cap on the pool that keeps every class in it and the estimate of its AP unbiased by design."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imbalanced_losses._rows.pool import Pool

_WORD = 1 << 64


class Sample(NamedTuple):
    """Rows drawn from a pool of M."""

    rows: Tensor  # [k] int64, ascending
    weights: Tensor  # [k] float64, one over the row's probability of being drawn


def capped(pool: Pool, limit: int, seed: int, step: int, num_labels: int = 2) -> Pool:
    """At most `limit` rows of a pool, each weighted by one over its chance of being drawn."""
    if pool.targets.shape[0] <= limit:
        return pool
    sample = quota_indices(strata_of(pool.targets, num_labels), limit, seed, step)
    drawn = pool.select(sample.rows)
    weights = drawn.filled(weights=True).weights
    assert weights is not None
    factor = sample.weights.to(weights.dtype)
    weights = weights * (factor if weights.dim() == 1 else factor[:, None])
    weights = weights.clamp_(max=torch.finfo(weights.dtype).max)
    return drawn._replace(weights=weights, draws=sample.weights)


def quota_indices(strata: Tensor, limit: int, seed: int, step: int) -> Sample:
    """Draw `limit` of M rows, with a guaranteed quota for every stratum.

    Each of the S strata present gets limit // (2·S) rows, or all it has, drawn uniformly; the rest
    of the budget is drawn uniformly from all rows that are left. A row of a stratum of n rows with
    quota q is thus drawn with probability p = q/n + (1 − q/n) · rest/left, and weighted by 1/p
    (Horvitz and Thompson 1952), so that weighted counts estimate the counts in the pool.

    A pure function of its arguments: the same draw on every process and device, and after a
    checkpoint. The global random state is neither read nor changed.

    Args:
        strata: [M] int64, the stratum of each row; any values.
        limit: rows to draw, in 1..M.
        seed, step: what selects the draw.
    """
    generator = torch.Generator("cpu").manual_seed(_mixed(seed, step))
    keys = torch.rand(2, len(strata), generator=generator, dtype=torch.float64, device="cpu")
    first_key, second_key = keys.to(strata.device)

    _, stratum, counts = strata.unique(return_inverse=True, return_counts=True)  # [M], [S]
    quotas = counts.clamp(max=limit // (2 * len(counts)))  # [S]
    reserved = _rank_in_stratum(first_key, stratum, counts) < quotas[stratum]  # [M]

    rest, left = limit - quotas.sum(), len(strata) - quotas.sum()
    order = torch.where(reserved, -1.0, second_key).argsort()  # reserved rows first
    drawn = order[:limit].sort().values

    by_quota = quotas.double() / counts  # [S]
    probability = by_quota + (1 - by_quota) * (rest.double() / left)
    return Sample(drawn, 1 / probability[stratum[drawn]])


def strata_of(targets: Tensor, num_labels: int = 2) -> Tensor:
    """The stratum [M] of each row: its class, or for multi-label targets [M, C] its rarest label.

    Rows without a positive label, 1 to `num_labels` − 1, form one stratum of their own.
    """
    if targets.dim() == 1:
        return targets
    positive = (targets > 0) & (targets < num_labels)  # [M, C]
    rarity = positive.sum(0).argsort(stable=True).argsort()  # [C], 0 = the rarest
    num_classes = targets.shape[1]
    return torch.where(positive, rarity, num_classes).amin(1)


def _rank_in_stratum(key: Tensor, stratum: Tensor, counts: Tensor) -> Tensor:
    """The position [M] of each row among the rows of its stratum, by key."""
    by_key = key.argsort()
    order = by_key[stratum[by_key].argsort(stable=True)]  # by stratum, then by key
    first = counts.cumsum(0) - counts  # [S]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - first[stratum[order]]
    return rank


def _mixed(seed: int, step: int) -> int:
    """A 64-bit generator seed in which neighbouring steps share nothing (SplitMix64)."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) % _WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % _WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % _WORD
    return z ^ (z >> 31)
