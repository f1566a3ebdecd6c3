"""`python -m demo`: train five ways on real data; judge over all rows and per block."""

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
from demo.train import LOSSES, ON_WHOLE_BLOCKS, Recipe, Run, make_task, steps_of, train

FULL, QUICK = Recipe(), Recipe(steps=600, block_steps=250)
FULL_SEEDS, QUICK_SEEDS = 10, 4
MS_PER_STEP, MS_PER_BLOCK_STEP = 2.0, 6.0  # on one core of 2024, averaged over the losses
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
    _report(console, runs, options)
    console.print(f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo",
        description="Train the same small network on the protein data of the KDD Cup 2004, 0.9 % "
        "positive, with BCE, sqrt-weighted BCE and SmoothAP, over all rows and within blocks, and "
        "compare the rankings of test rows over all rows and per block.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{QUICK.steps} steps instead of {FULL.steps}, and {QUICK_SEEDS} splits instead of "
        f"{FULL_SEEDS}",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="how many splits to train on, at least 2"
    )
    parser.add_argument(
        "--split",
        choices=("rows", "blocks"),
        default="blocks",
        help="blocks (default): test on proteins never trained on, which is what one would meet "
        "in use; rows: a random split, stratified, which is easier",
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
    return options


def _recipe(options: argparse.Namespace) -> Recipe:
    return QUICK if options.quick else FULL


def _introduce(console: Console, options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    milliseconds = sum(
        MS_PER_BLOCK_STEP * recipe.block_steps
        if loss in ON_WHOLE_BLOCKS
        else MS_PER_STEP * recipe.steps
        for loss in LOSSES
    )
    seconds = options.seeds * milliseconds / 1000 + 10
    split = (
        "whole blocks, so the test proteins are new to the network"
        if options.split == "blocks"
        else "rows, at random and stratified"
    )
    console.print(
        "[bold]Which loss ranks rare positives best?[/bold]\n"
        "Data     protein homology (KDD Cup 2004): 145,751 rows, 74 features,\n"
        "         1,296 homologues (0.889 %), in 153 blocks, one a query protein;\n"
        "         downloaded once (22 MB), then cached\n"
        "Judged   over all rows, and per block as in the cup\n"
        f"Split    60/20/20 by {split}\n"
        f"Runs     {options.seeds} splits x {len(LOSSES)} losses, MLP 74-64-32-1,\n"
        f"         {recipe.steps} steps of {recipe.batch_size} random rows,\n"
        f"         or {recipe.block_steps} of {recipe.blocks_per_batch} whole blocks, about "
        f"{recipe.blocks_per_batch * 952:,} rows\n"
        f"Time     about {round(seconds, -1):.0f} seconds on one CPU core\n"
    )


def _split(data: Protein, seed: int, kind: str) -> Split:
    if kind == "rows":
        return row_split(data.labels, seed)
    return block_split(data.blocks, data.labels, seed)


def _train_all(console: Console, data: Protein, options: argparse.Namespace) -> list[Run]:
    """Every loss on every split; one line a split, and a bar where there is a terminal."""
    recipe = _recipe(options)
    runs: list[Run] = []
    bar = Progress(
        TextColumn("{task.description:31}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    steps = options.seeds * sum(steps_of(loss, recipe) for loss in LOSSES)
    with bar:
        all_steps = bar.add_task("", total=steps)
        for seed in range(options.seeds):
            task = make_task(data, _split(data, seed, options.split))
            for loss in LOSSES:
                bar.update(all_steps, description=loss)
                runs.append(train(task, loss, seed, recipe, lambda n: bar.advance(all_steps, n)))
            seconds = sum(run.seconds for run in runs if run.seed == seed)
            console.print(f"Split {seed + 1} of {options.seeds}: {seconds:.1f} s")
    return runs


def _report(console: Console, runs: list[Run], options: argparse.Namespace) -> None:
    from demo.report import legend, make_table, verdict, write_files

    record: dict[str, Any] = {
        "quick": options.quick,
        "split": options.split,
        "seeds": options.seeds,
        **_recipe(options)._asdict(),
    }
    files = write_files(runs, record, options.output)
    console.print()
    console.print(make_table(runs))
    console.print(f"{legend(runs)}\n\n{verdict(runs)}\n")
    for path in files:
        console.print(f"  {path}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
