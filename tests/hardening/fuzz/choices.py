"""Bytes as a sequence of choices, and tensors made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Values at and beyond the edges of every dtype, among ordinary ones.
SPECIAL = (
    math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, -1e-45, 5e-324, 1e-38, 1e-30, -1e-30, 6e4,
    -7e4, 1e19, -1e19, 3e38, -3.4e38, 1.7e308, -1e300, 16777217.0, 1.0, -1.0,
)  # fmt: skip
LABELS = (0, 1, 2, -100, -1, 3, 255, 2**31, -(2**63))


class Choices:
    """Bytes, consumed from the front; zeros when they have run out."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        position = self.position
        self.position = position + 1
        return self.data[position] if position < len(self.data) else 0

    def below(self, bound: int) -> int:
        return self.byte() % bound

    def once_in(self, count: int) -> bool:
        """True for few bytes, and never when they have run out."""
        return self.byte() % count == count - 1

    def of(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]

    def number(self, is_wild: bool) -> float:
        """A score: a few ties, or with `is_wild` anything that a float can be."""
        byte = self.byte()
        if is_wild and byte >= 128:
            return SPECIAL[byte % len(SPECIAL)]
        return (byte % 64 - 32) / 8


class Arguments(NamedTuple):
    """The arguments of one forward pass."""

    logits: Tensor
    targets: Tensor
    sample_weight: Tensor | None


def numbers(choices: Choices, count: int, is_wild: bool) -> list[float]:
    return [choices.number(is_wild) for _ in range(count)]


def arguments(choices: Choices, num_classes: int, multilabel: bool, ignored: int) -> Arguments:
    """A batch: mostly a good one, of up to ten rows."""
    num_rows = choices.below(11)
    dtype = choices.of(FLOATS)
    is_wild = choices.once_in(3)
    scores = numbers(choices, num_rows * num_classes, is_wild)
    logits = torch.tensor(scores, dtype=torch.float64).to(dtype).reshape(num_rows, num_classes)
    num_labels = 2 if multilabel or num_classes == 1 else num_classes
    shape = (num_rows, num_classes) if multilabel else (num_rows,)
    labels = []
    for _ in range(math.prod(shape)):
        byte = choices.byte()
        labels.append(ignored if byte >= 224 else byte % num_labels)
    targets = torch.tensor(labels, dtype=torch.int64).reshape(shape)
    weight = None
    if choices.once_in(3):
        weight = torch.tensor(
            [abs(number) for number in numbers(choices, num_rows, choices.once_in(8))],
            dtype=torch.float64,
        ).to(choices.of(FLOATS))
    return Arguments(logits, targets, weight)


def spoiled(choices: Choices, good: Arguments) -> Arguments:
    """The same batch with one thing about it changed, which may make it a bad one."""
    logits, targets, weight = good
    kind = choices.below(12)
    if kind == 0:
        logits = logits.reshape(-1)
    elif kind == 1:
        logits = logits[None]
    elif kind == 2:
        logits = logits.to(choices.of((torch.int64, torch.bool, torch.complex64, torch.uint8)))
    elif kind == 3:
        targets = targets[1:]
    elif kind == 4:
        targets = targets.unsqueeze(choices.below(2))
    elif kind == 5:
        dtypes = (*FLOATS, torch.int8, torch.uint8, torch.bool, torch.int16, torch.complex64)
        targets = targets.to(choices.of(dtypes))
    elif kind == 6 and targets.numel() > 0:
        targets = targets.clone()
        targets.view(-1)[choices.below(targets.numel())] = choices.of(LABELS)
    elif kind == 7:
        targets = targets.double() + choices.of((0.5, math.nan, math.inf, 1e30, -0.0))
    elif kind == 8:
        weight = torch.tensor(numbers(choices, choices.below(12), True))
    elif kind == 9:
        weight = torch.ones(
            len(logits), dtype=choices.of((torch.int64, torch.bool, torch.complex64))
        )
    elif kind == 10:
        logits, targets = logits.T.contiguous().T, targets.flip(0)
    elif kind == 11:
        logits = logits.expand(3, *logits.shape)[choices.below(3)] * choices.of(SPECIAL)
    return Arguments(logits, targets, weight)
