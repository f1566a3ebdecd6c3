"""The families of the torture suite: what each claims, and the tests that show it.

A test belongs to one family at most: to the one that names it, else to the one that names its file.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """One claim."""

    title: str
    claim: str
    tests: str  # words "room/file" or "room/file::test", without "test_" before the file
    at_least: int  # cases that must have run


FAMILIES = {
    "T1": Family(
        "definition",
        "Loss, gradient and validity are those of plain float64 loops: 1, 2 and 5 classes, one "
        "label or several, queues, ignored rows, weights, reductions, both backends. Loss "
        "within 1e-12, gradient within 1e-10 in float64; 1e-6 and 1e-5 in float32.",
        "unit/ap_loss unit/backends unit/functional metrics/ranked_sum unit/panel_ranks "
        "unit/line unit/panels unit/weighting",
        400,
    ),
    "T2": Family(
        "average precision",
        "At τ → 0 it is scikit-learn's average_precision_score within 1e-12, weights included; "
        "a tie counts half.",
        "unit/diagnostics::test_exact_ap_is_scikit_learns "
        "unit/functional::test_a_tie_counts_half "
        "unit/functional::test_sharper_is_nearer_to_average_precision "
        "unit/functional::test_small_temperature_is_average_precision "
        "unit/weighting::test_ap_is_scikit_learns_with_the_same_weights",
        350,
    ),
    "T3": Family(
        "invariants",
        "Range, shift, scale, order of rows and classes, ignored rows, weights as numbers of "
        "rows, sign and sum of the gradient, queue as a longer batch: no random example breaks "
        "one, with either backend, in float16, bfloat16, float32 and float64.",
        "metrics/properties",
        800,
    ),
    "T4": Family(
        "derivatives",
        "First and second derivatives pass torch's gradcheck and gradgradcheck, batched over "
        "cotangents too; forward mode, which is not provided, is an error.",
        "unit/ap_loss::test_forward_mode_is_refused unit/ap_loss::test_gradcheck "
        "unit/backends::test_batch_of_cotangents unit/backends::test_forward_mode_is_refused "
        "unit/backends::test_four_derivatives unit/backends::test_gradcheck "
        "unit/functional::test_forward_mode_is_refused unit/functional::test_gradcheck "
        "unit/functional::test_torch_func_gradient "
        "unit/panel_ranks::test_derivatives_of_smooth_ap unit/panel_ranks::test_gradcheck",
        48,
    ),
    "T5": Family(
        "special values",
        "NaN, ±∞, the largest and the smallest numbers and −0, in positives, negatives, ignored"
        " rows and rows on their way into the queue, in four dtypes: never a finite loss with a"
        " gradient that is not; the step after a bad row is that of a run that never saw it.",
        "unit/panel_ranks::test_infinite_scores metrics/special_values",
        192,
    ),
    "T6": Family(
        "nothing to rank",
        "No rows, one row, one class, all ignored, weight zero: loss and gradient are exactly 0"
        " and attached to the graph, whatever the logits, in every dtype.",
        "metrics/degenerate unit/reduce",
        144,
    ),
    "T7": Family(
        "low precision",
        "float16, bfloat16 and autocast: loss in float32 and within 2e-6 of float64 on the same"
        " logits, gradient within two units in the last place of their dtype, under every "
        "global setting of matrix products.",
        "metrics/precision",
        36,
    ),
    "T8": Family(
        "queue",
        "A ring equals a deque through random sequences of forward passes (ragged, ignored, not"
        " finite, weightless, four dtypes), errors, interrupts, eval, reset, checkpoints, other"
        " sizes, copies and casts; what fails leaves every bit as it was.",
        "unit/queue",
        200,
    ),
    "T9": Family(
        "checkpoints",
        "Ten steps after a round trip are those without it, bit for bit, temperature and draws "
        "included; another queue size keeps the newest rows; the predecessor's checkpoints "
        "load; one that is cut short, spoilt or of another loss is an error that changes "
        "nothing.",
        "unit/checkpoint unit/mixed_loss::test_a_resumed_run_goes_on_exactly unit/state "
        "hardening/wrong_checkpoints",
        40,
    ),
    "T10": Family(
        "any number of ranks",
        "One to eight real processes, ragged and empty shares, ranks without positives, queues,"
        " caps, weights: the parameter gradient of one process with all rows, within 1e-12.",
        "hardening/worlds",
        400,
    ),
    "T11": Family(
        "trainers",
        "The same under DDP with its options, accumulation, FSDP2, summed gradients, clipping, "
        "a mix with cross-entropy, groups that come and go, rows or sums.",
        "unit/distributed unit/gather unit/sums",
        36,
    ),
    "T12": Family(
        "ranks that disagree",
        "Another dtype, class count, setting or phase, bad input on one rank, a rank that stays"
        " away: the same typed error on every rank, no hang, no abort; evaluation on one rank "
        "and uneven numbers of batches work.",
        "unit/distributed::test_a_rank_that_stays_away_is_an_error_not_a_hang "
        "unit/distributed::test_ranks_with_fewer_batches_go_on_without_rows "
        "unit/gather::test_bad_input_on_one_rank_is_an_error_on_every_rank "
        "unit/gather::test_one_rank_may_evaluate_by_itself "
        "unit/gather::test_ranks_that_disagree_raise_the_same_error "
        "unit/mixed_loss::test_bad_input_at_the_switch_is_an_error_on_every_rank "
        "unit/mixed_loss::test_ranks_switch_together "
        "unit/sums::test_what_is_refused_is_refused_on_every_rank",
        12,
    ),
    "T13": Family(
        "draws",
        "max_pool_size: rows as often as stated, the same after a checkpoint, none in eval, "
        "global random state untouched; over 300 draws the loss is within 0.05 of the full "
        "pool's.",
        "unit/subsample",
        30,
    ),
    "T14": Family(
        "compilers",
        "torch.compile in one graph, two at most over steps with changing positives, export, "
        "fake and meta tensors: the results of eager code.",
        "unit/compile",
        16,
    ),
    "T15": Family(
        "no waiting for the device",
        "With 1, 10 and 100 classes a step on another device copies nothing to it, and reads "
        "back nothing, or one bool where values are checked; a linear pool reads once more, "
        "backward never.",
        "unit/cuda::test_a_step_on_a_device",
        96,
    ),
    "T16": Family(
        "memory",
        "No tensor of all pairs, none kept for backward; a pass over 32 768 rows, half of them "
        "positive, stays within 512 MiB.",
        "unit/backends::test_memory_of_smooth_ap unit/backends::test_no_tensor_of_all_pairs "
        "unit/backends::test_nothing_of_all_pairs_is_kept unit/memory "
        "unit/line::test_no_tensor_of_all_pairs unit/scratch",
        20,
    ),
    "T17": Family(
        "bad input",
        "Every argument, of a wrong type, shape or value, is an error that names it, what was "
        "expected and what came; conversions are the documented ones.",
        "unit/arguments",
        60,
    ),
    "T18": Family(
        "training",
        "30 steps on two and three ranks are those of one process within 1e-12; a bad row costs"
        " a GradScaler one step; accumulated gradients are those of the batch; AP rises on a "
        "toy set, from an inverted ranking too.",
        "unit/accumulation hardening/training",
        12,
    ),
    "T19": Family(
        "predecessor",
        "300 random histories give the losses of imbalanced-losses 0.6.0 within 1e-6 and its "
        "gradients within 1e-5; what differs on purpose is asserted on both sides.",
        "hardening/predecessor hardening/predecessor_differences",
        300,
    ),
    "T21": Family(
        "faults",
        "A NaN row on any rank spoils one step; a step interrupted at any line leaves the state"
        " before it or after it; a process killed at any moment resumes bit for bit; where a "
        "rank dies, the others say so.",
        "hardening/faults hardening/kills",
        30,
    ),
    "T22": Family(
        "fuzzing",
        "Arguments, settings and checkpoints made of random bytes: a documented error that "
        "changes nothing, or a loss and a gradient as defined. `make fuzz` goes on, guided by "
        "coverage.",
        "hardening/fuzz",
        2000,
    ),
    "T23": Family(
        "public cases",
        "What people reported in public of other libraries works here: tools that average, "
        "broadcast, cast, copy, save and load models, tensors of other libraries, hooks, "
        "export.",
        "hardening/public_cases",
        350,
    ),
}


def path_of(test: str) -> str:
    """
    >>> path_of("unit/queue::test_reset")
    'tests/unit/test_queue.py::test_reset'
    """
    file, _, name = test.partition("::")
    room, _, file = file.rpartition("/")
    return f"tests/{room}/test_{file}.py" + (f"::{name}" if name else "")


def family_of(node_id: str) -> str:
    """The key of a test's family, "others" for a test that none names.

    >>> family_of("tests/unit/test_ap_loss.py::test_gradcheck[one label]")
    'T4'
    """
    path, _, name = node_id.partition("::")
    for wanted in (f"{path}::{name.partition('[')[0]}", path):
        for key, family in FAMILIES.items():
            if wanted in map(path_of, family.tests.split()):
                return key
    return "others"
