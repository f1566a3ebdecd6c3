"""Where SmoothAPLoss differs from the one of imbalanced-losses 0.6.0 on purpose.

Each case is run by both and both behaviours are asserted; docs/differences.md says why.

`make peers` fetches the predecessor; without it these tests are skipped.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from imbalanced_losses import PartialAUCLoss, RecallAtKLoss, SmoothAPLoss
from tests.hardening.predecessor_cases import IS_THERE, WHY_SKIPPED, Draw, run_predecessor
from tests.hardening.predecessor_worker import Case, Outcome, run_case

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not IS_THERE, reason=WHY_SKIPPED)]


def one_class(positives: list[float], negatives: list[float], **step: Any) -> Case:
    """A batch of binary scores."""
    logits = torch.tensor([*positives, *negatives])[:, None]
    targets = torch.tensor([1] * len(positives) + [0] * len(negatives))
    return {"logits": logits, "targets": targets, "training": True, **step}


def history(*steps: Case, **arguments: Any) -> Case:
    return {"arguments": {"num_classes": 1, "queue_size": 0} | arguments, "steps": list(steps)}


BATCH = one_class([1.0, 0.2], [0.7, -0.5])
PROBE = {**one_class([0.1], [0.4]), "training": False}


def as_dtype(step: Case, dtype: torch.dtype) -> Case:
    return {**step, "logits": step["logits"].to(dtype)}


def with_targets(*targets: float) -> Case:
    return {**BATCH, "targets": torch.tensor(targets)}


def rare_positives(size: int) -> Case:
    draw = Draw(0)
    targets = (draw.uniform(size) < 0.01).long()
    logits = draw.normal(size, 1) + targets[:, None]
    return {"logits": logits, "targets": targets, "training": True}


RARE = rare_positives(4096)
DIFFERENCES = {
    "weighted negative": history({**BATCH, "sample_weight": torch.tensor([1.0, 1.0, 3.0, 1.0])}),
    "repeated negative": history(one_class([1.0, 0.2], [0.7, 0.7, 0.7, -0.5])),
    "ignored rows": history(BATCH, with_targets(-100, -100, -100, -100), PROBE, queue_size=4),
    "nothing ignored": history(BATCH, PROBE, queue_size=4),
    "only the probe": history(PROBE),
    "infinite positive": history(one_class([float("inf"), 0.2], [0.7, -0.5])),
    "NaN, then clean": history(one_class([float("nan")], [0.7]), BATCH, queue_size=8),
    "binary target 2": history(with_targets(2, 1, 0, 0)),
    "soft target": history(with_targets(0.7, 1.0, 0.0, 0.0)),
    "wrong class": history({"logits": torch.eye(4, 3), "targets": torch.tensor([0, 1, 2, 7]),
        "training": True}, num_classes=3),
    "full pool": history(RARE, temperature=0.05),
    "capped pool": history(*[RARE] * 20, temperature=0.05, max_pool_size=512),
    "capped eval": history({**RARE, "training": False}, temperature=0.05, max_pool_size=512),
}  # fmt: skip
Pair = tuple[list[Outcome], list[Outcome]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Name of a difference -> (outcomes here, outcomes there)."""
    theirs = run_predecessor(list(DIFFERENCES.values()), tmp_path_factory.mktemp("differences"))
    mine = [run_case(SmoothAPLoss, case) for case in DIFFERENCES.values()]
    return dict(zip(DIFFERENCES, zip(mine, theirs, strict=True), strict=True))


def last_losses(both: dict[str, Pair], name: str) -> tuple[float, float]:
    mine, theirs = both[name]
    return float(mine[-1]["loss"]), float(theirs[-1]["loss"])


def test_weight_means_that_many_rows(both: dict[str, Pair]) -> None:
    mine, theirs = last_losses(both, "weighted negative")
    repeated = last_losses(both, "repeated negative")
    assert mine == pytest.approx(repeated[0], abs=1e-6)
    assert abs(theirs - repeated[1]) > 0.01


def test_ignored_rows_push_nothing_out_of_the_queue(both: dict[str, Pair]) -> None:
    mine, theirs = last_losses(both, "ignored rows")
    assert mine == pytest.approx(last_losses(both, "nothing ignored")[0], abs=1e-6)
    assert theirs == pytest.approx(last_losses(both, "only the probe")[1], abs=1e-6)
    assert abs(mine - theirs) > 0.01


def test_infinite_positive_has_a_finite_gradient(both: dict[str, Pair]) -> None:
    mine, theirs = both["infinite positive"]
    assert mine[0]["loss"].isfinite()
    assert mine[0]["gradient"].isfinite().all()
    assert theirs[0]["loss"].isfinite()
    assert theirs[0]["gradient"].isnan().any()


def test_nan_stays_out_of_the_queue(both: dict[str, Pair]) -> None:
    mine, theirs = both["NaN, then clean"]
    assert mine[0]["loss"].isnan()
    assert theirs[0]["loss"].isnan()
    assert mine[1]["loss"].isfinite()
    assert theirs[1]["loss"].isnan()


@pytest.mark.parametrize("name", ["binary target 2", "soft target", "wrong class"])
def test_targets_out_of_range_are_an_error(both: dict[str, Pair], name: str) -> None:
    mine, theirs = both[name]
    assert mine[0]["error"] == "ValueError"
    assert theirs[0]["loss"].isfinite()


def test_capped_pool_estimates_the_full_one(both: dict[str, Pair]) -> None:
    full = last_losses(both, "full pool")[0]
    mine, theirs = (
        torch.stack([outcome["loss"] for outcome in outcomes]).mean()
        for outcomes in both["capped pool"]
    )
    assert abs(mine - full) < 0.1
    assert theirs < full - 0.2


def test_nothing_is_drawn_in_eval(both: dict[str, Pair]) -> None:
    mine, theirs = last_losses(both, "capped eval")
    full = last_losses(both, "full pool")[0]
    assert mine == pytest.approx(full, abs=1e-6)
    assert theirs < full - 0.2


# --- Its other ranking losses --------------------------------------------------------------------

VALUE = torch.rand(4096, generator=torch.Generator().manual_seed(1))
SIBLINGS = {
    "SmoothAPLoss": history({**RARE, "sample_weight": VALUE}, temperature=0.1),
    "RecallAtQuantileLoss": history({**RARE, "sample_weight": VALUE}, quantile=0.05),
    "PAUCAtBudgetLoss": history(
        {**RARE, "sample_weight": VALUE}, alpha=0.02, beta=0.1, n_knots=400, temperature=0.01
    ),
}
SHARP = {"queue_size": 0, "temperature": 1e-3, "softness": 0.01}
HERE = {
    "SmoothAPLoss": SmoothAPLoss(1, 0, temperature=0.1),
    "RecallAtQuantileLoss": RecallAtKLoss(1, k=0.05, **SHARP),
    "PAUCAtBudgetLoss": PartialAUCLoss(1, min_fpr=0.02, max_fpr=0.1, **SHARP),
}


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    cases = [{**case, "loss": name} for name, case in SIBLINGS.items()]
    outcomes = run_predecessor(cases, tmp_path_factory.mktemp("siblings"))
    return {name: steps[-1] for name, steps in zip(SIBLINGS, outcomes, strict=True)}


@pytest.mark.parametrize("name", SIBLINGS)
def test_its_weight_is_our_value(siblings: dict[str, Outcome], name: str) -> None:
    """The same number; of a recall or an area, where all steps are sharp."""
    mine = HERE[name](RARE["logits"], RARE["targets"], value=VALUE).item()
    exact = name == "SmoothAPLoss"
    assert mine == pytest.approx(float(siblings[name]["loss"]), abs=1e-6 if exact else 0.01)
