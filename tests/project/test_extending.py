"""The page on adding to the library: its loss and its backend hold what it says of them."""

from __future__ import annotations

import copy
import inspect
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from imbalanced_losses import SmoothAPLoss, extending
from imbalanced_losses.extending import Problems, RankingOptions
from tests.helpers import oracle
from tests.helpers.rows import Batch, make_batch, numbers_of, state_of
from tests.project.test_docs import PAGES, ROOT, blocks

PAGE = next(page for page in PAGES if page.stem == "extending")


def block_with(start: str, page: Path = PAGE) -> str:
    """The block of the page that defines something."""
    (found,) = [code for _, code in blocks(page) if start in code]
    return found


def module_of(code: str, name: str) -> Any:
    """A block of the page as a module, which the compiler can find."""
    module: Any = ModuleType(name)
    sys.modules[name] = module
    exec(compile(code, str(PAGE), "exec"), vars(module))
    return module


CODE = block_with("class RecallAtBudgetLoss")
RecallAtBudgetLoss = module_of(CODE, "recall_at_budget").RecallAtBudgetLoss


def loss_by_loops(
    batch: Batch, budget: float, softness: float, tau: float, num_classes: int
) -> float:
    """The mean over classes, from the formula."""
    kept = batch.targets != -100
    weights = (torch.ones(len(kept)) if batch.weights is None else batch.weights)[kept].tolist()
    losses = []
    for c in range(num_classes):
        is_positive = batch.targets[kept] == (1 if num_classes == 1 else c)
        scores = batch.logits[kept, c].double().tolist()
        problem = oracle.Problem(scores, is_positive.tolist(), tau, weights)
        k = budget * oracle.mass(problem.rows)

        def found(i: Any, problem: oracle.Problem = problem, k: float = k) -> float:
            return oracle.sigmoid((k - problem.rank(i, problem.rows)) / (softness * k))

        losses.append(1 - problem.mean_over_positives(found))
    defined = [loss for loss in losses if not math.isnan(loss)]
    return sum(defined) / len(defined)


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


@pytest.mark.parametrize("queue_size", [0, 20])
def test_compiled_in_one_graph(queue_size: int) -> None:
    torch._dynamo.reset()
    eager = make(3, queue_size=queue_size, temperature_unit="spread")
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    for seed in range(3):
        one, other = (make_batch(24, 3, seed=seed).leaf() for _ in range(2))
        found, expected = one.through(compiled), other.through(eager)
        torch.testing.assert_close(found, expected)
        for loss in (found, expected):
            loss.backward()
        torch.testing.assert_close(one.logits.grad, other.logits.grad)


OPTIONS: dict[str, Any] = {
    "queue_size": 7,
    "temperature": 0.2,
    "reduction": "sum",
    "ignore_index": -1,
    "update_queue_in_eval": True,
    "gather_distributed": False,
    "max_pool_size": 9,
    "multilabel": True,
    "temperature_unit": "spread",
    "queue_follows_shift": True,
    "process_group": None,
    "grad_reduce": "sum",
    "gather": "rows",
    "target_prior": (0.1, 0.2),
}


def test_no_option_is_lost() -> None:
    """All of the constructor of `SmoothAPLoss` reach the base, which keeps its state by them."""
    assert OPTIONS.keys() == RankingOptions.__annotations__.keys()
    assert {"num_classes", *OPTIONS} == inspect.signature(SmoothAPLoss).parameters.keys()
    loss_fn, other = RecallAtBudgetLoss(2, **OPTIONS), SmoothAPLoss(2, **OPTIONS)
    for name, value in OPTIONS.items():
        assert getattr(loss_fn, name) == getattr(other, name) == value
    for seed in range(3):
        batch = make_batch(8, 2, seed=seed, multilabel=True)
        for one in (loss_fn, other):
            assert batch.through(one).isfinite()
    assert numbers_of(state_of(loss_fn)).equal(numbers_of(state_of(other)))
    with pytest.raises(TypeError, match="queue_sise"):
        RecallAtBudgetLoss(2, queue_sise=7)


def test_it_is_one_short_file_that_imports_nothing_private() -> None:
    assert len(CODE.splitlines()) <= 60
    assert re.findall(r"(?<!super\(\))\._", CODE) == []
    for name in extending.__all__:
        assert f"`{name}`" in PAGE.read_text(encoding="utf-8") or name in CODE


# --- The backend ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_backend_passes_the_tests_of_the_engine(tmp_path: Path) -> None:
    code = block_with("class PlainPlan", ROOT / "CONTRIBUTING.md")
    (tmp_path / "plain.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
    run = subprocess.run(
        [*command, "tests/unit/test_backends.py", "--plan", "plain.PlainPlan"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(extending.__file__).parents[1]}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    passed = re.search(r"(\d+) passed", run.stdout.splitlines()[-1])
    assert passed is not None
    assert int(passed[1]) > 60


def test_a_metric_of_another_shape() -> None:
    class Column(SmoothAPLoss):
        def metric(self, problems: Problems) -> Tensor:
            return super().metric(problems)[:, None]

    with pytest.raises(ValueError, match=r"one number a problem, \[3\], got \[3, 1\]"):
        Column(3, 0)(torch.randn(9, 3), torch.arange(9) % 3)
