"""Checkpoints of one loss, spoiled, loaded into another."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imbalanced_losses import CrossEntropy, MixedLoss, SmoothAPLoss
from tests.hardening.fuzz.choices import LABELS, SPECIAL, Choices, arguments, numbers
from tests.hardening.fuzz.watch import assert_sound, assert_unchanged, state_of
from tests.helpers.rows import saved_by_0_9

# What torch says of keys, or what this package says of a value, which names the key.
MESSAGE = re.compile(
    r"(Missing key|Unexpected key|logits|targets|weights|cursor|is_weighted|temperature|num_steps|"
    r"num_calls|has_switched|temperature_scale|_queue|_extra_state)"
)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int32,
    torch.uint8, torch.int8, torch.bool, torch.complex64,
)  # fmt: skip
OLD_NAMES = {
    "_queue.logits": "_queue._q_logits",
    "_queue.targets": "_queue._q_targets",
    "_queue.weights": "_queue._q_weight",
    "_queue.cursor": "_queue._q_ptr",
}
NOT_TENSORS: tuple[Any, ...] = (None, 3, -1, 0.5, True, "0.1", [1, 2], {"a": 1}, math.nan, 10**30)


def one_run(data: bytes) -> None:
    choices = Choices(data)
    config = config_of(choices)
    saved = new_loss(config, choices)
    other = config if choices.below(4) else config_of(choices)
    kind = choices.below(8)
    loaded = new_loss(other, choices)
    state = choices.of((saved.state_dict, lambda: saved_by_0_9(saved)))()
    num_changes = choices.below(4)
    is_same = num_changes == 0 and other == config
    for _ in range(num_changes):
        state = CHANGES[choices.below(len(CHANGES))](choices, state)
    strict, assign = choices.below(4) > 0, choices.once_in(3)
    module: nn.Module = loaded
    if kind == 6:  # the loss of a bigger model, which torch loads part by part
        module = nn.ModuleDict({"loss": loaded})
        state = {f"loss.{name}": value for name, value in state.items()}
    load(module, state, strict, assign)
    if is_same:
        assert_same_checkpoint(loaded, saved)
    check_usable(loaded)


def assert_same_checkpoint(loaded: nn.Module, saved: nn.Module) -> None:
    """The same numbers, in whichever dtype."""
    expected = saved_by_0_9(saved)
    for name, value in saved_by_0_9(loaded).items():
        assert torch.equal(value.double(), expected[name].double()), f"{name} was not taken"


def config_of(choices: Choices) -> dict[str, Any]:
    return {
        "num_classes": choices.of((1, 1, 2, 3)),
        "queue_size": choices.of((0, 1, 4, 7)),
        "multilabel": choices.once_in(3),
        "ignore_index": choices.of((-100, -100, -100, -1)),
        "max_pool_size": choices.of((None, None, 4)),
        "is_mixed": choices.once_in(4),
    }


def new_loss(config: dict[str, Any], choices: Choices) -> nn.Module:
    """A loss that has made up to two steps."""
    config = dict(config)
    is_mixed = config.pop("is_mixed")
    num_classes, multilabel, ignored = (
        config[name] for name in ("num_classes", "multilabel", "ignore_index")
    )
    loss_fn: nn.Module = SmoothAPLoss(temperature=0.3, **config)
    if is_mixed:
        partner = CrossEntropy(num_classes, ignore_index=ignored, multilabel=multilabel)
        loss_fn = MixedLoss(
            partner, loss_fn, main_weight=0.5, warmup_steps=1, temperature=(0.5, 0.1, 3)
        )  # type: ignore[arg-type]
    for _ in range(choices.below(3)):
        logits, targets, weight = arguments(choices, num_classes, multilabel, ignored)
        if weight is not None and not bool(weight.float().isfinite().all()):
            weight = None
        loss_fn(logits, targets, sample_weight=weight)
    return loss_fn


State = dict[str, Any]


def without_a_key(choices: Choices, state: State) -> State:
    state.pop(choices.of(sorted(state)) if state else "", None)
    return state


def with_another_key(choices: Choices, state: State) -> State:
    names = ("extra", "_queue.extra", "_extra_state", "_queue", "", "main_loss.", "_queue._q_ptr")
    return {**state, choices.of(names): torch.zeros(choices.below(3))}


def with_no_tensor(choices: Choices, state: State) -> State:
    return state and {**state, choices.of(sorted(state)): choices.of(NOT_TENSORS)}


def with_predecessor_names(choices: Choices, state: State) -> State:
    return {OLD_NAMES.get(name, name): value for name, value in state.items()}


def with_swapped_keys(choices: Choices, state: State) -> State:
    if not state:
        return state
    one, other = choices.of(sorted(state)), choices.of(sorted(state))
    return {**state, one: state[other], other: state[one]}


def with_a_spoiled_tensor(choices: Choices, state: State) -> State:
    """Another dtype, shape, value or kind of tensor under a key."""
    if not state:
        return state
    name = choices.of(sorted(state))
    value = state[name]
    if isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided:
        value = SPOILERS[choices.below(len(SPOILERS))](choices, value)
    return {**state, name: value}


def with_a_number(choices: Choices, value: Tensor) -> Tensor:
    if value.numel() == 0:
        return value
    value = value.clone().contiguous()
    flat, place = value.view(-1), choices.below(value.numel())
    if value.is_floating_point():
        flat[place] = torch.tensor(choices.of(SPECIAL), dtype=torch.float64).to(value.dtype)
    elif value.dtype == torch.int64:
        flat[place] = choices.of(LABELS)
    return value


def with_flipped_bits(choices: Choices, value: Tensor) -> Tensor:
    if value.numel() == 0:
        return value
    value = value.clone().contiguous()
    raw = value.reshape(-1).view(torch.uint8)
    for _ in range(1 + choices.below(3)):
        raw[(256 * choices.byte() + choices.byte()) % len(raw)] ^= 1 << choices.below(8)
    return value


def with_its_mean(choices: Choices, value: Tensor) -> Tensor:
    """With itself the other way round."""
    if value.is_complex():
        return value
    wide = value.double()
    mean = (wide + wide.flatten().flip(0).reshape(value.shape)) / 2
    return mean.to(choices.of((torch.float64, torch.float16, torch.uint8)))


SPOILERS: tuple[Callable[[Choices, Tensor], Tensor], ...] = (
    with_a_number,
    with_a_number,
    with_a_number,
    lambda choices, value: value.to(choices.of(DTYPES)),
    lambda choices, value: value.reshape(-1),
    lambda choices, value: value.unsqueeze(choices.below(2) if value.dim() else 0),
    lambda choices, value: value[1:] if value.dim() else value,
    with_flipped_bits,
    with_its_mean,
    lambda choices, value: torch.tensor(numbers(choices, choices.below(9), True)),
    lambda choices, value: value.to("meta"),
    lambda choices, value: value.to_sparse(),
    lambda choices, value: value.detach().float().requires_grad_() * 1,
    lambda choices, value: value.T if value.dim() == 2 else value,
)
CHANGES: tuple[Callable[[Choices, State], State], ...] = (
    with_a_spoiled_tensor,
    with_a_spoiled_tensor,
    with_a_spoiled_tensor,
    with_a_spoiled_tensor,
    without_a_key,
    with_another_key,
    with_no_tensor,
    with_predecessor_names,
    with_swapped_keys,
)


def load(module: nn.Module, state: State, strict: bool, assign: bool) -> None:
    """Load, or refuse with a message and without a change; the caller's dictionary stays."""
    before, values, expected = state_of(module), dict(state), copy.deepcopy(module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            module.load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            text = str(error)
            if not (text.startswith("Error(s) in loading state_dict") and MESSAGE.search(text)):
                raise AssertionError("an error that says nothing") from error
            is_about_values = "Missing key" not in text and "Unexpected key" not in text
            is_one = not isinstance(module, nn.ModuleDict)
            if is_one or (is_about_values and isinstance(module["loss"], SmoothAPLoss)):
                assert_unchanged(module, before)
        else:
            for warning in said:
                assert_emptied(module, expected, str(warning.message))
    assert list(state) == list(values), "the caller's dictionary has changed"
    assert all(state[name] is value for name, value in values.items())


def assert_emptied(module: nn.Module, before: nn.Module, text: str) -> None:
    """Of the loss whose key a warning names the queue is empty, and nothing else has changed."""
    assert "has changed since it was saved" in text, text
    path, _, _ = text.partition("_extra_state: ")
    found, expected = (it.get_submodule(path.rstrip(".")) for it in (module, before))
    if isinstance(expected, SmoothAPLoss):
        expected.reset_queue()
        assert state_of(found) == state_of(expected), "a changed state was taken"
    else:
        assert found._num_steps == expected._num_steps, "a changed schedule was taken"


def check_usable(loss_fn: nn.Module) -> None:
    """Whatever was loaded: a sound queue, another checkpoint, and a finite next step."""
    ranking = loss_fn.main_loss if isinstance(loss_fn, MixedLoss) else loss_fn
    assert isinstance(ranking, SmoothAPLoss)
    assert_sound(ranking)
    loss_fn.load_state_dict(loss_fn.state_dict())
    num_classes = ranking.num_classes
    logits = torch.linspace(-1, 1, 4 * num_classes).reshape(4, num_classes).requires_grad_()
    targets = torch.tensor([0, 1, 0, 1])
    if ranking.multilabel:
        targets = targets[:, None].expand(4, num_classes)
    loss = loss_fn(logits, targets)
    loss.backward()
    assert bool(loss.isfinite()), f"loss {loss} after loading"
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all()), f"gradient {logits.grad} after loading"
    assert_sound(ranking)
