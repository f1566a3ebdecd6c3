"""What the quality benchmark computes beside training: batches, choices, formulas."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from benchmarks import ap_variants, multiclass, quality, recipes, tasks
from benchmarks.quality import Tuned
from demo import train
from demo.data import row_split
from sklearn.metrics import average_precision_score

from imbalanced_losses.functional import smooth_ap
from tests.cases import seeded


def row(loss: str, validation_ap: float, test_ap: float, split: int = 0) -> dict[str, str]:
    numbers = {"validation_ap": validation_ap, "test_ap": test_ap, "seconds": 1, "split": split}
    return {"task": "t", "loss": loss, **{k: str(v) for k, v in numbers.items()}}


def test_settings_are_chosen_by_validation() -> None:
    rows = [row("BCE", 0.5, 0.9), row("BCE", 0.6, 0.1), row("BCE", 0.4, 0.8, split=1)]
    found = quality.tuned(rows)
    assert found == {("t", "BCE"): {0: Tuned(0.6, 0.1, 1), 1: Tuned(0.4, 0.8, 1)}}


def test_the_rival_is_chosen_by_validation() -> None:
    rows = [row("BCE", 0.6, 0.1), row("focal", 0.5, 0.9), row(quality.OURS, 0.9, 0.9)]
    assert quality.rival_of(quality.tuned(rows), "t") == "BCE"


def test_gains_are_paired_by_split() -> None:
    rows = [row("BCE", 0.5, 0, split=k) for k in (0, 1)]
    rows += [row("a", 0.6, 0), row("a", 0.3, 0, split=1), row("b", 0.9, 0)]
    chosen = quality.tuned(rows)
    assert quality.gains(chosen, "t", ["a", "b"], "BCE") == [pytest.approx(-0.05)]
    assert quality.gains(chosen, "t", ["a", "b", "not run either"], "not run") == []


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [quality.Job("t", 0, "BCE", rate, 0.1) for rate in (1e-3, 1e-2)]
    path = tmp_path / "runs.csv"
    path.write_text("task,split,loss,learning_rate,weight_decay\nt,0,BCE,0.001,0.1\n")
    asked: list[quality.Job] = []

    class Inline:
        """A pool of workers without processes."""

        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Inline:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, chunk: list[quality.Job], run: object) -> None:
            asked.extend(chunk)

    monkeypatch.setattr(quality, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(quality, "as_completed", lambda futures: [])
    quality.run_all(jobs, path, 1)
    assert asked == jobs[1:]


def test_batches() -> None:
    labels = (torch.arange(5000) % 50 == 0).long()
    epoch = [
        rows
        for rows, _ in zip(quality._batches(5000, recipes.BATCH_SIZE, 3), range(4), strict=False)
    ]
    assert len(torch.cat(epoch).unique()) == 4 * recipes.BATCH_SIZE
    for rows, _ in zip(
        quality._quota_batches(labels, 0.25, recipes.BATCH_SIZE, 3), range(3), strict=False
    ):
        assert len(rows) == recipes.BATCH_SIZE
        assert labels[rows].sum() == recipes.BATCH_SIZE / 4


@pytest.mark.parametrize("seed", range(5))
def test_supap_is_an_upper_bound(seed: int) -> None:
    scores = torch.randn(80, generator=seeded(seed))
    labels = (torch.rand(80, generator=seeded(seed + 9)) < 0.3).long()
    true_loss = 1 - average_precision_score(labels, scores)
    for temperature in (0.01, 0.1, 0.5):
        assert ap_variants.upper_bound(scores, labels, temperature).item() >= true_loss - 1e-6


def test_powers_of_precision() -> None:
    logits = torch.randn(60, generator=seeded(5), dtype=torch.float64)
    y = (torch.rand(60, generator=seeded(6)) < 0.2).long()
    tau = 0.3 * logits.std(correction=0)
    smoothed = 1 - smooth_ap(logits, y == 1, tau).ap
    loss = {q: ap_variants.powered(logits, y, tau, power=q) for q in (0, 1e-6, 0.5, 1, 2)}
    assert loss[1].item() == pytest.approx(smoothed.item(), rel=1e-12)
    assert loss[0].item() == pytest.approx(loss[1e-6].item(), rel=1e-5)
    assert loss[0] > loss[0.5] > loss[1] > loss[2]
    assert loss[0] >= -(1 - smoothed).log()


def test_a_margin_lifts_negatives() -> None:
    logits = torch.randn(60, generator=seeded(5), dtype=torch.float64)
    y = (torch.rand(60, generator=seeded(6)) < 0.2).long()
    lifted = 1 - smooth_ap(logits + 2 * 0.3 * (y == 0), y == 1, 0.3).ap
    assert ap_variants.powered(logits, y, 0.3, margin=2).item() == pytest.approx(lifted.item())


@pytest.mark.parametrize("count", ["softplus", "softmax"])
def test_counts_that_bound_a_step_bound_the_loss(count: str) -> None:
    logits, y = torch.tensor([2.0, 1.9, 1.8, 1.0]), torch.tensor([0, 0, 0, 1])
    for temperature in (1e-3, 1.0, 1e3):
        found = ap_variants.powered(logits, y, temperature, power=0, count=count)
        assert found.item() >= math.log(4)  # a precision of 1 / 4


def test_a_weight_that_changes_over_the_training() -> None:
    loss = recipes._mixed(lambda x, y: x.sum(), lambda x, y, rows: 0 * x.sum(), 0.9, 0.2)
    one = torch.ones(1)
    values = [loss(one, one, one).item() for _ in range(recipes.STEPS + 1)]
    assert values[0] == pytest.approx(0.9)
    assert values[recipes.STEPS // 2] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.2)


def test_weights_are_averaged_where_asked() -> None:
    generator = seeded(0)
    features, labels = torch.randn(600, 3, generator=generator), (torch.arange(600) % 6 == 0).long()
    features[labels == 1] += 1
    task = train.make_task(
        tasks.Table(features, labels, lambda seed: row_split(labels, seed)), row_split(labels, 0)
    )
    job = quality.Job("t", 0, "BCE", 1e-2, 1e-4)
    weights = []
    for make in (recipes.Trained(recipes.LOSSES["BCE"], averaging=decay) for decay in (0.0, 0.98)):
        model = train.make_model(3, 0)
        _, ap = quality._fit(job, make, model, task, train.average_precision)
        scores = quality._scores(model, task.validation.features)
        assert train.average_precision(scores, task.validation.labels) == ap
        weights.append(model[0].weight.detach())
    assert not weights[0].equal(weights[1])


PEERS = {"predecessor", "LibAUC APLoss"}  # each needs a process of its own


@pytest.mark.parametrize("name", sorted(recipes.ALL.keys() - PEERS))
def test_every_contender_has_a_gradient(name: str) -> None:
    labels = (torch.arange(256) % 8 == 0).long()
    logits = torch.randn(256, generator=seeded(0)).requires_grad_()
    loss = recipes.ALL[name](labels)(logits, labels, torch.arange(256))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert logits.grad[labels == 1].sum() < 0


@pytest.mark.parametrize("name", sorted(multiclass.LOSSES))
def test_every_contender_of_many_classes_has_a_gradient(name: str) -> None:
    labels = torch.arange(300) % 3
    logits = torch.randn(300, 3, generator=seeded(0)).requires_grad_()
    loss = multiclass.LOSSES[name](labels)(logits, labels, torch.arange(300))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad is not None
    assert (logits.grad.gather(1, labels[:, None]).view(100, 3).sum(0) < 0).all()
    assert logits.grad.sum(1).abs().max() < 1e-6  # log-softmax: moving a row's logits is nothing


def test_macro_ap() -> None:
    labels = torch.arange(120) % 3
    logits = torch.randn(120, 3, generator=seeded(1), dtype=torch.float64)
    moved = logits + 5 * torch.randn(120, 1, generator=seeded(2), dtype=torch.float64)
    shares = logits.softmax(1)
    each = [average_precision_score(labels == c, shares[:, c]) for c in range(3)]
    assert multiclass.macro_ap(moved, labels) == pytest.approx(sum(each) / 3)


def test_every_class_is_split_alike() -> None:
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    parts = row_split(labels, 0)
    assert torch.cat(list(parts)).sort().values.equal(torch.arange(80))
    assert [labels[rows].bincount().tolist() for rows in parts] == [
        [30, 12, 6],
        [10, 4, 2],
        [10, 4, 2],
    ]
