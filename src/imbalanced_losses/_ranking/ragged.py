"""Problems of unequal length, without padding to the longest: a few rectangles of similar ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from imbalanced_losses._ranking.backends import Backend
from imbalanced_losses._ranking.plan import Rows
from imbalanced_losses._ranking.problems import Problems
from imbalanced_losses._ranking.ranked_sum import Asked, Share
from imbalanced_losses._ranking.ranks import Ranks

# The longest problem of a rectangle beside its shortest: at most so much of it is padding.
_EVEN = 1.25


class RaggedProblems(Problems):
    """C ranking problems whose rows lie side by side: what a metric is a function of.

    Problems of similar length form a rectangle, in which rows of weight 0 fill the shorter ones.
    There is no loop over problems, only one over rectangles, whose number grows with the logarithm
    of the longest problem beside the shortest.

    Args:
        scores: [S] floating, the rows of the first problem first.
        temperature: τ > 0, a float or [C].
        is_positive: [S] bool.
        weights: [S] ≥ 0; None = 1 everywhere.
        value: [S] ≥ 0, of positives; None = 1 everywhere.
        is_graded, draws: as for `Problems`.
        lengths: [C] int64, how many rows each problem has.
    """

    def __init__(
        self,
        scores: Tensor,
        temperature: float | Tensor,
        is_positive: Tensor,
        weights: Tensor | None = None,
        *,
        lengths: Tensor,
        value: Tensor | None = None,
        is_graded: bool = False,
        draws: Tensor | None = None,
        backend: Backend = "auto",
    ) -> None:
        self.scores, self.is_positive, self.given_weights = scores, is_positive, weights
        self.given_value, self.is_graded, self.draws = value, is_graded, draws
        self.temperature, self.backend = temperature, backend
        self._parts = [
            _Part(places, index, self._rectangle(places, index, is_real))
            for places, index, is_real in _rectangles(lengths.to(scores.device))
        ]
        order = torch.cat([part.places for part in self._parts])
        self._order = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )

    def _rectangle(self, places: Tensor, index: Tensor, is_real: Tensor | None) -> Problems:
        weights = None if self.given_weights is None else self.given_weights[index]
        if is_real is not None:
            ones = torch.ones((), dtype=self.scores.dtype, device=self.scores.device)
            weights = torch.where(is_real, ones if weights is None else weights, 0)
        tau = self.temperature
        if isinstance(tau, Tensor) and tau.dim() > 0:
            tau = tau[places]
        return Problems(
            self.scores[index],
            tau,
            self.is_positive[index],
            weights,
            value=None if self.given_value is None else self.given_value[index],
            is_graded=self.is_graded,
            draws=None if self.draws is None else self.draws[index],
            backend=self.backend,
        )

    @property
    def valid(self) -> Tensor:
        return self._of_parts(lambda part: part.valid)

    @property
    def unit(self) -> Tensor:
        return self._of_parts(lambda part: part.unit)

    def mass(self, rows: Rows, *, by_value: bool = False) -> Tensor:
        """The summed weights [C] of rows; 1 where a problem is not valid."""
        return self._of_parts(lambda part: part.mass(rows, by_value=by_value))

    def mean_weight(self, rows: Rows) -> Tensor:
        """The mean weight [C] of rows; 1 where a problem is not valid."""
        return self._of_parts(lambda part: part.mean_weight(rows))

    def _of_parts(self, what: Callable[[Problems], Tensor]) -> Tensor:
        """A value [C] from those of the rectangles."""
        return torch.cat([what(part.problems) for part in self._parts])[self._order]

    def _ranked(self, asked: Asked) -> Tensor:
        totals = [part.problems._ranked(_seen_by(asked, part)) for part in self._parts]
        return torch.cat(totals)[self._order]


@dataclass
class _Part:
    """Some of the problems as a rectangle."""

    places: Tensor  # [k], which of the problems
    index: Tensor  # [k, m], where its rows are
    problems: Problems


def _seen_by(asked: Asked, part: _Part) -> Asked:
    """The same of a part: constants of all problems, or of all rows, are those of its own."""
    worth, slopes, share = asked.worth, asked.slopes, asked.share
    return Asked(
        lambda ranks: worth(_RanksOfPart(ranks, part)),
        asked.queries,
        asked.among,
        slopes and (lambda ranks: slopes(_RanksOfPart(ranks, part))),
        asked.is_mean,
        asked.by_value,
        share
        and Share(lambda ranks: share.of(_RanksOfPart(ranks, part)), share.least[part.places]),
    )


class _RanksOfPart(Ranks):
    """The ranks of a part."""

    def __init__(self, ranks: Ranks, part: _Part) -> None:
        self._inner, self._part = ranks, part

    def among(self, rows: Rows) -> Tensor:
        return self._inner.among(rows)

    @property
    def weights(self) -> Tensor | float:
        return self._inner.weights

    def of_problem(self, values: Tensor) -> Tensor:
        return self._inner.of_problem(values[self._part.places])

    def of_row(self, values: Tensor) -> Tensor:
        return self._inner.of_row(values[self._part.index])


def _rectangles(lengths: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Problems [k] of similar length, where their rows are [k, m], and which are no padding [k, m].

    None where there is no padding. A problem's last row stands in where it has too few.
    """
    starts = lengths.cumsum(0) - lengths
    sizes, order = lengths.sort(descending=True, stable=True)
    on_host = sizes.tolist()
    first = 0
    while first < len(on_host):
        longest, last = on_host[first], first + 1
        while last < len(on_host) and on_host[last] * _EVEN >= longest:
            last += 1
        places, size = order[first:last], sizes[first:last, None]
        number = torch.arange(longest, device=lengths.device)
        is_even = on_host[last - 1] == longest
        index = starts[places, None] + torch.minimum(number, size - 1)
        yield places, index, None if is_even else number < size
        first = last
