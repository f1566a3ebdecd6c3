"""Relatives of Smooth-AP that were tried for `benchmarks.quality` and are not in the library.

As written, pair by pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

# What a negative counts that is ahead of a positive by x temperatures.
COUNTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "softplus": lambda x: softplus(x) / math.log(2),  # never less than a step function
    "softmax": torch.exp,
}


def powered(
    logits: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    power: float = 1.0,
    count: str = "sigmoid",
    margin: float = 0.0,
) -> Tensor:
    """Mean over positives of (1 − p^q) / q of their smoothed precision p, with q = `power`.

    q = 1 is Smooth-AP, q = 0 the mean of −log p, which by Jensen's inequality is no less than
    −log AP: the lower q, the more of the gradient goes to positives with many negatives above. Of
    negatives before a positive as a function that rises ever more slowly or ever faster: Li et
    al., "Rethinking the Optimization of Average Precision", AAAI 2022, arXiv 2102.04640.

    Args:
        logits: [n].
        y: [n] in {0, 1}.
        temperature: τ > 0.
        power: q ≥ 0.
        count: a key of COUNTS.
        margin: by which negatives are lifted, in temperatures, as in Rolínek et al., "Optimizing
            Rank-based Metrics with Blackbox Differentiation", CVPR 2020, arXiv 1912.03500.
    """
    is_positive = y == 1
    if not is_positive.any() or is_positive.all():
        return 0 * logits.sum()
    scores = logits / temperature
    positives, negatives = scores[is_positive], scores[~is_positive] + margin
    among_positives = 0.5 + torch.sigmoid(positives - positives[:, None]).sum(1)
    lead = negatives - positives[:, None]  # [P, N]
    if count == "softmax":
        before = torch.logsumexp(lead, 1)
    else:
        before = COUNTS[count](lead).sum(1).clamp(min=1e-30).log()
    log_precision = -softplus(before - among_positives.log())  # p = 1 / (1 + negatives / positives)
    if power == 0:
        return -log_precision.mean()
    return -(torch.expm1(power * log_precision) / power).mean()


def upper_bound(logits: Tensor, y: Tensor, temperature: float) -> Tensor:
    """SupAP, an upper bound of 1 − AP (Ramzi et al., NeurIPS 2021), of standardised scores.

    Ranks among positives are the true ones; a negative counts by a sigmoid where it is below the
    positive, by a sigmoid + ½ where it is barely above, and linearly beyond.
    """
    margin, slope = 2 * temperature, 1.0
    scores = logits / logits.std()
    positives, negatives = scores[y == 1], scores[y == 0]
    if len(positives) == 0:
        return 0 * logits.sum()
    above = 1 + (positives > positives[:, None]).sum(1)
    lead = negatives - positives[:, None]  # [P, N]
    step = torch.sigmoid(lead / temperature)
    edge = torch.sigmoid(torch.tensor(margin / temperature)) + 0.5
    far = slope * (lead - margin) + edge
    counted = torch.where(lead <= 0, step, torch.where(lead < margin, step + 0.5, far))
    return 1 - (above / (above + counted.sum(1))).mean()
