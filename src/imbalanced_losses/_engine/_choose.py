"""Which backend computes: a pure function of sizes."""

from __future__ import annotations

import torch

# Measured with benchmarks/speed.py on two CPU cores. The dense backend takes a nanosecond or two a
# pair; the panels take a fixed time for their convolutions and the calls around them, and then
# some ten nanoseconds a row.
_PAIRS_OF_A_CALL = 300_000
_PAIRS_OF_A_ROW = 20


def choose(device_type: str, dtype: torch.dtype, num_pairs: int, num_rows: int) -> str:
    """The name of the backend that is expected to be faster.

    Args:
        device_type: "cpu", "cuda", …; "mps" has no float64, which the panels need.
        dtype: of the scores.
        num_pairs: Q·M, what the dense backend computes.
        num_rows: C·M + Q, what the panel backend computes.
    """
    if device_type == "mps":
        return "dense"
    cost_factor = 2 if dtype == torch.float64 else 1
    panels = cost_factor * (_PAIRS_OF_A_CALL + _PAIRS_OF_A_ROW * num_rows)
    return "panel" if num_pairs > panels else "dense"
