"""Random histories in which the predecessor and this library mean the same, and how to run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.hardening.predecessor_worker import Case, Outcome

PREDECESSOR = Path(__file__).parents[2] / ".cache" / "peers" / "predecessor"
IS_THERE = (PREDECESSOR / "imbalanced_losses").is_dir()
WHY_SKIPPED = "the predecessor is not there to compare with: fetch it with `make peers`"


def run_predecessor(cases: list[Case], folder: Path) -> list[list[Outcome]]:
    """Outcomes of the cases, computed by the predecessor in its own process."""
    cases_file, results_file = folder / "cases.pt", folder / "results.pt"
    torch.save(cases, cases_file)
    worker = Path(__file__).with_name("predecessor_worker.py")
    command = [sys.executable, str(worker), str(PREDECESSOR), str(cases_file), str(results_file)]
    subprocess.run(command, check=True, timeout=300)
    results: list[list[Outcome]] = torch.load(results_file, weights_only=True)
    return results


class Draw:
    """Seeded choices, none of them from the global generators."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def choice(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=self.generator))]

    def integer(self, low: int, high: int) -> int:
        """Uniform in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def chance(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)


def random_case(seed: int) -> Case:
    """A history of 1 to 5 batches in which both libraries mean the same.

    Ignored rows come with a queue only where nothing is overwritten: here they take no slot, there
    they do. float64 logits are such as float32 holds: the predecessor's queue rounds to it. A first
    batch always has rows: of an empty pool `none` gives NaN here, zeros there.
    """
    draw = Draw(seed)
    num_classes = draw.choice(1, 2, 5, 10)
    tau = draw.choice(0.01, 0.05, 0.5, 1.0)
    dtype = draw.choice(torch.float32, torch.float64)
    has_queue = draw.chance(0.6)
    ignored_share = draw.choice(0.0, 0.0, 0.2, 0.6)
    num_steps = draw.integer(3, 5) if has_queue else 1
    sizes = [draw.integer(2, 80) for _ in range(num_steps)]
    if has_queue and draw.chance(0.2):
        sizes[-1] = 0
    queue_size = 0
    if has_queue:
        queue_size = 512 if ignored_share else draw.choice(7, 32, 64, 512)
    arguments = {
        "num_classes": num_classes,
        "queue_size": queue_size,
        "temperature": tau,
        "reduction": draw.choice("mean", "sum", "none"),
        "ignore_index": draw.choice(-100, -1, 255),
        "update_queue_in_eval": draw.chance(0.2),
        "max_pool_size": draw.choice(None, 4096),
    }
    spread = draw.choice(1.0, tau, 10 * tau)
    positive_share = draw.choice(0.05, 0.3, 0.8)
    steps = [
        random_step(draw, size, arguments, ignored_share, positive_share, spread, dtype)
        for size in sizes
    ]
    return {"arguments": arguments, "steps": steps}


def random_step(
    draw: Draw,
    size: int,
    arguments: dict[str, Any],
    ignored_share: float,
    positive_share: float,
    spread: float,
    dtype: torch.dtype,
) -> Case:
    """One ragged batch."""
    num_classes = arguments["num_classes"]
    if num_classes == 1:
        targets = (draw.uniform(size) < positive_share).long()
    else:  # skewed, so that rare classes are missing from some pools
        targets = (draw.uniform(size).square() * num_classes).long()
    targets = targets.where(draw.uniform(size) >= ignored_share, arguments["ignore_index"])
    targets = targets.to(draw.choice(torch.int64, torch.int64, torch.int32))
    step = {
        "logits": (spread * draw.normal(size, num_classes) + draw.choice(0.0, 3.0)).to(dtype),
        "targets": targets[:, None] if num_classes == 1 and draw.chance(0.3) else targets,
        "training": draw.chance(0.8),
    }
    return step | ({"sample_weight": torch.ones(size)} if draw.chance(0.1) else {})


def in_float64(case: Case) -> Case:
    steps = [{**step, "logits": step["logits"].double()} for step in case["steps"]]
    return {**case, "steps": steps}
