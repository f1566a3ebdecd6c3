"""`python -m demo`: train four losses on real data and compare their test AP."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from demo.data import DataUnavailableError, Protein, Split, block_split, load_protein, row_split
from demo.train import LOSSES, Recipe, Run, make_task, train

FULL, QUICK = Recipe(), Recipe(steps=600, evaluate_every=50)
FULL_SEEDS, QUICK_SEEDS = 10, 4
MS_PER_STEP = 1.7  # on one core of 2024, averaged over the losses
OUTPUT = Path(__file__).resolve().parent / "output"


def main(arguments: Sequence[str] | None = None, data: Protein | None = None) -> int:
    """Run the demo.

    Args:
        arguments: of the command line; None: those of this process.
        data: used instead of the protein data.

    Returns:
        The exit code: 1 if the data could not be had.
    """
    options = _parse(arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # "±" on a terminal that lacks it
    console = Console(highlight=False)
    # One thread: the matrices are small, and the result does not depend on the number of cores.
    torch.set_num_threads(1)
    started = time.perf_counter()
    _introduce(console, options)
    try:
        data = load_protein() if data is None else data
    except DataUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    runs = _train_all(console, data, options)
    _report(console, data, runs, options)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Train the same small network with four losses (BCE, sqrt-weighted BCE, "
        "SmoothAP, SmoothAP + BCE) on the protein data of the KDD Cup 2004, 0.9 % positive, and "
        "compare their Average Precision on test rows.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK.steps} steps instead of {FULL.steps}, {QUICK_SEEDS} seeds instead of "
        f"{FULL_SEEDS}, and rows instead of blocks",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="how many splits to train on, at least 2"
    )
    parser.add_argument(
        "--split",
        choices=("rows", "blocks"),
        help="rows: a random split, stratified; blocks: test on proteins never trained on, which "
        "is harder and what one would meet in use",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="DIR",
        help="where plots and numbers go (default: demo/output in this checkout)",
    )
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = QUICK_SEEDS if options.quick else FULL_SEEDS
    if options.seeds < 2:
        parser.error("--seeds must be at least 2: differences are compared over seeds")
    if options.split is None:
        options.split = "rows" if options.quick else "blocks"
    return options


def _recipe(options: argparse.Namespace) -> Recipe:
    return QUICK if options.quick else FULL


def _introduce(console: Console, options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    seconds = options.seeds * len(LOSSES) * recipe.steps * MS_PER_STEP / 1000 + 10
    split = (
        "whole blocks, so the test proteins are new to the network"
        if options.split == "blocks"
        else "rows, at random and stratified"
    )
    console.print(
        "[bold]Which loss ranks rare positives best?[/bold]\n"
        "Data     protein homology (KDD Cup 2004): 145,751 rows, 74 features,\n"
        "         1,296 positives (0.889 %); downloaded once (22 MB), then cached\n"
        f"Split    60/20/20 by {split}\n"
        f"Losses   {', '.join(LOSSES)}\n"
        f"Runs     {options.seeds} seeds x {len(LOSSES)} losses, {recipe.steps} steps of "
        f"{recipe.batch_size} rows each, MLP 74-64-32-1\n"
        f"Time     about {round(seconds, -1):.0f} seconds on one CPU core\n"
    )


def _split(data: Protein, seed: int, kind: str) -> Split:
    if kind == "rows":
        return row_split(data.labels, seed)
    return block_split(data.blocks, data.labels, seed)


def _train_all(console: Console, data: Protein, options: argparse.Namespace) -> list[Run]:
    """Every loss on every seed; one line a seed, and a bar where there is a terminal."""
    recipe = _recipe(options)
    runs: list[Run] = []
    bar = Progress(
        TextColumn("{task.description:18}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    console.print(f"seed  {'  '.join(LOSSES)}  seconds   (test AP)")
    with bar:
        all_steps = bar.add_task("", total=options.seeds * len(LOSSES) * recipe.steps)
        for seed in range(options.seeds):
            task = make_task(data, _split(data, seed, options.split))
            for loss in LOSSES:
                bar.update(all_steps, description=loss)
                runs.append(train(task, loss, seed, recipe, lambda n: bar.advance(all_steps, n)))
            latest = runs[-len(LOSSES) :]
            aps = "  ".join(f"{run.test_ap:{len(run.loss)}.3f}" for run in latest)
            console.print(f"{seed:4}  {aps}  {sum(run.seconds for run in latest):7.1f}")
    return runs


def _report(console: Console, data: Protein, runs: list[Run], options: argparse.Namespace) -> None:
    from demo.report import make_table, verdict, write_files

    record: dict[str, Any] = {
        "quick": options.quick,
        "split": options.split,
        "seeds": options.seeds,
        **_recipe(options)._asdict(),
    }

    def test_labels(seed: int) -> torch.Tensor:
        return data.labels[_split(data, seed, options.split).test]

    files = write_files(runs, test_labels, record, options.output)
    console.print()
    console.print(make_table(runs))
    console.print(
        "Differences are paired by seed, with a 95 % interval and the seeds on which the\n"
        "loss of that row is better. Checkpoints were chosen by validation AP alone.\n"
    )
    console.print(verdict(runs))
    console.print()
    for path in files:
        console.print(f"  {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
