"""Every metric and its loss: one table of properties, in which a new metric is a row."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from imbalanced_losses import (
    MixedLoss,
    NDCGLoss,
    PartialAUCLoss,
    RecallAtFPRLoss,
    RecallAtKLoss,
    SmoothAPLoss,
    functional,
)
from imbalanced_losses.extending import RankingLoss, RankingOptions
from tests.helpers import oracle
from tests.helpers.cases import seeded
from tests.helpers.ranks import WORLD_SIZE, Failure, Ranks
from tests.helpers.rows import IGNORED, Batch, numbers_of, queued_rows, state_of

# Triton's interpreter computes with numpy, which says where an infinity comes up.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered.*:RuntimeWarning")


class Member(NamedTuple):
    loss: type[RankingLoss]
    function: Callable[..., Any]
    oracle: Callable[..., float]
    own: Mapping[str, Any] = MappingProxyType({})
    is_graded: bool = False
    by_rows: bool = False  # takes weights in the caller's units
    is_linear: bool = True  # in values, up to their sum
    counts_negatives: bool = False  # a negative of weight 2 is two: its place among them is none

    @property
    def loses_by_negatives(self) -> bool:
        """Whether no negative that is lifted makes it larger: a range of them may lose its best."""
        return self.function is not functional.partial_auc

    def of(self, case: Case, **options: Any) -> Tensor:
        labels = case.grades if self.is_graded else case.grades > 0
        arguments = {"sample_weight": case.weights, "value": case.value} | dict(self.own) | options
        found: Tensor = self.function(case.scores, labels, case.tau, **arguments)[0]
        return found

    def make(self, num_classes: int = 1, **options: Any) -> Any:
        settings = {"queue_size": 0, "temperature": 0.3, "multilabel": num_classes > 1}
        return self.loss(num_classes, **(dict(self.own) | settings | options))

    def targets(self, grades: Tensor) -> Tensor:
        return grades if self.is_graded else torch.where(grades > 0, 1, grades)


MEMBERS = {
    "AP": Member(SmoothAPLoss, functional.smooth_ap, oracle.smooth_ap, counts_negatives=True),
    "recall at rows": Member(*(RecallAtKLoss, functional.recall_at_k, oracle.recall_at_k,
        {"k": 4}), by_rows=True, counts_negatives=True),
    "recall at a share": Member(*(RecallAtKLoss, functional.recall_at_k, oracle.recall_at_k),
        {"k": 0.3, "softness": 0.4}, counts_negatives=True),
    "recall at one row": Member(RecallAtKLoss, functional.recall_at_k, oracle.recall_at_k,
        {"k": 0.01, "softness": 1.0}),
    "recall at FPR": Member(RecallAtFPRLoss, functional.recall_at_fpr, oracle.recall_at_fpr,
        {"max_fpr": 0.3}),
    "recall at no negative": Member(*(RecallAtFPRLoss, functional.recall_at_fpr,
        oracle.recall_at_fpr), {"max_fpr": 0.01, "softness": 0.5}),
    "partial AUC": Member(PartialAUCLoss, functional.partial_auc, oracle.partial_auc,
        {"max_fpr": 0.3}),
    "partial AUC of a range": Member(*(PartialAUCLoss, functional.partial_auc, oracle.partial_auc),
        {"min_fpr": 0.2, "max_fpr": 0.6, "softness": 0.1}),
    "partial AUC from a rate on": Member(PartialAUCLoss, functional.partial_auc,
        oracle.partial_auc, {"min_fpr": 0.2, "max_fpr": 1}),
    "AUC": Member(*(PartialAUCLoss, functional.partial_auc, oracle.partial_auc, {"max_fpr": 1.0}),
        counts_negatives=True),
    "NDCG": Member(*(NDCGLoss, functional.ndcg, oracle.ndcg, {}, True, True, False),
        counts_negatives=True),
    "NDCG at rows": Member(*(NDCGLoss, functional.ndcg, oracle.ndcg, {"k": 5}, True, True, False),
        counts_negatives=True),
    "NDCG at a share": Member(*(NDCGLoss, functional.ndcg, oracle.ndcg, {"k": 0.2}, True, True,
        False), counts_negatives=True),
}  # fmt: skip


class Case(NamedTuple):
    """Problems [C, M]: ties, rows of weight 0, and those with odd numbers are not valid."""

    scores: Tensor
    grades: Tensor
    tau: Tensor  # [C]
    weights: Tensor | None = None
    value: Tensor | None = None

    def to(self, like: Tensor) -> Case:
        grades = self.grades.to(like.device)
        rest = (None if field is None else field.to(like) for field in self[2:])
        return Case(self.scores.to(like), grades, *rest)  # type: ignore[arg-type]


def case(
    shape: tuple[int, int], *, weighted: bool = False, valued: bool = False, seed: int = 0
) -> Case:
    generator = seeded(seed)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator).double()

    scores = torch.randn(shape, generator=generator).double()
    scores[:, 3:6] = scores[:, :1]
    grades = (5 * uniform() - 2).ceil().clamp(min=0).long()  # 0 to 3
    grades[:, :4] = torch.tensor([2, 0, 1, 3])
    weights = uniform() * (uniform() < 0.8)
    weights[:, :4] = torch.tensor([0.5, 0.5, 1.5, 0.5])
    value = torch.where(grades > 0, 3 * uniform(), torch.nan)
    value[:, 3] = 0
    grades[1::4] = 0
    grades[3::4] = 2
    if valued:
        value[3::4] = 7
    tau = torch.linspace(0.1, 0.3, shape[0]).double()
    return Case(scores, grades, tau, weights if weighted else None, value if valued else None)


def expected(member: Member, of: Case) -> Tensor:
    """[C], 0 where it is not defined."""
    rows = []
    for c in range(len(of.scores)):
        weights, value = (None if f is None else f[c].tolist() for f in (of.weights, of.value))
        scores, grades = of.scores[c].tolist(), of.grades[c].tolist()
        problem = oracle.Problem(scores, grades, of.tau[c].item(), weights, value)
        rows.append(member.oracle(problem, **member.own))
    return torch.tensor(rows, dtype=torch.float64).nan_to_num()


WAYS = {
    "dense": ("dense", (4, 19), False),
    "dense, one problem": ("dense", (1, 19), False),
    "panels": ("panel", (4, 19), False),
    "panels, one problem": ("panel", (1, 19), False),
    "kernels, dense": ("dense", (2, 11), True),
    "kernels, panels": ("panel", (2, 11), True),
}
EACH_MEMBER = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
EACH_WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["dense", "panel"])

# --- The function ---------------------------------------------------------------------------------


@EACH_WAY
@EACH_MEMBER
def test_value_and_gradient(
    member: Member, way: tuple[str, tuple[int, int], bool], request: pytest.FixtureRequest
) -> None:
    """The value is that of loops; a gradient in float32 and in kernels that of pairs in float64."""
    backend, shape, has_kernels = way
    for weighted, valued, dtype in (
        (True, True, torch.float64),
        (False, False, torch.float32),
        *[(True, False, torch.float64), (True, True, torch.float32)] * (not has_kernels),
    ):
        of = case(shape, weighted=weighted, valued=valued)
        of = of._replace(tau=5 * of.tau) if has_kernels else of  # few panels: they are interpreted
        plain = of._replace(scores=of.scores.clone().requires_grad_())
        (slopes,) = torch.autograd.grad(member.of(plain, backend="dense").sum(), plain.scores)
        device = request.getfixturevalue("device") if has_kernels else "cpu"
        given = of.to(torch.empty(0, dtype=dtype, device=device))
        given.scores.requires_grad_()
        found = member.of(given, backend=backend)
        (gradient,) = torch.autograd.grad(found.sum(), given.scores)
        right, bound = expected(member, of), {torch.float64: 1e-11, torch.float32: 3e-6}[dtype]
        assert found.dtype == dtype
        assert right[0] > 0.01
        assert (right[1::2] == 0).all()
        torch.testing.assert_close(found.cpu().double(), right, rtol=0, atol=bound)
        bound *= 10 * slopes.abs().max().item()
        torch.testing.assert_close(gradient.cpu().double(), slopes, rtol=0, atol=bound)
        assert not gradient[1::2].any()


@EACH_BACKEND
@EACH_MEMBER
def test_derivatives(member: Member, backend: str) -> None:
    """First and second ones, in scores and temperature."""
    of = case((2, 7), weighted=True, valued=True)

    def metric(scores: Tensor, tau: Tensor) -> Tensor:
        return member.of(of._replace(scores=scores, tau=tau), backend=backend)

    inputs = of.scores.requires_grad_(), (3 * of.tau).requires_grad_()
    assert torch.autograd.gradcheck(metric, inputs)
    assert torch.autograd.gradgradcheck(metric, inputs)


@EACH_MEMBER
def test_units(member: Member) -> None:
    """Weights and values may be scaled, even beyond float32."""
    of = case((2, 15), weighted=True, valued=True)
    assert of.weights is not None
    assert of.value is not None
    unit = 1 if member.by_rows else 1e-200
    scaled = member.of(of._replace(weights=unit * of.weights, value=1e300 * of.value))
    torch.testing.assert_close(scaled, member.of(of), rtol=1e-10, atol=1e-12)


@EACH_MEMBER
def test_repetition(member: Member) -> None:
    """A negative of weight 2 is two of them; means are linear in value."""
    of = case((1, 15), valued=True)
    if member.counts_negatives:
        is_negative = of.grades[0] == 0
        index = torch.cat((torch.arange(15), is_negative.nonzero()[:, 0]))
        twice = Case(of.scores[:, index], of.grades[:, index], of.tau)
        once = twice._replace(
            scores=of.scores, grades=of.grades, weights=torch.where(is_negative, 2.0, 1.0)[None]
        )
        torch.testing.assert_close(member.of(once), member.of(twice))
    if member.is_linear:
        ones = torch.eye(15, dtype=torch.float64)[of.grades[0] > 0]
        apart = torch.cat([member.of(of._replace(value=one[None])) for one in ones])
        assert of.value is not None
        share = of.value[0, of.grades[0] > 0]
        torch.testing.assert_close(member.of(of), (share @ apart / share.sum())[None])


@EACH_MEMBER
def test_half_precision(member: Member) -> None:
    of = case((3, 15), weighted=True, valued=True)
    for dtype in (torch.float16, torch.bfloat16):
        scores = of.scores.to(dtype).requires_grad_()
        half = of.to(torch.empty(0))._replace(scores=scores)
        wide = half._replace(scores=scores.detach().float().requires_grad_())
        found, right = member.of(half), member.of(wide)
        assert found.dtype == torch.float32
        assert found.equal(right)
        for one in (found, right):
            one.sum().backward()
        assert scores.grad is not None
        assert scores.grad.dtype == dtype
        torch.testing.assert_close(scores.grad.float(), wide.scores.grad, rtol=1e-2, atol=1e-4)


def limit(member: Member, of: Case) -> float:
    """τ → 0, then softness → 0."""
    own = {**member.own, "softness": 1e-6} if "softness" in member_arguments(member) else {}
    return member.of(of._replace(tau=of.tau * 1e-9), **own).item()


def member_arguments(member: Member) -> set[str]:
    return set(inspect.signature(member.function).parameters)


@pytest.mark.parametrize("seed", range(5))
def test_limits_are_those_that_people_know(seed: int) -> None:
    generator = seeded(seed)
    scores = torch.randperm(40, generator=generator).double()[None]
    grades = torch.randint(0, 4, (1, 40), generator=generator) * (scores % 3 > 0).long()
    of = Case(scores, grades, torch.ones(1).double())
    is_positive = (grades[0] > 0).numpy()
    values, weights = scores[0].numpy(), torch.rand(1, 40, generator=generator).double()
    ap = sklearn_metrics.average_precision_score(is_positive, values, sample_weight=weights[0])
    assert limit(MEMBERS["AP"], of._replace(weights=weights)) == pytest.approx(ap)

    in_order = is_positive[np.argsort(-values)]
    for k in (1, 7, 40):
        recall = Member(RecallAtKLoss, functional.recall_at_k, oracle.recall_at_k, {"k": k})
        assert limit(recall, of) == pytest.approx(in_order[:k].mean() * k / in_order.sum())
    num_negatives = int((~is_positive).sum())
    for k in (1, 5, num_negatives - 1):
        own = {"max_fpr": k / num_negatives}
        budget = np.cumsum(~in_order)[in_order] <= k
        at_fpr = Member(RecallAtFPRLoss, functional.recall_at_fpr, oracle.recall_at_fpr, own)
        assert limit(at_fpr, of) == pytest.approx(budget.mean())
        area = limit(MEMBERS["partial AUC"]._replace(own=own), of) * own["max_fpr"]
        low, high = own["max_fpr"] ** 2 / 2, own["max_fpr"]  # McClish 1989
        standardised = (1 + (area - low) / (high - low)) / 2
        found = sklearn_metrics.roc_auc_score(is_positive, values, max_fpr=own["max_fpr"])
        assert standardised == pytest.approx(found)
        gains = 2.0 ** grades.numpy() - 1
        for own in ({}, {"k": k}):
            found = sklearn_metrics.ndcg_score(gains, values[None], **own)
            ndcg = MEMBERS["NDCG"]._replace(own=own)
            assert limit(ndcg, of) == pytest.approx(found)
    auc = sklearn_metrics.roc_auc_score(is_positive, values, sample_weight=weights[0])
    assert limit(MEMBERS["AUC"], of._replace(weights=weights)) == pytest.approx(auc)


def test_scores_that_tie_far_beyond_the_budget_are_worth_nothing() -> None:
    scores = torch.zeros(1, 1001, dtype=torch.float64).requires_grad_()
    is_positive = torch.arange(1001)[None] == 0
    found, valid = functional.partial_auc(scores, is_positive, max_fpr=0.001)
    found.sum().backward()
    assert found.item() == pytest.approx(0, abs=1e-12)
    assert valid.item()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_a_heavy_best_row_is_in_the_ideal_whatever_k() -> None:
    weights = torch.tensor([9.0, 1, 1])
    found = functional.ndcg(torch.arange(3.0), torch.tensor([2, 0, 1]), k=1, sample_weight=weights)
    assert found.valid.item()
    assert found.metric.isfinite().item()


BAD: list[tuple[str, str, Callable[[], Any]]] = [
    ("k", "0", partial(RecallAtKLoss, 1, 0)),
    ("k", "1.0", partial(RecallAtKLoss, 1, 1.0)),
    ("k", "True", partial(NDCGLoss, 1, True)),
    ("k", "nan", partial(NDCGLoss, 1, math.nan)),
    ("softness", "0", partial(RecallAtFPRLoss, 1, 0.1, 0)),
    ("softness", "inf", partial(NDCGLoss, 1, 3, math.inf)),
    ("max_fpr", "1", partial(RecallAtFPRLoss, 1, 1)),
    ("max_fpr", "5", partial(PartialAUCLoss, 1, 5)),
    ("min_fpr", "0.1", partial(PartialAUCLoss, 1, 0.1, 0.1)),
    ("min_fpr", "-1", partial(PartialAUCLoss, 1, 0.1, -1)),
    ("num_classes", "3", partial(NDCGLoss, 3)),
    ("target_prior", r"\(0.1,\)", partial(NDCGLoss, target_prior=0.1)),
    ("ignore_index", "4", partial(NDCGLoss, ignore_index=4)),
    ("targets", "32", lambda: NDCGLoss()(torch.randn(2, 1), torch.tensor([1, 32]))),
    ("targets", "0.5", lambda: NDCGLoss()(torch.randn(2, 1), torch.tensor([1, 0.5]))),
    ("grades", r"\[1\]", lambda: functional.ndcg(torch.randn(2), torch.tensor([1]))),
]


@pytest.mark.parametrize(("name", "got", "call"), BAD)
def test_bad_arguments(name: str, got: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name} must .*\bgot {got}"):
        call()


# --- The loss -------------------------------------------------------------------------------------


def batch(
    member: Member,
    num_rows: int = 24,
    num_classes: int = 1,
    *,
    seed: int = 0,
    weighted: bool = True,
) -> Batch:
    """Rows of which one is ignored and one weighs nothing."""
    generator, shape = seeded(seed), (num_rows, num_classes)
    logits = torch.randn(shape, generator=generator).double()
    grades = (5 * torch.rand(shape, generator=generator) - 2).ceil().clamp(min=0).long()
    grades[0], grades[1], grades[2] = 1, 0, IGNORED
    weights = torch.rand(num_rows, generator=generator).double() + 0.5
    weights[3] = 0
    targets = member.targets(grades)
    return Batch(
        logits, targets if num_classes > 1 else targets.squeeze(1), weights if weighted else None
    )


@pytest.mark.parametrize("unit", ["score", "spread"])
@EACH_MEMBER
def test_a_loss_is_one_minus_its_function(member: Member, unit: str) -> None:
    of = batch(member, num_classes=3)
    assert of.weights is not None
    weights = of.weights * (of.targets.T != IGNORED)
    tau: Any = 0.3
    if unit == "spread":
        tau = 0.3 * functional.score_spread(of.logits.T, weights)
    grades = of.targets.T.clamp(min=0)
    metric = member.of(Case(of.logits.T, grades, tau, weights))
    loss = of.through(member.make(3, temperature_unit=unit, reduction="none"))
    torch.testing.assert_close(loss, 1 - metric)


@EACH_MEMBER
def test_a_queue_makes_one_large_batch(member: Member) -> None:
    first, second = (batch(member, seed=seed) for seed in (0, 1))
    loss_fn = member.make(queue_size=40)
    first.through(loss_fn)
    together = Batch(*(torch.cat(pair) for pair in zip(second, first, strict=True)))
    torch.testing.assert_close(
        second.through(loss_fn), together.through(member.make()), rtol=1e-6, atol=1e-7
    )


@EACH_MEMBER
def test_prior_and_classes(member: Member) -> None:
    """Of one class against the rest, with positives as common as they will be."""
    if member.is_graded:
        return
    of = batch(member, seed=2)
    targets = torch.arange(24) % 3
    found = member.make(3, multilabel=False, reduction="none", target_prior=(0.1, 0.3, 0.6))(
        of.logits.expand(-1, 3), targets
    )
    for c, prior in enumerate((0.1, 0.3, 0.6)):
        weights = functional.prior_weights(targets == c, prior, torch.ones(24).double())
        grades = (targets == c).long()[None]
        one = Case(of.logits.T, grades, torch.full((1,), 0.3), weights[None])
        torch.testing.assert_close(found[c], 1 - member.of(one).squeeze())


NOTHING = {
    "no rows": [],
    "one row": [1],
    "negatives": [0] * 4,
    "positives": [1] * 4,
    "ignored": [IGNORED] * 4,
    "one class and ignored": [0, IGNORED] * 3,
    "no weight for positives": [1, 0, 0],
}


@EACH_MEMBER
def test_nothing_to_rank(member: Member) -> None:
    """Exactly 0, attached to the graph, with a gradient of exactly 0, whatever the logits hold."""
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    values = torch.inf, -torch.inf, torch.nan, 60_000.0
    for number, (name, value) in enumerate(itertools.product(NOTHING, values)):
        dtype = dtypes[(number + number // 4) % 4]
        reduction, num_classes = ("mean", "sum", "none")[number % 3], (1, 3)[number % 2]
        targets = torch.tensor(NOTHING[name], dtype=torch.int64)
        weights = torch.tensor([0.0, 1, 1]) if "weight" in name else None
        logits = torch.full((len(targets), num_classes), value, dtype=dtype, requires_grad=True)
        given = targets[:, None].expand(logits.shape) if num_classes > 1 else targets
        unit = "spread" if number % 5 < 2 else "score"
        loss_fn = member.make(num_classes, queue_size=9, reduction=reduction, temperature_unit=unit)
        for _ in range(2):  # then with more of the same in the queue
            loss, per_class, valid = loss_fn(logits, given, True, sample_weight=weights)
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            assert not valid.any()
            assert per_class.isnan().all()
            assert loss.isnan().all() if reduction == "none" else loss.item() == 0
            assert reduction == "none" or not loss.signbit()
            (gradient,) = torch.autograd.grad(loss.sum(), logits)
            assert gradient.dtype == dtype
            assert (gradient == 0).all()


@EACH_MEMBER
def test_rows_that_are_not_finite(member: Member) -> None:
    """An infinity ranks as an extreme; NaN makes one NaN loss, and no queue remembers it."""
    of = batch(member)
    for extreme in (torch.inf, -torch.inf):
        bad = of._replace(logits=of.logits.clone()).leaf()
        with torch.no_grad():
            bad.logits[:2] = extreme
        loss = bad.through(member.make())
        loss.backward()
        assert loss.isfinite()
        assert bad.logits.grad.isfinite().all()
        assert not bad.logits.grad[:2].any()
    loss_fn, other = member.make(queue_size=30), member.make(queue_size=30)
    bad = of._replace(logits=of.logits.clone())
    bad.logits[4] = torch.nan
    assert bad.through(loss_fn).isnan()
    kept = [n for n in range(24) if n != 4]
    Batch(*(field[kept] for field in of)).through(other)
    assert queued_rows(loss_fn) == queued_rows(other)
    assert of.through(loss_fn).equal(of.through(other))


@EACH_MEMBER
def test_it_takes_part_in_the_rest(member: Member) -> None:
    """Checkpoints, mixing, draws, diagnostics, repr, copies: what serves one serves all."""
    loss_fn, other = (member.make(queue_size=30, max_pool_size=40) for _ in range(2))
    for seed in range(3):
        batch(member, seed=seed).through(loss_fn)
    other.load_state_dict(loss_fn.state_dict())
    of = batch(member, seed=3)
    found = of._replace(weights=None).leaf()
    assert loss_fn.diagnose(*found[:2]).metric.isfinite().all()
    assert of.through(copy.deepcopy(loss_fn)).equal(of.through(other))
    assert numbers_of(state_of(other)).shape == numbers_of(state_of(loss_fn)).shape
    assert repr(eval(repr(loss_fn))) == repr(loss_fn)
    assert {*RankingOptions.__annotations__} <= {*inspect.signature(member.loss).parameters}
    mix = MixedLoss(lambda logits, targets: logits.mean(), member.make(), main_weight=0.5)
    half = (found.through(member.make()) + found.logits.mean()) / 2
    torch.testing.assert_close(mix(*found[:2]), half)
    name = "k" if "k" in member.own else next(iter(member.own), "num_classes")
    with pytest.raises(AttributeError, match=f"{name} of {member.loss.__name__} can't be changed"):
        setattr(loss_fn, name, 3)


def test_the_budget_does_not_shrink_to_a_row_that_stands_for_many() -> None:
    """Of drawn rows the mean weight is that of the pool: else k would be ten rows, not one."""
    logits = torch.randn(4000, 1, generator=seeded(0))
    targets = (torch.arange(4000) % 2).float()
    whole = RecallAtKLoss(1, 1e-5, queue_size=0, temperature=1e-4)
    drawn = RecallAtKLoss(1, 1e-5, queue_size=0, temperature=1e-4, max_pool_size=400)
    problems = drawn._problems(drawn._pool(drawn._batch(logits, targets)[0]), None)
    one = problems.mean_weight("all") * problems.unit
    assert one.item() == pytest.approx(1, rel=0.02)
    assert whole(logits, targets) <= 1


# --- Processes ------------------------------------------------------------------------------------


def through_rank(rank: int | None, name: str, options: dict[str, Any]) -> tuple[float, Tensor]:
    """Loss and gradient of one process with its rows, or with all rows for None."""
    of = batch(MEMBERS[name], 23, 2)
    own = {None: slice(None), 0: slice(9), 1: slice(9, None)}[rank]
    of = Batch(*(field[own] for field in of)).leaf()
    loss = of.through(MEMBERS[name].make(2, **options))
    loss.backward()
    assert of.logits.grad is not None
    return loss.item(), of.logits.grad


def all_through_rank(rank: int, gather: str) -> dict[str, Any]:
    return {
        (name, unit): through_rank(rank, name, {"gather": gather, "temperature_unit": unit})
        for name in MEMBERS
        for unit in ("score", "spread")
    }


@pytest.mark.parametrize("gather", ["rows", "sums"])
def test_two_processes_are_one(ranks: Ranks, gather: str) -> None:
    found = ranks.run(all_through_rank, gather)
    for outcome, own in zip(found, (slice(9), slice(9, None)), strict=True):
        assert not isinstance(outcome, Failure), outcome
        for (name, unit), (loss, gradient) in outcome.items():
            right, slopes = through_rank(None, name, {"temperature_unit": unit})
            assert loss == pytest.approx(right, abs=1e-11), (name, unit)
            # DDP averages.
            torch.testing.assert_close(
                gradient, WORLD_SIZE * slopes[own], rtol=1e-9, atol=1e-11, msg=f"{name}, {unit}"
            )


def other_k(rank: int) -> str:
    try:
        batch(MEMBERS["recall at rows"]).through(MEMBERS["recall at rows"].make(k=3 + rank))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_processes_that_disagree_on_k(ranks: Ranks) -> None:
    for text in ranks.run(other_k):
        assert "ranks disagree on k: rank 0, 1, … have 3, 4" in text


def test_advice_of_a_budget_that_no_positive_is_near() -> None:
    """And none where all positives are well within it."""
    logits, last = torch.arange(400.0)[:, None], torch.arange(400) < 3
    for loss_fn in (RecallAtKLoss(1, 0.02), RecallAtFPRLoss(1, 0.02), PartialAUCLoss(1, 0.02)):
        found = loss_fn.diagnose(logits, last)
        assert found.near_budget.item() == 0
        assert any(text.startswith("no positive is near the budget") for text in found.advice())
        assert "near_budget" in str(found)
        easy = type(loss_fn)(1, 0.02, softness=0.01).diagnose(logits, last.flip(0))
        assert not any("budget" in text for text in easy.advice())
    plain = SmoothAPLoss(1).diagnose(logits, last)
    assert plain.near_budget is None
    assert "near_budget" not in str(plain)
    graded = NDCGLoss(queue_size=0).diagnose(torch.randn(9, 1), 1 + torch.arange(9) % 3)
    assert graded.metric.item() > 0.1
    assert not any("NaN" in text or "no loss" in text for text in graded.advice())
