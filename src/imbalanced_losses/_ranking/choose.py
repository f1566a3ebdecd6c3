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


# C·M² up to which a CUDA device compares all pairs, a tenth of the rows being positive. Called one
# by one, a step is launches, of which the linear way has twice as many: on an H200 (torch 2.11)
# both took 1.9 ms at C = 1, M = 65,536, and 1.6 and 1.8 ms at C = 10, M = 16,384. As a CUDA graph
# it is arithmetic: .15 and .14 ms at C = 1, M = 16,384, and .11 and .12 ms at C = 10, M = 4,096.
# `python -m benchmarks.gpu` measures both.
MOST_FUSED_PAIRS, MOST_CAPTURED_PAIRS = 1 << 32, 1 << 28
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


def choose_fused(num_problems: int, num_rows: int, is_captured: bool = False) -> str:
    """The same for the kernels of a device, where the number of positives is not known.

    `is_captured` as a CUDA graph.
    """
    most = MOST_CAPTURED_PAIRS if is_captured else MOST_FUSED_PAIRS
    if num_rows <= FEW_FUSED_ROWS or num_problems * num_rows**2 <= most:
        return "dense"
    return "panel"
