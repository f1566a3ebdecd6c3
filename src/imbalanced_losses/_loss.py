"""What every ranking loss shares: the constructor, the row pipeline, the state."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_in_backward, is_on_host, is_traced
from imbalanced_losses._checks.typing import typed_as
from imbalanced_losses._module import StatefulLoss, arguments_of
from imbalanced_losses._ranking import BACKENDS, Backend, Problems, Processes
from imbalanced_losses._ranking.cuda.rows import check_values
from imbalanced_losses._ranking.weighting import spread, weights_at_prior
from imbalanced_losses._rows.checkpoint import Saved, in_current_form, pack_ranking, unpack_ranking
from imbalanced_losses._rows.gather import Gather, GradReduce, Group, ProcessGroup, gather
from imbalanced_losses._rows.pool import Pool
from imbalanced_losses._rows.queue import MemoryQueue
from imbalanced_losses._rows.reduce import Reduction, mark_invalid, reduce_valid
from imbalanced_losses._rows.subsample import capped
from imbalanced_losses.diagnostics import Diagnostics, _diagnosed

TemperatureUnit = Literal["score", "spread"]
# What has to be the same in every process that ranks rows together.
_COMPARED = (
    *("gather", "grad_reduce", "reduction", "temperature_unit", "queue_follows_shift"),
    *("ignore_index", "queue_size", "max_pool_size", "temperature", "training"),
)


class RankingOptions(TypedDict, total=False):
    """The arguments of every ranking loss but `num_classes`, for a subclass's `**options`."""

    queue_size: int
    temperature: float
    reduction: Reduction
    ignore_index: int
    update_queue_in_eval: bool
    gather_distributed: bool | None
    max_pool_size: int | None
    multilabel: bool
    temperature_unit: TemperatureUnit
    queue_follows_shift: bool
    process_group: ProcessGroup | None
    grad_reduce: GradReduce
    gather: Gather
    target_prior: float | Sequence[float] | Tensor | None


class PerClass(NamedTuple):
    """What a ranking loss makes of C problems."""

    losses: Tensor  # [C], any finite value where not valid
    valid: Tensor  # [C] bool


class RankingLoss(StatefulLoss):
    """Base of the ranking losses: rows in, one loss out.

    One forward pass is: check → gather over processes → extend by the queue's rows → drop ignored
    rows → cap → metric of each problem → push the live batch → reduce. A subclass implements
    `metric`.
    """

    _queue: MemoryQueue

    #: Compare the values of targets and sample_weight with what is allowed; reads one bool back
    #: from the device in each forward pass. Shapes and dtypes are checked in any case.
    check_values: bool = True
    #: How ranks are computed: "auto", or the name of one way (see `functional.smooth_ap`).
    backend: Backend = "auto"
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
        self._settings = arguments_of(RankingLoss)

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
        batch, processes = self._batch(logits, targets, sample_weight, return_per_class)
        self._follow(batch.logits.device)
        pool = self._pool(batch)
        problems = self._problems(pool, processes)
        losses, valid = self._per_class(problems)
        self._remember(batch)
        loss = reduce_valid(losses, valid, self.reduction)
        return (loss, mark_invalid(losses, valid), valid) if return_per_class else loss

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @torch.no_grad()
    def diagnose(
        self, logits: Tensor, targets: Tensor, *, sample_weight: Tensor | None = None
    ) -> Diagnostics:
        """What a batch, ranked with the rows in the queue, gives to learn from.

        Call it now and then, before the step of that batch (afterwards its rows
        are in the queue as well); nothing changes. It sorts the pool and takes
        a few times as long as a forward pass.

        Where forward gathers the rows of all ranks this does too, and all of
        them must call it; with gather="sums" it is about the rows of this rank.

        Args:
            logits: [N, C], as for forward.
            targets: [N] or [N, C], as for forward.
            sample_weight: as for forward.

        Returns:
            `Diagnostics`, fields [C]; `print` it for a table and advice.

        Raises:
            TypeError, ValueError: as forward.

        Example:
            >>> from imbalanced_losses import SmoothAPLoss
            >>> loss_fn = SmoothAPLoss(1, queue_size=0, temperature=0.001)
            >>> logits = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
            >>> found = loss_fn.diagnose(logits, torch.tensor([0, 0, 1, 0]))
            >>> round(found.ap.item(), 4), found.active_pairs.item()
            (0.3333, 0.0)
            >>> found.advice()[0].partition(",")[0]
            'fewer than 1 % of the pairs carry gradient'
        """
        if self.gather == "sums":
            batch = self._checked(logits, targets, sample_weight)
        else:
            batch, _ = self._batch(logits, targets, sample_weight)
        batch = batch._replace(logits=batch.logits.detach())
        self._follow(batch.logits.device)
        pool = self._pool(batch)
        problems = self._problems(pool, None)
        in_batch = batch.problems(self.ignore_index)
        is_positive = in_batch.is_positive
        if in_batch.weights is not None:
            is_positive = is_positive & (in_batch.weights > 0)
        ages = self._queue.ages()
        age = int(ages.max()) if len(ages) else 0
        return _diagnosed(problems, is_positive.sum(1), age)

    def metric(self, problems: Problems) -> Tensor:
        """What the loss is one minus of: a function of `problems` and constants.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C], any finite value where a problem is not valid.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement metric")

    def _per_class(self, problems: Problems) -> PerClass:
        """The loss [C] of each ranking problem, and where it means something [C]."""
        return PerClass(1 - self.metric(problems), problems.valid)

    def _problems(self, pool: Pool, processes: Processes | None) -> Problems:
        """The rows as ranking problems, positives as common as in deployment if that is known."""
        scores, is_positive, weights, num_live = pool.problems(self.ignore_index)
        if self._prior is not None:
            if weights is None:
                weights = scores.new_ones(()).expand(scores.shape)
            prior = self._prior.to(scores.device)
            weights = weights_at_prior(is_positive, prior, weights, processes)
        temperature = self._temperature_now if is_traced(scores) else self.temperature
        if self.temperature_unit == "spread":
            temperature = temperature * spread(scores, weights, processes)
        return Problems(
            scores,
            temperature,
            is_positive,
            weights,
            num_live=num_live,
            processes=processes,
            backend=self.backend,
        )

    def _spread_of_batch(
        self, logits: Tensor, targets: Tensor, sample_weight: Tensor | None
    ) -> float:
        """Standard deviation of the scores, the mean over classes; over ranks as in forward."""
        batch, processes = self._batch(logits, targets, sample_weight)
        self._follow(batch.logits.device)
        problems = self._problems(batch, processes)
        return float(spread(problems.scores.detach(), problems.given_weights, processes).mean())

    def _batch(
        self,
        logits: Tensor,
        targets: Tensor,
        sample_weight: Tensor | None,
        return_per_class: bool = False,
        error: Exception | None = None,
    ) -> tuple[Pool, Processes | None]:
        """The arguments of forward as rows, and the ranks that hold others to rank them with.

        Where ranks gather rows, they are those of all ranks. An error from elsewhere is raised if
        the arguments have none of their own.
        """
        if not self._gathers():
            _checks.boolean("return_per_class", return_per_class)
            batch = self._checked(logits, targets, sample_weight)
            if error is not None:
                raise error
            return batch, None
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
        _checks.choice("backend", self.backend, BACKENDS)
        if self.gather == "sums" and self.backend == "dense":
            raise ValueError(
                'backend must be "auto" or "panel" with gather="sums": a process that lacks the '
                'rows of the others has no pairs to sum over; got "dense"'
            )
        logits = _checks.logits(logits, self.num_classes, targets)
        targets = _checks.targets(targets, logits, self.multilabel)
        if sample_weight is not None:
            sample_weight = _checks.sample_weight(sample_weight, logits, self.multilabel)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if sample_weight is None else sample_weight.detach().to(logits.dtype)
        if self.check_values and not logits.is_meta:
            num_labels = 2 if self.multilabel or self.num_classes == 1 else self.num_classes
            check_values(targets, sample_weight, weights, num_labels, self.ignore_index)
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

    def _pool(self, batch: Pool) -> Pool:
        """The rows to rank: the batch, then those of the queue; without ignored ones; capped."""
        pool = batch
        if self.queue_size > 0:
            rows = self._queue.rows_beside(batch)
            if self.queue_follows_shift:
                shift = batch.zero_with_gradient_of_mean(self.ignore_index)
                rows = rows._replace(logits=rows.logits + shift)
            pool = batch.extend(rows)
        # Off the CPU dropping rows would wait for the device, and a compiler could not follow;
        # there their weight of zero does the same.
        if is_on_host(pool.logits) or self.max_pool_size is not None:
            pool = pool.without_ignored(self.ignore_index)
        if self.max_pool_size is None or not self.training:
            return pool
        return capped(pool, self.max_pool_size, self.sampling_seed, self._queue.num_steps)

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
