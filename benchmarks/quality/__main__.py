"""Which loss is ahead at which number, on real data.

    python -m benchmarks.quality [question] [--tasks …] [--losses …] [--splits 10]
        [--report [--gains]]

One network (an MLP F-64-32-1), the same steps and batches, and the same tuning for every loss of
a question: of its settings and of the checkpoints the one with the best validation value of the
number in question. Test rows are scored once a run. The recipes were chosen on other splits
(`--development`). Every finished run is in the CSV at once; started again, the rest is done.
"""

from __future__ import annotations

import argparse

from benchmarks import _measure
from benchmarks.quality import report, tasks
from benchmarks.quality.questions import QUESTIONS
from benchmarks.quality.runs import Job, finished, run_all

DEVELOPMENT_SEED = 100  # splits from here on are for choosing recipes, never reported


def main() -> None:
    """Train what is left, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="question", help=", ".join(QUESTIONS))
    parser.add_argument("--tasks", nargs="+", help="instead of all")
    parser.add_argument("--losses", nargs="+", help="instead of all")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--development", action="store_true", help="splits to choose recipes on")
    parser.add_argument("--report", action="store_true", help="print what there is, and plot it")
    parser.add_argument("--gains", action="store_true", help="with the recipe's gain in each cell")
    options = parser.parse_args()
    if unknown := set(options.questions) - QUESTIONS.keys():
        parser.error(f"no question is called {', '.join(unknown)}: {', '.join(QUESTIONS)}")
    first = DEVELOPMENT_SEED if options.development else 0
    for name in options.questions or QUESTIONS:
        question = QUESTIONS[name]
        path = _measure.RESULTS / f"quality-{name}{'-development' * options.development}.csv"
        jobs = [
            Job(name, task, split, loss, setting)
            for task in options.tasks or question.numbers
            for split in range(first, first + options.splits)
            for loss, contender in question.contenders.items()
            for setting in (question.leaves if isinstance(contender, str) else question.settings)
            if loss in (options.losses or question.contenders)
            if (task, loss) not in question.skipped
        ]
        if not options.report:
            for task in options.tasks or question.numbers:
                tasks.load(task)  # once, before the workers ask for it
            run_all(jobs, path, options.workers)
        report.report(
            name, finished(path), by_validation=options.development, with_gains=options.gains
        )


if __name__ == "__main__":
    main()
