"""The page on adding to the library: its loss and its backend hold what it says of them."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import CrossEntropy, MixedLoss, extending
from tests.ranks import WORLD_SIZE, Failure, Ranks
from tests.rows import Batch, make_batch
from tests.test_docs import PAGES, ROOT, blocks

PAGE = next(page for page in PAGES if page.stem == "extending")


def block_with(start: str) -> str:
    """The block of the page that defines something."""
    (found,) = [code for _, code in blocks(PAGE) if start in code]
    return found


def defined_in(code: str, name: str) -> Any:
    namespace: dict[str, Any] = {"__name__": "page", "torch": torch, "Tensor": Tensor}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace[name]


RecallAtBudgetLoss = defined_in(block_with("class RecallAtBudgetLoss"), "RecallAtBudgetLoss")


def loss_by_loops(
    batch: Batch, budget: float, softness: float, tau: float, num_classes: int
) -> float:
    """The mean over classes, from the formula."""
    weights = [1.0] * len(batch.logits) if batch.weights is None else batch.weights.tolist()
    losses = []
    for c in range(num_classes):
        scores = batch.logits[:, c].double().tolist()
        target = 1 if num_classes == 1 else c
        rows = [i for i, t in enumerate(batch.targets.tolist()) if t != -100 and weights[i] > 0]
        positives = [i for i in rows if batch.targets[i] == target]
        if not 0 < len(positives) < len(rows):
            continue
        k = budget * sum(weights[i] for i in rows)
        total = 0.0
        for i in positives:
            others = (
                weights[j] / (1 + math.exp((scores[i] - scores[j]) / tau)) for j in rows if j != i
            )
            rank = weights[i] + math.fsum(others)
            total += weights[i] / (1 + math.exp((rank - k) / (softness * k)))
        losses.append(1 - total / sum(weights[i] for i in positives))
    return sum(losses) / len(losses)


def make(num_classes: int = 1, **options: Any) -> Any:
    settings = {"budget": 0.3, "queue_size": 0, "temperature": 0.3, "temperature_unit": "score"}
    return RecallAtBudgetLoss(num_classes, **(settings | options))


# --- The loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_value_is_the_formula(num_classes: int, weighted: bool) -> None:
    batch = make_batch(20, num_classes, dtype=torch.float64)
    batch.targets[3] = -100
    if weighted:
        weights = torch.linspace(0, 2, 20, dtype=torch.float64)
        batch = batch._replace(weights=weights)
    got = batch.through(make(num_classes)).item()
    assert got == pytest.approx(loss_by_loops(batch, 0.3, 0.25, 0.3, num_classes), abs=1e-12)


@pytest.mark.parametrize("unit", ["score", "spread"])
def test_gradcheck(unit: str) -> None:
    batch = make_batch(12, 2, dtype=torch.float64).leaf()
    loss_fn = make(2, temperature_unit=unit, reduction="sum")
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda logits: loss_fn(logits, batch.targets), batch.logits)


def test_hard_steps_give_recall() -> None:
    """τ and softness near zero: the share of positives among the k highest."""
    logits = torch.randn(50, 1, dtype=torch.float64)
    targets = torch.arange(50) % 7 == 0
    loss_fn = make(budget=0.21, temperature=1e-6, softness=1e-3)  # k = 10.5
    top = logits.squeeze(1).topk(10).indices
    recall = targets[top].sum() / targets.sum()
    assert loss_fn(logits, targets).item() == pytest.approx(1 - recall.item(), abs=1e-6)


def test_weight_two_is_the_row_twice() -> None:
    """Of negatives: a positive would tie with its copy."""
    batch = make_batch(15, dtype=torch.float64)
    weights = torch.where(batch.targets == 1, 1.0, 2.0).double()
    once = batch._replace(weights=weights).through(make())
    index = torch.cat((torch.arange(15), (batch.targets == 0).nonzero().squeeze(1)))
    twice = Batch(batch.logits[index], batch.targets[index]).through(make())
    assert once.item() == pytest.approx(twice.item(), abs=1e-12)


def test_the_queue_makes_one_large_batch() -> None:
    first, second = (make_batch(10, seed=seed, dtype=torch.float64) for seed in (0, 1))
    loss_fn = make(queue_size=10)
    first.through(loss_fn)
    logits = torch.cat((second.logits, first.logits))
    together = make()(logits, torch.cat((second.targets, first.targets)))
    assert second.through(loss_fn).item() == pytest.approx(together.item(), abs=1e-12)


@pytest.mark.parametrize("targets", [[0] * 4, [1] * 4, [-100] * 4, []], ids=str)
def test_nothing_to_rank(targets: list[int]) -> None:
    logits = torch.full((len(targets), 1), torch.inf).requires_grad_()
    loss, per_class, valid = make()(logits, torch.tensor(targets, dtype=torch.int64), True)
    loss.backward()
    assert loss.item() == 0
    assert not valid.item()
    assert per_class.isnan().all()
    assert (logits.grad == 0).all()


def test_infinities_rank_as_extremes() -> None:
    logits = torch.tensor([[torch.inf], [0.0], [-torch.inf]], requires_grad=True)
    loss = make(budget=0.5, softness=0.01)(logits, torch.tensor([1, 0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.isfinite().all()


def test_it_takes_part_in_the_rest() -> None:
    """Mixing, checkpoints, repr: what is written for ranking losses serves this one."""
    loss_fn, other = make(queue_size=6), make(queue_size=6)
    batch = make_batch(9)
    batch.through(loss_fn)
    other.load_state_dict(loss_fn.state_dict())
    assert batch.through(other) == batch.through(loss_fn)
    mix = MixedLoss(CrossEntropy(1), make(), main_weight=0.5)
    expected = (batch.through(CrossEntropy(1)) + batch.through(make())) / 2
    assert batch.through(mix).item() == pytest.approx(expected.item())
    assert repr(make()).endswith("budget=0.3, softness=0.25)")


@pytest.mark.parametrize("bad", [{"budget": 0}, {"budget": 1}, {"softness": 0}], ids=str)
def test_bad_arguments(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="budget must be in"):
        make(**bad)


def gradient_on(rank: int) -> tuple[float, Tensor]:
    batch = make_batch(6 + rank, seed=rank, dtype=torch.float64).leaf()
    loss = batch.through(make())
    loss.backward()
    return loss.item(), batch.logits.grad


def test_ranks_that_gather_rows_need_nothing(ranks: Ranks) -> None:
    batches = [make_batch(6 + rank, seed=rank, dtype=torch.float64) for rank in range(WORLD_SIZE)]
    whole = Batch(*(torch.cat([batch[k] for batch in batches]) for k in (0, 1))).leaf()
    loss = whole.through(make())
    loss.backward()
    parts = whole.logits.grad.split([6 + rank for rank in range(WORLD_SIZE)])
    for found, part in zip(ranks.run(gradient_on), parts, strict=True):
        assert not isinstance(found, Failure), found
        assert found[0] == pytest.approx(loss.item(), abs=1e-12)
        torch.testing.assert_close(found[1], WORLD_SIZE * part)  # DDP averages


def test_it_imports_nothing_private() -> None:
    code = block_with("class RecallAtBudgetLoss")
    imported = [line for line in code.splitlines() if line.startswith(("from", "import"))]
    assert [line for line in imported if "._" in line] == []
    for name in extending.__all__:
        assert name in PAGE.read_text(encoding="utf-8")


# --- The backend ---------------------------------------------------------------------------------


def test_the_backend_passes_the_tests_of_the_engine(tmp_path: Path) -> None:
    code = block_with("class PlainPlan")
    (tmp_path / "plain.py").write_text(f"import torch\nfrom torch import Tensor\n\n{code}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    run = subprocess.run(
        [*command, "tests/test_engine.py", "--plan", "plain.PlainPlan"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    passed = re.search(r"(\d+) passed", run.stdout.splitlines()[-1])
    assert passed is not None
    assert int(passed[1]) > 80
