"""What the quality benchmark computes: numbers, choices, batches, losses of lists, a run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.quality import losses, report, runs, training
from benchmarks.quality.numbers import NUMBERS
from benchmarks.quality.questions import QUESTIONS
from benchmarks.quality.tasks import Rows
from benchmarks.quality.training import Budget, Setting
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.helpers.cases import seeded

pytestmark = pytest.mark.slow


def some_rows(num_rows: int = 600, grades: int = 2) -> Rows:
    generator = seeded(0)
    features = torch.randn(num_rows, 3, generator=generator)
    labels = torch.randint(grades, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.8] = 0
    group = torch.randint(20, (num_rows,), generator=generator).sort().values
    return Rows(features, labels, group, torch.rand(num_rows, generator=generator))


def of_groups(scores: torch.Tensor, rows: Rows) -> Iterator[tuple[Any, Any]]:
    for group in rows.group.unique():
        own = rows.group == group
        yield scores[own].numpy(), rows.labels[own].numpy()


def test_numbers_within_groups() -> None:
    rows = some_rows()
    scores = torch.randint(30, (600,), generator=seeded(1)).float()  # with ties
    each = list(of_groups(scores, rows))
    aps = [average_precision_score(y, s) for s, y in each if 0 < y.sum() < len(y)]
    assert NUMBERS["mean AP"](scores, rows) == pytest.approx(np.mean(aps))
    apart = scores + 0.1 * torch.rand(600, generator=seeded(2))
    each = list(of_groups(apart, rows))
    found = sum(y[np.argsort(-s)[:20]].sum() for s, y in each) / rows.labels.sum().item()
    assert NUMBERS["20 alerts a day"](apart, rows) == pytest.approx(found)
    firsts = [y[s.argmax()] for s, y in each if y.any()]
    assert NUMBERS["TOP1"](apart, rows) == pytest.approx(np.mean(firsts))
    lasts = [1 + np.flatnonzero(y[np.argsort(-s)]).max() for s, y in each if y.any()]
    assert NUMBERS["last positive"](apart, rows) == pytest.approx(np.mean(lasts))


def test_numbers_at_a_budget() -> None:
    rows = some_rows()
    scores = torch.rand(600, generator=seeded(1))
    order = scores.argsort(descending=True)
    labels, value = rows.labels[order], rows.value[order]
    assert NUMBERS["recall at 1 %"](scores, rows) == pytest.approx(
        float(labels[:6].sum() / labels.sum())
    )
    assert NUMBERS["money at 5 %"](scores, rows) == pytest.approx(
        float((labels * value)[:30].sum() / (labels * value).sum())
    )
    false, true = (labels == 0).cumsum(0), labels.cumsum(0)
    allowed = false <= 0.01 * (labels == 0).sum()
    assert NUMBERS["recall at FPR 1 %"](scores, rows) == pytest.approx(
        float(true[allowed].max() / labels.sum())
    )
    area = NUMBERS["pAUC to FPR 1 %"](scores, rows)
    standardised = roc_auc_score(rows.labels, scores, max_fpr=0.01)
    assert area == pytest.approx(0.005 + (2 * standardised - 1) * 0.995)
    assert NUMBERS["pAUC to FPR 1 %"](rows.labels.float(), rows) == pytest.approx(1)


def row(loss: str, validation: float, test: float, split: int = 0) -> dict[str, str]:
    own = {"validation": validation, "test": test, "seconds": 1, "split": split}
    return {"task": "t", "number": "AP", "loss": loss, **{k: str(v) for k, v in own.items()}}


def test_settings_are_chosen_by_validation() -> None:
    rows = [row("BCE", 0.5, 0.9), row("BCE", 0.6, 0.1), row("BCE", 0.4, 0.8, split=1)]
    found = report.tuned(rows)["t", "AP", "BCE"]
    assert {split: one.test for split, one in found.items()} == {0: 0.1, 1: 0.8}


def test_gains_are_paired_and_corrected() -> None:
    rows = []
    for split in range(10):
        rows += [row("ours", 0, 0.5 + split, split), row("behind", 0, 0.4 + split, split)]
        rows += [row("level", 0, 0.5 + split + 0.01 * (-1) ** split, split)]
    runs_of = {loss: own for (_, _, loss), own in report.tuned(rows).items()}
    found = report.compared(runs_of, "ours")
    assert found["behind"].gain == pytest.approx(0.1)
    assert (found["behind"].wins, found["behind"].splits) == (10, 10)
    assert found["behind"].p == pytest.approx(2 * 2 / 2**10)  # the smallest of two p
    assert found["level"].p > 0.05
    assert report.compared(runs_of, "ours", sign=-1)["behind"].gain == pytest.approx(-0.1)


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [Setting(rate) for rate in (1e-3, 1e-2)]
    jobs = [runs.Job("all-rows", "t", 0, "BCE", setting) for setting in settings]
    path = tmp_path / "runs.csv"
    path.write_text(f"task,split,loss,setting\nt,0,BCE,{settings[0]}\n")
    asked: list[runs.Job] = []

    class Inline:
        """A pool of workers without processes."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Inline:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, chunk: list[runs.Job]) -> None:
            asked.extend(chunk)

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(runs, "as_completed", lambda futures: [])
    runs.run_all(jobs, path, 1)
    assert asked == jobs[1:]


def test_batches() -> None:
    rows, budget = some_rows(), Budget(batch_size=100)
    epoch = [b for b, _ in zip(training._random(600, budget, 3), range(6), strict=False)]
    assert torch.cat(epoch).sort().values.equal(torch.arange(600))
    for batch, _ in zip(training._with_share(rows.labels, 0.25, budget, 3), range(3), strict=False):
        assert rows.labels[batch].sum() == 25
    for batch, _ in zip(training._groups(rows, budget, 3), range(3), strict=False):
        whole = torch.isin(rows.group, rows.group[batch])
        assert batch.sort().values.equal(whole.nonzero().squeeze(1))


def test_features_within_groups() -> None:
    rows = some_rows()
    found = training._standardised(rows)
    for group in rows.group.unique():
        own = found[rows.group == group]
        assert own.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(own.std(0, correction=0), torch.ones(3))


def test_losses_of_lists() -> None:
    rows = some_rows(grades=3)
    scores = torch.randn(600, generator=seeded(1), dtype=torch.float64)
    cross_entropies, pairs = [], []
    for own, labels in of_groups(scores, rows):
        gain = 2.0**labels - 1
        if gain.min() == gain.max():
            continue
        cross_entropies.append(-(np.log(np.exp(own) / np.exp(own).sum()) * gain).sum() / gain.sum())
        pairs.append(
            np.mean(
                [
                    np.log1p(np.exp(own[j] - own[i]))
                    for i in range(len(own))
                    for j in range(len(own))
                    if gain[i] > gain[j]
                ]
            )
        )
    for make, expected in ((losses.list_net, cross_entropies), (losses.pairwise, pairs)):
        found = make(rows)(scores, rows, torch.arange(600))
        assert found.item() == pytest.approx(np.mean(expected))


PEERS = ("predecessor", "LibAUC")  # each needs a process of its own
CONTENDERS = {
    f"{question}: {loss}": (question, contender)
    for question, one in QUESTIONS.items()
    for loss, contender in one.contenders.items()
    if not isinstance(contender, str) and not loss.startswith(PEERS)
}


@pytest.mark.parametrize("name", sorted(CONTENDERS))
def test_every_contender_lifts_positives(name: str) -> None:
    question, contender = CONTENDERS[name]
    rows = some_rows()
    if question == "classes":
        rows = rows._replace(labels=torch.arange(600) % 18)
        logits = torch.randn(600, 18, generator=seeded(1)).requires_grad_()
    else:
        logits = torch.randn(600, generator=seeded(1)).requires_grad_()
    loss = contender.make(rows)(logits, rows, torch.arange(600))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    own = logits.grad.gather(1, rows.labels[:, None]) if logits.dim() == 2 else logits.grad
    assert own[rows.labels > 0].sum() < 0


def test_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is that of the best validation value, and test rows are read once."""
    rows = some_rows(900)
    rows.features[rows.labels == 1] += 1
    parts = training.Parts(*(rows.select(part) for part in torch.arange(900).split(300)))
    seen: list[float] = []
    ap = NUMBERS["AP"]

    def number(scores: torch.Tensor, own: Rows) -> float:
        seen.append(ap(scores, own))
        return seen[-1]

    monkeypatch.setitem(NUMBERS, "AP", number)
    contender = QUESTIONS["all-rows"].contenders["BCE"]
    found = training.run(
        contender, parts, Setting(), ("AP",), seed=0, budget=Budget(steps=200, batch_size=100)
    )["AP"]
    *validation, test = seen
    assert len(validation) == 200 // training.EVALUATE_EVERY
    assert found.validation == max(validation)
    assert found.best_step == training.EVALUATE_EVERY * (1 + validation.index(max(validation)))
    assert found.test == test


def test_a_worker_of_the_predecessor_can_load_it() -> None:
    """It has our import name, so what the worker imports first must not import ours."""
    code = "import sys, benchmarks.quality.runs; print('imbalanced_losses' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
