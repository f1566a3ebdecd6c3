"""Which backend computes: a pure function of sizes."""

from __future__ import annotations

import torch

# What the panels cost, in pairs of the dense backend: a fixed sum for the calls, then for the
# convolutions of each problem (some 500 panels at scores of unit spread and τ = 0.01), then for
# each row. Measured with benchmarks/speed.py on two CPU cores.
_PAIRS_OF_A_CALL = 300_000
_PAIRS_OF_A_PROBLEM = 500_000
_PAIRS_OF_A_ROW = 25


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
    panels = _PAIRS_OF_A_CALL + _PAIRS_OF_A_PROBLEM * num_problems + _PAIRS_OF_A_ROW * num_rows
    if dtype == torch.float64:
        panels *= 2
    return "panel" if num_pairs > panels else "dense"
