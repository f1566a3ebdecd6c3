"""The figures of the documentation, into docs/assets.

    python -m benchmarks.figures [--into docs/assets]

One function a figure. All but the curves of the cost, which are read from the newest results, are
computed on the spot, in some seconds on one core. `benchmarks.speed.plots`,
`benchmarks.quality`, `benchmarks.gpu` and the demo draw the others.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from torch import Tensor

from benchmarks import _measure, _peers
from benchmarks.speed import plots
from imbalanced_losses._ranking import sigmoid_sums
from imbalanced_losses._ranking.panels.line import Precision
from imbalanced_losses._ranking.panels.panels import Panels
from imbalanced_losses.functional import score_spread, smooth_ap

# Colours of Okabe and Ito, told apart by every kind of colour vision; dashes say it again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 11,  # a phone shows the figures at three quarters of their size
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "savefig.transparent": True,
    "svg.hashsalt": "imbalanced_losses",  # the same file every time
}
SIZE = (5.2, 3.7)


def soft_ranks() -> Figure:
    """The rank of a row, as its score passes six others: counted, and soft at three τ."""
    others = torch.tensor([-2.0, -1.2, -0.9, 0.3, 1.0, 2.1], dtype=torch.float64)
    score = torch.linspace(-3, 3, 601, dtype=torch.float64)
    gap = others - score[:, None]
    fig, axes = plt.subplots(figsize=SIZE)
    axes.plot(score, 1 + (gap > 0).sum(1), color="black", linewidth=1, label="counted")
    for tau, colour, dash in zip((0.05, 0.2, 1.0), COLOURS, DASHES, strict=False):
        rank = 1 + (gap / tau).sigmoid().sum(1)
        axes.plot(score, rank, dash, color=colour, label=f"τ = {tau:g}")
    axes.plot(others, torch.full_like(others, 7.6), "|", color="black", markersize=10)
    axes.set(xlabel="score of the row (ticks: the others)", ylabel="rank", yticks=range(1, 8))
    axes.legend()
    return fig


def pair_gradient() -> Figure:
    """One positive, one negative: ∂AP by the positive's score against how far it is behind."""
    behind = torch.linspace(-2, 2, 401, dtype=torch.float64)
    pairs = torch.stack((torch.zeros_like(behind), behind), dim=1)  # [401, (positive, negative)]
    is_positive = torch.tensor([True, False]).expand(pairs.shape)
    fig, axes = plt.subplots(figsize=SIZE)
    for tau, colour, dash in zip((0.01, 0.05, 0.2, 1.0), COLOURS, DASHES, strict=True):
        scores = pairs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(smooth_ap(scores, is_positive, tau).ap.sum(), scores)
        axes.plot(behind, gradient[:, 0], dash, color=colour, label=f"τ = {tau:g}")
    axes.set(yscale="log", ylim=(1e-4, 40))
    axes.set(xlabel="score of the negative − score of the positive", ylabel="gradient of AP")
    axes.legend()
    return fig


def world_size() -> Figure:
    """The gradient that data-parallel training steps with, beside that of one process.

    A linear model, batches of 4,096 rows with 1 % positives, split over W processes; the mean over
    ten batches. The gradient of every process is computed here in turn, from the formula, and the
    trainer's mean is taken. "rows gathered": each ranks all rows and keeps the gradient of its own,
    times W as this library does, or as it is. "own rows only": each ranks its own.
    """
    ranks = (1, 2, 4, 8, 16, 32)
    found = torch.zeros(3, len(ranks), 2, dtype=torch.float64)  # [way, W, (size, cosine)]
    num_batches = 10
    for seed in range(num_batches):
        features, is_positive, weights = _rows_of_a_model(seed)
        whole = _gradient(features, is_positive, weights)
        for k, num_ranks in enumerate(ranks):
            parts = torch.arange(len(features)).chunk(num_ranks)
            own = [_gradient(features[p], is_positive[p], weights) for p in parts]
            gathered = torch.stack([_gradient(features, is_positive, weights, p) for p in parts])
            ways = (gathered.mean(0) * num_ranks, gathered.mean(0), torch.stack(own).mean(0))
            for way, gradient in enumerate(ways):
                cosine = torch.nn.functional.cosine_similarity(gradient, whole, dim=0)
                found[way, k] += torch.stack((gradient.norm() / whole.norm(), cosine))
    found /= num_batches
    names = ("rows gathered, times W", "rows gathered, as it is", "own rows only")
    fig, both = plt.subplots(2, 1, figsize=(SIZE[0], 5.6), sharex=True)
    for way, name in enumerate(names):
        style = {"color": COLOURS[way], "linestyle": DASHES[way], "marker": "os^"[way]}
        for axes, values in zip(both, found[way].T, strict=True):
            axes.plot(ranks, values, label=name, **style)
    both[0].set(ylabel="size, relative", xscale="log", yscale="log", ylim=(0.02, 8))
    both[1].set(ylabel="cosine", xlabel="processes, W", ylim=(0, 1.05))
    both[1].set_xticks(ranks, [str(n) for n in ranks])
    both[1].minorticks_off()
    both[1].legend(loc="lower left")
    return fig


def _rows_of_a_model(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [N, D], is_positive [N] and weights [D] of a model that ranks a little."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4096, 16, generator=generator, dtype=torch.float64)
    is_positive = torch.rand(4096, generator=generator) < 0.01
    features[:, :8] += 0.6 * is_positive[:, None]
    return features, is_positive, torch.randn(16, generator=generator, dtype=torch.float64) + 0.5


def _gradient(
    features: Tensor, is_positive: Tensor, weights: Tensor, kept: Tensor | None = None
) -> Tensor:
    """[D], of the loss by the weights, with the gradient of all scores or those of `kept` rows."""
    scores = (features @ weights).requires_grad_()
    ap, valid = smooth_ap(scores, is_positive, 0.1 * score_spread(scores))
    (of_scores,) = torch.autograd.grad(torch.where(valid, 1 - ap, 0), scores)
    if kept is None:
        return features.T @ of_scores
    return features[kept].T @ of_scores[kept]


def panel_error() -> Figure:
    """The error of Σ σ′ by panels, against the definition in float64.

    2,000 normal scores, each a query and a source, τ = 0.1: the largest error relative to the
    largest sum, for p coefficients a panel of width h·τ, with rings around the pairs that are used.
    Faint: ρ^(−p), the rate of the theory.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, generator=generator, dtype=torch.float64)
    weights, problem = torch.ones(1, 2000, 1, dtype=torch.float64), torch.zeros(2000).long()
    exact = _slope_sums(scores)
    used = {2.0: (10, 16), 1.0: (7,), 0.16: (4,)}
    degrees = range(2, 19)
    fig, axes = plt.subplots(figsize=SIZE)
    for width, colour, dash in zip((2.0, 1.0, 0.5, 0.16), COLOURS, DASHES, strict=True):
        reach = math.ceil(40 / width)
        errors = []
        for degree in degrees:
            precision = (Precision(degree, width, reach),)
            panels = Panels(scores, problem, scores[None], 0.1, precisions=precision)
            moments = panels.moments(panels.sources, weights.movedim(-1, 0))
            sums = panels.evaluated(panels.field(moments, 1), panels.queries, torch.float64)[0]
            errors.append(float((sums - exact).abs().max() / exact.max()))
        rho = 2 * math.pi / width + math.sqrt((2 * math.pi / width) ** 2 + 1)
        rate = [errors[0] * rho ** (degrees[0] - p) for p in degrees]
        axes.plot(degrees, rate, color=colour, alpha=0.3)
        axes.plot(degrees, errors, dash, color=colour, label=f"h = {width:g}")
        for p in used.get(width, ()):
            axes.plot(p, errors[p - degrees[0]], "o", color=colour, fillstyle="none", markersize=9)
    axes.set(yscale="log", ylim=(1e-16, 1e-1), xlabel="coefficients a panel, p")
    axes.set_xticks(degrees[::2])
    axes.set(ylabel="largest error of Σ σ′, relative")
    axes.legend()
    return fig


def _slope_sums(scores: Tensor) -> Tensor:
    """Σ σ′ of every row by the definition, at τ = 0.1."""
    queries = scores.clone().requires_grad_()
    sums = sigmoid_sums(
        queries,
        torch.zeros(len(scores)).long(),
        scores[None],
        torch.ones(1, len(scores), 1, dtype=torch.float64),
        0.1,
        backend="dense",
    )
    (gradient,) = torch.autograd.grad(sums.sum(), queries)
    return -gradient * 0.1


def cost_time() -> Figure:
    """Time of a forward and backward pass against the rows ranked, from the newest results."""
    return _cost(plots.QUANTITIES[0])


def cost_memory() -> Figure:
    """The same for peak memory."""
    return _cost(plots.QUANTITIES[1])


def _cost(quantity: plots.Quantity) -> Figure:
    source = _measure.newest("cpu-memory")
    if source is None:
        raise FileNotFoundError("no result yet: run `python -m benchmarks.speed.memory` first")
    problem = "C = 1, 10% positive"
    rows = [row for row in _measure.read_csv(source) if row["problem"] == problem]
    fig, axes = plt.subplots(figsize=SIZE)
    plots.draw(axes, rows, quantity)
    sizes = sorted({int(row["num_rows"]) for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="rows ranked, M (10 % positive)")
    axes.set(ylabel=quantity.label, ylim=(None, axes.get_ylim()[1] * 10))
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(loc="upper left")
    return fig


FIGURES: tuple[Callable[[], Figure], ...] = (
    soft_ranks,
    pair_gradient,
    world_size,
    panel_error,
    cost_time,
    cost_memory,
)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The same sums, in the same order, on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: list[str] | None = None) -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, default=_peers.ROOT / "docs" / "assets")
    into = parser.parse_args(arguments).into
    mpl.use("agg")
    into.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE), _one_thread():
        for draw in FIGURES:
            fig = draw()
            fig.savefig(into / f"{draw.__name__}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(fig)
            print(f"written: {draw.__name__}.svg")


if __name__ == "__main__":
    main()
