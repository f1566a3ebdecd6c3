"""Derivatives of the sigmoid, to full relative precision on both sides.

They are polynomials in σ, taken at −|x|, where σ is small and its relative error stays at rounding:
so the derivatives at far x come out right, not as the difference of two numbers near one.
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor


def sigmoid_derivative(order: int, x: Tensor) -> Tensor:
    """φₙ(x), n = order; φ₀ = σ."""
    return sigmoid_derivative_(order, x.clone())


def sigmoid_derivative_(order: int, x: Tensor) -> Tensor:
    """φₙ(x), overwriting x."""
    if order == 0:
        return x.sigmoid_()
    sign = x.sign().neg_() if order % 2 == 0 else None  # φₙ is odd for even n, even for odd n
    z = x.abs_().neg_().sigmoid_()
    *lower, leading = _derivative_polynomial(order)
    out = z * leading
    for coefficient in reversed(lower):
        out.add_(coefficient).mul_(z)
    return out if sign is None else out.mul_(sign)


@lru_cache
def _derivative_polynomial(order: int) -> tuple[int, ...]:
    """Coefficients a₁, a₂, … of φₙ = a₁σ + a₂σ² + …, from σ′ = σ − σ²."""
    polynomial = {1: 1}
    for _ in range(order):
        raised: dict[int, int] = {}
        for power, coefficient in polynomial.items():
            raised[power] = raised.get(power, 0) + power * coefficient
            raised[power + 1] = raised.get(power + 1, 0) - power * coefficient
        polynomial = raised
    return tuple(polynomial[power] for power in sorted(polynomial))
