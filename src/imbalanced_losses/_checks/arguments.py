"""Every check of an argument and the wording of its error.

One style: the argument, what was expected, what came; and the fix where there is one (`_fixes`).
A check returns nothing or the argument in its canonical form, and changes no state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from imbalanced_losses._checks import hints as _fixes
from imbalanced_losses._checks.tracing import is_on_host, is_traced

REDUCTIONS = ("mean", "sum", "none")
TEMPERATURE_UNITS = ("score", "spread")
GRAD_REDUCES = ("mean", "sum")
GATHERS = ("rows", "sums")


def integer(name: str, value: Any, minimum: int | None = None) -> int:
    """An int, at least `minimum`; bool is not one."""
    expected = "an int" if minimum is None else f"an int >= {minimum}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({_kind(value)})")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return int(value)


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({_kind(value)})")
    return value


def choice(name: str, value: Any, options: tuple[str, ...]) -> Any:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
    return value


def number_above_zero(name: str, value: Any) -> float:
    """A finite number above zero."""
    return _finite(name, value, "> 0", least=math.ulp(0.0))


def number_at_least_zero(name: str, value: Any) -> float:
    """A finite number from zero on."""
    return _finite(name, value, ">= 0", least=0.0)


def _finite(name: str, value: Any, bound: str, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        fix = _fixes.of_number(value)
        raise TypeError(f"{name} must be a float {bound}, got {value!r} ({_kind(value)}){fix}")
    if not least <= float(value) < math.inf:
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")
    return float(value)


def ignore_index(value: Any, binary_labels: bool) -> int:
    """An int that is not one of the labels 0 and 1 where those are all there is."""
    index = integer("ignore_index", value)
    if binary_labels and index in (0, 1):
        raise ValueError(
            f"ignore_index must not be a label: with num_classes=1 or multilabel=True targets are "
            f"0 and 1, and ignoring one of them leaves nothing to rank; got {index}"
        )
    return index


def logits(given: Any, num_classes: int, targets: Any = None) -> Tensor:
    """Floating [N, num_classes]; the targets that came with them are for the wording alone."""
    value = _tensor("logits", given)
    if not value.is_floating_point():
        fix = _fixes.of_swapped(value, targets, num_classes) or _fixes.of_dtype("logits", value)
        raise TypeError(f"logits must be floating point, got {value.dtype}{fix}")
    if value.dim() != 2 or value.shape[1] != num_classes:
        fix = _fixes.of_logits(value, num_classes, targets)
        raise ValueError(
            f"logits must be [N, {num_classes}] (num_classes={num_classes}), "
            f"got {list(value.shape)}{fix}"
        )
    return value


def targets(given: Any, logits: Tensor, multilabel: bool) -> Tensor:
    """Real [N], or [N, C] for multi-label; [N, 1] becomes [N] for one class."""
    value = _tensor("targets", given)
    if value.is_complex():
        raise TypeError(f"targets must be integers (or integral floats), got {value.dtype}")
    num_rows, num_classes = logits.shape
    expected = [num_rows, num_classes] if multilabel else [num_rows]
    if not multilabel and num_classes == 1 and value.shape == (num_rows, 1):
        value = value.squeeze(1)
    if list(value.shape) != expected:
        fix = _fixes.of_targets(value, logits, multilabel)
        raise ValueError(
            f"targets must be {expected} to fit logits {list(logits.shape)}, "
            f"got {list(value.shape)}{fix}"
        )
    return _on_device("targets", value, "logits", logits)


def sample_weight(given: Any, logits: Tensor, multilabel: bool = False) -> Tensor:
    """Real [N]; with multilabel labels also [N, C], which it always becomes."""
    value = _tensor("sample_weight", given)
    if value.is_complex():
        raise TypeError(f"sample_weight must be real, got {value.dtype}")
    if value.shape != logits.shape[:1] and not (multilabel and value.shape == logits.shape):
        expected = f"[{logits.shape[0]}]{f' or {list(logits.shape)}' if multilabel else ''}"
        raise ValueError(
            f"sample_weight must be {expected}, one weight a row of logits, "
            f"got {list(value.shape)}{_fixes.of_sample_weight(value, logits, multilabel)}"
        )
    _on_device("sample_weight", value, "logits", logits)
    return value[:, None].expand(logits.shape) if multilabel and value.dim() == 1 else value


def _with_values(name: str, value: Tensor) -> Tensor:
    if value.is_meta:
        raise TypeError(f"{name} must have values, got a tensor on meta; use a list of floats")
    return value


def target_prior(value: Any, num_classes: int) -> tuple[float, ...]:
    """A share of positives for each class, in (0, 1)."""
    if isinstance(value, Tensor):
        value = _with_values("target_prior", _tensor("target_prior", value)).tolist()
    if not isinstance(value, (list, tuple)):
        if num_classes > 1:
            raise TypeError(
                f"target_prior must be one share of positives a class, {num_classes} of them, "
                f"got {_kind(value)}"
            )
        value = [value]
    if len(value) != num_classes:
        raise ValueError(
            f"target_prior must have one share of positives a class, {num_classes} of them, "
            f"got {len(value)}"
        )
    return tuple(_share("target_prior", share) for share in value)


def _share(name: str, value: Any) -> float:
    share = number_above_zero(name, value)
    if share >= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}{_fixes.of_share(share)}")
    return share


def prior_weights(
    is_positive: Any, target_prior: Any, sample_weight: Any
) -> tuple[Tensor, float | Tensor, Tensor | None]:
    """The arguments of `functional.prior_weights`."""
    is_positive = _bool(is_positive)
    if is_positive.dim() not in (1, 2):
        raise ValueError(f"is_positive must be [M] or [C, M], got {list(is_positive.shape)}")
    beside = ("is_positive", is_positive)
    if isinstance(target_prior, Tensor):
        shapes = is_positive.shape[:-1], torch.Size(())
        target_prior = _fits("target_prior", target_prior, beside, *shapes)
    else:
        _share("target_prior", target_prior)
    if sample_weight is not None:
        shapes = is_positive.shape, is_positive.shape[-1:]
        sample_weight = _floating("sample_weight", sample_weight)
        _fits("sample_weight", sample_weight, beside, *shapes)
    return is_positive, target_prior, sample_weight


def row_values(
    targets: Tensor,
    sample_weight: Tensor | None,
    weights: Tensor | None,
    num_labels: int,
    ignore_index: int,
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
    if sample_weight is not None and weights is not None:
        signed = sample_weight if sample_weight.dtype.is_signed else weights
        good_weights = (signed >= 0) & weights.isfinite()
        all_good &= good_weights.all()
    if is_traced(targets):
        text = f"targets must be {labels}, or ignore_index={ignore_index}"
        torch._assert_async(all_good, f"{text}; sample_weight finite and >= 0")
        return
    if bool(all_good):
        return
    if not bool(good_targets.all()):
        first = targets[~good_targets][0].item()
        fix = _fixes.of_labels(targets, num_labels, ignore_index)
        raise ValueError(
            f"targets must be {labels}, or ignore_index={ignore_index}, got {first}{fix}"
        )
    if sample_weight is not None:
        first = sample_weight[~good_weights][0].item()
        raise ValueError(f"sample_weight must be finite and >= 0, got {first}")


def saved_count(name: str, number: float, maximum: int = 2**53) -> int:
    """A count in a checkpoint; float64 does not tell larger ones apart."""
    if not (number.is_integer() and 0 <= number <= maximum):
        raise ValueError(f"{name} must be an int in 0..{maximum}, got {number:g}")
    return int(number)


def temperature_schedule(value: Any) -> tuple[float, float, int]:
    """(start, end, steps) of an annealed temperature."""
    if not (isinstance(value, (tuple, list)) and len(value) == 3):
        raise TypeError(f"temperature must be (start, end, steps) or None, got {value!r}")
    start, end, steps = value
    return (
        number_above_zero("temperature's start", start),
        number_above_zero("temperature's end", end),
        integer("temperature's steps", steps, minimum=1),
    )


def losses_to_mix(auxiliary_loss: Any, main_loss: Any, ranking: type) -> None:
    """A loss that gives one number, and a ranking loss that does."""
    for name, value in (("auxiliary_loss", auxiliary_loss), ("main_loss", main_loss)):
        if isinstance(value, type):
            raise TypeError(
                f"{name} must be a loss, got the class {value.__name__}; construct it: "
                f"{value.__name__}(...)"
            )
    if not callable(auxiliary_loss):
        raise TypeError(f"auxiliary_loss must be callable, got {auxiliary_loss!r}")
    if not isinstance(main_loss, ranking):
        is_swapped = isinstance(auxiliary_loss, ranking)
        fix = "; auxiliary_loss comes first, then main_loss" if is_swapped else ""
        raise TypeError(
            f"main_loss must be a ranking loss of this library, got {_kind(main_loss)}{fix}"
        )
    for name, loss in (("auxiliary_loss", auxiliary_loss), ("main_loss", main_loss)):
        if getattr(loss, "reduction", None) == "none":
            raise ValueError(f'{name} must have reduction "mean" or "sum", got "none"')


def called_module(model: Any, module: Any) -> nn.Module:
    """The module behind a model: itself, or what came beside a function."""
    found = model if isinstance(model, nn.Module) else module
    if not isinstance(found, nn.Module):
        raise TypeError(
            f"module must be the network that the function calls, got {_kind(found)}: its running "
            "statistics would move twice, since every micro-batch goes through it twice"
        )
    return found


def micro_batches(value: Any) -> None:
    """A sequence of at least one."""
    if isinstance(value, Tensor):
        raise TypeError(
            "inputs must be a sequence of micro-batches, got one Tensor; use inputs.split(rows)"
        )
    if not hasattr(value, "__len__"):
        raise TypeError(
            f"inputs must be a sequence, since it is gone through twice, got {_kind(value)}; "
            "use list(inputs)"
        )
    if len(value) == 0:
        raise ValueError("inputs must hold at least one micro-batch, got none")


def one_number(name: str, value: Tensor) -> None:
    """What a loss returns where one number is needed."""
    if not isinstance(value, Tensor) or value.dim() > 0:
        got = list(value.shape) if isinstance(value, Tensor) else _kind(value)
        raise ValueError(
            f'{name} must return one number [], got {got}; use reduction "mean" or "sum"'
        )


def class_weight(given: Any, num_classes: int) -> Tensor:
    """[C] floating, finite and > 0; of a list float32 on the CPU."""
    if isinstance(given, (list, tuple)):
        given = torch.tensor(given, dtype=torch.float32, device="cpu")
    value = _with_values("class_weight", _floating("class_weight", given))
    if value.shape != (num_classes,):
        raise ValueError(
            f"class_weight must be [num_classes] = [{num_classes}], got {list(value.shape)}"
        )
    if not bool((value.isfinite() & (value > 0)).all()):
        raise ValueError(f"class_weight must be finite and > 0, got {value.tolist()}")
    return value


def scores(given: Any) -> Tensor:
    """Floating [M] or [C, M]."""
    value = _floating("scores", given)
    if value.dim() not in (1, 2):
        raise ValueError(f"scores must be [M] or [C, M], got {list(value.shape)}")
    return value


def weights_of_scores(given: Any, scores: Tensor) -> Tensor | None:
    """Real [M] or the shape of the scores, floating from here on; or None."""
    if given is None:
        return None
    value = _fits("sample_weight", given, ("scores", scores), scores.shape[-1:], scores.shape)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return value if value.is_floating_point() else value.to(dtype)


def smooth_ap(
    scores_given: Any, is_positive: Any, temperature: Any, sample_weight: Any
) -> tuple[Tensor, Tensor, float | Tensor, Tensor | None]:
    """The arguments of `functional.smooth_ap`."""
    rows = scores(scores_given)
    beside = ("scores", rows)
    is_positive = _fits("is_positive", _bool(is_positive), beside, rows.shape)
    if isinstance(temperature, Tensor):
        temperature = _floating("temperature", temperature)
        _fits("temperature", temperature, beside, rows.shape[:-1], torch.Size(()))
    else:
        number_above_zero("temperature", temperature)
    return rows, is_positive, temperature, weights_of_scores(sample_weight, rows)


def groups(ids_given: Any, is_positive: Any) -> tuple[Tensor, Tensor]:
    """What a sampler of groups is made of: [N] int64 and [N] bool, on the CPU."""
    ids = _with_values("group", _tensor("group", ids_given))
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"group must be integers, got {ids.dtype}")
    if ids.dim() != 1 or len(ids) == 0:
        raise ValueError(f"group must be [N] with N > 0, got {list(ids.shape)}")
    if is_positive is None:
        return ids.cpu().long(), torch.zeros(len(ids), dtype=torch.bool, device="cpu")
    positive = _fits("is_positive", _bool(is_positive), ("group", ids), ids.shape)
    return ids.cpu().long(), positive.cpu()


def place(num_replicas: Any, rank: Any) -> tuple[int, int] | None:
    """How many processes there are and which one this is, where that was said."""
    if num_replicas is None and rank is None:
        return None
    if num_replicas is None or rank is None:
        raise ValueError(
            f"num_replicas and rank must be given together, got {num_replicas!r} and {rank!r}"
        )
    if integer("rank", rank, minimum=0) >= integer("num_replicas", num_replicas, minimum=1):
        raise ValueError(f"rank must be in 0..{num_replicas - 1} (num_replicas), got {rank}")
    return int(num_replicas), int(rank)


def num_batches(num_groups: int, in_step: int, drop_last: bool) -> int:
    """Of a process, where all processes together take `in_step` groups in a step; at least one."""
    if drop_last and num_groups < in_step:
        raise ValueError(
            f"group must hold >= {in_step} groups, groups_per_batch for every process, or "
            f"drop_last=True leaves no batch; got {num_groups}"
        )
    return num_groups // in_step if drop_last else -(-num_groups // in_step)


def num_consumed(value: Any, num_batches: int) -> int:
    """A number of batches of one epoch."""
    if integer("num_consumed", value, minimum=0) > num_batches:
        raise ValueError(
            f"num_consumed must be in 0..{num_batches}, batches of one epoch, got {value}"
        )
    return int(value)


def saved_sampler(state_dict: Mapping[str, int], **own: int) -> None:
    """The state of a sampler with the same batches."""
    for name, value in own.items():
        if state_dict[name] != value:
            raise ValueError(
                f"state_dict must be of a sampler with {name}={value}, as this one, got "
                f"{name}={state_dict[name]}: give it the same arguments on as many processes"
            )


def _fits(name: str, given: Any, beside: tuple[str, Tensor], *shapes: torch.Size) -> Tensor:
    """A real tensor of one of the shapes, on the device of the argument `beside` it."""
    value = _tensor(name, given)
    other, tensor = beside
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    # Of as many dimensions: else a compiler would tell the lengths of different ones apart.
    if value.shape not in [shape for shape in shapes if len(shape) == value.dim()]:
        expected = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes))
        raise ValueError(
            f"{name} must be {expected} to fit {other} {list(tensor.shape)}, got "
            f"{list(value.shape)}{_fixes.of_shape(name, value, shapes)}"
        )
    return value if value.dim() == 0 else _on_device(name, value, *beside)


def _on_device(name: str, value: Tensor, other: str, beside: Tensor) -> Tensor:
    if value.device != beside.device:
        raise ValueError(
            f"{name} must be on the device of {other} ({beside.device}), got {value.device}"
            f"; use {name}.to({other}.device)"
        )
    return value


def _bool(given: Any) -> Tensor:
    value = _tensor("is_positive", given)
    if value.dtype != torch.bool:
        raise TypeError(f"is_positive must be bool, got {value.dtype}; use targets == 1")
    return value


def _floating(name: str, given: Any) -> Tensor:
    value = _tensor(name, given)
    if not value.is_floating_point():
        fix = _fixes.of_dtype(name, value)
        raise TypeError(f"{name} must be floating point, got {value.dtype}{fix}")
    return value


def _tensor(name: str, given: Any) -> Tensor:
    """A dense tensor that can be calculated with: float8 becomes float32."""
    if not isinstance(given, Tensor):
        fix = _fixes.of_type(name, given)
        raise TypeError(f"{name} must be a torch.Tensor, got {_kind(given)}{fix}")
    value: Tensor = plain(given)
    if not torch.compiler.is_compiling():  # older compilers do not know is_nested
        is_dense = value.layout == torch.strided and not (value.is_nested or value.is_quantized)
        if not is_dense or _kind(value) == "DTensor":
            raise TypeError(f"{name} must be a dense tensor, got {_fixes.of_layout(name, value)}")
    is_float8 = value.dtype.itemsize == 1 and value.is_floating_point()
    return value.float() if is_float8 else value


def plain(value: Any) -> Any:
    """A tensor of a subclass that acts by `__torch_function__` (MONAI's, fastai's) as a plain one.

    Those that act by `__torch_dispatch__`, such as compilers' own, are left alone.
    """
    kind = type(value)
    if (
        torch.compiler.is_compiling()
        or kind in (Tensor, Parameter)
        or not isinstance(value, Tensor)
    ):
        return value
    is_passive = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    return value.as_subclass(Tensor) if is_passive else value


def _kind(value: Any) -> str:
    return type(value).__name__
