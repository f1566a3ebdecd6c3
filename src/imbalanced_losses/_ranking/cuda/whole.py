"""Kernels whose programs go through all rows of a problem: one launch where PyTorch takes twenty.

Letters and conventions are those of `kernels`. A problem is a row of [C, M], or where its length is
given a stretch of [S], which has a row stride and no stride between problems. Sums are float64.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _extent(lengths, ends, problem, num_rows, SEGMENTED: tl.constexpr):
    """The first row of a problem, and the one after its last."""
    if SEGMENTED:
        end = tl.load(ends + problem).to(tl.int32)
        begin = end - tl.load(lengths + problem).to(tl.int32)
    else:
        end = num_rows + tl.program_id(0) * 0
        begin = end * 0
    return begin, end


@triton.jit
def _usable(scores, weights, place, weight_place, inside, LARGEST, WEIGHTED: tl.constexpr):
    """Scores that are finite and count, 0 of others, and their weights, both float64."""
    score = tl.load(scores + place, mask=inside, other=0.0).to(tl.float64)
    weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if WEIGHTED:
        weight = tl.load(weights + weight_place, mask=inside, other=0.0).to(tl.float64)
    counts = (tl.abs(score) <= LARGEST) & (weight > 0)
    return tl.where(counts, score, 0.0), tl.where(counts, weight, 0.0)


@triton.jit
def _narrowed(value, target):
    """A float64 value for a target of any dtype; to bfloat16 some versions go by float32 alone."""
    if target.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    return value


@triton.jit
def whole_spread(
    scores,  # [C, M] of any floating dtype
    weights,  # [C, M] ≥ 0, or anything where not WEIGHTED
    lengths,  # [C] int64, or anything where not SEGMENTED
    ends,  # [C] int64, or anything where not SEGMENTED
    deviations,  # [C]
    facts,  # [3, C] float64: mean, mass, and 1 / deviation, 0 where there is no spread
    score_strides,
    score_stride,
    weight_strides,
    weight_stride,
    num_rows,
    WEIGHTED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    LARGEST: tl.constexpr,
    EPSILON: tl.constexpr,
    ROOT: tl.constexpr,  # of the smallest number
    BLOCK: tl.constexpr,
):
    """`weighting.spread`."""
    problem, num_problems = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    scores += problem * score_strides
    weights += problem * weight_strides
    own = tl.arange(0, BLOCK)
    masses = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        _score, weight = _usable(
            scores, weights, row * score_stride, row * weight_stride, row < end, LARGEST, WEIGHTED
        )
        masses += weight
    mass = tl.sum(masses, 0)
    mass = tl.where(mass > 0, mass, 1.0)
    sizes = tl.zeros([BLOCK], dtype=tl.float64)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        score, weight = _usable(
            scores, weights, row * score_stride, row * weight_stride, row < end, LARGEST, WEIGHTED
        )
        sizes += weight / mass * tl.abs(score)
        sums += weight / mass * score
    unit, mean = tl.sum(sizes, 0), tl.sum(sums, 0)
    per_unit = 1.0 / tl.where(unit > 0, unit, 1.0)  # units whose square does not overflow
    squares = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        score, weight = _usable(
            scores, weights, row * score_stride, row * weight_stride, row < end, LARGEST, WEIGHTED
        )
        distance = score * per_unit - mean * per_unit
        squares += weight / mass * distance * distance
    variance = tl.sum(squares, 0)
    floor = EPSILON * tl.abs(mean) * per_unit
    smallest = ROOT * per_unit
    floor = tl.where(floor > smallest, floor, smallest)
    has_spread = (unit > 0) & (variance > floor * floor)
    deviation = tl.where(has_spread, tl.sqrt(variance) * unit, 1.0)
    tl.store(deviations + problem, deviation)
    tl.store(facts + problem, mean)
    tl.store(facts + num_problems + problem, mass)
    tl.store(facts + 2 * num_problems + problem, tl.where(has_spread, 1.0 / deviation, 0.0))


@triton.jit
def whole_spread_slopes(
    scores,
    weights,
    lengths,
    ends,
    facts,
    gradients,  # [C], by the deviations
    slopes,  # [C, M]
    score_strides,
    score_stride,
    weight_strides,
    weight_stride,
    gradient_stride,
    num_rows,
    WEIGHTED: tl.constexpr,
    SEGMENTED: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """∂ deviation / ∂ score = ω (score − mean) / (mass · deviation), times a gradient."""
    problem, num_problems = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    scores += problem * score_strides
    weights += problem * weight_strides
    if not SEGMENTED:
        slopes += problem * num_rows
    mean = tl.load(facts + problem)
    mass = tl.load(facts + num_problems + problem)
    rate = tl.load(facts + 2 * num_problems + problem)
    gradient = tl.load(gradients + problem * gradient_stride).to(tl.float64)
    factor = tl.where(rate > 0, gradient * rate, 0.0)
    for start in range(begin, end, BLOCK):
        row = (start + tl.arange(0, BLOCK)).to(tl.int64)
        score, weight = _usable(
            scores, weights, row * score_stride, row * weight_stride, row < end, LARGEST, WEIGHTED
        )
        slope = tl.where(weight > 0, weight / mass * (score - mean) * factor, 0.0)
        tl.store(slopes + row, _narrowed(slope, slopes), mask=row < end)


@triton.jit
def whole_temperature(
    scores,  # [C, M], finite or NaN
    slopes,  # [C, M], by the scores
    lengths,
    ends,
    temperature,  # [C]
    gradients,  # [C], by the temperature
    temperature_stride,
    num_rows,
    SEGMENTED: tl.constexpr,
    SMALLEST: tl.constexpr,
    FARTHEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`ranked_sum._slopes_in_temperature`."""
    problem = tl.program_id(0).to(tl.int64)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    if not SEGMENTED:
        scores += problem * num_rows
        slopes += problem * num_rows
    tau = tl.load(temperature + problem * temperature_stride).to(tl.float64)
    rate = 1.0 / tau
    own = tl.arange(0, BLOCK)
    sizes = tl.zeros([BLOCK], dtype=tl.float64)
    moments = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        slope = tl.load(slopes + row, mask=row < end, other=0.0).to(tl.float64)
        scaled = _scaled(scores, row, slope, rate, row < end, FARTHEST)
        sizes += tl.abs(slope)
        moments += tl.abs(slope) * scaled
    size = tl.sum(sizes, 0)
    origin = tl.sum(moments, 0) / tl.where(size > 1e-300, size, 1e-300)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        slope = tl.load(slopes + row, mask=row < end, other=0.0).to(tl.float64)
        scaled = _scaled(scores, row, slope, rate, row < end, FARTHEST)
        sums += (scaled - origin) * slope
    tl.store(gradients + problem, tl.where(tau <= SMALLEST, 0.0, -tl.sum(sums, 0)))


@triton.jit
def _scaled(scores, row, slope, rate, inside, FARTHEST: tl.constexpr):
    """Scores over τ, 0 of those that have no slope."""
    score = tl.load(scores + row, mask=inside, other=0.0).to(tl.float64) * rate
    score = tl.where(score > FARTHEST, FARTHEST, score)
    score = tl.where(score < -FARTHEST, -FARTHEST, score)
    return tl.where(slope != 0, score, 0.0)


@triton.jit
def whole_prior(
    is_positive,  # [C, M] uint8
    weights,  # [C, M] ≥ 0
    lengths,
    ends,
    prior,  # [C]
    at_prior,  # [C, M]
    positive_strides,
    positive_stride,
    weight_strides,
    weight_stride,
    prior_stride,
    num_rows,
    SEGMENTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`weighting.weights_at_prior`."""
    problem = tl.program_id(0).to(tl.int64)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    is_positive += problem * positive_strides
    weights += problem * weight_strides
    if not SEGMENTED:
        at_prior += problem * num_rows
    own = tl.arange(0, BLOCK)
    positives = tl.zeros([BLOCK], dtype=tl.float64)
    negatives = tl.zeros([BLOCK], dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        positive = tl.load(is_positive + row * positive_stride, mask=row < end, other=0) != 0
        weight = tl.load(weights + row * weight_stride, mask=row < end, other=0.0).to(tl.float64)
        positives += tl.where(positive, weight, 0.0)
        negatives += tl.where(positive, 0.0, weight)
    positive_mass, negative_mass = tl.sum(positives, 0), tl.sum(negatives, 0)
    is_defined = (positive_mass > 0) & (negative_mass > 0)
    share = tl.load(prior + problem * prior_stride).to(tl.float64)
    factor = positive_mass / tl.where(is_defined, negative_mass, 1.0) * (1.0 - share) / share
    factor = tl.where(is_defined, factor, 1.0)
    of_positives = tl.where(factor > 1, 1.0 / tl.where(factor > 1, factor, 1.0), 1.0)
    of_negatives = tl.where(factor < 1, factor, 1.0)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        positive = tl.load(is_positive + row * positive_stride, mask=row < end, other=0) != 0
        weight = tl.load(weights + row * weight_stride, mask=row < end, other=0.0).to(tl.float64)
        weight *= tl.where(positive, of_positives, of_negatives)
        tl.store(at_prior + row, _narrowed(weight, at_prior), mask=row < end)


@triton.jit
def whole_values(
    value,  # [C, M] ≥ 0 of positives
    sides,  # [C, M] by `kernels.prepare`
    lengths,
    ends,
    unit_value,  # [C, M]: in units of the largest, 0 of all but positives
    mass_by_value,  # [C]: Σ ω v, 1 where not valid
    numbers,  # [2, C] int32, written over with 0 where not valid
    valid,  # [C] uint8, written over
    masses,  # [3, C], written over with 1 where not valid
    value_strides,
    value_stride,
    num_rows,
    SEGMENTED: tl.constexpr,
    GRADED: tl.constexpr,  # whether two rows must differ in what they are worth
    BLOCK: tl.constexpr,
):
    """What positives are worth; a problem of which all are worth 0 is not valid."""
    problem, num_problems = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    value += problem * value_strides
    if not SEGMENTED:
        sides += problem * num_rows
        unit_value += problem * num_rows
    own = tl.arange(0, BLOCK)
    num_positives = tl.load(numbers + problem)
    num_present = tl.load(numbers + num_problems + problem)
    largest = tl.max(tl.zeros([BLOCK], dtype=tl.float64), 0)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        side = tl.load(sides + row, mask=row < end, other=0.0)
        worth = tl.load(value + row * value_stride, mask=side > 0, other=0.0).to(tl.float64)
        largest = tl.maximum(largest, tl.max(worth, 0))
    largest = tl.where(num_positives > 0, largest, 0.0)
    unit = tl.where(largest > 0, largest, 1.0)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    num_best = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(begin, end, BLOCK):
        row = (start + own).to(tl.int64)
        side = tl.load(sides + row, mask=row < end, other=0.0)
        side = tl.where(num_positives > 0, side, 0.0)
        worth = tl.load(value + row * value_stride, mask=side > 0, other=0.0).to(tl.float64)
        worth = (worth / unit).to(side.dtype)
        tl.store(unit_value + row, worth, mask=row < end)
        sums += side.to(tl.float64) * worth
        num_best += (worth == 1).to(tl.int32)
    mass = tl.sum(sums, 0)
    is_valid = (num_present > 0) & (mass > 0)
    if GRADED:
        is_valid = is_valid & (tl.sum(num_best, 0) < num_present)
    tl.store(mass_by_value + problem, tl.where(is_valid, mass, 1.0))
    tl.store(numbers + problem, tl.where(is_valid, num_positives, 0))
    tl.store(numbers + num_problems + problem, tl.where(is_valid, num_present, 0))
    tl.store(valid + problem, is_valid.to(tl.uint8))
    for k in range(3):
        place = masses + k * num_problems + problem
        tl.store(place, tl.where(is_valid, tl.load(place), 1.0))


@triton.jit
def whole_ideal(
    unit_value,  # [C, M] by `whole_values`
    sides,  # [C, M]
    lengths,
    ends,
    units,  # [C], the heaviest weight in the caller's numbers
    budgets,  # [C], or anything where not LIMITED
    terms,  # [C, M]
    unit_stride,
    num_rows,
    SEGMENTED: tl.constexpr,
    LIMITED: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
):
    """g / log(1 + place), place being the weight of rows with more gain, and its own.

    The lighter first among equals. With a budget of rows within it, and of the first.
    """
    problem = tl.program_id(0).to(tl.int64)
    begin, end = _extent(lengths, ends, problem, num_rows, SEGMENTED)
    if not SEGMENTED:
        unit_value += problem * num_rows
        sides += problem * num_rows
        terms += problem * num_rows
    unit = tl.load(units + problem * unit_stride).to(tl.float64)
    for first in range(begin + tl.program_id(1) * BQ, end, BQ * tl.num_programs(1)):
        own = first + tl.arange(0, BQ)
        gain = tl.load(unit_value + own, mask=own < end, other=0.0).to(tl.float64)
        weight = tl.abs(tl.load(sides + own, mask=own < end, other=0.0)).to(tl.float64)
        before = tl.zeros([BQ], dtype=tl.float64)
        for start in range(begin, end, BM):
            row = start + tl.arange(0, BM)
            theirs = tl.load(unit_value + row, mask=row < end, other=0.0).to(tl.float64)[None, :]
            side = tl.load(sides + row, mask=row < end, other=0.0)
            size = tl.abs(side).to(tl.float64)[None, :]
            is_equal = (size == weight[:, None]) & (row[None, :] < own[:, None])
            is_lighter = (size < weight[:, None]) | is_equal
            is_above = (theirs > gain[:, None]) | ((theirs == gain[:, None]) & is_lighter)
            before += tl.sum(tl.where(is_above, size, 0.0), 1)
        place = before + weight
        # log(1 + x), also of an x that is lost beside 1.
        x = place * unit
        one_more = 1.0 + x
        more = one_more - 1.0
        is_small = (more > 0) & (x < 1)
        log = tl.log(one_more) * tl.where(is_small, x / tl.where(is_small, more, 1.0), 1.0)
        log = tl.where(more == 0, x, log)
        counts = gain > 0
        if LIMITED:
            budget = tl.load(budgets + problem).to(tl.float64)
            counts = counts & ((place <= budget + 0.5 * weight) | (before == 0))
        term = gain / tl.where(counts, log, 1.0)
        tl.store(terms + own, tl.where(counts, term, 0.0), mask=own < end)


@triton.jit
def whole_mean(
    values,  # [R, K]
    counts,  # [R, K] uint8
    means,  # [R]: of the values that count, or their sum; 0 where none does
    is_any,  # [R] uint8
    divisors,  # [R]
    num_columns,
    DIVIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`reduce.mean_where`."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], dtype=tl.float64)
    numbers = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < num_columns
        place = row * num_columns + column
        is_counted = tl.load(counts + place, mask=inside, other=0) != 0
        sums += tl.load(values + place, mask=is_counted, other=0.0).to(tl.float64)
        numbers += is_counted.to(tl.int32)
    number = tl.sum(numbers, 0)
    divisor = tl.where(DIVIDED & (number > 1), number, 1).to(tl.float64)
    tl.store(means + row, _narrowed(tl.sum(sums, 0) / divisor, means))
    tl.store(is_any + row, (number > 0).to(tl.uint8))
    tl.store(divisors + row, _narrowed(divisor, divisors))
