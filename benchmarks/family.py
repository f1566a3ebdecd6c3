"""Time of every metric, and of ranks within groups, as a multiple of Average Precision's.

    python -m benchmarks.family

One forward and backward pass of the functional form, float32, 1 % positive (2 % in groups), scores
of unit spread, τ = 0.01, one thread. All are measured in turn in one process, by its own CPU time,
and each is compared with `smooth_ap` of as many rows without groups in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import _measure, _peers
from benchmarks._measure import Row
from imbalanced_losses import functional

ROUNDS = 9
SIZES = (65_536, 1_048_576)
MEMBERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "smooth_ap": (functional.smooth_ap, {}),
    "recall_at_k, 1 %": (functional.recall_at_k, {"k": 0.01}),
    "recall_at_fpr, 1 %": (functional.recall_at_fpr, {"max_fpr": 0.01}),
    "partial_auc, to 1 %": (functional.partial_auc, {"max_fpr": 0.01}),
    "partial_auc, 1 to 5 %": (functional.partial_auc, {"max_fpr": 0.05, "min_fpr": 0.01}),
    "partial_auc, all (AUC)": (functional.partial_auc, {"max_fpr": 1.0}),
    "ndcg": (functional.ndcg, {}),
    "ndcg, k = 1 %": (functional.ndcg, {"k": 0.01}),
}
# Groups, and the fewest and the most rows that one has.
GROUPS = {
    "10,000 groups of 50 rows": (10_000, 50, 50),
    "10,000 groups of 20 to 80 rows": (10_000, 20, 80),
    "100 groups of 20,000 rows": (100, 20_000, 20_000),
    "100 groups of 10,000 to 30,000 rows": (100, 10_000, 30_000),
}


def step(
    function: Callable[..., Any], num_rows: int, share: float, **own: Any
) -> Callable[[], None]:
    """One forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_rows, generator=generator).requires_grad_()
    is_positive = torch.rand(num_rows, generator=generator) < share
    labels: Tensor = is_positive.long() if function is functional.ndcg else is_positive

    def run() -> None:
        scores.grad = None
        function(scores, labels, **own)[0].sum().backward()

    return run


def libauc_partial_auc(num_rows: int, share: float) -> Callable[[], None]:
    """LibAUC's, which compares every positive with every negative."""
    loss_of = _peers.load("libauc").pAUC_CVaR_Loss(data_len=num_rows, pos_len=num_rows, beta=0.01)
    index = torch.arange(num_rows)

    def compared(scores: Tensor, labels: Tensor) -> tuple[Tensor]:
        return (loss_of(scores, labels.long(), index),)

    return step(compared, num_rows, share)


def measured(steps: dict[str, Callable[[], None]], what: str, num_rows: int) -> list[Row]:
    """Medians over rounds; the first step is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for _ in track(range(ROUNDS), f"{what}, {num_rows:,} rows"):
        for name, run in steps.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    first = next(iter(times.values()))
    return [
        {
            "what": what,
            "rows": num_rows,
            "name": name,
            "cpu_ms": round(1e3 * statistics.median(own), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(own, first, strict=True)), 2),
        }
        for name, own in times.items()
    ]


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    results: list[Row] = []
    for num_rows in SIZES:
        steps = {name: step(f, num_rows, 0.01, **own) for name, (f, own) in MEMBERS.items()}
        if num_rows == SIZES[0] and _peers.is_there("libauc"):  # beyond, it takes tens of GB
            steps["LibAUC, partial AUC to 1 %"] = libauc_partial_auc(num_rows, 0.01)
        results += measured(steps, "members", num_rows)
    for name, (count, fewest, most) in GROUPS.items():
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(fewest, most + 1, (count,), generator=generator)
        group = torch.arange(count).repeat_interleave(lengths)
        steps = {
            "without groups": step(functional.smooth_ap, len(group), 0.02),
            name: step(functional.smooth_ap, len(group), 0.02, group=group),
        }
        results += measured(steps, "groups", len(group))
    table = Table("", "rows", "CPU ms", "× the first")
    for row in results:
        table.add_row(
            row["name"], f"{row['rows']:,}", f"{row['cpu_ms']:.1f}", f"{row['ratio']:.2f}"
        )
    Console().print(table)
    path = _measure.write_csv(results, "family", "cpu", _measure.header(1, "cpu"))
    print(f"written: {path.relative_to(_peers.ROOT)}")


if __name__ == "__main__":
    main()
