"""Fifty small mistakes in `_ranking` and `_rows`, each of which the fast suite has to notice.

    python -m tests.hardening.telling_mutants              # all of them: some five minutes
    python -m tests.hardening.telling_mutants spread queue # those whose file or text has a word

Each is made in a copy of the source, against which the test files named beside it are run up to the
first failure. Exits with 1 where one survives, or where its line is not there any more: then write
it anew. `make mutation` makes all mistakes there are, in hours.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401 (loaded once, for all forks)

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path("src/imbalanced_losses")


class Mutant(NamedTuple):
    """A line of a file, what stands there instead, and the tests that come to it."""

    file: str
    old: str  # occurs once in the file
    new: str
    tests: str  # names of test files without "test_", the likeliest first


MUTANTS = [
    # A metric, and what it is a mean of.
    Mutant("_ranking/average_precision.py", "(precision / among_all).neg_()",
           "precision / among_all", "table"),
    Mutant("_ranking/plan.py", "else 0.5 * queries.weights", "else queries.weights", "table"),
    Mutant("_ranking/plan.py", "return half if member else 0.0", "return half", "table"),
    Mutant("_ranking/plan.py", 'None if queries == "all" else False', "False",
           "ranked_sum backends"),
    Mutant("_ranking/plan.py", "return weights * value", "return weights", "table"),
    Mutant("_ranking/budget.py", "number + 0.5 * ranks.weights", "number", "table"),
    Mutant("_ranking/budget.py", "number = k / problems.unit", "number = k", "table"),
    Mutant("_ranking/budget.py", "number + 0.5 * one", "number", "table"),
    Mutant("_ranking/partial_auc.py", "(own[1] if has_last else 1) - own[0]", "own[1]", "table"),
    Mutant("_ranking/ndcg.py", "is_within | is_first", "is_within", "table"),
    Mutant("_ranking/ndcg.py", "weights.argsort(stable=True)", "(-weights).argsort()", "table"),
    # Which problems there are, and which rows are in them.
    Mutant("_ranking/problems.py", "is_valid = 0 < num_positives < num_rows",
           "is_valid = 0 < num_positives", "functional edges table"),
    Mutant("_ranking/problems.py", "chosen & (weights > 0)", "chosen", "table edges"),
    Mutant("_ranking/problems.py", "present * self.draws", "present * 1.0", "ranked_sum table"),
    Mutant("_ranking/problems.py", "at(self.value, problem, row) == 1",
           "at(self.value, problem, row) > 0", "table"),
    Mutant("_ranking/problems.py", "product(given.weights, counted)", "given.weights", "table"),
    Mutant("_ranking/canonical.py", "torch.where(weights > 0, scores, 0.0)", "scores",
           "functional"),
    Mutant("_ranking/canonical.py", "torch.finfo(dtype).max / 2", "torch.finfo(dtype).max",
           "edges fuzz"),
    Mutant("_ranking/canonical.py", "units[0])).to(dtype).clamp(min=smallest(dtype))",
           "units[0])).to(dtype)", "functional"),
    Mutant("_ranking/weighting.py", "odds * (1 - target_prior)", "odds", "weighting"),
    Mutant("_ranking/weighting.py", "variance.detach() > floor.square()", "variance.detach() > 0",
           "functional edges"),
    Mutant("_ranking/weighting.py", "mean = mean.detach()", "mean = mean * 1", "sums table"),
    # Slopes.
    Mutant("_ranking/ranked_sum.py", "torch.where(counts > share.least, average, 0)", "average",
           "table"),
    Mutant("_ranking/ranked_sum.py", "given.temperature * per", "given.temperature", "table"),
    Mutant("_ranking/ranked_sum.py", "if given.has_extremes:", "if False:", "edges panel_ranks"),
    Mutant("_ranking/ranked_sum.py", "temperature <= smallest(", "temperature < 0 * smallest(",
           "functional"),
    Mutant("_ranking/ranked_sum.py", "(scaled - layout.for_rows(origin))", "scaled",
           "functional ranked_sum"),
    Mutant("_ranking/ranked_sum.py", "torch.minimum(rank.clamp(min=0), among_all)", "rank",
           "fuzz edges"),
    Mutant("_ranking/ranked_sum.py", "[tensor.view_as(tensor) for tensor", "[tensor for tensor",
           "functional"),
    Mutant("_ranking/sigmoid.py", "x.abs_().neg_().sigmoid_()", "x.abs_().sigmoid_()", "backends"),
    Mutant("_ranking/dense.py", "is_exact = a.dtype != torch.float32 or",
           "is_exact = True or", "precision"),
    # Backends.
    Mutant("_ranking/tiles.py", "row, as_query, alpha=-1)", "row, as_query)", "table backends"),
    Mutant("_ranking/tiles.py", "slope if tile.is_real is None else slope * tile.is_real", "slope",
           "backends table"),
    Mutant("_ranking/tiles.py", "max(0, self._num_live_queries - tile.start)",
           "self._num_live_queries", "backends"),
    Mutant("_ranking/ragged.py", "torch.finfo(given.scores.dtype).min", "0", "ragged groups"),
    Mutant("_ranking/panels/ranks.py", "one[columns], value=-1)", "one[columns])",
           "table backends"),
    Mutant("_ranking/panels/line.py", "skipped = reach + 1", "skipped = reach",
           "panels panel_ranks"),
    # Rows on their way.
    Mutant("_rows/pool.py", "is_positive & (own >= 0)", "is_positive", "groups pool"),
    Mutant("_rows/pool.py", "(ids[theirs] == group)[:, None]", "(ids == ids)[:1, None]", "groups"),
    Mutant("_rows/groups.py", " & self._are_in(live)", "", "groups"),
    Mutant("_rows/queue.py", "rows.is_storable(self.ignore_index).nonzero().squeeze(1))\n        c",
           "rows.is_present(self.ignore_index).nonzero().squeeze(1))\n        c", "queue table"),
    Mutant("_rows/queue.py", "keep & (number > surplus)", "keep", "queue"),
    Mutant("_rows/queue.py", "cursor = len(source) % max(1, self.size)", "cursor = 0", "state"),
    Mutant("_rows/queue.py", "self.is_grouped != is_grouped and", "False and", "groups"),
    Mutant("_rows/checkpoint.py", "or words[:1].ne(_checksum(words[1:]))", "", "checkpoint"),
    Mutant("_rows/subsample.py", "(1 - by_quota) * ", "", "subsample"),
    Mutant("_rows/reduce.py", "counts.sum(-1).clamp(min=1)", "counts.shape[-1]", "reduce ap_loss"),
    Mutant("_rows/gather.py", 'group.size() if grad_reduce == "mean" else 1', "1", "worlds"),
    Mutant("_rows/gather.py", 'weights=any(header["weighted"] for header in headers)',
           "weights=batch.weights is not None", "worlds"),
    Mutant("_rows/gather.py", "if name not in _OWN and any(", "if False and any(", "gather"),
]  # fmt: skip


def files_of(mutant: Mutant, tests: Path) -> list[str]:
    """The test files that a mutant names, wherever below `tests` they lie."""
    found = [path for name in mutant.tests.split() for path in tests.rglob(f"test_{name}.py")]
    assert found, f"no file for {mutant.tests}"
    return [str(path) for path in found]


def run(arguments: list[str], output: Path) -> int:
    """Pytest's exit status in a fork, which has PyTorch loaded already and the package not yet."""
    child = os.fork()
    if not child:
        status = 70
        try:
            with output.open("w", encoding="utf-8") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                status = int(pytest.main(arguments))
                sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome_of(mutant: Mutant, root: Path, scratch: Path) -> str:
    """Who kills a mutant, or "survived", or "not there"."""
    target, output = scratch / mutant.file, scratch.parent / "output"
    text = (root / PACKAGE / mutant.file).read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        return "not there"
    target.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--rootdir", str(root)]
    try:
        status = run([*options, *files_of(mutant, root / "tests")], output)
    finally:
        target.write_text(text, encoding="utf-8")
    if status == 0:
        return "survived"
    said = output.read_text(encoding="utf-8").splitlines()
    lines = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return lines[0].split(" - ")[0] if lines else "\n".join(["no test failed", *said[-20:]])


def main(words: list[str], root: Path = ROOT) -> int:
    chosen = [one for one in MUTANTS if not words or any(w in f"{one}" for w in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder) / PACKAGE.name
        shutil.copytree(root / PACKAGE, scratch, ignore=shutil.ignore_patterns("__pycache__"))
        sys.path.insert(0, str(scratch.parent))
        os.environ.update(PYTHONPATH=str(scratch.parent), OMP_NUM_THREADS="1")
        sys.dont_write_bytecode = True
        for one in chosen:
            start = time.perf_counter()
            outcome = outcome_of(one, root, scratch)
            missed += not outcome.startswith(("FAILED", "ERROR"))
            seconds = time.perf_counter() - start
            print(f"{one.file}: {one.old!r}\n    {outcome} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} killed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
