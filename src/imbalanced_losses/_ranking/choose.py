"""Which backend computes: a pure function of sizes."""

from __future__ import annotations

import torch

# What the panels cost, in pairs of the dense backend: a fixed sum for the calls, then for the
# convolutions of each problem (some 400 panels at scores of unit spread and τ = 0.01), then for
# each row. Measured on two CPU cores; `python -m benchmarks.speed --only choice` checks it.
_PAIRS_OF = {
    torch.float32: {"call": 600_000, "problem": 150_000, "row": 25},
    torch.float64: {"call": 500_000, "problem": 700_000, "row": 25},
}


# C·M² up to which a CUDA device compares all pairs. A guess from rates: `make gpu` measures where
# both ways take as long, and prints what should stand here.
# With a tenth of the rows positive, ranks and slopes take 2 · 0.1 · C·M² sigmoids. An H100 computes
# some 10¹² of them a second: 132 multiprocessors of 16 exponentials or reciprocals a cycle at
# 1.75 GHz make 1.8 · 10¹² pairs of one each, of which a loop with loads gets half. The linear way
# launches some 130 operations, the dense one 50: called one by one, at 5 µs, that is 0.4 ms.
# 2 · 0.1 · C·M² / 10¹² s = 0.4 ms at C·M² = 2 · 10⁹; a quarter of that allows for pools of which
# four tenths are positive.
MOST_FUSED_PAIRS = 1 << 29
# Rows of a pool so small that it is all launches, of which the dense way has fewer.
FEW_FUSED_ROWS = 1 << 11


def choose(
    device_type: str, dtype: torch.dtype, num_pairs: int, num_problems: int, num_rows: int
) -> str:
    """The name of the backend that is expected to be faster.

    Args:
        device_type: "cpu", "cuda", …; "mps" has no float64, which the panels need.
        dtype: of the scores; float64 takes panels of a higher degree.
        num_pairs: Q·M, what the dense backend computes.
        num_problems: C.
        num_rows: C·M + Q, the scores that the panel backend locates.
    """
    if device_type == "mps":
        return "dense"
    pairs_of = _PAIRS_OF[dtype]
    panels = pairs_of["call"] + pairs_of["problem"] * num_problems + pairs_of["row"] * num_rows
    return "panel" if num_pairs > panels else "dense"


def choose_fused(num_problems: int, num_rows: int) -> str:
    """The same for the kernels of a device, where the number of positives is not known."""
    if num_rows <= FEW_FUSED_ROWS or num_problems * num_rows**2 <= MOST_FUSED_PAIRS:
        return "dense"
    return "panel"
