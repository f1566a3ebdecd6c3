"""Test AP of losses on real imbalanced tasks, with equal tuning by validation AP.

    python -m benchmarks.quality [--plan final] [--tasks protein chess] [--splits 10] [--report]

Eight binary tasks (`benchmarks.tasks`), fixed splits, one network (an MLP F-64-32-1), one budget
(500 steps of 1,024 rows, AdamW with one cycle) for every loss. For each task, split and loss the
learning rate and the weight decay are those of the best validation AP, and so is the checkpoint;
test rows are scored once a run. The library's loss has one recipe for all tasks, `OURS`.

Every finished run is a line of the CSV at once; started again, the rest is done. `--report` prints
what there is. Then: differences of test AP, paired by split, to the member of the BCE family that
has the best mean validation AP on that task, with Wilcoxon's signed-rank test.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from benchmarks import _measure, _peers, tasks
from benchmarks._measure import Row

LEARNING_RATES = (3e-3, 1e-2)
WEIGHT_DECAYS = (1e-4, 1e-1)
BATCH_SIZE, STEPS, EVALUATE_EVERY = 1024, 500, 50
ASSETS = _measure.RESULTS.parents[1] / "docs" / "assets"
DEVELOPMENT_SEED = 100  # splits from here on are for choosing the recipe, never reported
SECOND_MOMENT = 0.999  # of AdamW
SAMPLED_POSITIVE = 0.25  # of a batch, where LibAUC asks for a sampler
KEY = ("task", "split", "loss", "learning_rate", "weight_decay")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [n], labels [n], rows [n] -> []
Make = Callable[[Tensor], Loss]  # of the training labels [N]


class Job(NamedTuple):
    """One training run."""

    task: str
    split: int
    loss: str
    learning_rate: float
    weight_decay: float


# --- Losses: from the training labels [N] to a function -------------------------------------------


def _weighted(power: float) -> Make:
    def make(labels: Tensor) -> Loss:
        weight = ((labels == 0).sum() / (labels == 1).sum()) ** power
        return lambda logits, y, _: bce(logits, y.float(), pos_weight=weight)

    return make


def _focal(labels: Tensor) -> Loss:
    """Lin et al. 2017, γ = 2, without α."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        each = bce(logits, y.float(), reduction="none")
        return ((1 - torch.exp(-each)).square() * each).mean()

    return loss


def _hard_negatives(labels: Tensor) -> Loss:
    """BCE on all positives and the tenth of the negatives that has the highest scores."""

    def loss(logits: Tensor, y: Tensor, _: Tensor) -> Tensor:
        negatives = logits[y == 0]
        hardest = negatives.topk(max(1, len(negatives) // 10)).values
        kept = torch.cat((logits[y == 1], hardest))
        is_positive = torch.arange(len(kept)) < len(kept) - len(hardest)
        return bce(kept, is_positive.float())

    return loss


class Recipe(NamedTuple):
    """Smooth-AP of the batch, in units of the spread, beside another loss; no queue."""

    temperature: float
    main_weight: float = 1.0
    auxiliary: str = "focal"  # a key of BCE_FAMILY
    sampled_positive: float | None = None  # share of positives in a batch; None: as they come
    at_prior: bool = False  # rank at the prevalence of the training rows all the same
    unit: Literal["score", "spread"] = "spread"
    queue_size: int = 0
    upper_bound: bool = False  # SupAP in place of Smooth-AP
    batch_size: int = BATCH_SIZE
    second_moment: float = SECOND_MOMENT
    last_temperature: float | None = None  # approached geometrically over the whole training
    warmup: int = 0  # steps with the other loss alone, and as many to blend over

    def name(self) -> str:
        temperature = f"τ {self.temperature:g}"
        if self.last_temperature is not None:
            temperature += f" to {self.last_temperature:g}"
        parts = ["SupAP" if self.upper_bound else "SmoothAP", temperature]
        if self.unit == "score":
            parts[-1] += " raw"
        if self.main_weight < 1:
            parts += [f"w {self.main_weight:g}", self.auxiliary]
        if self.queue_size:
            parts.append(f"queue {self.queue_size}")
        if self.sampled_positive is not None:
            parts.append(f"{self.sampled_positive:.0%} positives")
        if self.at_prior:
            parts.append("at prior")
        if self.warmup:
            parts.append(f"warm-up {self.warmup}")
        return _trained_name(", ".join(parts), self.batch_size, self.second_moment)

    def __call__(self, labels: Tensor) -> Loss:
        from imbalanced_losses import MixedLoss, SmoothAPLoss

        ranking = SmoothAPLoss(
            1,
            queue_size=self.queue_size,
            queue_follows_shift=self.queue_size > 0,
            temperature=self.temperature,
            temperature_unit=self.unit,
            target_prior=labels.double().mean().item() if self.at_prior else None,
        )
        pointwise = BCE_FAMILY[self.auxiliary](labels)
        if self.upper_bound:
            bound = functools.partial(_upper_bound, temperature=self.temperature)
            w = self.main_weight
            return lambda x, y, _: w * bound(x, y) + (1 - w) * pointwise(x, y, _)
        if self.main_weight == 1 and not self.warmup and self.last_temperature is None:
            return lambda logits, y, _: ranking(logits[:, None], y)
        mixed = MixedLoss(
            lambda logits, y: pointwise(logits.squeeze(1), y, y),
            ranking,
            main_weight=self.main_weight,
            warmup_steps=self.warmup,
            blend_steps=self.warmup,
            temperature=None
            if self.last_temperature is None
            else (self.temperature, self.last_temperature, STEPS),
        )
        return lambda logits, y, _: mixed(logits[:, None], y)


def _trained_name(name: str, batch_size: int, second_moment: float) -> str:
    if batch_size != BATCH_SIZE:
        name += f", batch {batch_size}"
    if second_moment != SECOND_MOMENT:
        name += f", β₂ {second_moment:g}"
    return name


def _upper_bound(logits: Tensor, y: Tensor, temperature: float) -> Tensor:
    """SupAP, an upper bound of 1 − AP (Ramzi et al., NeurIPS 2021), of standardised scores.

    Ranks among positives are the true ones; a negative counts by a sigmoid where it is below the
    positive, by a sigmoid + ½ where it is barely above, and linearly beyond.
    """
    margin, slope = 2 * temperature, 1.0
    scores = logits / logits.std()
    positives, negatives = scores[y == 1], scores[y == 0]
    if len(positives) == 0:
        return 0 * logits.sum()
    above = 1 + (positives > positives[:, None]).sum(1)
    lead = negatives - positives[:, None]  # [P, N]
    step = torch.sigmoid(lead / temperature)
    edge = torch.sigmoid(torch.tensor(margin / temperature)) + 0.5
    far = slope * (lead - margin) + edge
    counted = torch.where(lead <= 0, step, torch.where(lead < margin, step + 0.5, far))
    return 1 - (above / (above + counted.sum(1))).mean()


class Trained(NamedTuple):
    """A loss with batches or an optimiser of its own."""

    make: Make
    sampled_positive: float | None = None
    batch_size: int = BATCH_SIZE
    second_moment: float = SECOND_MOMENT

    def __call__(self, labels: Tensor) -> Loss:
        return self.make(labels)


def _predecessor(labels: Tensor) -> Loss:
    """With its own defaults: raw logits, τ = 0.01, a queue of 1,024."""
    loss_fn = _peers.load("predecessor").SmoothAPLoss(1)
    return lambda logits, y, _: loss_fn(logits[:, None], y)


def _libauc(labels: Tensor) -> Loss:
    loss_fn = _peers.load("libauc").APLoss(data_len=len(labels))
    return lambda logits, y, rows: loss_fn(torch.sigmoid(logits)[:, None], y[:, None], rows)


BCE_FAMILY: dict[str, Make] = {
    "BCE": _weighted(0.0),
    "sqrt-weighted BCE": _weighted(0.5),
    "weighted BCE": _weighted(1.0),
    "focal": _focal,
    "hard-negative BCE": _hard_negatives,
}
SQRT, BCE, HARD = "sqrt-weighted BCE", "BCE", "hard-negative BCE"
# The one recipe for all tasks, chosen on development splits among CANDIDATES.
OURS = "SmoothAP + BCE"
LOSSES: dict[str, Make] = {
    **BCE_FAMILY,
    "LibAUC APLoss": _libauc,
    OURS: Recipe(0.3, 0.8, SQRT),
    "SmoothAP": Recipe(0.1),
    "predecessor": _predecessor,
}
CANDIDATES: dict[str, Make] = (
    {
        recipe.name(): recipe
        for recipe in (
            # On all tasks.
            *(Recipe(tau, w, SQRT) for tau, w in ((0.1, 0.2), (0.1, 0.5), (0.1, 0.8))),
            *(Recipe(tau, w, SQRT) for tau, w in ((0.3, 0.5), (0.3, 0.8))),
            *(Recipe(tau, w, BCE) for tau, w in ((0.1, 0.5), (0.3, 0.5), (0.3, 0.9))),
            *(Recipe(0.3, w) for w in (0.5, 0.8, 0.9, 0.95)),
            *(Recipe(tau, w) for tau, w in ((0.1, 0.8), (0.1, 0.95), (1.0, 0.8), (1.0, 0.9))),
            Recipe(0.3, 0.8, HARD),
            Recipe(0.3, 0.8, sampled_positive=0.1, at_prior=True),
            Recipe(0.1, 0.8, upper_bound=True),
            # On the two tasks with the fewest positives, and given up there.
            *(Recipe(0.3, w, SQRT) for w in (0.02, 0.1, 0.3, 0.95)),
            *(Recipe(0.3, w) for w in (0.02, 0.1, 0.3)),
            *(Recipe(0.3, w, BCE) for w in (0.02, 0.1)),
            *(Recipe(1.0, w, SQRT) for w in (0.1, 0.8)),
            *(Recipe(tau, w) for tau, w in ((0.1, 0.1), (1.0, 0.3))),
            Recipe(0.3, 0.3, HARD),
            *(Recipe(0.3, 0.8, BCE, sampled_positive=share) for share in (0.1, 0.25)),
            Recipe(0.3, 0.8, sampled_positive=0.1),
            Recipe(0.3, 0.8, BCE, sampled_positive=0.1, at_prior=True),
            Recipe(0.1, 0.3, BCE, sampled_positive=0.25, at_prior=True),
            Recipe(1.0, 0.5, BCE, unit="score"),
            # Later, on all tasks: pools of 4,096, what Adam remembers, schedules.
            *(
                Recipe(tau, w, SQRT, batch_size=4096)
                for tau, w in ((0.1, 0.8), (0.3, 0.8), (0.3, 0.5))
            ),
            Recipe(0.1, batch_size=4096),
            *(Recipe(0.3, w, SQRT, second_moment=0.95) for w in (0.5, 0.8)),
            Recipe(0.1, second_moment=0.95),
            Recipe(0.3, 0.8, SQRT, queue_size=4096),
            Recipe(1.0, 0.8, SQRT, last_temperature=0.1),
            *(Recipe(tau, 0.8, SQRT, warmup=100) for tau in (0.1, 0.3)),
        )
    }
    | {
        _trained_name(name, 4096, SECOND_MOMENT): Trained(make, batch_size=4096)
        for name, make in BCE_FAMILY.items()
    }
    | {
        _trained_name(name, BATCH_SIZE, 0.95): Trained(make, second_moment=0.95)
        for name, make in BCE_FAMILY.items()
    }
)
# As many positives as negatives in every batch, and the prevalence known or not.
REBALANCED: dict[str, Make] = {
    f"{name}, {how}": contender
    for how, share in (("as they come", None), ("50 % positives", 0.5))
    for name, contender in (
        ("BCE", Trained(_weighted(0.0), share)),
        ("SmoothAP", Recipe(0.1, sampled_positive=share)),
        (OURS, Recipe(0.3, 0.8, SQRT, sampled_positive=share)),
    )
} | {
    "SmoothAP, 50 % positives, target_prior": Recipe(0.1, sampled_positive=0.5, at_prior=True),
    f"{OURS}, 50 % positives, target_prior": Recipe(
        0.3, 0.8, SQRT, sampled_positive=0.5, at_prior=True
    ),
}
REBALANCED_TASKS = ("protein", "chess")


# --- One run --------------------------------------------------------------------------------------

_cached: dict[tuple[str, int], Any] = {}


def run(job: Job) -> Row:
    """Train, keep the checkpoint of the best validation AP, score the test rows once."""
    from demo import train

    torch.set_num_threads(1)
    if (job.task, job.split) not in _cached:
        _cached.clear()
        table = tasks.load(job.task)
        _cached[job.task, job.split] = train.make_task(table, table.split(job.split))
    task = _cached[job.task, job.split]
    started = time.perf_counter()
    model = train.make_model(task.train.features.shape[1], job.split)
    best_step, validation_ap = _fit(model, task, job)
    test_ap = train.average_precision(_scores(model, task.test.features), task.test.labels)
    return {
        **job._asdict(),
        "best_step": best_step,
        "validation_ap": f"{validation_ap:.6f}",
        "test_ap": f"{test_ap:.6f}",
        "seconds": f"{time.perf_counter() - started:.2f}",
    }


def _fit(model: nn.Module, task: Any, job: Job) -> tuple[int, float]:
    """Train in place; step and AP of the best validation, whose weights the model has then."""
    from demo import train

    features, labels = task.train
    make = {**LOSSES, **CANDIDATES, **REBALANCED}[job.loss]
    loss_fn = make(labels)
    rates = {"lr": job.learning_rate, "weight_decay": job.weight_decay}
    is_libauc = job.loss == "LibAUC APLoss"
    if is_libauc:
        from libauc.optimizers import SOAP

        optimizer: Any = SOAP(model.parameters(), mode="adam", verbose=False, **rates)
    else:
        betas = (0.9, getattr(make, "second_moment", SECOND_MOMENT))
        optimizer = torch.optim.AdamW(model.parameters(), betas=betas, fused=True, **rates)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=job.learning_rate, total_steps=STEPS, cycle_momentum=not is_libauc
    )
    sampled = SAMPLED_POSITIVE if is_libauc else getattr(make, "sampled_positive", None)
    batch_size = getattr(make, "batch_size", BATCH_SIZE)
    batches = (
        _batches(len(labels), batch_size, job.split)
        if sampled is None
        else _quota_batches(labels, sampled, batch_size, job.split)
    )
    best_step, best_ap, best_weights = 0, -1.0, model.state_dict()
    for step, rows in zip(range(1, STEPS + 1), batches, strict=False):
        optimizer.zero_grad()
        loss_fn(model(features[rows]), labels[rows], rows).backward()
        optimizer.step()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            scores = _scores(model, task.validation.features)
            if not bool(scores.isfinite().all()):
                break
            ap = train.average_precision(scores, task.validation.labels)
            if ap > best_ap:
                best_step, best_ap = step, ap
                best_weights = {name: w.clone() for name, w in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return best_step, best_ap


def _batches(num_rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Whole epochs, shuffled anew, full batches only."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, num_rows)
    while True:
        order = torch.randperm(num_rows, generator=generator)
        yield from (rows for rows in order.split(size) if len(rows) == size)


def _quota_batches(labels: Tensor, share: float, batch_size: int, seed: int) -> Iterator[Tensor]:
    """A fixed share of positives in every batch, as LibAUC's samplers make them."""
    generator = torch.Generator().manual_seed(seed)
    rare, common = (labels == 1).nonzero().squeeze(1), (labels == 0).nonzero().squeeze(1)
    num_rare = round(share * batch_size)
    while True:
        picks = [
            part[torch.randint(len(part), (number,), generator=generator)]
            for part, number in ((rare, num_rare), (common, batch_size - num_rare))
        ]
        yield torch.cat(picks)


@torch.no_grad()
def _scores(model: nn.Module, features: Tensor) -> Tensor:
    scores: Tensor = model(features)
    return scores


# --- All runs -------------------------------------------------------------------------------------


def finished(path: Path) -> list[Row]:
    return list(_measure.read_csv(path)) if path.exists() else []


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def run_all(jobs: list[Job], path: Path, workers: int) -> None:
    """Run what is not in the file yet; the predecessor apart, for it has our import name."""
    done = {key_of(row) for row in finished(path)}
    left = [job for job in jobs if key_of(job._asdict()) not in done]
    is_new = not path.exists()
    context = multiprocessing.get_context("spawn")
    path.parent.mkdir(exist_ok=True)
    with path.open("a", newline="") as file:
        writer: Any = None
        groups = [[job for job in left if (job.loss == "predecessor") == apart] for apart in (0, 1)]
        for group in groups:
            # One split after the other for each worker, which keeps the data of one.
            chunks = [list(own) for _, own in itertools.groupby(group, key=lambda j: j[:2])]
            peer = "predecessor" if group and group[0].loss == "predecessor" else "ours"
            with ProcessPoolExecutor(workers, context, _peers.load, (peer,)) as pool:
                futures = [pool.submit(run_chunk, chunk) for chunk in chunks]
                for future in track(as_completed(futures), "training", total=len(futures)):
                    for row in future.result():
                        if writer is None:
                            writer = csv.DictWriter(file, list(row), lineterminator="\n")
                            if is_new:
                                file.writelines(f"{line}\n" for line in _measure.header(1, "cpu"))
                                writer.writeheader()
                        writer.writerow(row)
                    file.flush()


def run_chunk(jobs: list[Job]) -> list[Row]:
    return [run(job) for job in jobs]


class Tuned(NamedTuple):
    """A loss on one split, with the settings of its best validation AP."""

    validation_ap: float
    test_ap: float
    seconds: float  # of one run


def tuned(rows: list[Row]) -> dict[tuple[str, str], dict[int, Tuned]]:
    """(task, loss) -> split -> the run chosen."""
    found: dict[tuple[str, str], dict[int, Tuned]] = {}
    for row in rows:
        one = Tuned(*(float(row[name]) for name in Tuned._fields))
        splits = found.setdefault((row["task"], row["loss"]), {})
        split = int(row["split"])
        splits[split] = max(splits.get(split, one), one, key=lambda run: run.validation_ap)
    return found


def report(rows: list[Row], rival: str | None = None, value: str = "test_ap") -> None:
    """Mean AP of every loss, and its paired difference to `rival`, or the best of the BCE family.

    `value` is "validation_ap" where a recipe is to be chosen.
    """
    from scipy.stats import wilcoxon

    chosen = tuned(rows)

    def ap(run: Tuned) -> float:
        return float(getattr(run, value))

    names = list(dict.fromkeys(row["task"] for row in rows))
    losses = list(dict.fromkeys(row["loss"] for row in rows))
    grid = Grid("loss", *names, "s")
    rivals = {task: rival or rival_of(chosen, task) for task in names}
    for loss in losses:
        cells, seconds = [], []
        for task in names:
            own, other = chosen.get((task, loss), {}), chosen.get((task, rivals[task]), {})
            both = sorted(own.keys() & other.keys())
            if not both:
                cells.append("–")
                continue
            mean = statistics.mean(ap(own[k]) for k in both)
            seconds += [own[k].seconds for k in both]
            differences = [ap(own[k]) - ap(other[k]) for k in both]
            if loss == rivals[task]:
                cells.append(f"{mean:.4f}\n{'rival' if rival else 'best BCE'}")
                continue
            wins = sum(d > 0 for d in differences)
            p = wilcoxon(differences).pvalue if any(differences) and len(both) > 1 else 1.0
            cells.append(
                f"{mean:.4f}\n{statistics.mean(differences):+.4f} {wins}/{len(both)}\np {p:.3f}"
            )
        grid.add_row(loss, *cells, f"{statistics.mean(seconds):.1f}" if seconds else "–")
    Console(width=140).print(grid)


def rival_of(chosen: dict[tuple[str, str], dict[int, Tuned]], task: str) -> str:
    """The member of the BCE family with the best mean validation AP; test AP plays no part."""

    def mean_validation(loss: str) -> float:
        runs = chosen.get((task, loss), {})
        return statistics.mean(r.validation_ap for r in runs.values()) if runs else -1.0

    return max(BCE_FAMILY, key=mean_validation)


def plot(rows: list[Row], path: Path) -> None:
    """Forest plot: mean difference to the best of the BCE family and its 95 % t interval."""
    from matplotlib import pyplot as plt
    from scipy.stats import t

    chosen = tuned(rows)
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(figsize=(7, 0.75 * len(names) + 1.2), layout="constrained")
    for k, (loss, style) in enumerate(STYLES.items()):
        means, errors, heights = [], [], []
        for height, task in enumerate(reversed(names)):
            own, rival = chosen.get((task, loss), {}), chosen[task, rival_of(chosen, task)]
            gains = [own[s].test_ap - rival[s].test_ap for s in sorted(own.keys() & rival.keys())]
            if len(gains) < 2:
                continue
            half = statistics.stdev(gains) / len(gains) ** 0.5 * t.ppf(0.975, len(gains) - 1)
            means.append(statistics.mean(gains))
            errors.append(half)
            heights.append(height + 0.27 - 0.18 * k)
        axes.errorbar(means, heights, xerr=errors, linestyle="", capsize=2, label=loss, **style)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.set_yticks(
        range(len(names)), [f"{n}\n(best: {rival_of(chosen, n)})" for n in reversed(names)]
    )
    axes.set_xlabel("difference in test AP to the best of the BCE family, paired by split")
    axes.set_xlim(left=-0.16)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=150)


STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0072B2", "marker": "o"},
    "SmoothAP": {"color": "#56B4E9", "marker": "D"},
    "predecessor": {"color": "#D55E00", "marker": "s"},
    "LibAUC APLoss": {"color": "#009E73", "marker": "^"},
}


class Plan(NamedTuple):
    """One set of runs."""

    losses: list[str]
    tasks: tuple[str, ...]
    first_split: int
    splits: int
    into: str
    rival: str | None = None
    value: str = "test_ap"


PLANS = {
    "final": Plan(list(LOSSES), tuple(tasks.TASKS), 0, 10, "quality"),
    "development": Plan(
        [*BCE_FAMILY, "SmoothAP", *CANDIDATES],
        tuple(tasks.TASKS),
        DEVELOPMENT_SEED,
        2,
        "quality-development",
        value="validation_ap",
    ),
    "prevalence": Plan(
        list(REBALANCED), REBALANCED_TASKS, 0, 5, "prevalence", "SmoothAP, 50 % positives"
    ),
}


def main() -> None:
    """Train what is left, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--plan",
        choices=PLANS,
        default="final",
        help="development: candidates for the recipe, by validation AP on other splits; "
        "prevalence: batches with 50 %% positives",
    )
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, help="instead of the plan's")
    parser.add_argument("--losses", nargs="+", help="instead of the plan's")
    parser.add_argument("--splits", type=int, help="instead of the plan's")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--into", help="name of the CSV in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="print what there is, and plot it")
    options = parser.parse_args()
    plan = PLANS[options.plan]
    path = _measure.RESULTS / f"{options.into or plan.into}.csv"
    splits = range(plan.first_split, plan.first_split + (options.splits or plan.splits))
    names = options.tasks or plan.tasks
    jobs = [
        Job(*cell)
        for cell in itertools.product(
            names, splits, options.losses or plan.losses, LEARNING_RATES, WEIGHT_DECAYS
        )
    ]
    if not options.report:
        for name in names:
            tasks.load(name)  # once, before the workers ask for it
        run_all(jobs, path, options.workers)
    rows = finished(path)
    report(rows, plan.rival, plan.value)
    if options.plan == "final":
        plot(rows, ASSETS / "quality.png")


if __name__ == "__main__":
    main()
