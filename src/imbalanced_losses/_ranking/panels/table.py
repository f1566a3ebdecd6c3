"""The translation table of the panels: φₙ between two panels as a polynomial in both places."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from imbalanced_losses._ranking.sigmoid import sigmoid_derivative


@lru_cache(maxsize=64)
def translation_table(
    order: int, degree: int, width: float, reach: int, device: torch.device
) -> Tensor:
    """A[a, b, d + reach] of φₙ((d + (s − t)/2)·h) = Σ A[a, b, d] tᵃ sᵇ, n = order, |d| ≤ reach.

    By interpolation in the p = degree Chebyshev nodes of both places, for panels of width h (in
    units of the temperature). float64.
    """
    nodes = torch.cos(math.pi * (torch.arange(degree, dtype=torch.float64) + 0.5) / degree)
    shift = torch.arange(-reach, reach + 1, dtype=torch.float64)
    places = (nodes[None, :] - nodes[:, None]) / 2  # [query node, source node]
    values = sigmoid_derivative(order, (shift + places[..., None]) * width)
    # Chebyshev coefficients first: their decay outweighs the growth of the integers that turn them
    # into powers, where going there in one step would lose those digits.
    to_chebyshev = _chebyshev_transform(degree)
    coefficients = torch.einsum("an,bm,nmd->abd", to_chebyshev, to_chebyshev, values)
    powers = _powers_of_chebyshev(degree)
    return torch.einsum("ak,bl,kld->abd", powers, powers, coefficients).to(device)


@lru_cache(maxsize=64)
def table_spectrum(
    order: int,
    degree: int,
    width: float,
    reach: int,
    transposed: bool,
    device: torch.device,
    size: int,
) -> Tensor:
    """[size // 2 + 1, a, b]: the translation table as the factor of a Fourier transform.

    Multiplied to the transform of `size` panels of moments it gives the field of all but the last
    2·reach of them, the first being that of panel `reach`.
    """
    table = translation_table(order, degree, width, reach, device)
    if transposed:
        table = table.transpose(0, 1).flip(2)
    spectrum: Tensor = torch.fft.rfft(table, n=size)
    return spectrum.conj().movedim(2, 0).resolve_conj().contiguous()


def _chebyshev_transform(degree: int) -> Tensor:
    """[k, n]: values at the Chebyshev nodes to coefficients of the polynomials T_k."""
    k = torch.arange(degree, dtype=torch.float64)
    transform = torch.cos(math.pi * k[:, None] * (k[None, :] + 0.5) / degree) * (2 / degree)
    transform[0] /= 2
    return transform


def _powers_of_chebyshev(degree: int) -> Tensor:
    """[a, k]: the coefficient of tᵃ in T_k(t), by T_k = 2t·T_{k−1} − T_{k−2}."""
    powers = torch.eye(degree, dtype=torch.float64)
    for k in range(2, degree):
        powers[1:, k] = 2 * powers[:-1, k - 1]
        powers[:, k] -= powers[:, k - 2]
    return powers
