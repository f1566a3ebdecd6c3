"""What `help` shows: complete, in the order of the house, and no wider than a terminal."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from imbalanced_losses import (
    CrossEntropy,
    Diagnostics,
    GroupBatchSampler,
    MixedLoss,
    NDCGLoss,
    PartialAUCLoss,
    RecallAtFPRLoss,
    RecallAtKLoss,
    SmoothAPLoss,
    accumulation,
    distributed,
    functional,
)
from imbalanced_losses.extending import RankingOptions

SIBLINGS = {one.__name__: one for one in (NDCGLoss, PartialAUCLoss, RecallAtFPRLoss, RecallAtKLoss)}
CLASSES = {
    "SmoothAPLoss": SmoothAPLoss,
    **SIBLINGS,
    "MixedLoss": MixedLoss,
    "CrossEntropy": CrossEntropy,
    "Diagnostics": Diagnostics,
    "GroupBatchSampler": GroupBatchSampler,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{module.__name__.rpartition('.')[2]}.{name}": getattr(module, name)
    for module in (accumulation, distributed, functional)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}
METHODS = {
    f"{owner}.{name}": method
    for owner, class_ in CLASSES.items()
    for name, method in inspect.getmembers(class_, inspect.isfunction)
    if not name.startswith("_") and method.__module__.startswith("imbalanced_losses")
}
LOSSES = {
    "SmoothAPLoss": lambda: SmoothAPLoss(2),
    "NDCGLoss": NDCGLoss,
    "PartialAUCLoss": lambda: PartialAUCLoss(2, 0.1),
    "RecallAtFPRLoss": lambda: RecallAtFPRLoss(2, 0.1),
    "RecallAtKLoss": lambda: RecallAtKLoss(2, 0.1),
    "MixedLoss": lambda: MixedLoss(CrossEntropy(2), SmoothAPLoss(2), main_weight=0.5),
    "CrossEntropy": lambda: CrossEntropy(2),
}
# In this order; which of them there are depends on what is described.
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example", "Note")


def each(of: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("thing", of.values(), ids=of.keys())


def sections(thing: Any) -> dict[str, str]:
    """The text below each heading of a docstring; before the first, "Summary"."""
    text = inspect.getdoc(thing)
    assert text is not None
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    names = ["Summary", *parts[1::2]]
    return dict(zip(names, parts[::2], strict=True))


def described(text: str) -> set[str]:
    """The names with an entry in a section; "a, b: …" describes both."""
    entries = re.findall(r"^    (\w+(?:, \w+)*): ", text, re.MULTILINE)
    return {name for entry in entries for name in entry.split(", ")}


def parameters(thing: Any) -> set[str]:
    return set(inspect.signature(thing).parameters) - {"self"}


@each(CLASSES | FUNCTIONS | METHODS)
def test_every_parameter_is_described_and_no_other(thing: Any) -> None:
    names = parameters(thing)
    if thing is Diagnostics:
        assert described(sections(thing)["Attributes"]) == names
    elif thing in SIBLINGS.values():
        own = names - RankingOptions.__annotations__.keys()
        assert described(sections(thing)["Args"]) == own | {"options"}
    elif names:
        assert described(sections(thing)["Args"]) == names


@each(
    {name: thing for name, thing in CLASSES.items() if thing is not Diagnostics}
    | FUNCTIONS
    | {"SmoothAPLoss.diagnose": SmoothAPLoss.diagnose}
)
def test_there_is_an_example(thing: Any) -> None:
    assert ">>> " in sections(thing)["Example"]


@each(LOSSES)
def test_every_public_attribute_is_described(thing: Any) -> None:
    """Those of an instance and those of its class, but for what nn.Module has."""
    loss_fn = thing()
    names = {*vars(loss_fn), *loss_fn._modules, *loss_fn._buffers} - set(vars(torch.nn.Module()))
    of_class = {name for class_ in type(loss_fn).__mro__[:-2] for name in vars(class_)}
    names |= of_class - set(dir(torch.nn.Module))
    found = sections(type(loss_fn))
    entries = described(found["Args"]) | described(found.get("Attributes", ""))
    if type(loss_fn) in SIBLINGS.values():
        of_ap = sections(SmoothAPLoss)
        entries |= described(of_ap["Args"]) | described(of_ap["Attributes"])
    for name in sorted(names):
        if name.startswith("_") or name in entries:
            continue
        own = inspect.getattr_static(type(loss_fn), name)
        assert isinstance(own, property) or inspect.isfunction(own), name
        assert own.__doc__, name


@each(CLASSES | METHODS | {n: f for n, f in FUNCTIONS.items() if not n.startswith("functional")})
def test_it_fits_80_columns(thing: Any) -> None:
    margin = 4 if inspect.isclass(thing) or "." not in thing.__qualname__ else 8
    lines = (inspect.getdoc(thing) or "").splitlines()
    assert [line for line in lines if margin + len(line) > 80] == []


# --- repr ----------------------------------------------------------------------------------------

NAMES = {"SmoothAPLoss": SmoothAPLoss, "CrossEntropy": CrossEntropy, "tensor": torch.tensor}


@pytest.mark.parametrize(
    "loss_fn",
    [
        SmoothAPLoss(1),
        SmoothAPLoss(
            3, 8, 0.1, "sum", -1, True, False, 64, multilabel=True, temperature_unit="spread",
            queue_follows_shift=True, grad_reduce="sum", target_prior=(0.1, 0.2, 0.3),
        ),
        SmoothAPLoss(1, gather="sums"),
        CrossEntropy(1),
        CrossEntropy(2, torch.tensor([0.5, 2.0]), -1, multilabel=True, gamma=2.0),
    ],
    ids=["plain", "every argument", "sums", "cross-entropy", "focal"],
)  # fmt: skip
def test_repr_is_the_call_that_constructs_it(loss_fn: Any) -> None:
    again = eval(repr(loss_fn), dict(NAMES))
    assert repr(again) == repr(loss_fn)
    for name in parameters(type(loss_fn)):
        one, other = getattr(loss_fn, name), getattr(again, name)
        assert one.equal(other) if isinstance(one, torch.Tensor) else one == other


def squared(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (logits[:, 0] - targets).square().mean()


def test_repr_of_a_mix() -> None:
    mix = MixedLoss(squared, SmoothAPLoss(1), main_weight=0.9, warmup_steps=3)
    first, second, third, last = repr(mix).splitlines()
    assert (first, last) == ("MixedLoss(", ")")
    assert second == "  auxiliary_loss=squared, main_weight=0.9, warmup_steps=3"
    assert third == f"  (main_loss): {mix.main_loss!r}"
