"""Time of every metric, also compiled, of other libraries' losses, and of ranks within groups.

    python -m benchmarks.speed.family

One forward and backward pass of the functional form, float32, 1 % positive (2 % in groups), scores
of unit spread, τ = 0.01, one thread. What is compared is measured in turn in one process, by its
own CPU time, and in the same round: each metric with `smooth_ap` of as many rows, and another
library's loss with the metric that stands for the same. Other libraries' losses have a process
each, which may take 8 GiB beside its inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks import _measure, _peers, _worker
from benchmarks._measure import Row
from imbalanced_losses import functional

ROUNDS, FEWEST_ROUNDS, LONG_S = 9, 3, 5.0  # so many, or fewer of what takes long
SIZES = (1_024, 4_096, 16_384, 65_536, 262_144, 1_048_576)
LIMIT_GIB = 8
Step = Callable[[], None]
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


def rows(num_rows: int, share: float) -> tuple[Tensor, Tensor]:
    """Scores [M], a leaf, and which are positive."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(num_rows, generator=generator)
    return scores.requires_grad_(), torch.rand(num_rows, generator=generator) < share


def step(
    function: Callable[..., Any], num_rows: int, share: float, compiled: bool = False, **own: Any
) -> Step:
    """One forward and backward pass of a metric."""
    scores, is_positive = rows(num_rows, share)
    labels = is_positive.long() if function is functional.ndcg else is_positive
    metric = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function

    def run() -> None:
        scores.grad = None
        metric(scores, labels, **own)[0].sum().backward()

    return run


def libauc_partial_auc(num_rows: int) -> Step:
    """Compares every positive with every negative."""
    scores, is_positive = rows(num_rows, 0.01)
    labels, index = is_positive.long(), torch.arange(num_rows)
    loss_of = _peers.load("libauc").pAUC_CVaR_Loss(num_rows, num_rows, beta=0.01)

    def run() -> None:
        scores.grad = None
        loss_of(scores, labels, index).backward()

    return run


def libauc_ndcg(num_rows: int) -> Step:
    """Compares every positive with every row, of one list, in which the positives come first."""
    scores, is_positive = rows(num_rows, 0.01)
    order = is_positive.int().argsort(descending=True)
    scores = scores.detach()[None, order].requires_grad_()
    count = int(is_positive.sum())
    discounts = 1 / torch.log2(torch.arange(count) + 2)
    batch = {
        "rating": is_positive[None, order].long(),
        "user_id": torch.zeros(1, dtype=torch.int64),
        "num_pos_items": torch.tensor([count]),
        "ideal_dcg": discounts.sum()[None],
        "user_item_id": torch.arange(num_rows)[None],
    }
    loss_of = _peers.load("libauc").NDCGLoss(num_rows, 1, num_rows, count)

    def run() -> None:
        scores.grad = None
        loss_of(scores, batch).backward()

    return run


def allrank_ndcg(num_rows: int) -> Step:
    """Compares every row with every row."""
    scores, is_positive = rows(num_rows, 0.01)
    labels, loss_of = is_positive[None].float(), _peers.load("allrank").approxNDCGLoss

    def run() -> None:
        scores.grad = None
        loss_of(scores[None], labels, alpha=100.0).backward()

    return run


# The library, its loss, and the metric that stands for the same.
OTHERS: dict[str, tuple[str, Callable[[int], Step], str]] = {
    "LibAUC pAUC_CVaR_Loss, to 1 %": ("libauc", libauc_partial_auc, "partial_auc, to 1 %"),
    "LibAUC NDCGLoss": ("libauc", libauc_ndcg, "ndcg"),
    "allRank approxNDCGLoss": ("allrank", allrank_ndcg, "ndcg"),
}


def beside(name: str) -> list[Row]:
    """Another library's loss and ours, in a process that is for this alone."""
    torch.set_num_threads(1)
    what = f"beside {name}"
    _, build, member = OTHERS[name]
    function, own = MEMBERS[member]
    build(SIZES[0])()  # so that what libraries load is no part of the limit
    _worker.limit_address_space(LIMIT_GIB * 2**30)
    results: list[Row] = []
    for num_rows in SIZES:
        try:
            steps = {member: step(function, num_rows, 0.01, **own), name: build(num_rows)}
            results += measured(steps, what, num_rows)
        except Exception as error:
            if not _worker.ran_out(error):
                raise
            died = {"cpu_ms": "", "ratio": "", "outcome": f"out of memory at {LIMIT_GIB} GiB"}
            results.append({"what": what, "num_rows": num_rows, "name": name, **died})
    return results


def measured(steps: dict[str, Step], what: str, num_rows: int) -> list[Row]:
    """Medians over rounds; the first step is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for number in track(range(ROUNDS), f"{what}, {num_rows:,} rows"):
        if number >= FEWEST_ROUNDS and sum(map(sum, times.values())) > LONG_S:
            break
        for name, run in steps.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    first = next(iter(times.values()))
    return [
        {
            "what": what,
            "num_rows": num_rows,
            "name": name,
            "cpu_ms": round(1e3 * statistics.median(own), 2),
            "ratio": round(statistics.median(a / b for a, b in zip(own, first, strict=True)), 2),
            "outcome": "ok",
        }
        for name, own in times.items()
    ]


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    results: list[Row] = []
    for num_rows in SIZES:
        steps = {name: step(f, num_rows, 0.01, **own) for name, (f, own) in MEMBERS.items()}
        results += measured(steps, "members", num_rows)
    for num_rows in SIZES[:3]:
        for name, (function, own) in MEMBERS.items():
            torch._dynamo.reset()
            steps = {
                name: step(function, num_rows, 0.01, **own),
                f"{name}, compiled": step(function, num_rows, 0.01, compiled=True, **own),
            }
            results += measured(steps, "compiled", num_rows)
    for other, (peer, *_) in OTHERS.items():
        if _peers.is_there(peer):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                results += process.submit(beside, other).result()
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
        found = [row["outcome"]]
        if row["outcome"] == "ok":
            found = [f"{row['cpu_ms']:.1f}", f"{row['ratio']:.2f}"]
        table.add_row(row["name"], f"{row['num_rows']:,}", *found)
    Console().print(table)
    path = _measure.write_csv(results, "cpu-family", _measure.header(1))
    print(f"written: {path.relative_to(_peers.ROOT)}")


if __name__ == "__main__":
    main()
