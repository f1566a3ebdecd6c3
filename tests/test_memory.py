"""What a training step may hold, as the kernel accounts for it."""

from __future__ import annotations

from benchmarks._contenders import Case
from benchmarks._measure import run_cell

LIMIT_BYTES = 512 * 2**20


def test_a_large_pool_half_of_it_positive_fits() -> None:
    """32 768 rows: 2 GiB for one float32 a pair. In a process of its own, over what it holds
    before; allocations beyond the limit fail there.
    """
    case = Case(num_rows=32_768, positive_rate=0.5)
    reply = run_cell("ours", case, num_threads=1, timeout_s=600, limit_bytes=LIMIT_BYTES)
    assert 2**20 < reply.get("peak_bytes", 0) <= LIMIT_BYTES, reply
