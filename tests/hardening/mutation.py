"""Mutation testing of `src`: mutmut, with a test runner that collects the tests once.

    python -m tests.hardening.mutation run _rows.queue _ranking*  # what is not done of these
    python -m tests.hardening.mutation again NAME…                # these, whatever is known
    python -m tests.hardening.mutation report                     # the table, and who survived

mutmut starts pytest for each mutant, which takes longer than most tests that kill one. Here the
process from which mutants are forked has imported and collected everything, and has run no test. A
mutant meets tests that reach it, one variant of each before the next, those of its own module
before others, the fastest first: for `FIRST_ROUND_S` of their usual time, and who survives that
for `--seconds`.

Everything else is mutmut's: `mutmut show NAME` prints a mutant, `mutmut browse` lets one look.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import importlib
import json
import math
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from datetime import date
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mutmut import __main__ as mutmut
from mutmut.mutation.data import MutantLineSpans, SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.runners.harness import ListAllTestsResult, TestRunner
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.type_checking import run_type_checker
from mutmut.utils.file_utils import change_cwd, walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name
from mutmut.workers.isolation import ForkServerRunner, run_in_fork_with_result

PACKAGE = "imbalanced_losses"
FOLDER = Path("mutants")
FIRST_ROUND_S = 2.0  # of tests, by the time that they usually take
MEMORY = 6 << 30  # bytes that a mutant may map beyond what was mapped before
RESULTS = Path("benchmarks/results/mutation.csv")
JUSTIFIED = Path("tests/hardening/mutants.csv")  # survivors that no test can tell from the original
CAUGHT = ("killed", "timeout", "suspicious", "segfault", "caught by type check")
MISSED = ("survived", "no tests")
COLUMNS = (*CAUGHT, *MISSED, "justified", "not checked")


class WarmRunner(TestRunner):  # type: ignore[misc]
    """Runs tests of one session, which is collected once; every call is in a process of its own."""

    def __init__(self) -> None:
        from _pytest.config import _prepareconfig
        from _pytest.main import Session

        settings = mutmut.config()
        # mutmut leaves files open between forks, which would be an error of the next test.
        plugins = ["-p", "no:terminal", "-p", "no:unraisableexception"]
        options = ["--rootdir=.", "-s", *plugins, *settings.pytest_add_cli_args]
        self.seconds = math.inf  # of tests that a mutant meets
        with change_cwd(FOLDER):
            config = _prepareconfig([*options, *settings.pytest_add_cli_args_test_selection])
            config._do_configure()
            self.session = Session.from_config(config)
            config.hook.pytest_sessionstart(session=self.session)
            config.hook.pytest_collection(session=self.session)
        self.items = {item.nodeid: item for item in self.session.items}
        for name in run_in_fork_with_result(self._imported_by_tests):
            with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
                importlib.import_module(name)

    def _imported_by_tests(self) -> list[str]:
        """Modules that torch imports late, half a second of them in every fork."""
        before = set(sys.modules)
        first_of_each_file = {item.path: item for item in reversed(self.session.items)}
        self._run(list(first_of_each_file.values()))
        return [name for name in sys.modules if name not in before]

    def list_all_tests(self) -> ListAllTestsResult:
        return ListAllTestsResult(ids=set(self.items))

    def run_forced_fail(self) -> int:
        return self.run_tests(mutant_name=None, tests=[])

    def run_stats(self, *, tests: Iterable[str]) -> int:
        """What each test reaches, and its processor time."""
        for name in list(tests) or self.items:
            clear_caches()
            state()._stats.clear()
            start = time.process_time()
            self._run([self.items[name]])
            if self.session.testsfailed:
                print(f"failed without any mutant: {name}", flush=True)
                return 1
            state().duration_by_test[name] = time.process_time() - start
            for function in state()._stats:
                state().tests_by_mangled_function_name[function].add(name)
        return 0

    def run_tests(self, *, mutant_name: str | None, tests: Iterable[str]) -> int:
        items = self._in_order([self.items[name] for name in tests or self.items], mutant_name)
        limit_what_is_used(sum(map(usual_seconds, items)))
        self._run(items)
        for process in multiprocessing.active_children():
            process.kill()
        return int(self.session.testsfailed > 0)

    def _run(self, items: list[pytest.Item]) -> None:
        with change_cwd(FOLDER):
            for item, next_item in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
                if self.session.testsfailed:
                    break

    def _in_order(self, items: list[pytest.Item], mutant_name: str | None) -> list[pytest.Item]:
        own = f"/test_{module_of(mutant_name or '').rpartition('.')[2].lstrip('_')}.py"
        items.sort(key=usual_seconds)
        seen = Counter[str]()
        order = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            order[item] = (seen[function] > 0, own not in item.nodeid, seen[function])
            seen[function] += 1
        items.sort(key=order.__getitem__)
        left, kept = self.seconds if mutant_name else FIRST_ROUND_S, []
        for item in items:
            if usual_seconds(item) <= left:
                left -= usual_seconds(item)
                kept.append(item)
        return kept


def usual_seconds(item: pytest.Item) -> float:
    seconds: float = state().duration_by_test.get(item.nodeid, 0.0)
    return seconds


def clear_caches() -> None:
    """So that what a test reaches does not depend on the tests before it."""
    for name, module in list(sys.modules.items()):
        if name.startswith(PACKAGE):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def limit_what_is_used(seconds: float) -> None:
    """Some mutants never end, or ask for all memory there is."""
    limit = int(time.process_time() + 20 + 5 * seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))


def outcomes() -> dict[str, str]:
    """Of each mutant, by name."""
    found = {}
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        found |= {name: status_by_exit_code[code] for name, code in data.exit_code_by_key.items()}
    return found


def module_of(mutant: str) -> str:
    return mutant.rpartition(".")[0].removeprefix(f"{PACKAGE}.")


def run(modules: list[str], processes: int, seconds: float) -> None:
    """The mutants of these modules that are not done; then those who survived for no reason."""
    runner, justified = prepared(), justifications()
    rounds = ((("not checked", "no tests"), FIRST_ROUND_S), (("survived",), seconds))
    for wanted, limit in rounds:
        if limit < FIRST_ROUND_S:
            break
        runner.seconds = limit
        todo = [
            name
            for name, outcome in outcomes().items()
            if outcome in wanted
            and any(fnmatch(module_of(name), module) for module in modules)
            and not (outcome == "survived" and is_any(justified, name))
        ]
        if todo:
            check_that_nothing_is_killed_for_nothing(runner)
            mutmut._run(todo, processes)


def check_that_nothing_is_killed_for_nothing(runner: WarmRunner) -> None:
    """The code as it is has to survive twice, by the way that mutants go."""
    forks = mutmut.get_mutant_runner(1)
    mutmut.collect_or_load_stats(forks)
    forks.startup()
    for number in (1, 2):
        forks.submit(f"{PACKAGE}.none.x__mutmut_{number}", list(runner.items), 3600, 0.0)
        result = forks.wait_for_result()
        assert result.exit_code == 0, f"the unmutated code was killed: {result}"
    forks.shutdown()


def prepared() -> WarmRunner:
    """mutmut with the runner in the place of its own; mutants are made where that is to be done."""
    mutmut.set_mutant_under_test("mutant_generation")
    FOLDER.mkdir(exist_ok=True)
    mutmut.copy_src_dir()
    mutmut.copy_also_copy_files()
    mutmut.setup_source_paths()
    mutmut.create_mutants(1)
    mutmut.set_mutant_under_test("list_all_tests")
    runner = WarmRunner()
    mutmut.get_mutant_runner = lambda processes: ForkServerRunner(processes, lambda: runner, {})
    mutmut.filter_mutants_with_type_checker = refused_by_mypy
    return runner


def refused_by_mypy() -> dict[str, Any]:
    """What mutmut's own function of this purpose finds, without parsing megabytes of mutants.

    And without what mypy only refuses because mutants stand beside each other in one class.
    """
    sources = sorted((FOLDER / "src").rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    file = FOLDER / f"type-check-{digest[:12]}.json"
    if not file.exists():
        with change_cwd(FOLDER):
            errors = run_type_checker(mutmut.config().type_check_command)
        refused = {}
        for error in errors:
            if "already defined" in error.error_description:
                continue
            path = error.file_path.relative_to(FOLDER.absolute())
            spans = MutantLineSpans.load(path=path).span_by_function_name
            (function,) = (
                name for name, span in spans.items() if span.start <= error.line_number <= span.end
            )
            assert not function.endswith("_orig"), error
            refused[get_mutant_name(path, function)] = error.error_description
        file.write_text(json.dumps(refused, indent=1))
    return {
        name: SimpleNamespace(error=SimpleNamespace(error_description=description))
        for name, description in json.loads(file.read_text()).items()
    }


def report() -> None:
    """Write the counts of each module that was run, and print the survivors not justified."""
    justified = justifications()
    rows: dict[str, Counter[str]] = {}
    for name, outcome in outcomes().items():
        is_justified = outcome in MISSED and is_any(justified, name)
        rows.setdefault(module_of(name), Counter())["justified" if is_justified else outcome] += 1
        if outcome in MISSED and not is_justified:
            print(f"{outcome}: {name}\n    {mutated_line(name)}")
    with RESULTS.open("w", newline="") as file:
        file.write(f"# {date.today()}; {versions()}\n")
        file.write("# command: python -m tests.hardening.mutation run MODULE…, then report\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["module", "mutants", *COLUMNS, "score"])
        for module, counts in rows.items():
            if counts["killed"]:
                cells = (counts[name] for name in COLUMNS)
                writer.writerow([module, counts.total(), *cells, score(counts)])


def is_any(justified: list[tuple[str, str]], mutant: str) -> bool:
    line = mutated_line(mutant)
    return any(re.search(where, mutant) and re.search(what, line) for where, what in justified)


def mutated_line(mutant: str) -> str:
    """The lines that a mutant has in the place of others."""
    lines = get_diff_for_mutant(mutant).splitlines()
    return " ".join(line[1:].strip() for line in lines[3:] if line.startswith("+"))


def justifications() -> list[tuple[str, str]]:
    """Where and what: regular expressions, found in the name and in the line of a mutant."""
    with JUSTIFIED.open(newline="") as file:
        return [(row["where"], row["what"]) for row in csv.DictReader(file)]


def score(counts: Counter[str]) -> str:
    """Percent caught, of the mutants that were run and that a test could tell."""
    caught = sum(counts[name] for name in CAUGHT)
    missed = sum(counts[name] for name in MISSED)
    return f"{100 * caught / max(1, caught + missed):.1f}"


def versions() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    names = ("torch", "mutmut", "mypy", "pytest", "hypothesis")
    return ", ".join([f"python {python}", *(f"{name} {version(name)}" for name in names)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    commands = parser.add_subparsers(dest="command", required=True)
    modules = commands.add_parser("run")
    modules.add_argument("modules", nargs="+")
    modules.add_argument("--seconds", type=float, default=30, help="of tests for a survivor")
    commands.add_parser("again").add_argument("mutants", nargs="+")
    commands.add_parser("report")
    options = parser.parse_args()
    if options.command == "run":
        run(options.modules, options.processes, options.seconds)
    elif options.command == "again":
        prepared()
        mutmut._run(options.mutants, options.processes)
    else:
        report()


if __name__ == "__main__":
    main()
