"""Batches of whole groups, for losses that rank rows within their group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import Sampler

from imbalanced_losses._checks import arguments as _checks
from imbalanced_losses._checks import sampler as _of_sampler
from imbalanced_losses._rows.gather import Group
from imbalanced_losses._rows.subsample import _mixed, _rank_in_stratum

__all__ = ["GroupBatchSampler"]


class GroupBatchSampler(Sampler[list[int]]):
    """Batches that hold every row of their groups: `DataLoader(batch_sampler=…)`.

    An epoch has every group once, batches that differ by at most one group, and
    as many of them on each process, which share no group. A group comes twice
    only where there would be more batches than groups. The batches follow from
    the arguments and the epoch; no global random state is read or changed.

    Args:
        group: [N] integer, any values: what each row is ranked within; N > 0.
        groups_per_batch: groups in a batch of one process, at most; >= 1.
        max_group_size: rows of a larger group that an epoch has, drawn anew in
            each; >= 2. None: all.
        is_positive: [N] bool. A draw keeps every positive while they fill at
            most half of it; of more, it draws some. None: all are alike.
        shuffle: another order in each epoch; False: groups by their first row.
        seed: of order and draws, the same on every process; >= 0.
        num_replicas: number of processes. None: torch.distributed's when
            iterating, else 1.
        rank: the place of this process; given together with num_replicas.
        drop_last: batches of exactly groups_per_batch groups; an epoch leaves
            out the groups that do not fill one on every process.

    Attributes:
        weights: [N] float32, >= 1: one over the chance that a row is in its
            group's batch. With `sample_weight=weights[rows]` sums over rows are
            those of whole groups, in expectation over the draws.
        epoch: what `set_epoch` chose; 0 before.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.

    Example:
        >>> query = torch.tensor([7, 7, 3, 3, 3, 9])
        >>> list(GroupBatchSampler(query, groups_per_batch=2, shuffle=False))
        [[0, 1, 2, 3, 4], [5]]
    """

    def __init__(
        self, group: Tensor, groups_per_batch: int, *, max_group_size: int | None = None,
        is_positive: Tensor | None = None, shuffle: bool = True, seed: int = 0,
        num_replicas: int | None = None, rank: int | None = None, drop_last: bool = False,
    ) -> None:  # fmt: skip
        """See the class."""
        ids, positive = _of_sampler.groups(group, is_positive)
        self.groups_per_batch = _checks.integer("groups_per_batch", groups_per_batch, minimum=1)
        cap = len(ids) + 1 if max_group_size is None else max_group_size
        cap = _checks.integer("max_group_size", cap, minimum=2)
        self.shuffle = _checks.boolean("shuffle", shuffle)
        self.seed = _checks.integer("seed", seed, minimum=0)
        self._place = _of_sampler.place(num_replicas, rank)
        self.drop_last = _checks.boolean("drop_last", drop_last)
        self.epoch = self._num_given = self._first = 0

        _, of_row, sizes = ids.unique(return_inverse=True, return_counts=True)  # [N], [G]
        self._rows, ends = of_row.argsort(stable=True), sizes.cumsum(0)  # [N] by group, [G]
        self._spans = torch.stack([ends - sizes, ends], 1)  # [G, 2], of each group in _rows
        num_positive = torch.zeros_like(sizes).index_add_(0, of_row, positive.long())
        counts = torch.stack([sizes - num_positive, num_positive], 1)  # [G, 2]
        most = (cap - counts[:, 0]).clamp(min=cap // 2)  # positives in a draw
        positives = num_positive.minimum(most)
        quotas = torch.stack([sizes.clamp(max=cap) - positives, positives], 1)
        strata = 2 * of_row + positive  # [N]
        self.weights = (counts / quotas).float().flatten()[strata]
        is_capped = bool((sizes > cap).any())
        self._draw = (strata, counts.flatten(), quotas.flatten()) if is_capped else None

    @property
    def sampler(self) -> GroupBatchSampler:
        """This sampler: Lightning and Accelerate look here for `set_epoch`."""
        return self

    def __len__(self) -> int:
        """The number of batches in an epoch, of one process."""
        in_step = self.groups_per_batch * self._processes()[0]
        return _of_sampler.num_batches(len(self._spans), in_step, self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        """The rows of each batch, group after group."""
        first, self._first = self._first, 0
        num_replicas, rank = self._processes()
        num_parts = len(self) * num_replicas
        generator = torch.Generator("cpu").manual_seed(_mixed(self.seed, self.epoch))
        order = self._rows[self._spans[:, 0]].argsort()  # [G]
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator, device="cpu")
        if self._draw is not None:
            stratum, counts, quotas = self._draw
            key = torch.rand(len(stratum), generator=generator, dtype=torch.float64, device="cpu")
            is_drawn = _rank_in_stratum(key, stratum, counts) < quotas[stratum]  # [N]
        if self.drop_last:
            order = order[: num_parts * self.groups_per_batch]
        if len(order) < num_parts:
            order = order.repeat(-(-num_parts // len(order)))[:num_parts]
        for groups in order.tensor_split(num_parts)[rank::num_replicas][first:]:
            rows = torch.cat([self._rows[slice(*span)] for span in self._spans[groups].tolist()])
            first = self._num_given = first + 1
            yield (rows if self._draw is None else rows[is_drawn[rows]]).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch before iterating; without it, all are as the first.

        Args:
            epoch: a number >= 0, the same on every process.
        """
        if _checks.integer("epoch", epoch, minimum=0) != self.epoch:
            self.epoch, self._num_given, self._first = int(epoch), 0, 0

    def state_dict(self, num_consumed: int | None = None) -> dict[str, int]:
        """The place in the epoch, the same on every process.

        Args:
            num_consumed: batches of this epoch, on each process, that were
                trained on. None: those handed out, more where workers prefetch.

        Returns:
            What `load_state_dict` takes.
        """
        own = {"seed": self.seed, "num_batches": len(self)}
        count = self._num_given if num_consumed is None else num_consumed
        count = _of_sampler.num_consumed(count, own["num_batches"])
        return {"epoch": self.epoch, "num_consumed": count, **own}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on, in the next iteration, with the batches left of the epoch.

        Args:
            state_dict: of a sampler with these arguments, on as many processes.
        """
        _of_sampler.saved_sampler(state_dict, seed=self.seed, num_batches=len(self))
        self.epoch, self._first = state_dict["epoch"], state_dict["num_consumed"]
        self._num_given = self._first

    def _processes(self) -> tuple[int, int]:
        """The number of processes, and the place of this one."""
        return self._place or (Group().size(), Group().rank())
