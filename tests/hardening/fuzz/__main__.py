"""Fuzzing guided by coverage, by atheris.

    python -m tests.hardening.fuzz forward|load_state_dict [options of libFuzzer]

What was found that reaches further is kept in .cache/fuzz/<target>, where the next run goes on. An
input for which a property does not hold ends the run and lies in that folder as crash-<hash>;
`python -m tests.hardening.fuzz <target> <file>` plays it again.

Long runs go in shares, each in a process of its own: the comparisons that atheris watches keep the
tensors that come of them, some 7 KB for each execution.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

PROGRAM = f"python -m {__package__}"
TARGETS = ("forward", "load_state_dict")
SHARE = 50_000  # executions of one process


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {PROGRAM} {'|'.join(TARGETS)} [-runs=N] [-seed=N] [FILE …]")
    target, options = sys.argv[1], sys.argv[2:]
    runs = number_in(options, "-runs=")
    if runs is not None and runs > SHARE:
        in_shares(target, options, runs)
    else:
        fuzz(target, options)


def number_in(options: list[str], name: str) -> int | None:
    return next((int(o.removeprefix(name)) for o in options if o.startswith(name)), None)


def in_shares(target: str, options: list[str], runs: int) -> None:
    """Processes one after the other, until one fails; a seed is that of the first."""
    seed = number_in(options, "-seed=")
    kept = [option for option in options if not option.startswith(("-runs=", "-seed="))]
    for done in range(0, runs, SHARE):
        own = [f"-runs={min(SHARE, runs - done)}"]
        if seed is not None:
            own.append(f"-seed={seed + done // SHARE}")
        print(f"{target}: {done} of {runs} executions done", flush=True)
        command = [sys.executable, "-m", __package__, target, *kept, *own]
        outcome = subprocess.run(command, check=False)
        if outcome.returncode:
            sys.exit(outcome.returncode)
    print(f"{target}: {runs} executions, and no property broken")


def fuzz(target: str, options: list[str]) -> None:
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["imbalanced_losses"]):
        module = importlib.import_module(f"{__package__}.{target}")
    corpus = Path(".cache/fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(Path(option).is_file() for option in options):
        options = [str(corpus), f"-artifact_prefix={corpus}/", "-max_len=256", *options]
    atheris.Setup([sys.argv[0], "-timeout=120", "-rss_limit_mb=4096", *options], module.one_run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
