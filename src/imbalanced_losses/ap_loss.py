"""Average Precision as a loss."""

from __future__ import annotations

from torch import Tensor

from imbalanced_losses._loss import RankingLoss
from imbalanced_losses._ranking import Problems
from imbalanced_losses._ranking.average_precision import average_precision
from imbalanced_losses.functional import SmoothAP, smooth_ap


class SmoothAPLoss(RankingLoss):
    """Differentiable Average Precision loss with an optional memory queue.

    One minus the Average Precision of each class, its ranks smoothed by
    sigmoids (Smooth-AP, Brown et al. 2020), averaged over classes. Binary
    (num_classes=1), multi-class (one-vs-rest: class c is scored by
    logits[:, c]) and multi-label. Flatten sequences first: rows are rows.

    Args:
        num_classes: C, number of classes. Use 1 for binary mode: targets in
            {0, 1}.
        queue_size: rows of past batches kept in a ring and ranked together with
            the live batch, without gradient. Pays where a batch holds fewer
            than about three positives. 0 = none.
        temperature: sigmoid sharpness τ > 0. Smaller approximates the true rank
            more closely and gives harder, sparser gradients. In units of the
            scores typically 0.005–0.05; in units of their spread 0.05–0.3.
        reduction: "mean" or "sum" over the valid classes, or "none": [C], NaN
            at degenerate classes (no positive or no negative in the pool).
        ignore_index: target that marks padding. Such rows are in neither the
            ranking nor the positive set and take no slot of the queue.
        update_queue_in_eval: False freezes the queue in eval mode.
        gather_distributed: whether to rank the rows of all processes together.
            None: in training, when torch.distributed has more than one process,
            asked anew in every forward pass; True: always; False: never. Every
            process then stores the same global batch, so queues stay equal;
            with a large global batch prefer queue_size=0.
        max_pool_size: cap on the rows ranked at once, in training. Above it
            each class present is guaranteed max_pool_size // (2 * n_classes)
            rows (or all it has), the rest is uniform over what is left, and
            every row is weighted by one over its probability of being drawn, so
            that the loss estimates the full pool's. None = no cap.
        multilabel: targets are [N, C] in {0, 1, ignore_index}, every class a
            problem of its own.
        temperature_unit: "score": τ is in units of the logits. "spread": the
            effective τ of a class is temperature × the standard deviation of
            its scores in the pool, with gradient through the deviation, so that
            τ does not depend on the scale of the logits.
        queue_follows_shift: let the queue's rows move with the mean of the live
            batch in the gradient (their values stay). AP does not change when
            all scores move together; rows without gradient break that, and this
            restores it.
        process_group: the processes that rank together; None: all. Every
            group then has a loss of its own, and the trainer's gradient is the
            mean over groups, weighted by size.
        grad_reduce: what the trainer does with the gradients of the processes:
            "mean" (DDP, FSDP, Lightning, Accelerate) or "sum". The outcome is
            the gradient of one process with all rows; the value of the loss is
            the same for both.
        gather: what processes send each other. "rows": every process gets all
            rows and ranks them. "sums": every process keeps its rows, and they
            add up the sums that ranking takes, whose size does not depend on
            the number of rows: for pools too large for one process. Loss and
            gradient are the same to rounding. queue_size and max_pool_size are
            then per process, the backend is the linear one, queue_follows_shift
            is refused, and gradients can't be differentiated again.
        target_prior: share of positives in deployment, one for each class. In
            every pool positives and negatives are weighted, on top of
            sample_weight, so that positives have this share: for batches, or
            training sets, in which they are more common than they will be
            (`functional.prior_weights`). None: as common as in the pool.

    Attributes:
        temperature: can be assigned between steps; part of the checkpoint. The
            other arguments are attributes of the same names, to be read.
        check_values: False skips the check of the values of targets and
            sample_weight, which reads one bool back from the device. On the
            class or on one loss.
        sampling_seed: selects the draws of max_pool_size, the same on every
            rank.
        backend: "auto" or the name of one way to compute
            (see `functional.smooth_ap`).

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> import torch
        >>> loss_fn = SmoothAPLoss(num_classes=4, queue_size=512)
        >>> logits = torch.randn(32, 4, requires_grad=True)
        >>> targets = torch.randint(0, 4, (32,))
        >>> loss = loss_fn(logits, targets)
        >>> loss.backward()
        >>> loss, per_class, valid = loss_fn(logits, targets, True)
        >>> per_class.shape, valid.shape
        (torch.Size([4]), torch.Size([4]))

    Note:
        Ranking the pool of M = batch + queue rows takes O(M) memory and, from a
        few thousand rows on, O(M) time; below, O(|P| × M) with |P| positives is
        faster and is done.

        Outputs trained this way rank; they are not probabilities: calibrate
        them, or keep a cross-entropy term beside this loss.

    Source: Brown et al., "Smooth-AP", ECCV 2020, arXiv 2007.12163; definition
    in `imbalanced_losses.functional.smooth_ap`.
    """

    def metric(self, problems: Problems) -> Tensor:
        """Smooth AP of each class.

        Args:
            problems: the C ranking problems of a pool.

        Returns:
            [C] in [0, 1], 0 where a problem is not valid.
        """
        return average_precision(problems)

    @staticmethod
    def _compute_smooth_ap(
        scores: Tensor, is_pos: Tensor, tau: float | Tensor, sample_weight: Tensor | None = None
    ) -> SmoothAP:
        """Smooth AP of scores [M] or [C, M]; `functional.smooth_ap` is its public name."""
        return smooth_ap(scores, is_pos, tau, sample_weight=sample_weight)
