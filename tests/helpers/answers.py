"""What the function of AP gives back, and its slopes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imbalanced_losses.functional import smooth_ap


class Answer(NamedTuple):
    ap: Tensor  # [] or [C]
    valid: Tensor
    gradient: Tensor  # of the sum of AP, by the scores


def solved(
    scores: Tensor,
    is_positive: Tensor,
    temperature: float | Tensor,
    weights: Tensor | None = None,
    backend: Any = "auto",
) -> Answer:
    leaf = scores.detach().clone().requires_grad_()
    ap, valid = smooth_ap(leaf, is_positive, temperature, sample_weight=weights, backend=backend)
    (gradient,) = torch.autograd.grad(ap.sum(), leaf)
    return Answer(ap.detach(), valid, gradient)
