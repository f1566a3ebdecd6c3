"""What every ranking loss shares: the constructor, the row pipeline, the state."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from imbalanced_losses import _checks
from imbalanced_losses._checkpoint import Saved, in_current_form, pack_ranking, unpack_ranking
from imbalanced_losses._engine import ALONE, Exchange
from imbalanced_losses._gather import Gather, GradReduce, Group, ProcessGroup, gather
from imbalanced_losses._module import StatefulLoss, arguments_of
from imbalanced_losses._pool import Pool, Problems
from imbalanced_losses._queue import MemoryQueue
from imbalanced_losses._reduce import Reduction, mark_invalid, reduce_valid
from imbalanced_losses._subsample import quota_indices, strata_of
from imbalanced_losses._tracing import is_in_backward, is_on_host, is_traced
from imbalanced_losses._typing import typed_as
from imbalanced_losses.functional import _prior_weights_of_pool, _score_spread_of_pool

TemperatureUnit = Literal["score", "spread"]
# What has to be the same in every process that ranks rows together.
_COMPARED = (
    *("gather", "grad_reduce", "reduction", "temperature_unit", "queue_follows_shift"),
    *("ignore_index", "queue_size", "max_pool_size", "temperature", "training"),
)


class PerClass(NamedTuple):
    """What a ranking loss makes of C problems."""

    losses: Tensor  # [C], any finite value where not valid
    valid: Tensor  # [C] bool


class _QueuedRankingLoss(StatefulLoss):
    """Base of the ranking losses: rows in, one loss out.

    One forward pass is: check → gather over ranks → extend by the queue's rows → drop ignored rows
    → cap → per-class losses → push the live batch → reduce. A subclass implements `_per_class`.
    """

    _queue: MemoryQueue

    #: Compare the values of targets and sample_weight with what is allowed; reads one bool back
    #: from the device in each forward pass. Shapes and dtypes are checked in any case.
    check_values: bool = True
    #: Selects the stream of draws of `max_pool_size`, together with the number of draws made.
    sampling_seed: int = 0

    def __init__(
        self,
        num_classes: int,
        queue_size: int = 1024,
        temperature: float = 0.01,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        update_queue_in_eval: bool = False,
        gather_distributed: bool | None = None,
        max_pool_size: int | None = None,
        *,
        multilabel: bool = False,
        temperature_unit: TemperatureUnit = "score",
        queue_follows_shift: bool = False,
        process_group: ProcessGroup | None = None,
        grad_reduce: GradReduce = "mean",
        gather: Gather = "rows",
        target_prior: float | Sequence[float] | Tensor | None = None,
    ) -> None:
        """See the class for the arguments."""
        super().__init__()
        self.num_classes = _checks.integer("num_classes", num_classes, minimum=1)
        self.queue_size = _checks.integer("queue_size", queue_size, minimum=0)
        self._temperature = _checks.number_above_zero("temperature", temperature)
        self.reduction: Reduction = _checks.choice("reduction", reduction, _checks.REDUCTIONS)
        self.multilabel = _checks.boolean("multilabel", multilabel)
        self.ignore_index = _checks.ignore_index(ignore_index, self.multilabel or num_classes == 1)
        self.update_queue_in_eval = _checks.boolean("update_queue_in_eval", update_queue_in_eval)
        self.gather_distributed = gather_distributed
        if gather_distributed is not None:
            _checks.boolean("gather_distributed", gather_distributed)
        self.max_pool_size = max_pool_size
        if max_pool_size is not None:
            self.max_pool_size = _checks.integer("max_pool_size", max_pool_size, minimum=2)
        self.temperature_unit: TemperatureUnit = _checks.choice(
            "temperature_unit", temperature_unit, _checks.TEMPERATURE_UNITS
        )
        self.queue_follows_shift = _checks.boolean("queue_follows_shift", queue_follows_shift)
        self._group = Group(process_group)
        self.grad_reduce: GradReduce = _checks.choice(
            "grad_reduce", grad_reduce, _checks.GRAD_REDUCES
        )
        self.gather: Gather = _checks.choice("gather", gather, _checks.GATHERS)
        if self.gather == "sums" and self.queue_follows_shift:
            raise ValueError(
                'queue_follows_shift must be False with gather="sums": the mean of all live rows '
                'would have to be differentiated over ranks; use gather="rows" or a '
                "global batch that needs no queue"
            )
        self.target_prior: tuple[float, ...] | None = None
        if target_prior is not None:
            self.target_prior = _checks.target_prior(target_prior, num_classes)
        self._queue = MemoryQueue(
            self.queue_size, self.num_classes, self.ignore_index, self.multilabel
        )
        self._place_numbers()
        self._settings = arguments_of(_QueuedRankingLoss)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that rank their rows together; None for all."""
        return self._group.handle

    @property
    def temperature(self) -> float:
        """τ, in units of `temperature_unit`; can be assigned between steps."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        number = _checks.number_above_zero("temperature", value)
        self._temperature, self._temperature_now = number, self._as_tensor(number)

    def reset_queue(self) -> None:
        """Empty the queue: the next batch is ranked by itself."""
        self._queue.reset()

    @overload
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: Literal[False] = False,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: Literal[True],
        *,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: bool,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: bool = False,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The loss of a batch, ranked together with the rows in the queue.

        Args:
            logits: [N, C] floating; float16 and bfloat16 are computed in
                float32.
            targets: [N] integers (any dtype, bool, or floats with integral
                values) in {0..C-1}, {0, 1} for one class, or ignore_index;
                [N, 1] is taken for one class. With multilabel=True [N, C] in
                {0, 1, ignore_index}.
            return_per_class: also return the loss of each class.
            sample_weight: [N], finite and ≥ 0: how many rows each row stands
                for, in the sense of scikit-learn's `average_precision_score`. 0
                is the same as leaving the row out. With multilabel=True also
                [N, C], a weight for each label. Without gradient.

        Returns:
            loss: [] float32 (float64 for float64 logits), [C] for
                reduction="none". Exactly 0, attached to the graph, when no
                class is valid.
            per_class: [C], NaN at classes without a positive or without a
                negative in the pool. Only with return_per_class=True.
            valid: [C] bool, False at those classes. Only with
                return_per_class=True.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit. Nothing has
                changed then.
        """
        if self._updates_queue():
            self._require_step()
        batch, exchange = self._batch(logits, targets, sample_weight, return_per_class)
        self._follow(batch.logits.device)
        pool = self._capped(self._present(self._extended(batch)))
        problems = self._problems(pool, exchange)
        losses, valid = self._per_class(problems)
        self._remember(batch)
        loss = reduce_valid(losses, valid, self.reduction)
        return (loss, mark_invalid(losses, valid), valid) if return_per_class else loss

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def _per_class(self, problems: Problems) -> PerClass:
        """The loss [C] of each ranking problem, and where it means something [C]."""
        raise NotImplementedError(f"{type(self).__name__} must implement _per_class")

    def _problems(self, pool: Pool, exchange: Exchange) -> Problems:
        """The rows as ranking problems, positives as common as in deployment if that is known."""
        problems = pool.problems(self.ignore_index)._replace(exchange=exchange)
        if self._prior is None:
            return problems
        scores, is_positive, weights, *_ = problems
        if weights is None:
            weights = scores.new_ones(()).expand(scores.shape)
        weights = _prior_weights_of_pool(
            is_positive, self._prior.to(scores.device), weights, exchange
        )
        return problems._replace(weights=weights)

    def _effective_temperature(self, problems: Problems) -> float | Tensor:
        """τ in units of the scores: one for all problems, or [C]."""
        temperature = self._temperature_now if is_traced(problems.scores) else self.temperature
        if self.temperature_unit == "score":
            return temperature
        spread = _score_spread_of_pool(problems.scores, problems.weights, problems.exchange)
        return temperature * spread

    def _spread_of_batch(
        self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None
    ) -> float:
        """Standard deviation of the scores, the mean over classes; over ranks as in forward."""
        batch, exchange = self._batch(logits, targets, sample_weight)
        self._follow(batch.logits.device)
        problems = self._problems(batch, exchange)
        spread = _score_spread_of_pool(problems.scores.detach(), problems.weights, exchange)
        return float(spread.mean())

    def _batch(
        self,
        logits: Tensor,
        targets: Tensor,
        sample_weight: Tensor | None,
        return_per_class: bool = False,
        error: Exception | None = None,
    ) -> tuple[Pool, Exchange]:
        """The arguments of forward as rows, and the ranks that hold others to rank them with.

        Where ranks gather rows, they are those of all ranks. An error from elsewhere is raised if
        the arguments have none of their own.
        """
        if not self._gathers():
            _checks.boolean("return_per_class", return_per_class)
            batch = self._checked(logits, targets, sample_weight)
            if error is not None:
                raise error
            return batch, ALONE
        settings: dict[str, float | str] = {
            **{name: getattr(self, name) or 0 for name in _COMPARED},
            "target_prior": _as_number(self.target_prior),
            "steps made": self._queue.num_steps,
        }
        sent: Pool | Exception
        try:
            _checks.boolean("return_per_class", return_per_class)
            sent = self._checked(logits, targets, sample_weight)
            sent = sent if error is None else error
        except (TypeError, ValueError) as own_error:
            sent = own_error  # the other ranks wait to hear of it
        device = getattr(logits, "device", torch.device("cpu"))
        return gather(sent, settings, device, self._group, self.gather, self.grad_reduce)

    def _checked(self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None) -> Pool:
        """The arguments of forward as rows: float32 or float64, int64, weights."""
        logits = _checks.logits(logits, self.num_classes, targets)
        targets = _checks.targets(targets, logits, self.multilabel)
        if sample_weight is not None:
            sample_weight = _checks.sample_weight(sample_weight, logits, self.multilabel)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if sample_weight is None else sample_weight.detach().to(logits.dtype)
        if self.check_values and not logits.is_meta:
            num_labels = 2 if self.multilabel or self.num_classes == 1 else self.num_classes
            _checks.row_values(targets, sample_weight, weights, num_labels, self.ignore_index)
        return Pool(logits, targets.detach().to(torch.int64), weights)

    def _follow(self, device: torch.device) -> None:
        self._queue.to(device)
        if self._temperature_now.device != self._queue.cursor.device:
            self._place_numbers()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, or of what another process sent: its state is its own."""
        super().__setstate__(state)
        self._queue = copy.copy(self._queue)
        self._place_numbers()

    def _place_numbers(self) -> None:
        """Settings as tensors, beside the queue: copied at every step they would wait for it.

        In float64 whatever the module is cast to, and no part of the checkpoint.
        """
        # For compiled code, to which a float is a constant: a new one would compile it anew.
        self._temperature_now = self._as_tensor(self._temperature)
        self._prior = None if self.target_prior is None else self._as_tensor(self.target_prior)

    def _as_tensor(self, number: float | Sequence[float]) -> Tensor:
        like = self._queue.cursor
        with torch.inference_mode(False):  # it outlives it
            if isinstance(number, float):
                return like.new_full((), number, dtype=torch.float64)  # no copy
            return torch.tensor(number, dtype=torch.float64, device="cpu").to(like.device)

    def _gathers(self) -> bool:
        """Whether this forward pass is a collective one; asked every time."""
        wanted = self.training if self.gather_distributed is None else self.gather_distributed
        return wanted and self._group.size() > 1

    def _updates_queue(self) -> bool:
        return self.training or self.update_queue_in_eval

    def _depends_on_state(self) -> bool:
        return self.queue_size > 0 or self.max_pool_size is not None

    def _extended(self, batch: Pool) -> Pool:
        """The batch, then the rows of the queue."""
        if self.queue_size == 0:
            return batch
        rows = self._queue.rows_beside(batch)
        if self.queue_follows_shift:
            shift = _zero_with_gradient_of_mean(batch, self.ignore_index)
            rows = rows._replace(logits=rows.logits + shift)
        return batch.extend(rows)

    def _present(self, pool: Pool) -> Pool:
        """The pool without ignored rows and free slots.

        Off the CPU that would wait for the device, and a compiler could not follow; there their
        weight of zero does the same.
        """
        if not is_on_host(pool.logits) and self.max_pool_size is None:
            return pool
        present = pool.is_present(self.ignore_index)
        return pool if present.all() else pool.select(present.nonzero().squeeze(1))

    def _capped(self, pool: Pool) -> Pool:
        """At most max_pool_size rows, each weighted by one over its chance of being drawn."""
        limit = self.max_pool_size
        if limit is None or not self.training or pool.targets.shape[0] <= limit:
            return pool
        step = self._queue.num_steps
        sample = quota_indices(strata_of(pool.targets), limit, self.sampling_seed, step)
        drawn = pool.select(sample.rows)
        weights = drawn.row_weights()
        factor = sample.weights.to(weights.dtype)
        weights = weights * (factor if weights.dim() == 1 else factor[:, None])
        return drawn._replace(weights=weights.clamp_(max=torch.finfo(weights.dtype).max))

    def _remember(self, batch: Pool) -> None:
        """The one change of state of a forward pass."""
        if self._updates_queue():
            # A number that changes would have code compiled anew in every step. Only draws need it.
            is_counted = self.max_pool_size is not None or not torch.compiler.is_compiling()
            is_step = self.training and is_counted and not is_in_backward()
            self._queue.push(batch, is_step=is_step)

    def get_extra_state(self) -> Tensor:
        """Queue, counter, temperature: bytes, as many for every state."""
        return pack_ranking(self._saved())

    def _take(self, state: Tensor) -> None:
        saved = unpack_ranking(state, self._saved(), self.ignore_index)
        self._queue.restore(saved.slots, saved.cursor, saved.is_weighted)
        self._queue.num_steps = saved.num_steps
        self.temperature = saved.temperature

    def _saved(self) -> Saved:
        queue = self._queue
        return Saved(
            self._temperature, queue.num_steps, int(queue.cursor), queue.is_weighted, queue.slots()
        )

    def _in_current_form(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        return in_current_form(state_dict, prefix, self._saved())


def _as_number(prior: tuple[float, ...] | None) -> float:
    """A number that tells priors apart: 0 for none, one prior itself, a checksum of several."""
    if prior is None or len(prior) == 1:
        return 0.0 if prior is None else prior[0]
    return float(zlib.crc32(repr(prior).encode()))


def _zero_with_gradient_of_mean(batch: Pool, ignore_index: int) -> Tensor:
    """[C] zeros whose gradient is that of each class's mean live score.

    AP does not change when all scores move together, but rows of the queue are detached and would
    stay behind; added to them, this lets them move along in the gradient alone.
    """
    weights = batch.problems(ignore_index).weights
    usable = batch.logits.isfinite()  # [N, C]
    if weights is not None:
        usable &= weights.T > 0
    share = usable / usable.sum(0).clamp(min=1).double()  # [N, C]
    mean = (torch.where(usable, batch.logits, 0.0) * share).sum(0)
    return (mean - mean.detach()).to(batch.logits.dtype)
