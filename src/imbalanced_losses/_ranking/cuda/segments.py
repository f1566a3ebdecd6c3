"""The dense kernels for problems of unequal length, whose rows lie side by side in [S].

Letters and conventions are those of `kernels`. Of each problem its length and its end are given, of
each row its problem. A tile may touch several problems: pairs across two of them count nothing, and
queries whose problems lie side by side share the sources between the first and the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from imbalanced_losses._ranking.cuda.kernels import (
    _finite,
    _is_query,
    _logistic,
    _places,
    _row_facts,
    _slopes_by_side,
    _store_ranks,
    _units,
)


@triton.jit(do_not_specialize=["fixed_bits"])
def segment_facts(
    scores,  # [S] of any floating dtype
    is_positive,  # [S] uint8
    weights,  # [S] ≥ 0, or anything where not WEIGHTED
    temperature,  # [C], or anything where FIXED
    lengths,  # [C] int64
    ends,  # [C] int64
    ready,  # [S]: as `kernels.prepare` writes it, and so on
    sides,  # [S]
    unit_weights,  # [S]
    order,  # [S] int32
    numbers,  # [2, C] int32
    valid,  # [C] uint8
    masses,  # [3, C]
    rates,  # [C]
    units,  # [C]
    fixed_bits,
    score_stride,
    positive_stride,
    weight_stride,
    temperature_stride,
    WEIGHTED: tl.constexpr,
    FIXED: tl.constexpr,
    ONE_SIDED: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`kernels.prepare` of a problem."""
    problem, num_problems = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    end = tl.load(ends + problem).to(tl.int32)
    begin = end - tl.load(lengths + problem).to(tl.int32)
    largest = tl.max(tl.zeros([BLOCK], dtype=tl.float64), 0)
    num_positives = tl.sum(tl.zeros([BLOCK], dtype=tl.int32), 0)
    num_present = tl.sum(tl.zeros([BLOCK], dtype=tl.int32), 0)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        positive, weight = _row_facts(
            is_positive, weights, row, row < end, positive_stride, weight_stride, WEIGHTED
        )
        largest = tl.maximum(largest, tl.max(weight, 0).to(tl.float64))
        num_positives += tl.sum(positive.to(tl.int32), 0)
        num_present += tl.sum((weight > 0).to(tl.int32), 0)

    positives_before = num_positives * 0
    present_before = num_positives * 0
    positive_mass = tl.sum(tl.zeros([BLOCK], dtype=tl.float64), 0)
    mass = tl.sum(tl.zeros([BLOCK], dtype=tl.float64), 0)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = row < end
        positive, weight = _row_facts(
            is_positive, weights, row, inside, positive_stride, weight_stride, WEIGHTED
        )
        present = weight > 0
        score = tl.load(scores + row * score_stride, mask=inside, other=0.0)
        score = _finite(tl.where(present, score, 0.0).to(ready.dtype.element_ty), LARGEST)
        tl.store(ready + row, score, mask=inside)
        unit = _units(weight, largest.to(weight.dtype), score, WEIGHTED, SMALLEST)
        if WEIGHTED:
            tl.store(unit_weights + row, unit, mask=inside)
        tl.store(sides + row, tl.where(positive, unit, -unit), mask=inside)
        place = _places(
            positive, present, row - begin, num_positives, num_present, positives_before,
            present_before,
        )  # fmt: skip
        tl.store(order + begin + place, row.to(tl.int32), mask=inside)
        positives_before += tl.sum(positive.to(tl.int32), 0)
        present_before += tl.sum(present.to(tl.int32), 0)
        wide = unit.to(tl.float64)
        positive_mass += tl.sum(tl.where(positive, wide, 0.0), 0)
        mass += tl.sum(wide, 0)

    is_valid = num_positives > 0
    if not ONE_SIDED:
        is_valid = is_valid & (num_positives < num_present)
    tl.store(masses + problem, tl.where(is_valid, mass, 1.0))
    tl.store(masses + num_problems + problem, tl.where(is_valid, positive_mass, 1.0))
    tl.store(masses + 2 * num_problems + problem, tl.where(is_valid, mass - positive_mass, 1.0))
    tl.store(valid + problem, is_valid.to(tl.uint8))
    tl.store(numbers + problem, tl.where(is_valid, num_positives, 0))
    tl.store(numbers + num_problems + problem, tl.where(is_valid, num_present, 0))
    if WEIGHTED:
        tl.store(units + problem, tl.where(largest > 0, largest, 1.0))
    if FIXED:
        tau = fixed_bits.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        tau = tl.load(temperature + problem * temperature_stride).to(tl.float64)
    tl.store(rates + problem, 1.0 / tau)


@triton.jit
def _bounds(problems, lengths, ends, numbers, place, inside, num_problems):
    """Of some rows their problem, where that begins and ends, and how many of its rows count."""
    problem = tl.load(problems + place, mask=inside, other=0)
    end = tl.load(ends + problem, mask=inside, other=0)
    begin = end - tl.load(lengths + problem, mask=inside, other=0)
    num_present = tl.load(numbers + num_problems + problem, mask=inside, other=0)
    return problem, begin.to(tl.int32), end.to(tl.int32), num_present


@triton.jit
def segment_ranks(
    scores,  # [S]
    sides,  # [S]
    order,  # [S] int32
    numbers,  # [2, C] int32
    rates,  # [C]
    problems,  # [S] int64
    lengths,  # [C] int64
    ends,  # [C] int64
    ranks,  # [K, S]
    sums,  # [2, S] float64
    num_rows,
    num_problems,
    QUERIES: tl.constexpr,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WITH_SLOPES: tl.constexpr,
    SMALLEST: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
):
    """`kernels.soft_ranks` of a block of queries."""
    number = tl.program_id(0) * BQ + tl.arange(0, BQ)
    inside = number < num_rows
    problem, begin, end, num_present = _bounds(
        problems, lengths, ends, numbers, number, inside, num_problems
    )
    row = tl.load(order + number, mask=inside, other=0)
    own_side = tl.load(sides + row, mask=inside, other=0.0)
    is_query = inside & _is_query(own_side, num_present, QUERIES)
    query = tl.load(scores + row, mask=is_query, other=0.0)[:, None]
    rate = tl.load(rates + problem, mask=is_query, other=0.0)[:, None]
    among_negatives = tl.zeros([BQ], dtype=tl.float64)
    among_positives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_negatives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_positives = tl.zeros([BQ], dtype=tl.float64)
    first = tl.min(tl.where(is_query, begin, num_rows), 0)
    last = tl.max(tl.where(is_query, end, 0), 0)
    for offset in range(first, last, BM):
        source = offset + tl.arange(0, BM)
        score = tl.load(scores + source, mask=source < last, other=0.0)[None, :]
        side = tl.load(sides + source, mask=source < last, other=0.0)[None, :]
        is_pair = (source[None, :] >= begin[:, None]) & (source[None, :] < end[:, None])
        sigmoid, slope = _logistic(tl.where(is_pair, (score - query) * rate, 0.0))
        positive_weight = tl.where(is_pair & (side > 0), side, 0.0)
        negative_weight = tl.where(is_pair & (side < 0), -side, 0.0)
        among_negatives += tl.sum(sigmoid * negative_weight, 1).to(tl.float64)
        among_positives += tl.sum(sigmoid * positive_weight, 1).to(tl.float64)
        if WITH_SLOPES:
            slope = tl.where(source[None, :] != row[:, None], slope, 0.0)
            slope_of_negatives += tl.sum(slope * negative_weight, 1).to(tl.float64)
            slope_of_positives += tl.sum(slope * positive_weight, 1).to(tl.float64)
    size = tl.program_id(0).to(tl.int64) * 0 + num_rows  # one row is a constant
    _store_ranks(
        ranks, sides, row, inside, is_query, among_negatives, among_positives,
        size, ALL, POSITIVES, NEGATIVES, SMALLEST,
    )  # fmt: skip
    if WITH_SLOPES:
        tl.store(sums + row, slope_of_negatives, mask=is_query)
        tl.store(sums + size + row, slope_of_positives, mask=is_query)


@triton.jit
def segment_slopes(
    scores,  # [S]
    sides,  # [S]
    order,  # [S] int32
    numbers,  # [2, C] int32
    rates,  # [C]
    problems,  # [S] int64
    lengths,  # [C] int64
    ends,  # [C] int64
    by_all,  # [S]
    by_positives,
    by_negatives,
    sums,  # [2, S] float64
    divisors,  # [C], or anything where not DIVIDED
    slopes,  # [S]
    num_rows,
    num_live,
    num_problems,
    QUERIES: tl.constexpr,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WEIGHS: tl.constexpr,
    DIVIDED: tl.constexpr,
    LARGEST: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
):
    """`kernels.score_slopes` of a block of sources."""
    source = tl.program_id(0) * BM + tl.arange(0, BM)
    is_live = source < num_live
    problem, begin, _, num_present = _bounds(
        problems, lengths, ends, numbers, source, is_live, num_problems
    )
    num_positives = tl.load(numbers + problem, mask=is_live, other=0)
    end = begin + num_present  # of the queries in `order`
    if QUERIES == "positives":
        end = begin + num_positives
    if QUERIES == "negatives":
        begin += num_positives
    own_score = tl.load(scores + source, mask=is_live, other=0.0)
    side = tl.load(sides + source, mask=is_live, other=0.0)
    score = own_score[None, :]
    own_rate = tl.load(rates + problem, mask=is_live, other=0.0)
    rate = own_rate[None, :]
    as_negative = tl.zeros([BM], dtype=tl.float64)
    as_positive = tl.zeros([BM], dtype=tl.float64)
    first = tl.min(tl.where(end > begin, begin, num_rows), 0)
    last = tl.max(tl.where(end > begin, end, 0), 0)
    for start in range(first, last, BQ):
        number = start + tl.arange(0, BQ)
        is_real = number < last
        row = tl.load(order + number, mask=is_real, other=0)
        query = tl.load(scores + row, mask=is_real, other=0.0)[:, None]
        own = tl.load(sides + row, mask=is_real, other=0.0)
        to_negative, to_positive = _slopes_by_side(
            by_all, by_positives, by_negatives, own, row, is_real,
            ALL, POSITIVES, NEGATIVES, WEIGHS,
        )  # fmt: skip
        is_pair = (number[:, None] >= begin[None, :]) & (number[:, None] < end[None, :])
        _sigmoid, slope = _logistic(tl.where(is_pair, (score - query) * rate, 0.0))
        is_pair = is_pair & (source[None, :] != row[:, None])
        negative = tl.where(is_pair, slope * to_negative[:, None], 0.0)
        positive = tl.where(is_pair, slope * to_positive[:, None], 0.0)
        as_negative += tl.sum(negative, 0).to(tl.float64)
        as_positive += tl.sum(positive, 0).to(tl.float64)
    slope = tl.where(side > 0, as_positive, as_negative) * tl.abs(side).to(tl.float64)
    is_query = _is_query(side, num_present, QUERIES)
    to_negative, to_positive = _slopes_by_side(
        by_all, by_positives, by_negatives, side, source, is_query,
        ALL, POSITIVES, NEGATIVES, WEIGHS,
    )  # fmt: skip
    size = tl.program_id(0).to(tl.int64) * 0 + num_rows  # one row is a constant
    of_negatives = tl.load(sums + source, mask=is_query, other=0.0)
    of_positives = tl.load(sums + size + source, mask=is_query, other=0.0)
    slope -= of_negatives * to_negative + of_positives * to_positive
    slope = tl.where((tl.abs(own_score) == LARGEST) | (side == 0), 0.0, slope)
    scale = own_rate.to(tl.float64)
    if DIVIDED:
        scale /= tl.load(divisors + problem, mask=is_live, other=1.0)
    tl.store(slopes + source, slope * scale, mask=source < num_rows)


@triton.jit
def segment_totals(
    values,  # [S]
    sides,  # [S]
    numbers,  # [2, C] int32
    lengths,  # [C] int64
    ends,  # [C] int64
    divisors,  # [C], or anything where not DIVIDED
    totals,  # [C]
    QUERIES: tl.constexpr,
    DIVIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`kernels.weighted_totals` of a problem."""
    problem = tl.program_id(0).to(tl.int64)
    end = tl.load(ends + problem).to(tl.int32)
    begin = end - tl.load(lengths + problem).to(tl.int32)
    num_present = tl.load(numbers + tl.num_programs(0) + problem)
    total = tl.sum(tl.zeros([BLOCK], dtype=tl.float64), 0)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        side = tl.load(sides + row, mask=row < end, other=0.0)
        is_query = _is_query(side, num_present, QUERIES)
        value = tl.load(values + row, mask=is_query, other=0.0).to(tl.float64)
        total += tl.sum(value * tl.abs(side), 0)
    if DIVIDED:
        total /= tl.load(divisors + problem)
    tl.store(totals + problem, total)
