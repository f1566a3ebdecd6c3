"""`python -m fuzz forward|load_state_dict [options of libFuzzer]`: coverage-guided, by atheris.

What was found that reaches further is kept in .cache/fuzz/<target>, where the next run goes on. An
input for which a property does not hold ends the run and lies in that folder as crash-<hash>;
`python -m fuzz <target> <file>` plays it again.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris
import torch

TARGETS = ("forward", "load_state_dict")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m fuzz {'|'.join(TARGETS)} [-runs=N] [-seed=N] [FILE …]")
    target, options = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["imbalanced_losses"]):
        module = importlib.import_module(f"fuzz.{target}")
    corpus = Path(".cache/fuzz") / target
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(Path(option).is_file() for option in options):
        options = [str(corpus), f"-artifact_prefix={corpus}/", "-max_len=256", *options]
    atheris.Setup([sys.argv[0], "-timeout=120", "-rss_limit_mb=4096", *options], module.one_run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
