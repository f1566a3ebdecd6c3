"""The families of the torture suite: which tests show a claim. docs/torture.md has the claims.

A test belongs to one family at most: to the one that names it, else to the one that names its file.
"""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    title: str
    tests: str  # words "room/file" or "room/file::test", without "test_" before the file
    at_least: int  # cases that must have run


FAMILIES = {
    "T1": Family(
        "definition",
        "unit/ap_loss unit/backends unit/functional metrics/ranked_sum unit/panel_ranks unit/line"
        " unit/panels unit/weighting metrics/table",
        400,
    ),
    "T2": Family(
        "average precision",
        "unit/diagnostics::test_exact_ap_is_scikit_learns unit/functional::test_known_answer"
        " unit/functional::test_small_temperature_is_average_precision",
        350,
    ),
    "T3": Family("invariants", "metrics/properties", 800),
    "T4": Family(
        "derivatives",
        "unit/ap_loss::test_gradcheck unit/backends::test_four_derivatives "
        "unit/backends::test_gradcheck unit/functional::test_forward_mode_is_refused "
        "metrics/table::test_derivatives",
        40,
    ),
    "T5": Family("special values", "unit/panel_ranks::test_infinite_scores metrics/edges", 40),
    "T6": Family(
        "nothing to rank",
        "unit/reduce metrics/table::test_nothing_to_rank "
        "metrics/edges::test_an_undefined_class_leaves_the_others_alone "
        "metrics/edges::test_hardly_a_row_with_a_filled_queue "
        "metrics/edges::test_a_function_without_a_ranking",
        45,
    ),
    "T7": Family("low precision", "metrics/precision", 36),
    "T8": Family("queue", "unit/queue", 200),
    "T9": Family(
        "checkpoints",
        "unit/checkpoint unit/mixed_loss::test_a_resumed_run_goes_on_exactly unit/state "
        "hardening/wrong_checkpoints",
        40,
    ),
    "T10": Family("any number of ranks", "hardening/worlds", 400),
    "T11": Family("trainers", "unit/distributed unit/gather unit/sums", 36),
    "T12": Family(
        "ranks that disagree",
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
    "T13": Family("draws", "unit/subsample", 30),
    "T14": Family("compilers", "unit/compile", 16),
    "T15": Family("no waiting for the device", "unit/cuda::test_a_step_on_a_device", 6),
    "T16": Family(
        "memory",
        "unit/backends::test_memory_of_smooth_ap unit/backends::test_no_tensor_of_all_pairs "
        " unit/memory "
        "unit/line::test_no_tensor_of_all_pairs unit/scratch",
        20,
    ),
    "T17": Family("bad input", "unit/arguments", 60),
    "T18": Family("training", "unit/accumulation hardening/training", 12),
    "T19": Family("predecessor", "hardening/predecessor hardening/predecessor_differences", 300),
    "T21": Family("faults", "hardening/faults hardening/kills", 30),
    "T22": Family("fuzzing", "hardening/fuzz", 2000),
    "T23": Family("public cases", "hardening/public_cases", 200),
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
