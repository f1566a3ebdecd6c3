"""The sums as Triton kernels, for CUDA devices. Imported on first use, never by the package.

All are deterministic: every number is written by one program, which adds in an order of its own;
nothing is added atomically. Tiles are summed in the dtype of the scores, what they give in float64.

Letters as in the engine: C problems, M rows; x = (source − query) / τ. Blocks of queries and of
sources make a tile [BQ, BM] of pairs, which lives in registers: no pair is ever stored.

Rows are handed on as `sides` [C, M]: the weight of a positive, minus the weight of a negative, 0 of
a row that is left out; and as `order` [C, M]: the positives, then the negatives, then the others.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_facts(is_positive, weights, row, inside, positive_stride, weight_stride, WEIGHTED):
    """Whether a row is positive, and its weight, 0 where it is left out."""
    positive = tl.load(is_positive + row * positive_stride, mask=inside, other=0) != 0
    if WEIGHTED:
        weight = tl.load(weights + row * weight_stride, mask=inside, other=0.0)
        if weight.dtype != tl.float64:
            weight = weight.to(tl.float32)
        weight = tl.where(weight > 0, weight, 0.0)
    else:
        weight = tl.where(inside, 1.0, 0.0)
    return positive & (weight > 0), weight


@triton.jit
def _finite(score, LARGEST: tl.constexpr):
    """Scores, infinite ones as the largest: two infinities tie, and a NaN stays."""
    score = tl.where(score > LARGEST, LARGEST, score)
    return tl.where(score < -LARGEST, -LARGEST, score)


@triton.jit
def _units(weight, largest, like, WEIGHTED: tl.constexpr, SMALLEST: tl.constexpr):
    """Weights as parts of the largest.

    One too small beside it for its rank to have a reciprocal counts a little.
    """
    unit = weight
    if WEIGHTED:
        unit = (weight / tl.where(largest > 0, largest, 1.0)).to(like.dtype)
        unit = tl.where(weight > 0, tl.where(unit < SMALLEST, SMALLEST, unit), 0.0)
    return unit


@triton.jit
def _places(positive, present, row, num_positives, num_present, positives_before, present_before):
    """Where the rows of a block stand in `order`."""
    one_of = positive.to(tl.int32) + (present & ~positive).to(tl.int32) * 65536
    up_to = tl.cumsum(one_of, 0)  # of both, in one number
    positives_up_to, negatives_up_to = up_to % 65536, up_to // 65536
    place = row - present_before - positives_up_to - negatives_up_to + num_present
    negatives_before = present_before - positives_before
    place = tl.where(present, num_positives + negatives_before + negatives_up_to - 1, place)
    return tl.where(positive, positives_before + positives_up_to - 1, place)


@triton.jit
def block_facts(
    is_positive,  # [C, M] uint8
    weights,  # [C, M], or anything where not WEIGHTED
    facts,  # [3, C, blocks] float64
    positive_strides,
    positive_stride,
    weight_strides,
    weight_stride,
    num_rows,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of a block of rows: the largest weight, how many are positive, and how many there are."""
    problem = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_positive += problem * positive_strides
    weights += problem * weight_strides
    positive, weight = _row_facts(
        is_positive, weights, row, row < num_rows, positive_stride, weight_stride, WEIGHTED
    )
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    target = facts + problem * tl.num_programs(0) + tl.program_id(0)
    tl.store(target, tl.max(weight, 0).to(tl.float64))
    tl.store(target + size, tl.sum(positive.to(tl.int32), 0).to(tl.float64))
    tl.store(target + 2 * size, tl.sum((weight > 0).to(tl.int32), 0).to(tl.float64))


@triton.jit(do_not_specialize=["fixed_bits"])
def prepare(
    scores,  # [C, M] of any floating dtype
    is_positive,  # [C, M] uint8
    weights,  # [C, M] ≥ 0, or anything where not WEIGHTED
    temperature,  # [C], or anything where FIXED
    facts,  # [3, C, blocks] float64 by `block_facts`, or anything where there is one block
    ready,  # [C, M]: the scores, finite or NaN; 0 where left out
    sides,  # [C, M]
    unit_weights,  # [C, M] in [0, 1], where WEIGHTED
    order,  # [C, M] int32
    numbers,  # [2, C] int32: how many are positive, and how many there are; 0 where not valid
    valid,  # [C] uint8
    masses,  # [3, C, blocks]: of all, positives, negatives; where not valid they add up to 1
    rates,  # [C]: 1 / τ
    units,  # [C]: the largest weight, 1 where there is none
    fixed_bits,  # int64: those of τ as a float64, where FIXED
    score_strides,
    score_stride,
    positive_strides,
    positive_stride,
    weight_strides,
    weight_stride,
    temperature_stride,
    num_rows,
    WEIGHTED: tl.constexpr,
    FIXED: tl.constexpr,
    ONE_SIDED: tl.constexpr,  # whether a problem without negatives is valid
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two, at least as many as there are
):
    """Everything about rows and problems that does not depend on ranks."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    own = tl.arange(0, BLOCK)
    row = block.to(tl.int64) * BLOCK + own
    inside = row < num_rows
    is_positive += problem * positive_strides
    weights += problem * weight_strides
    positive, weight = _row_facts(
        is_positive, weights, row, inside, positive_stride, weight_stride, WEIGHTED
    )
    present = weight > 0
    if BLOCKS == 1:
        largest = tl.max(weight, 0)
        num_positives = tl.sum(positive.to(tl.int32), 0)
        num_present = tl.sum(present.to(tl.int32), 0)
        positives_before = 0
        present_before = 0
    else:
        number = tl.arange(0, BLOCKS)
        target = facts + problem * num_blocks + number
        size = num_problems.to(tl.int64) * num_blocks
        is_block, is_before = number < num_blocks, number < block
        largest = tl.max(tl.load(target, mask=is_block, other=0.0), 0).to(weight.dtype)
        found = tl.load(target + size, mask=is_block, other=0.0).to(tl.int32)
        num_positives = tl.sum(found, 0)
        positives_before = tl.sum(tl.where(is_before, found, 0), 0)
        found = tl.load(target + 2 * size, mask=is_block, other=0.0).to(tl.int32)
        num_present = tl.sum(found, 0)
        present_before = tl.sum(tl.where(is_before, found, 0), 0)

    target = problem * num_rows + row
    score = tl.load(scores + problem * score_strides + row * score_stride, mask=inside, other=0.0)
    score = _finite(tl.where(present, score, 0.0).to(ready.dtype.element_ty), LARGEST)
    tl.store(ready + target, score, mask=inside)
    unit = _units(weight, largest, score, WEIGHTED, SMALLEST)
    if WEIGHTED:
        tl.store(unit_weights + target, unit, mask=inside)
    tl.store(sides + target, tl.where(positive, unit, -unit), mask=inside)

    place = _places(
        positive, present, row, num_positives, num_present, positives_before, present_before
    )
    tl.store(order + problem * num_rows + place, row.to(tl.int32), mask=inside)

    is_valid = num_positives > 0
    if not ONE_SIDED:
        is_valid = is_valid & (num_positives < num_present)
    wide = unit.to(tl.float64)
    positive_mass = tl.sum(tl.where(positive, wide, 0.0), 0)
    mass = tl.sum(wide, 0)
    none = tl.where(block == 0, 1.0, 0.0).to(tl.float64)
    target = masses + problem * num_blocks + block
    size = num_problems.to(tl.int64) * num_blocks
    tl.store(target, tl.where(is_valid, mass, none))
    tl.store(target + size, tl.where(is_valid, positive_mass, none))
    tl.store(target + 2 * size, tl.where(is_valid, mass - positive_mass, none))
    if block == 0:
        tl.store(valid + problem, is_valid.to(tl.uint8))
        tl.store(numbers + problem, tl.where(is_valid, num_positives, 0))
        tl.store(numbers + num_problems + problem, tl.where(is_valid, num_present, 0))
        if FIXED:
            tau = fixed_bits.to(tl.int64).to(tl.float64, bitcast=True)
        else:
            tau = tl.load(temperature + problem * temperature_stride).to(tl.float64)
        tl.store(rates + problem, 1.0 / tau)
        if WEIGHTED:
            tl.store(units + problem, tl.where(largest > 0, largest, 1.0))


@triton.jit
def _logistic(x):
    """σ(x) and σ′(x), by e^(−|x|), which never overflows."""
    small = tl.exp(-tl.abs(x))
    inverse = 1.0 / (1.0 + small)
    return tl.where(x >= 0, inverse, small * inverse), small * inverse * inverse


@triton.jit
def _stretch(numbers, problem, num_problems, QUERIES: tl.constexpr):
    """Where in `order` the queries begin and end."""
    num_positives = tl.load(numbers + problem)
    num_present = tl.load(numbers + num_problems + problem)
    begin = num_positives * 0
    end = num_present
    if QUERIES == "positives":
        end = num_positives
    if QUERIES == "negatives":
        begin = num_positives
    return begin, end


@triton.jit
def _is_query(side, end, QUERIES: tl.constexpr):
    """Whether a row is one, `end` being above 0 where the problem has any."""
    side = tl.where(end > 0, side, 0.0)
    found = side != 0
    if QUERIES == "positives":
        found = side > 0
    if QUERIES == "negatives":
        found = side < 0
    return found


@triton.jit
def soft_ranks(
    scores,  # [C, M]
    sides,  # [C, M]
    order,  # [C, M] int32
    numbers,  # [2, C] int32
    rates,  # [C]
    ranks,  # [K, C, M]: 1 where a row is no query
    sums,  # [2, C, M] float64: Σ ω σ′(x) over negatives and positives, at the queries
    num_rows,
    QUERIES: tl.constexpr,
    ALL: tl.constexpr,  # which of the ranks is that among all rows; below 0: none
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WITH_SLOPES: tl.constexpr,
    SMALLEST: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The ranks of a block of queries; for slopes, without the pair of a query with itself."""
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first = tl.program_id(0) * BQ
    number = first + tl.arange(0, BQ)
    begin, end = _stretch(numbers, problem, num_problems, QUERIES)
    is_query = (number >= begin) & (number < end)
    base = problem * num_rows
    row = tl.load(order + base + number, mask=number < num_rows, other=0)
    query = tl.load(scores + base + row, mask=is_query, other=0.0)[:, None]
    rate = tl.load(rates + problem)
    among_negatives = tl.zeros([BQ], dtype=tl.float64)
    among_positives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_negatives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_positives = tl.zeros([BQ], dtype=tl.float64)
    stop = tl.where((first < end) & (first + BQ > begin), num_rows, 0)
    for chunk in range(0, stop, CHUNK):
        negatives = tl.zeros([BQ, BM], dtype=query.dtype)
        positives = tl.zeros([BQ, BM], dtype=query.dtype)
        negative_slopes = tl.zeros([BQ, BM], dtype=query.dtype)
        positive_slopes = tl.zeros([BQ, BM], dtype=query.dtype)
        for offset in range(0, CHUNK, BM):
            source = chunk + offset + tl.arange(0, BM)
            inside = source < num_rows
            score = tl.load(scores + base + source, mask=inside, other=0.0)[None, :]
            side = tl.load(sides + base + source, mask=inside, other=0.0)[None, :]
            positive_weight = tl.where(side > 0, side, 0.0)
            negative_weight = positive_weight - side
            sigmoid, slope = _logistic((score - query) * rate)
            negatives += sigmoid * negative_weight
            positives += sigmoid * positive_weight
            if WITH_SLOPES:
                is_other = source[None, :] != row[:, None]
                slope = tl.where(is_other, slope, 0.0)
                negative_slopes += slope * negative_weight
                positive_slopes += slope * positive_weight
        among_negatives += tl.sum(negatives, 1).to(tl.float64)
        among_positives += tl.sum(positives, 1).to(tl.float64)
        if WITH_SLOPES:
            slope_of_negatives += tl.sum(negative_slopes, 1).to(tl.float64)
            slope_of_positives += tl.sum(positive_slopes, 1).to(tl.float64)
    _store_ranks(
        ranks, sides, base + row, number < num_rows, is_query, among_negatives, among_positives,
        num_problems.to(tl.int64) * num_rows, ALL, POSITIVES, NEGATIVES, SMALLEST,
    )  # fmt: skip
    if WITH_SLOPES:
        size = num_problems.to(tl.int64) * num_rows
        tl.store(sums + base + row, slope_of_negatives, mask=is_query)
        tl.store(sums + size + base + row, slope_of_positives, mask=is_query)


@triton.jit
def _store_ranks(
    ranks,
    sides,
    place,
    inside,
    is_query,
    among_negatives,
    among_positives,
    size,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Σ ω σ(x) of both sides [n] as ranks among each set, a query counting itself fully."""
    side = tl.load(sides + place, mask=is_query, other=0.0).to(tl.float64)
    half = 0.5 * tl.abs(side)
    # Rounding breaks 0 ≤ R ≤ R among all > 0 when a weight is below the precision of its sum.
    among_all = among_negatives + among_positives + half
    among_all = tl.where(among_all < SMALLEST, SMALLEST, among_all)
    if ALL >= 0:
        tl.store(ranks + ALL * size + place, tl.where(is_query, among_all, 1.0), mask=inside)
    if POSITIVES >= 0:
        rank = among_positives + tl.where(side > 0, half, 0.0)
        rank = tl.where(rank > among_all, among_all, rank)
        tl.store(ranks + POSITIVES * size + place, tl.where(is_query, rank, 1.0), mask=inside)
    if NEGATIVES >= 0:
        rank = among_negatives + tl.where(side < 0, half, 0.0)
        rank = tl.where(rank > among_all, among_all, rank)
        tl.store(ranks + NEGATIVES * size + place, tl.where(is_query, rank, 1.0), mask=inside)


@triton.jit
def _slopes_by_side(
    by_all,
    by_positives,
    by_negatives,
    side,
    place,
    mask,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WEIGHS: tl.constexpr,
):
    """What a negative source, and a positive one, counts at queries: the slopes of all sets that
    hold it, times the weight of the query.
    """
    to_negative = tl.zeros(side.shape, dtype=side.dtype)
    to_positive = tl.zeros(side.shape, dtype=side.dtype)
    if ALL:
        slope = tl.load(by_all + place, mask=mask, other=0.0)
        to_negative += slope
        to_positive += slope
    if NEGATIVES:
        to_negative += tl.load(by_negatives + place, mask=mask, other=0.0)
    if POSITIVES:
        to_positive += tl.load(by_positives + place, mask=mask, other=0.0)
    if WEIGHS:
        to_negative *= tl.abs(side)
        to_positive *= tl.abs(side)
    return to_negative, to_positive


@triton.jit
def score_slopes(
    scores,  # [C, M]
    sides,  # [C, M]
    order,  # [C, M] int32
    numbers,  # [2, C] int32
    rates,  # [C]
    by_all,  # [C, M]: the derivatives by the ranks among all rows, at the queries
    by_positives,
    by_negatives,
    sums,  # [2, C, M] float64 by `soft_ranks`
    divisors,  # [C], or anything where not DIVIDED
    slopes,  # [C, M], 0 from num_live on
    num_rows,
    num_live,
    QUERIES: tl.constexpr,
    ALL: tl.constexpr,  # whether there are such derivatives
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WEIGHS: tl.constexpr,  # whether they are those of a query of weight 1
    DIVIDED: tl.constexpr,
    LARGEST: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What every row gets as a source, from all queries, less what it gets as a query."""
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    source = tl.program_id(0) * BM + tl.arange(0, BM)
    begin, end = _stretch(numbers, problem, num_problems, QUERIES)
    base = problem * num_rows
    is_live = source < num_live
    own_score = tl.load(scores + base + source, mask=is_live, other=0.0)
    side = tl.load(sides + base + source, mask=is_live, other=0.0)
    score = own_score[None, :]
    rate = tl.load(rates + problem)
    as_negative = tl.zeros([BM], dtype=tl.float64)
    as_positive = tl.zeros([BM], dtype=tl.float64)
    stop = tl.where(tl.program_id(0) * BM < num_live, end, begin)
    for start in range(begin, stop, BQ * BLOCKS):
        negative = tl.zeros([BQ, BM], dtype=score.dtype)
        positive = tl.zeros([BQ, BM], dtype=score.dtype)
        for block in range(0, tl.minimum(BLOCKS, tl.cdiv(end - start, BQ))):
            number = start + block * BQ + tl.arange(0, BQ)
            is_real = number < end
            row = tl.load(order + base + number, mask=is_real, other=0)
            query = tl.load(scores + base + row, mask=is_real, other=0.0)[:, None]
            own = tl.load(sides + base + row, mask=is_real, other=0.0)
            to_negative, to_positive = _slopes_by_side(
                by_all, by_positives, by_negatives, own, base + row, is_real,
                ALL, POSITIVES, NEGATIVES, WEIGHS,
            )  # fmt: skip
            _sigmoid, slope = _logistic((score - query) * rate)
            slope = tl.where(source[None, :] != row[:, None], slope, 0.0)
            negative += slope * to_negative[:, None]
            positive += slope * to_positive[:, None]
        as_negative += tl.sum(negative, 0).to(tl.float64)
        as_positive += tl.sum(positive, 0).to(tl.float64)
    slope = tl.where(side > 0, as_positive, as_negative) * tl.abs(side).to(tl.float64)
    is_query = _is_query(side, end, QUERIES)
    to_negative, to_positive = _slopes_by_side(
        by_all, by_positives, by_negatives, side, base + source, is_query,
        ALL, POSITIVES, NEGATIVES, WEIGHS,
    )  # fmt: skip
    size = num_problems.to(tl.int64) * num_rows
    of_negatives = tl.load(sums + base + source, mask=is_query, other=0.0)
    of_positives = tl.load(sums + size + base + source, mask=is_query, other=0.0)
    slope -= of_negatives * to_negative + of_positives * to_positive  # they nearly cancel
    # Nothing moves an infinity, whose slope would be finite where several tie, nor a row left out,
    # whose slope would be NaN where another is.
    slope = tl.where((tl.abs(own_score) == LARGEST) | (side == 0), 0.0, slope)
    scale = rate.to(tl.float64)
    if DIVIDED:
        scale /= tl.load(divisors + problem)
    tl.store(slopes + base + source, slope * scale, mask=source < num_rows)


@triton.jit
def weighted_totals(
    values,  # [C, M]
    sides,  # [C, M]
    numbers,  # [2, C] int32
    divisors,  # [C], or anything where not DIVIDED
    totals,  # [C, blocks]
    num_rows,
    QUERIES: tl.constexpr,
    DIVIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ ω · value over the queries of a block of rows."""
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, end = _stretch(numbers, problem, num_problems, QUERIES)
    side = tl.load(sides + problem * num_rows + row, mask=row < num_rows, other=0.0)
    is_query = _is_query(side, end, QUERIES)
    value = tl.load(values + problem * num_rows + row, mask=is_query, other=0.0).to(tl.float64)
    total = tl.sum(value * tl.abs(side), 0)
    if DIVIDED:
        total /= tl.load(divisors + problem)
    tl.store(totals + problem * tl.num_programs(0) + tl.program_id(0), total)


@triton.jit
def check_rows(
    targets,  # [n]
    sample_weight,  # [n] as given, or anything where not WEIGHTED
    weights,  # [n] in the dtype of the computation, or anything
    verdicts,  # [blocks] uint8
    num_labels,
    ignore_index,
    num_rows,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Whether targets are labels or ignored, and weights finite and ≥ 0, in a block of rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    target = tl.load(targets + row, mask=inside, other=0)
    if target.dtype.is_floating():
        target = target.to(tl.float64)
        good = (target >= 0) & (target < num_labels) & (target == tl.floor(target))
    else:
        target = target.to(tl.int64)
        good = (target >= 0) & (target < num_labels)
    good = good | (target == ignore_index)
    if WEIGHTED:
        given = tl.load(sample_weight + row, mask=inside, other=0)
        weight = tl.load(weights + row, mask=inside, other=0.0).to(tl.float64)
        good = good & (given >= 0) & (weight >= 0) & (weight < float("inf"))
    num_bad = tl.sum(tl.where(inside & ~good, 1, 0), 0)
    tl.store(verdicts + tl.program_id(0), (num_bad == 0).to(tl.uint8))


@triton.jit
def label_rows(
    targets,  # [1 or C, M]
    weights,  # as targets, or anything where not WEIGHTED
    is_positive,  # [C, M] uint8
    own,  # [1 or C, M]: the weights, 0 where ignored
    gains,  # [1 or C, M] of grades, 0 where ignored, or anything where not GRADED
    target_strides,
    target_stride,
    weight_strides,
    weight_stride,
    ignore_index,
    num_rows,
    WEIGHTED: tl.constexpr,
    BY_CLASS: tl.constexpr,  # a target is the class that is positive, else 1 is
    BY_LABEL: tl.constexpr,  # whether there is a target for each class
    GRADED: tl.constexpr,  # targets are grades, of which those above 0 are positive
    BLOCK: tl.constexpr,
):
    """A block of rows of one class."""
    problem = tl.program_id(1).to(tl.int64)
    label = problem if BY_LABEL else problem * 0
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    target = tl.load(targets + label * target_strides + row * target_stride, mask=inside, other=0)
    counts = target != ignore_index
    positive = target == (problem if BY_CLASS else 1)
    if GRADED:
        positive = counts & (target > 0)
        grade = tl.where(positive, target, 0)
        one = grade * 0 + 1
        gain = (one << tl.where(grade < 31, grade, 31)) - 1
        tl.store(gains + label * num_rows + row, gain.to(gains.dtype.element_ty), mask=inside)
    tl.store(is_positive + problem * num_rows + row, positive.to(tl.uint8), mask=inside)
    if WEIGHTED:
        place = weights + label * weight_strides + row * weight_stride
        weight = tl.load(place, mask=inside & counts, other=0.0)
    else:
        weight = tl.where(counts, 1.0, 0.0)
    end = num_rows
    if not BY_LABEL:  # once
        end = tl.where(problem == 0, num_rows, 0)
    tl.store(own + label * num_rows + row, weight, mask=row < end)


@triton.jit
def choose_rows(
    logits,  # [N, C]
    targets,  # [N, L]
    weights,  # [N, L], or anything where not WEIGHTED
    keep,  # [N] uint8
    counts,  # [blocks] int32
    before,  # [2] int64: cursor, and number of pushes, as they were
    cursor,
    pushed_at,  # [size + 1] int64
    logit_stride,
    logit_strides,
    target_stride,
    target_strides,
    weight_stride,
    weight_strides,
    size,
    num_rows,
    num_classes,
    num_labels,
    ignore_index,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Which rows of a block a queue stores: finite ones with a target that counts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    num_bad = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < num_classes)[None, :]
        place = row[:, None] * logit_stride + column[None, :] * logit_strides
        logit = tl.load(logits + place, mask=mask, other=0.0)
        num_bad += tl.sum((tl.abs(logit) < float("inf")).to(tl.int32) ^ 1, 1)
    num_present = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, num_labels, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < num_labels)[None, :]
        place = row[:, None] * target_stride + column[None, :] * target_strides
        present = mask & (tl.load(targets + place, mask=mask, other=0) != ignore_index)
        if WEIGHTED:
            place = row[:, None] * weight_stride + column[None, :] * weight_strides
            weight = tl.load(weights + place, mask=mask, other=0.0)
            num_bad += tl.sum((tl.abs(weight) < float("inf")).to(tl.int32) ^ 1, 1)
            present = present & (weight > 0)
        num_present += tl.sum(present.to(tl.int32), 1)
    kept = inside & (num_bad == 0) & (num_present > 0)
    tl.store(keep + row, kept.to(tl.uint8), mask=inside)
    tl.store(counts + tl.program_id(0), tl.sum(kept.to(tl.int32), 0))
    if tl.program_id(0) == 0:
        tl.store(before, tl.load(cursor))
        tl.store(before + 1, tl.load(pushed_at + size))


@triton.jit
def store_rows(
    logits,
    targets,
    weights,
    values,  # [N, L], or anything where not VALUED
    groups,  # [N, 1], or anything where not GROUPED
    keep,
    counts,
    before,
    stored_logits,  # [size + 1, C]
    stored_targets,  # [size + 1, L]
    stored_weights,  # [size + 1, L]
    stored_values,  # [size + 1, L]
    stored_groups,  # [size + 1]
    cursor,
    pushed_at,
    logit_stride,
    logit_strides,
    target_stride,
    target_strides,
    weight_stride,
    weight_strides,
    value_stride,
    value_strides,
    group_stride,
    size,
    num_rows,
    num_classes,
    num_labels,
    WEIGHTED: tl.constexpr,
    VALUED: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,  # a power of two, at least as many as there are
):
    """Some columns of the rows of a block, into the slots from the cursor on; the newest only."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    number = tl.arange(0, BLOCKS)
    count = tl.load(counts + number, mask=number < num_blocks, other=0)
    total = tl.sum(count, 0)
    surplus = tl.maximum(total - size, 0)
    kept = tl.load(keep + row, mask=inside, other=0).to(tl.int32)
    place = tl.sum(tl.where(number < block, count, 0), 0) + tl.cumsum(kept, 0) - 1 - surplus
    is_stored = (kept != 0) & (place >= 0)
    start, pushes = tl.load(before), tl.load(before + 1) + 1
    slot = (start + tl.maximum(place, 0)) % size
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = is_stored[:, None] & (column < num_classes)[None, :]
    found = row[:, None] * logit_stride + column[None, :] * logit_strides
    logit = tl.load(logits + found, mask=mask, other=0.0)
    tl.store(stored_logits + slot[:, None] * num_classes + column[None, :], logit, mask=mask)
    mask = is_stored[:, None] & (column < num_labels)[None, :]
    target_place = slot[:, None] * num_labels + column[None, :]
    found = row[:, None] * target_stride + column[None, :] * target_strides
    target = tl.load(targets + found, mask=mask, other=0)
    tl.store(stored_targets + target_place, target, mask=mask)
    if WEIGHTED:
        found = row[:, None] * weight_stride + column[None, :] * weight_strides
        weight = tl.load(weights + found, mask=mask, other=0.0)
    else:
        weight = tl.where(mask, 1.0, 0.0)
    tl.store(stored_weights + target_place, weight, mask=mask)
    if VALUED:
        found = row[:, None] * value_stride + column[None, :] * value_strides
        value = tl.load(values + found, mask=mask, other=0.0)
    else:
        value = tl.where(mask, -1.0, 0.0)
    tl.store(stored_values + target_place, value, mask=mask)
    if tl.program_id(1) == 0:
        tl.store(pushed_at + slot, pushes + slot * 0, mask=is_stored)
        group = slot * 0
        if GROUPED:
            group = tl.load(groups + row * group_stride, mask=is_stored, other=0)
        tl.store(stored_groups + slot, group, mask=is_stored)
        if block == 0:
            tl.store(cursor, (start + total - surplus) % size)
            tl.store(pushed_at + size, pushes)


# The linear way: rows in ascending order of score, in blocks -------------------------------------


@triton.jit
def _powers(distance, LIMIT: tl.constexpr, POWERS: tl.constexpr):
    """e^(−k·distance) [n, POWERS] of distances [n] ≥ 0 in τ; NaN stays."""
    distance = tl.where(distance > LIMIT, LIMIT, distance)
    return tl.exp(-distance[:, None] * tl.arange(0, POWERS)[None, :].to(distance.dtype))


@triton.jit
def _store_moments(
    moments, block, problem, num_problems, last_0, last_1, first_0, first_1, POWERS: tl.constexpr
):  # fmt: skip
    num_blocks = tl.num_programs(0)
    stride = num_problems.to(tl.int64) * num_blocks
    target = moments + tl.arange(0, POWERS) * stride + problem * num_blocks + block
    tl.store(target, last_0)
    tl.store(target + POWERS * stride, last_1)
    tl.store(target + 2 * POWERS * stride, first_0)
    tl.store(target + 3 * POWERS * stride, first_1)


@triton.jit
def _summed(powers, value):
    """Σ over rows of powers [n, POWERS] times a value [n]; coefficients of both signs follow."""
    return tl.sum(powers.to(tl.float64) * value.to(tl.float64)[:, None], 0)


@triton.jit
def block_moments(
    sides,  # [C, M] by row
    sorted_scores,  # [C, M]
    index,  # [C, M] int64: the rows in order
    numbers,  # [2, C] int32
    rates,  # [C]
    sorted_sides,  # [C, M]
    picked,  # [C, M] int32: in each block the places of its queries first
    counts,  # [C, blocks] int32: how many they are
    moments,  # [2, 2, POWERS, C, blocks] float64
    num_rows,
    QUERIES: tl.constexpr,
    LIMIT: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ ω · e^(−k·distance in τ) of the rows of a block, k < POWERS: to its last row and its first,
    over negatives and positives. And what other kernels need of a block, in order.
    """
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    base, begin = problem * num_rows, block * BLOCK
    rate = tl.load(rates + problem)
    _, end = _stretch(numbers, problem, num_problems, QUERIES)
    first = tl.load(sorted_scores + base + begin)
    last = tl.load(sorted_scores + base + tl.minimum(begin + BLOCK, num_rows) - 1)
    place = begin + tl.arange(0, BLOCK)
    inside = place < num_rows
    score = tl.load(sorted_scores + base + place, mask=inside, other=0.0)
    row = tl.load(index + base + place, mask=inside, other=0)
    side = tl.load(sides + base + row, mask=inside, other=0.0)
    tl.store(sorted_sides + base + place, side, mask=inside)
    is_query = _is_query(side, end, QUERIES)
    one = is_query.to(tl.int32)
    tl.store(picked + base + begin + tl.cumsum(one, 0) - 1, place, mask=is_query)
    tl.store(counts + problem * num_blocks + block, tl.sum(one, 0))
    positive = tl.where(side > 0, side, 0.0)
    negative = positive - side
    powers = _powers((last - tl.where(inside, score, last)) * rate, LIMIT, POWERS)
    last_0, last_1 = _summed(powers, negative), _summed(powers, positive)
    powers = _powers((tl.where(inside, score, first) - first) * rate, LIMIT, POWERS)
    first_0, first_1 = _summed(powers, negative), _summed(powers, positive)
    _store_moments(moments, block, problem, num_problems, last_0, last_1, first_0, first_1, POWERS)


@triton.jit
def slope_moments(
    by_all,  # [C, M] by row
    by_positives,
    by_negatives,
    sorted_scores,  # [C, M]
    index,  # [C, M] int64
    rates,  # [C]
    sorted_sides,  # [C, M]
    picked,  # [C, M] int32
    counts,  # [C, blocks] int32
    moments,  # [2, 2, POWERS, C, blocks] float64
    sorted_slopes,  # [2, C, M]: the slopes by both sides, at the queries
    num_rows,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WEIGHS: tl.constexpr,
    LIMIT: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
):
    """The same sums of the slopes of the queries."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    base, begin = problem * num_rows, block * BLOCK
    size = num_problems.to(tl.int64) * num_rows
    rate = tl.load(rates + problem)
    first = tl.load(sorted_scores + base + begin)
    last = tl.load(sorted_scores + base + tl.minimum(begin + BLOCK, num_rows) - 1)
    last_0 = tl.zeros([POWERS], dtype=tl.float64)
    last_1 = tl.zeros([POWERS], dtype=tl.float64)
    first_0 = tl.zeros([POWERS], dtype=tl.float64)
    first_1 = tl.zeros([POWERS], dtype=tl.float64)
    count = tl.load(counts + problem * num_blocks + block)
    for start in range(0, count, BQ):
        number = start + tl.arange(0, BQ)
        is_real = number < count
        place = tl.load(picked + base + begin + number, mask=is_real, other=0)
        row = tl.load(index + base + place, mask=is_real, other=0)
        side = tl.load(sorted_sides + base + place, mask=is_real, other=0.0)
        score = tl.load(sorted_scores + base + place, mask=is_real, other=0.0)
        to_negative, to_positive = _slopes_by_side(
            by_all, by_positives, by_negatives, side, base + row, is_real,
            ALL, POSITIVES, NEGATIVES, WEIGHS,
        )  # fmt: skip
        tl.store(sorted_slopes + base + place, to_negative, mask=is_real)
        tl.store(sorted_slopes + size + base + place, to_positive, mask=is_real)
        powers = _powers((last - tl.where(is_real, score, last)) * rate, LIMIT, POWERS)
        last_0 += _summed(powers, to_negative)
        last_1 += _summed(powers, to_positive)
        powers = _powers((tl.where(is_real, score, first) - first) * rate, LIMIT, POWERS)
        first_0 += _summed(powers, to_negative)
        first_1 += _summed(powers, to_positive)
    _store_moments(moments, block, problem, num_problems, last_0, last_1, first_0, first_1, POWERS)


@triton.jit
def _decayed(decay, total, next_decay, next_total):
    return decay * next_decay, total * next_decay + next_total


@triton.jit
def scan_blocks(
    moments,  # [2, 2, POWERS, C, blocks] float64
    sorted_scores,  # [C, M]
    rates,  # [C]
    num_rows,
    num_blocks,
    LIMIT: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The moments of a block together with those of all blocks below it, or above it."""
    line = tl.program_id(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    power, is_upper = line % POWERS, line // (2 * POWERS)
    rate = tl.load(rates + problem).to(tl.float64)
    sorted_scores += problem * num_rows
    moments += (line.to(tl.int64) * num_problems + problem) * num_blocks
    carry = tl.sum(tl.zeros([CHUNK], dtype=tl.float64), 0)
    for start in range(0, num_blocks, CHUNK):
        number = start + tl.arange(0, CHUNK)
        inside = number < num_blocks
        block = tl.where(is_upper > 0, num_blocks - 1 - number, number)
        edge = tl.where(is_upper > 0, block * BLOCK, tl.minimum((block + 1) * BLOCK, num_rows) - 1)
        before = tl.where(is_upper > 0, edge + BLOCK, block * BLOCK - 1)
        has_one = inside & (number > 0)
        own = tl.load(sorted_scores + edge, mask=has_one, other=0.0).to(tl.float64)
        other = tl.load(sorted_scores + before, mask=has_one, other=0.0).to(tl.float64)
        distance = tl.where(is_upper > 0, other - own, own - other) * rate
        distance = tl.where(distance > LIMIT, LIMIT, distance)
        decay = tl.exp(-distance * power.to(tl.float64))
        moment = tl.load(moments + block, mask=inside, other=0.0)
        decay, moment = tl.associative_scan((decay, moment), 0, _decayed)
        moment += decay * carry
        tl.store(moments + block, moment, mask=inside)
        carry = tl.sum(tl.where(number == start + CHUNK - 1, moment, 0.0), 0)


@triton.jit
def _far_moments(
    moments, sorted_scores, block, num_rows, problem, POWERS: tl.constexpr, BLOCK: tl.constexpr
):
    """The score that the blocks below end with, that the blocks above begin with, and moments
    [POWERS] of two values, below and above.
    """
    num_blocks = tl.num_programs(0)
    has_lower, has_upper = block > 0, block + 1 < num_blocks
    base = problem * num_rows + block * BLOCK
    below = tl.load(sorted_scores + base - 1, mask=has_lower, other=0.0)
    above = tl.load(sorted_scores + base + BLOCK, mask=has_upper, other=0.0)
    stride = tl.num_programs(1).to(tl.int64) * num_blocks
    target = moments + tl.arange(0, POWERS) * stride + problem * num_blocks + block
    mask = tl.arange(0, POWERS) < tl.where(has_lower, POWERS, 0)
    lower_0 = tl.load(target - 1, mask=mask, other=0.0)
    lower_1 = tl.load(target + POWERS * stride - 1, mask=mask, other=0.0)
    mask = tl.arange(0, POWERS) < tl.where(has_upper, POWERS, 0)
    upper_0 = tl.load(target + 2 * POWERS * stride + 1, mask=mask, other=0.0)
    upper_1 = tl.load(target + 3 * POWERS * stride + 1, mask=mask, other=0.0)
    return below, above, lower_0, lower_1, upper_0, upper_1


@triton.jit
def far_ranks(
    sides,  # [C, M] by row
    sorted_scores,  # [C, M]
    index,  # [C, M] int64
    rates,  # [C]
    sorted_sides,  # [C, M]
    picked,  # [C, M] int32
    counts,  # [C, blocks] int32
    moments,  # [2, 2, POWERS, C, blocks] float64
    coefficients,  # [3, POWERS] float64: of σ below and above, and of σ′
    ranks,  # [K, C, M] by row, of which those of the queries are written
    sums,  # [2, C, M] float64, in order: Σ ω σ′(x) over negatives and positives, at the queries
    num_rows,
    ALL: tl.constexpr,
    POSITIVES: tl.constexpr,
    NEGATIVES: tl.constexpr,
    WITH_SLOPES: tl.constexpr,
    SMALLEST: tl.constexpr,
    LIMIT: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
):
    """The ranks of the queries of a block: its own pairs one by one, all others by moments."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    base, begin = problem * num_rows, block * BLOCK
    size = num_problems.to(tl.int64) * num_rows
    rate = tl.load(rates + problem)
    below, above, lower_0, lower_1, upper_0, upper_1 = _far_moments(
        moments, sorted_scores, block, num_rows, problem, POWERS, BLOCK
    )
    own_power = tl.arange(0, POWERS)
    by_lower = tl.load(coefficients + own_power)
    by_upper = tl.load(coefficients + POWERS + own_power)
    by_slope = tl.load(coefficients + 2 * POWERS + own_power)
    source = begin + tl.arange(0, BLOCK)
    inside = source < num_rows
    score = tl.load(sorted_scores + base + source, mask=inside, other=0.0)[None, :]
    side = tl.load(sorted_sides + base + source, mask=inside, other=0.0)[None, :]
    positive_weight = tl.where(side > 0, side, 0.0)
    negative_weight = positive_weight - side
    count = tl.load(counts + problem * num_blocks + block)
    for start in range(0, count, BQ):
        number = start + tl.arange(0, BQ)
        is_real = number < count
        place = tl.load(picked + base + begin + number, mask=is_real, other=0)
        row = tl.load(index + base + place, mask=is_real, other=0)
        query = tl.load(sorted_scores + base + place, mask=is_real, other=0.0)
        to_lower = _powers(tl.where(begin > 0, query - below, 0.0) * rate, LIMIT, POWERS)
        has_upper = begin + BLOCK < num_rows
        to_upper = _powers(tl.where(has_upper, above - query, 0.0) * rate, LIMIT, POWERS)
        to_lower = to_lower.to(tl.float64)
        to_upper = to_upper.to(tl.float64)
        among_negatives = _evaluated(to_lower, to_upper, by_lower * lower_0, by_upper * upper_0)
        among_positives = _evaluated(to_lower, to_upper, by_lower * lower_1, by_upper * upper_1)
        sigmoid, slope = _logistic((score - query[:, None]) * rate)
        among_negatives += tl.sum(sigmoid * negative_weight, 1).to(tl.float64)
        among_positives += tl.sum(sigmoid * positive_weight, 1).to(tl.float64)
        if WITH_SLOPES:
            of_negatives = _evaluated(to_lower, to_upper, by_slope * lower_0, by_slope * upper_0)
            of_positives = _evaluated(to_lower, to_upper, by_slope * lower_1, by_slope * upper_1)
            slope = tl.where(source[None, :] != place[:, None], slope, 0.0)
            of_negatives += tl.sum(slope * negative_weight, 1).to(tl.float64)
            of_positives += tl.sum(slope * positive_weight, 1).to(tl.float64)
            tl.store(sums + base + place, of_negatives, mask=is_real)
            tl.store(sums + size + base + place, of_positives, mask=is_real)
        _store_ranks(
            ranks, sides, base + row, is_real, is_real, among_negatives, among_positives,
            size, ALL, POSITIVES, NEGATIVES, SMALLEST,
        )  # fmt: skip


@triton.jit
def _evaluated(to_lower, to_upper, lower, upper):
    """Σ_k of powers [n, POWERS] times moments [POWERS], from below and from above."""
    return tl.sum(to_lower * lower[None, :] + to_upper * upper[None, :], 1)


@triton.jit
def far_slopes(
    sorted_scores,  # [C, M]
    index,  # [C, M] int64
    numbers,  # [2, C] int32
    rates,  # [C]
    sorted_sides,  # [C, M]
    picked,  # [C, M] int32
    counts,  # [C, blocks] int32
    moments,  # [2, 2, POWERS, C, blocks] float64, of the slopes
    coefficients,  # [3, POWERS] float64
    sorted_slopes,  # [2, C, M]
    sums,  # [2, C, M] float64, in order
    divisors,  # [C], or anything where not DIVIDED
    slopes,  # [C, M] by row, 0 from num_live on
    num_rows,
    num_live,
    QUERIES: tl.constexpr,
    DIVIDED: tl.constexpr,
    LARGEST: tl.constexpr,
    LIMIT: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BQ: tl.constexpr,
):
    """What the rows of a block get as sources, less what they get as queries."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    problem, num_problems = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    base, begin = problem * num_rows, block * BLOCK
    size = num_problems.to(tl.int64) * num_rows
    rate = tl.load(rates + problem)
    _, end = _stretch(numbers, problem, num_problems, QUERIES)
    below, above, lower_0, lower_1, upper_0, upper_1 = _far_moments(
        moments, sorted_scores, block, num_rows, problem, POWERS, BLOCK
    )
    by_slope = tl.load(coefficients + 2 * POWERS + tl.arange(0, POWERS))
    source = begin + tl.arange(0, BLOCK)
    inside = source < num_rows
    row = tl.load(index + base + source, mask=inside, other=0)
    score = tl.load(sorted_scores + base + source, mask=inside, other=0.0)
    side = tl.load(sorted_sides + base + source, mask=inside, other=0.0)
    to_lower = _powers(tl.where(begin > 0, score - below, 0.0) * rate, LIMIT, POWERS)
    to_lower = to_lower.to(tl.float64)
    has_upper = begin + BLOCK < num_rows
    to_upper = _powers(tl.where(has_upper, above - score, 0.0) * rate, LIMIT, POWERS)
    to_upper = to_upper.to(tl.float64)
    as_negative = _evaluated(to_lower, to_upper, by_slope * lower_0, by_slope * upper_0)
    as_positive = _evaluated(to_lower, to_upper, by_slope * lower_1, by_slope * upper_1)
    count = tl.load(counts + problem * num_blocks + block)
    for start in range(0, count, BQ):
        number = start + tl.arange(0, BQ)
        is_real = number < count
        place = tl.load(picked + base + begin + number, mask=is_real, other=0)
        query = tl.load(sorted_scores + base + place, mask=is_real, other=0.0)[:, None]
        to_negative = tl.load(sorted_slopes + base + place, mask=is_real, other=0.0)
        to_positive = tl.load(sorted_slopes + size + base + place, mask=is_real, other=0.0)
        _sigmoid, slope = _logistic((score[None, :] - query) * rate)
        slope = tl.where(source[None, :] != place[:, None], slope, 0.0)
        as_negative += tl.sum(slope * to_negative[:, None], 0).to(tl.float64)
        as_positive += tl.sum(slope * to_positive[:, None], 0).to(tl.float64)
    slope = tl.where(side > 0, as_positive, as_negative) * tl.abs(side).to(tl.float64)
    is_query = _is_query(side, end, QUERIES)
    to_negative = tl.load(sorted_slopes + base + source, mask=is_query, other=0.0)
    to_positive = tl.load(sorted_slopes + size + base + source, mask=is_query, other=0.0)
    of_negatives = tl.load(sums + base + source, mask=is_query, other=0.0)
    of_positives = tl.load(sums + size + base + source, mask=is_query, other=0.0)
    slope -= of_negatives * to_negative + of_positives * to_positive
    scale = rate.to(tl.float64)
    if DIVIDED:
        scale /= tl.load(divisors + problem)
    slope = tl.where((tl.abs(score) == LARGEST) | (side == 0), 0.0, slope) * scale
    slope = tl.where(row < tl.where(end > 0, num_live, 0), slope, 0.0)
    tl.store(slopes + base + row, slope, mask=inside)
