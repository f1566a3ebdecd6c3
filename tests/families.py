"""The families of the torture suite: what each claims, and the tests that show it.

A test belongs to one family at most: to the one that names it, else to the one that names its file.
"""

from __future__ import annotations

import sys
from typing import NamedTuple


class Family(NamedTuple):
    """One claim."""

    title: str
    claim: str
    tests: tuple[str, ...]  # "test_file" or "test_file::test_name", below tests/
    at_least: int  # cases that must have run
    command: tuple[str, ...] = ()  # run after the tests; must exit with 0


FAMILIES = {
    "T1": Family(
        "definition",
        "Loss, gradient and validity are those of plain float64 loops: 1, 2 and 5 classes, one "
        "label or several, queues, ignored rows, weights, reductions, both backends. Loss within "
        "1e-12, gradient within 1e-10 in float64; 1e-6 and 1e-5 in float32.",
        (
            "test_ap_loss",
            "test_engine",
            "test_functional",
            "test_metrics",
            "test_panel",
            "test_panel_line",
            "test_panel_plan",
            "test_prior",
        ),
        400,
    ),
    "T2": Family(
        "average precision",
        "At τ → 0 it is scikit-learn's average_precision_score within 1e-12, weights included; a "
        "tie counts half.",
        (
            "test_diagnostics::test_exact_ap_is_scikit_learns",
            "test_functional::test_a_tie_counts_half",
            "test_functional::test_sharper_is_nearer_to_average_precision",
            "test_functional::test_small_temperature_is_average_precision",
            "test_prior::test_ap_is_scikit_learns_with_the_same_weights",
        ),
        350,
    ),
    "T3": Family(
        "invariants",
        "Range, shift, scale, order of rows and classes, ignored rows, weights as numbers of rows, "
        "sign and sum of the gradient, queue as a longer batch: no random example breaks one, "
        "with either backend, in float16, bfloat16, float32 and float64.",
        ("test_properties",),
        800,
    ),
    "T4": Family(
        "derivatives",
        "First and second derivatives pass torch's gradcheck and gradgradcheck, batched over "
        "cotangents too; forward mode, which is not provided, is an error.",
        (
            "test_ap_loss::test_forward_mode_is_refused",
            "test_ap_loss::test_gradcheck",
            "test_engine::test_batch_of_cotangents",
            "test_engine::test_forward_mode_is_refused",
            "test_engine::test_four_derivatives",
            "test_engine::test_gradcheck",
            "test_functional::test_forward_mode_is_refused",
            "test_functional::test_gradcheck",
            "test_functional::test_torch_func_gradient",
            "test_panel::test_derivatives_of_smooth_ap",
            "test_panel::test_gradcheck",
        ),
        48,
    ),
    "T5": Family(
        "special values",
        "NaN, ±∞, the largest and the smallest numbers and −0, in positives, negatives, ignored "
        "rows and rows on their way into the queue, in four dtypes: never a finite loss with a "
        "gradient that is not; the step after a bad row is that of a run that never saw it.",
        ("test_panel::test_infinite_scores", "test_special_values"),
        192,
    ),
    "T6": Family(
        "nothing to rank",
        "No rows, one row, one class, all ignored, weight zero: loss and gradient are exactly 0 "
        "and attached to the graph, whatever the logits, in every dtype.",
        ("test_degenerate", "test_reduce"),
        144,
    ),
    "T7": Family(
        "low precision",
        "float16, bfloat16 and autocast: loss in float32 and within 2e-6 of float64 on the same "
        "logits, gradient within two units in the last place of their dtype, under every global "
        "setting of matrix products.",
        ("test_precision",),
        36,
    ),
    "T8": Family(
        "queue",
        "A ring equals a deque through random sequences of forward passes (ragged, ignored, not "
        "finite, weightless, four dtypes), errors, interrupts, eval, reset, checkpoints, other "
        "sizes, copies and casts; what fails leaves every bit as it was.",
        ("test_queue",),
        200,
    ),
    "T9": Family(
        "checkpoints",
        "Ten steps after a round trip are those without it, bit for bit, temperature and draws "
        "included; another queue size keeps the newest rows; the predecessor's checkpoints load; "
        "one that is cut short, spoilt or of another loss is an error that changes nothing.",
        (
            "test_checkpoint",
            "test_mixed_loss::test_a_resumed_run_goes_on_exactly",
            "test_state",
            "test_wrong_checkpoints",
        ),
        40,
    ),
    "T10": Family(
        "any number of processes",
        "One to eight real processes, ragged and empty shares, some without positives, queues, "
        "caps, weights: the parameter gradient of one process with all rows, within 1e-12.",
        ("test_worlds",),
        400,
    ),
    "T11": Family(
        "trainers",
        "The same under DDP with its options, accumulation, FSDP2, summed gradients, clipping, a "
        "mix with cross-entropy, groups that come and go, rows or sums.",
        ("test_distributed", "test_gather", "test_sums"),
        36,
    ),
    "T12": Family(
        "processes that disagree",
        "Another dtype, class count, setting or phase, bad input on one, one that stays "
        "away: the same typed error on all, no hang, no abort; evaluation on one and "
        "uneven numbers of batches work.",
        (
            "test_distributed::test_a_rank_that_stays_away_is_an_error_not_a_hang",
            "test_distributed::test_ranks_with_fewer_batches_go_on_without_rows",
            "test_gather::test_bad_input_on_one_rank_is_an_error_on_every_rank",
            "test_gather::test_one_rank_may_evaluate_by_itself",
            "test_gather::test_ranks_that_disagree_raise_the_same_error",
            "test_mixed_loss::test_bad_input_at_the_switch_is_an_error_on_every_rank",
            "test_mixed_loss::test_ranks_switch_together",
            "test_sums::test_what_is_refused_is_refused_on_every_rank",
        ),
        12,
    ),
    "T13": Family(
        "draws",
        "max_pool_size: rows as often as stated, the same after a checkpoint, none in eval, global "
        "random state untouched; over 300 draws the loss is within 0.05 of the full pool's.",
        ("test_subsample",),
        30,
    ),
    "T14": Family(
        "compilers",
        "torch.compile in one graph, two at most over steps with changing positives, export, fake "
        "and meta tensors: the results of eager code.",
        ("test_compile",),
        16,
    ),
    "T15": Family(
        "no waiting for the device",
        "With 1, 10 and 100 classes a step on another device copies nothing to it, and reads back "
        "nothing, or one bool where values are checked; a linear pool reads once more, backward "
        "never.",
        ("test_fused::test_a_step_on_a_device",),
        96,
    ),
    "T16": Family(
        "memory",
        "No tensor of all pairs, none kept for backward; a pass over 32 768 rows, half of them "
        "positive, stays within 512 MiB.",
        (
            "test_engine::test_memory_of_smooth_ap",
            "test_engine::test_no_tensor_of_all_pairs",
            "test_engine::test_nothing_of_all_pairs_is_kept",
            "test_memory",
            "test_panel_line::test_no_tensor_of_all_pairs",
            "test_scratch",
        ),
        20,
    ),
    "T17": Family(
        "bad input",
        "Every argument, of a wrong type, shape or value, is an error that names it, what was "
        "expected and what came; conversions are the documented ones.",
        ("test_checks",),
        60,
    ),
    "T18": Family(
        "training",
        "30 steps on two and three processes equal those of one within 1e-12; a bad row costs a "
        "GradScaler one step; accumulated gradients are those of the batch; AP rises on a toy set, "
        "from an inverted ranking too.",
        ("test_accumulation", "test_training"),
        12,
    ),
    "T19": Family(
        "predecessor",
        "300 random histories give the losses of imbalanced-losses 0.6.0 within 1e-6 and its "
        "gradients within 1e-5; what differs on purpose is asserted on both sides.",
        ("test_predecessor", "test_predecessor_differences"),
        300,
    ),
    # T20 is `make mutation`, which takes hours.
    "T21": Family(
        "faults",
        "A NaN row on any process spoils one step; a step interrupted at any line leaves the state "
        "before it or after it; a process killed at any moment resumes bit for bit; where one "
        "dies, the others say so.",
        ("test_faults", "test_kills"),
        30,
    ),
    "T22": Family(
        "fuzzing",
        "Arguments, settings and checkpoints made of random bytes: a documented error that changes "
        "nothing, or a loss and a gradient as defined. `make fuzz` goes on, guided by coverage.",
        ("test_fuzz",),
        2000,
    ),
    "T23": Family(
        "public cases",
        "What people reported in public of other libraries works here: tools that average, "
        "broadcast, cast, copy, save and load models, tensors of other libraries, hooks, export.",
        ("test_public_cases",),
        350,
    ),
    "T24": Family(
        "public cases in processes",
        "The same with several processes: sub-groups inside DistributedDataParallel, a loss handed "
        "to processes that are spawned.",
        (),
        0,
        (sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/test_public_cases.py"),
    ),
}


def family_of(node_id: str) -> str:
    """The key of a test's family, "others" for a test that none names.

    >>> family_of("tests/test_ap_loss.py::test_gradcheck[one label]")
    'T4'
    >>> family_of("tests/test_ap_loss.py::test_known_answer")
    'T1'
    """
    path, _, name = node_id.partition("::")
    file = path.removeprefix("tests/").removesuffix(".py")
    for wanted in (f"{file}::{name.partition('[')[0]}", file):
        for key, family in FAMILIES.items():
            if wanted in family.tests:
                return key
    return "others"
