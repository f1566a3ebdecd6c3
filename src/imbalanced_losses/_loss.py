"""What every ranking loss shares: the constructor, and what happens to the rows of a call."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, overload

import torch
from torch import Tensor

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks.tracing import is_traced
from imbalanced_losses._checks.typing import (
    Gather,
    GradReduce,
    Reduction,
    TemperatureUnit,
    typed_as,
)
from imbalanced_losses._module import arguments_of
from imbalanced_losses._options import (
    COMPARED,
    RankingOptions,
    RowValues,
    Unpack,
    complete_signature,
)
from imbalanced_losses._ranking import BACKENDS, Backend, Problems, Processes
from imbalanced_losses._ranking.budget import Budget
from imbalanced_losses._ranking.cuda.rows import check_values
from imbalanced_losses._rows.gather import Group, ProcessGroup, gather
from imbalanced_losses._rows.groups import Groups
from imbalanced_losses._rows.pool import Pool
from imbalanced_losses._rows.reduce import PerClass, mark_invalid, reduce_valid
from imbalanced_losses._state import RankingState
from imbalanced_losses.diagnostics import Diagnostics, _diagnosed

__all__ = ["PerClass", "RankingLoss", "RankingOptions"]


class RankingLoss(RankingState):
    """Base of the ranking losses: rows in, one loss out.

    One forward pass is: check → gather over processes → extend by the queue's rows → drop ignored
    rows → cap → metric of each problem → push the live batch → reduce. A subclass implements
    `metric`.
    """

    #: Compare the values of targets and sample_weight with what is allowed; reads one bool back
    #: from the device in each forward pass. Shapes and dtypes are checked in any case.
    check_values: bool = True
    #: How ranks are computed: "auto", or the name of one way (see `functional.smooth_ap`).
    backend: Backend = "auto"
    #: Selects the stream of draws of `max_pool_size`, together with the number of draws made.
    sampling_seed: int = 0

    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Have `help` and `inspect.signature` show every option."""
        super().__init_subclass__(**keywords)
        cls.__signature__ = complete_signature(cls, _ARGUMENTS)

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
        _checks.number_above_zero("temperature", temperature)
        self.reduction = _checks.choice("reduction", reduction, get_args(Reduction))
        self.multilabel = _checks.boolean("multilabel", multilabel)
        self.ignore_index = _checks.ignore_index(
            ignore_index, self._num_labels() if self._is_binary or self._num_grades else 0
        )
        self.update_queue_in_eval = _checks.boolean("update_queue_in_eval", update_queue_in_eval)
        self.gather_distributed = _checks.maybe(
            _checks.boolean, "gather_distributed", gather_distributed
        )
        self.max_pool_size = _checks.maybe(_checks.integer, "max_pool_size", max_pool_size, 2)
        self.temperature_unit = _checks.choice(
            "temperature_unit", temperature_unit, get_args(TemperatureUnit)
        )
        self._group = Group(process_group)
        self.grad_reduce = _checks.choice("grad_reduce", grad_reduce, get_args(GradReduce))
        self.gather = _checks.choice("gather", gather, get_args(Gather))
        self.queue_follows_shift = _checks.queue_follows_shift(queue_follows_shift, gather)
        self.target_prior = _checks.maybe(_checks.shares, "target_prior", target_prior, num_classes)
        self._begin(temperature, self.target_prior)
        # What a subclass has set before this call is fixed too, and has to be the same in every
        # process.
        own = {k: v for k, v in arguments_of(type(self)).items() if k in vars(self)}
        self._own = [name for name in own if name not in _ARGUMENTS]
        self._settings = arguments_of(RankingLoss) | own

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that rank their rows together; None for all."""
        return self._group.handle

    @overload
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: Literal[False] = False,
        **values: Unpack[RowValues],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: Literal[True],
        **values: Unpack[RowValues],
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    @overload
    def forward(
        self, logits: Tensor, targets: Tensor, return_per_class: bool, **values: Unpack[RowValues]
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: bool = False,
        *,
        sample_weight: Tensor | None = None,
        group: Tensor | None = None,
        value: Tensor | None = None,
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
            group: [N], integers of any dtype and value, such as the number of
                a query, a customer or a day. Rows are then ranked only against
                rows of the same group, queued ones included, and the loss of a
                class is the mean over the groups of the batch in which it has
                a positive and a negative, each counting the same. In every
                call, or in none until reset_queue().
            value: [N], finite and ≥ 0: what finding each positive is worth,
                such as money. It weights the mean over positives and leaves
                ranks alone; of negatives it is not looked at. With
                multilabel=True also [N, C]. None: 1.

        Returns:
            loss: [] float32 (float64 for float64 logits), [C] for
                reduction="none". Exactly 0, attached to the graph, when no
                class is valid. Alone, without return_per_class=True.
            per_class: [C], NaN at classes without a positive or without a
                negative in the pool.
            valid: [C] bool, False at those classes.

        Raises:
            TypeError: an argument of the wrong type or dtype.
            ValueError: a shape or a value that does not fit. Nothing has
                changed then.
        """
        if self._updates_queue():
            self._require_step()
        values: RowValues = {"sample_weight": sample_weight, "group": group, "value": value}
        batch, processes = self._batch(logits, targets, return_per_class, **values)
        pool = self._pool(batch)
        groups = pool.groups()
        losses, valid = self._per_class(self._problems(pool, processes, groups))
        if groups is not None and batch.group is not None:
            losses, valid = groups.mean(losses, valid, batch.group, self.num_classes)
        self._remember(batch)
        loss = reduce_valid(losses, valid, self.reduction)
        return (loss, mark_invalid(losses, valid), valid) if return_per_class else loss

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    @torch.no_grad()
    def diagnose(self, logits: Tensor, targets: Tensor, **values: Unpack[RowValues]) -> Diagnostics:
        """Measure how much gradient signal a batch carries, ranked with the queue.

        Call it now and then, before the step of that batch (afterwards its rows
        are in the queue as well); nothing changes. It sorts the pool and takes
        a few times as long as a forward pass.

        If forward gathers the rows of all processes, so does this, and all of
        them must call it; with gather="sums" it is about this process's rows.

        Args:
            logits, targets: as for forward.
            values: sample_weight, group and value, as for forward.

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
            batch = self._checked(logits, targets, **values)
        else:
            batch, _ = self._batch(logits, targets, **values)
        batch = batch.with_logits(batch.logits.detach())
        pool = self._pool(batch)
        groups = pool.groups()
        problems = self._problems(pool, None, groups)
        in_batch = batch.problems(self.ignore_index, self._num_grades > 0)
        metric, budget = 1 - self._per_class(problems).losses, self._budget(problems)
        means = None
        if groups is not None and batch.group is not None:
            means = partial(groups.mean, live=batch.group, num_classes=self.num_classes)
        return _diagnosed(problems, metric, budget, in_batch, self._queue.ages(), means)

    def metric(self, problems: Problems) -> Tensor:
        """What the loss is one minus of: a function of `problems` and constants.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C], any finite value where a problem is not valid.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement metric")

    def _budget(self, problems: Problems) -> Budget | None:
        """What of the pool is looked at, for `diagnose`; None = all."""
        return None

    def _per_class(self, problems: Problems) -> PerClass:
        """The loss [C] of each ranking problem, and where it means something [C]."""
        found, valid = self.metric(problems), problems.valid
        if found.shape != valid.shape:
            raise ValueError(
                f"metric must return one number a problem, {list(valid.shape)}, got "
                f"{list(found.shape)}"
            )
        return PerClass(1 - found, valid)

    def _problems(
        self, pool: Pool, processes: Processes | None, groups: Groups | None = None
    ) -> Problems:
        """The rows as ranking problems, positives as common as in deployment if that is known."""
        is_graded, prior = self._num_grades > 0, self._prior
        columns = pool.problems(self.ignore_index, is_graded)
        layout = None
        if groups is not None:
            columns = columns.within(groups)
            layout = groups.layout(self.num_classes, pool.targets.shape[0])
            prior = None if prior is None else prior.repeat_interleave(len(groups.lengths))
        scores, is_positive, weights, value, draws, num_live = columns
        temperature = self._temperature_now if is_traced(scores) else self.temperature
        problems = Problems(
            scores,
            temperature,
            is_positive,
            weights,
            value=value,
            is_graded=is_graded,
            draws=draws,
            layout=layout,
            num_live=num_live,
            processes=processes,
            backend=self.backend,
        )
        if prior is not None:
            problems = problems.with_prior(prior.to(scores.device))
        if self.temperature_unit == "spread":
            problems = problems.replaced(temperature=temperature * problems.spread())
        return problems

    def _batch(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: bool = False,
        *,
        error: Exception | None = None,
        **values: Unpack[RowValues],
    ) -> tuple[Pool, Processes | None]:
        """The arguments of forward as rows, and the processes that hold the others.

        If processes gather rows, they are those of all; an error from elsewhere is then
        raised by all of them.
        """
        if not self._gathers():
            return self._checked(logits, targets, return_per_class, **values), None
        sent: Pool | Exception
        try:
            sent = self._checked(logits, targets, return_per_class, **values)
            sent = error or sent
        except (TypeError, ValueError) as own_error:
            sent = own_error  # the other processes wait to hear of it
        settings = {name: getattr(self, name) for name in (*COMPARED, *self._own)}
        settings["steps made"] = self._queue.num_steps
        device = getattr(logits, "device", torch.device("cpu"))
        return gather(sent, settings, device, self._group, self.gather, self.grad_reduce)

    def _checked(
        self,
        logits: Tensor,
        targets: Tensor,
        return_per_class: bool = False,
        **values: Unpack[RowValues],
    ) -> Pool:
        """The arguments of forward as rows."""
        _checks.boolean("return_per_class", return_per_class)
        _checks.backend(self.backend, BACKENDS, self.gather)
        fields = values.get("sample_weight"), values.get("group"), values.get("value")
        options: dict[str, Any] = {"num_grades": self._num_grades, "check": check_values}
        rows = Pool(*_checks.rows(self, logits, targets, *fields, **options))
        if rows.group is not None and self.gather == "sums":
            raise ValueError('group must be None with gather="sums": use gather="rows"')
        self._queue.require_same_grouping(rows.group is not None)
        self._follow(rows.logits.device)
        return rows

    def _gathers(self) -> bool:
        """Whether this forward pass is a collective one; asked every time."""
        wanted = self.training if self.gather_distributed is None else self.gather_distributed
        return wanted and self._group.size() > 1


_ARGUMENTS = inspect.signature(RankingLoss).parameters
