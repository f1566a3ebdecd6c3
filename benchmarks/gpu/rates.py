"""What a device could do at best: kernels that do nothing but the arithmetic of a sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoids(out, rounds, BLOCK: tl.constexpr):
    """out[i] = Σ_r σ(i·10⁻⁶ + r·10⁻³), r < rounds: float32, as the dense kernels compute it."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = index.to(tl.float32) * 1e-6
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(rounds):
        small = tl.exp(-tl.abs(x))
        inverse = 1.0 / (1.0 + small)
        total += tl.where(x >= 0, inverse, small * inverse)
        x += 1e-3
    tl.store(out + index, total)
