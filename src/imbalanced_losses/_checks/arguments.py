"""Every check of an argument and the wording of its error.

One style: the argument, what was expected, what came; and the fix where there is one (`_fixes`).
A check returns nothing or the argument in its canonical form, and changes no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from imbalanced_losses._checks import hints as _fixes
from imbalanced_losses._checks.tensors import (
    fits,
    floating,
    kind,
    of_bools,
    of_integers,
    one_or_two_dimensions,
    real,
    shown,
    tensor,
    text,
    with_values,
)
from imbalanced_losses._checks.tracing import is_on_host, is_traced
from imbalanced_losses._checks.typing import Gather, Labelled

T = TypeVar("T")


def maybe(check: Callable[..., T], name: str, value: Any, *more: Any) -> T | None:
    """None, or what a check makes of the value."""
    return None if value is None else check(name, value, *more)


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """An int, at least `minimum`; bool is not one."""
    expected = "an int" if minimum is None else f"an int >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(text(name, expected, shown(value)))
    if minimum is not None and value < minimum:
        raise ValueError(text(name, expected, repr(value)))
    return int(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(text(name, "True or False", shown(value)))
    return value


def choice(name: str, value: T, options: tuple[str, ...]) -> T:
    if value not in options:
        raise ValueError(text(name, f"one of {', '.join(map(repr, options))}", repr(value)))
    return value


def backend(value: Any, options: tuple[str, ...], gather: Gather) -> None:
    """One of the options, and with sums over processes one that sums."""
    choice("backend", value, options)
    if gather == "sums" and value == "dense":
        raise ValueError(
            'backend must be "auto" or "panel" with gather="sums": a process that lacks the '
            'rows of the others has no pairs to sum over; got "dense"'
        )


def queue_follows_shift(value: Any, gather: Gather) -> bool:
    """A bool, False with sums over processes."""
    if boolean("queue_follows_shift", value) and gather == "sums":
        raise ValueError(
            'queue_follows_shift must be False with gather="sums": the mean of all live rows '
            'would have to be differentiated over processes; use gather="rows" or a '
            "global batch that needs no queue"
        )
    return bool(value)


def number_above_zero(name: str, value: Any) -> float:
    """A finite number above zero."""
    return _finite(name, value, "> 0", least=math.ulp(0.0))


def number_at_least_zero(name: str, value: Any) -> float:
    """A finite number from zero on."""
    return _finite(name, value, ">= 0", least=0.0)


def _finite(name: str, value: Any, bound: str, least: float) -> float:
    # A float first: what else is a number takes longer to tell.
    if isinstance(value, bool) or not isinstance(value, (float, Real)):
        raise TypeError(text(name, f"a float {bound}", shown(value), _fixes.of_number(value)))
    if not least <= float(value) < math.inf:
        raise ValueError(text(name, f"finite and {bound}", repr(value)))
    return float(value)


def budget(name: str, value: Any) -> int | float:
    """A number of rows, an int, or a share of them, a float in (0, 1)."""
    if isinstance(value, Integral):
        return integer(name, value, minimum=1)
    expected = "an int >= 1 (rows) or a float between 0 and 1 (their share)"
    if not isinstance(value, Real):
        raise TypeError(text(name, expected, shown(value), _fixes.of_number(value)))
    share = float(value)
    if not 0 < share < 1:
        fix = (
            f"; for a number of rows use {int(share)}" if share >= 1 and share.is_integer() else ""
        )
        raise ValueError(text(name, expected, repr(value), fix))
    return share


def fpr_range(min_fpr: Any, max_fpr: Any) -> tuple[float, float]:
    """0 ≤ min_fpr < max_fpr ≤ 1."""
    low, high = number_at_least_zero("min_fpr", min_fpr), number_above_zero("max_fpr", max_fpr)
    if high > 1:
        fix = _fixes.of_share(high)
        raise ValueError(f"max_fpr must be at most 1, got {max_fpr!r}{fix}")
    if low >= high:
        raise ValueError(f"min_fpr must be below max_fpr, got {min_fpr!r} and {max_fpr!r}")
    return low, high


def grades(num_classes: int, multilabel: bool, target_prior: Any) -> None:
    """The arguments of a loss whose targets are grades."""
    if num_classes > 1 and not multilabel:
        raise ValueError(
            f"num_classes must be 1 for grades [N], got {num_classes}; for grades [N, C] use "
            "multilabel=True"
        )
    if target_prior is not None:
        raise ValueError(f"target_prior must be None for grades, got {target_prior!r}")


def ignore_index(value: Any, num_labels: int) -> int:
    """An int that is none of the labels 0 and 1, or grades, where those are all there is."""
    index = integer("ignore_index", value)
    if 0 <= index < num_labels == 2:
        raise ValueError(
            f"ignore_index must not be a label: with num_classes=1 or multilabel=True targets are "
            f"0 and 1, and ignoring one of them leaves nothing to rank; got {index}"
        )
    if 0 <= index < num_labels:
        raise ValueError(f"ignore_index must not be a grade, 0 to {num_labels - 1}, got {index}")
    return index


def rows(
    loss: Labelled,
    logits: Any,
    targets: Any,
    sample_weight: Any = None,
    group: Any = None,
    value: Any = None,
    *,
    num_grades: int = 0,
    check: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The rows of a call: logits float32 or float64, targets int64, weights and value like the
    logits, group int64. Their values are checked by `row_values` or what stands for it.
    """
    logits = _logits(logits, loss.num_classes, targets)
    targets = _targets(targets, logits, loss.multilabel)
    if sample_weight is not None:
        sample_weight = _of_rows("sample_weight", sample_weight, logits, loss.multilabel)
    if value is not None:
        value = _of_rows("value", value, logits, loss.multilabel)
    ids = None if group is None else group_ids(group, ("logits", logits), logits.shape[:1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = None if sample_weight is None else sample_weight.detach().to(logits.dtype)
    if loss.check_values and not logits.is_meta:
        num_labels = 2 if loss.multilabel or loss.num_classes == 1 else loss.num_classes
        labels = num_grades or num_labels, loss.ignore_index, num_grades > 0
        (check or row_values)(targets, sample_weight, weights, *labels)
    targets = targets.detach().to(torch.int64)
    if value is not None:
        value = value.detach().to(logits.dtype)
        if loss.check_values and not logits.is_meta:
            is_class = not (loss.multilabel or loss.num_classes == 1)
            is_asked = targets != loss.ignore_index
            _values_of_positives(value, is_asked if is_class else is_asked & (targets > 0))
    return logits, targets, weights, value, ids


def _logits(given: Any, num_classes: int, targets: Any) -> Tensor:
    """Floating [N, num_classes]; the targets that came with them are for the wording alone."""
    value = tensor("logits", given)
    if not value.is_floating_point():
        fix = _fixes.of_swapped(value, targets, num_classes) or _fixes.of_dtype("logits", value)
        raise TypeError(text("logits", "floating point", value.dtype, fix))
    if value.dim() != 2 or value.shape[1] != num_classes:
        expected = f"[N, {num_classes}] (num_classes={num_classes})"
        fix = _fixes.of_logits(value, num_classes, targets)
        raise ValueError(text("logits", expected, list(value.shape), fix))
    return value


def _targets(given: Any, logits: Tensor, multilabel: bool) -> Tensor:
    """Real [N], or [N, C] for multi-label; [N, 1] becomes [N] for one class."""
    value = tensor("targets", given)
    if value.is_complex():
        raise TypeError(text("targets", "integers (or integral floats)", value.dtype))
    if not multilabel and value.shape == logits.shape and logits.shape[1] == 1:
        value = value.squeeze(1)
    return fits("targets", value, ("logits", logits), logits.shape[: 1 + multilabel])


def _of_rows(name: str, given: Any, logits: Tensor, multilabel: bool) -> Tensor:
    """Real [N]; with multilabel labels also [N, C], which it always becomes."""
    shapes = (logits.shape[:1], logits.shape)[: 1 + multilabel]
    value = fits(name, real(name, given), ("logits", logits), *shapes)
    return value[:, None].expand(logits.shape) if multilabel and value.dim() == 1 else value


def group_ids(given: Any, beside: tuple[str, Tensor], shape: torch.Size) -> Tensor:
    """Ids [M] of any integer dtype as int64, which unsigned ones from 2⁶³ on wrap into."""
    return fits("group", of_integers("group", given), beside, shape).detach().to(torch.int64)


def _values_of_positives(value: Tensor, is_positive: Tensor) -> None:
    """Finite and ≥ 0; of other rows it is not looked at."""
    is_good = (value >= 0) & value.isfinite() | ~is_positive
    if is_traced(value):
        torch._assert_async(is_good.all(), "value of a positive must be finite and >= 0")
    elif not bool(is_good.all()):
        first = value[~is_good][0].item()
        raise ValueError(text("value of a positive", "finite and >= 0", first))


def shares(name: str, value: Any, num_classes: int) -> tuple[float, ...]:
    """A share of positives for each class, in (0, 1)."""
    expected = f"one share of positives a class, {num_classes} of them"
    if isinstance(value, Tensor):
        value = with_values(name, tensor(name, value)).tolist()
    if not isinstance(value, (list, tuple)):
        if num_classes > 1:
            raise TypeError(text(name, expected, kind(value)))
        value = [value]
    if len(value) != num_classes:
        raise ValueError(f"{name} must have {expected}, got {len(value)}")
    return tuple(between_0_and_1(name, share) for share in value)


def between_0_and_1(name: str, value: Any) -> float:
    share = number_above_zero(name, value)
    if share >= 1:
        raise ValueError(text(name, "between 0 and 1", repr(value), _fixes.of_share(share)))
    return share


def prior_weights(
    is_positive: Any, target_prior: Any, sample_weight: Any
) -> tuple[Tensor, float | Tensor, Tensor | None]:
    """The arguments of `functional.prior_weights`."""
    is_positive = of_bools("is_positive", is_positive)
    one_or_two_dimensions("is_positive", is_positive)
    beside = ("is_positive", is_positive)
    if isinstance(target_prior, Tensor):
        shapes = is_positive.shape[:-1], is_positive.shape[:0]
        target_prior = fits("target_prior", real("target_prior", target_prior), beside, *shapes)
    else:
        between_0_and_1("target_prior", target_prior)
    if sample_weight is not None:
        shapes = is_positive.shape, is_positive.shape[-1:]
        sample_weight = floating("sample_weight", sample_weight)
        sample_weight = fits("sample_weight", sample_weight, beside, *shapes)
    return is_positive, target_prior, sample_weight


def row_values(
    targets: Tensor,
    sample_weight: Tensor | None,
    weights: Tensor | None,
    num_labels: int,
    ignore_index: int,
    is_graded: bool = False,
) -> None:
    """Targets are labels or ignore_index, weights finite and ≥ 0: one read of the device.

    Args:
        targets, sample_weight: as given.
        weights: sample_weight in the dtype of the computation, where it has to be finite too.
    """
    wide = targets if targets.is_floating_point() else targets.to(torch.int64)
    if weights is None and not wide.is_floating_point() and is_on_host(targets):
        if targets.dtype == torch.bool or targets.numel() == 0:
            return
        low, high = torch.stack(torch.aminmax(wide)).tolist()
        if low >= 0 and high < num_labels:
            return
    good_targets = (wide >= 0) & (wide < num_labels)
    if wide.is_floating_point():
        good_targets &= wide == wide.trunc()
    good_targets |= wide == ignore_index
    if targets.dtype == torch.uint64:
        good_targets &= wide >= 0  # from 2⁶³ on they have wrapped
    all_good = good_targets.all()
    labels = "0 or 1" if num_labels == 2 else f"integers in 0..{num_labels - 1}"
    labels = f"grades, {labels}" if is_graded else labels
    labels += f", or ignore_index={ignore_index}"
    if sample_weight is not None and weights is not None:
        signed = sample_weight if sample_weight.dtype.is_signed else weights
        good_weights = (signed >= 0) & weights.isfinite()
        all_good &= good_weights.all()
    if is_traced(targets):
        expected = f"targets must be {labels}; sample_weight finite and >= 0"
        torch._assert_async(all_good, expected)
    elif not bool(all_good):
        if not bool(good_targets.all()):
            first = targets[~good_targets][0].item()
            fix = "" if is_graded else _fixes.of_labels(targets, num_labels, ignore_index)
            raise ValueError(text("targets", labels, first, fix))
        if sample_weight is not None:
            first = sample_weight[~good_weights][0].item()
            raise ValueError(text("sample_weight", "finite and >= 0", first))


def saved_count(name: str, number: float, maximum: int = 2**53) -> int:
    """A count in a checkpoint; float64 does not tell larger ones apart."""
    if not (number.is_integer() and 0 <= number <= maximum):
        raise ValueError(text(name, f"an int in 0..{maximum}", f"{number:g}"))
    return int(number)


def class_weight(name: str, given: Any, num_classes: int) -> Tensor:
    """[C] floating, finite and > 0; of a list float32 on the CPU."""
    if isinstance(given, (list, tuple)):
        given = torch.tensor(given, dtype=torch.float32, device="cpu")
    value = with_values(name, floating(name, given))
    if value.shape != (num_classes,):
        raise ValueError(text(name, f"[num_classes] = [{num_classes}]", list(value.shape)))
    if not bool((value.isfinite() & (value > 0)).all()):
        raise ValueError(text(name, "finite and > 0", value.tolist()))
    return value


def scores(given: Any) -> Tensor:
    """Floating [M] or [C, M]."""
    value = floating("scores", given)
    one_or_two_dimensions("scores", value)
    return value


def weights_of_scores(given: Any, scores: Tensor, name: str = "sample_weight") -> Tensor | None:
    """Real [M] or the shape of the scores, floating from here on; or None."""
    if given is None:
        return None
    value = fits(name, real(name, given), ("scores", scores), scores.shape[-1:], scores.shape)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return value if value.is_floating_point() else value.to(dtype)


def ranked(
    scores_given: Any,
    labels: Any,
    temperature: Any,
    sample_weight: Any,
    value: Any,
    is_graded: bool = False,
) -> tuple[Tensor, Tensor, float | Tensor, Tensor | None, Tensor | None]:
    """The arguments that the metrics of `functional` share."""
    rows = scores(scores_given)
    beside = ("scores", rows)
    name, check = ("grades", real) if is_graded else ("is_positive", of_bools)
    labels = fits(name, check(name, labels), beside, rows.shape)
    if isinstance(temperature, Tensor):
        temperature = floating("temperature", temperature)
        fits("temperature", temperature, beside, rows.shape[:-1], rows.shape[:0])
    else:
        number_above_zero("temperature", temperature)
    weights = weights_of_scores(sample_weight, rows)
    return rows, labels, temperature, weights, weights_of_scores(value, rows, "value")
