"""The sums as Triton kernels, for CUDA devices. Imported on first use, never by the package.

All are deterministic: every number is written by one program, which adds in an order of its own;
nothing is added atomically. Tiles are summed in the dtype of the scores, what they give in float64.

Letters as in the engine: C problems, M rows; x = (source − query) / τ. Blocks of queries and of
sources make a tile [BQ, BM] of pairs, which lives in registers: no pair is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank_sums(
    scores,  # [C, M]
    weights,  # [C, M], or anything where not WEIGHTED
    is_positive,  # [C, M] uint8
    rows,  # [C, stride] int32: the rows that are queries, then anything
    counts,  # [C] int32: how many they are
    rates,  # [C]: 1 / τ
    sums,  # [4 or 2, splits, C, M] float64, zeros
    num_rows,
    row_stride,
    splits,
    stretch,  # sources of a split, a multiple of CHUNK
    WEIGHTED: tl.constexpr,
    WITH_SLOPES: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Sums over a stretch of the sources, negatives and positives apart: Σ ω σ(x), and Σ ω σ′(x)
    without the pair of a query with itself.
    """
    split = tl.program_id(0) % splits
    first = (tl.program_id(0) // splits) * BQ
    problem = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + problem)
    if first >= count:
        return
    number = first + tl.arange(0, BQ)
    is_real = number < count
    row = tl.load(rows + problem * row_stride + number, mask=is_real, other=0)
    base = problem * num_rows
    query = tl.load(scores + base + row, mask=is_real, other=0.0)[:, None]
    rate = tl.load(rates + problem)
    among_negatives = tl.zeros([BQ], dtype=tl.float64)
    among_positives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_negatives = tl.zeros([BQ], dtype=tl.float64)
    slope_of_positives = tl.zeros([BQ], dtype=tl.float64)
    end = tl.minimum(num_rows, (split + 1) * stretch)
    for chunk in range(split * stretch, end, CHUNK):
        negatives = tl.zeros([BQ, BM], dtype=query.dtype)
        positives = tl.zeros([BQ, BM], dtype=query.dtype)
        negative_slopes = tl.zeros([BQ, BM], dtype=query.dtype)
        positive_slopes = tl.zeros([BQ, BM], dtype=query.dtype)
        for offset in range(0, CHUNK, BM):
            source = chunk + offset + tl.arange(0, BM)
            inside = source < end
            score = tl.load(scores + base + source, mask=inside, other=0.0)
            positive = tl.load(is_positive + base + source, mask=inside, other=0) != 0
            if WEIGHTED:
                weight = tl.load(weights + base + source, mask=inside, other=0.0)
            else:
                weight = tl.where(inside, 1.0, 0.0).to(query.dtype)
            weight = weight[None, :]
            positive_weight = tl.where(positive[None, :], weight, 0.0)
            x = (score[None, :] - query) * rate
            small = tl.exp(-tl.abs(x))  # e^(−|x|), which never overflows
            inverse = 1.0 / (1.0 + small)
            sigmoid = tl.where(x >= 0, inverse, small * inverse)
            negatives += sigmoid * (weight - positive_weight)
            positives += sigmoid * positive_weight
            if WITH_SLOPES:
                is_other = source[None, :] != row[:, None]
                slope = tl.where(is_other, small * inverse * inverse, 0.0)
                negative_slopes += slope * (weight - positive_weight)
                positive_slopes += slope * positive_weight
        among_negatives += tl.sum(negatives, 1).to(tl.float64)
        among_positives += tl.sum(positives, 1).to(tl.float64)
        if WITH_SLOPES:
            slope_of_negatives += tl.sum(negative_slopes, 1).to(tl.float64)
            slope_of_positives += tl.sum(positive_slopes, 1).to(tl.float64)
    size = tl.num_programs(1).to(tl.int64) * num_rows  # C·M
    place = sums + split * size + base + row
    tl.store(place, among_negatives, mask=is_real)
    tl.store(place + splits * size, among_positives, mask=is_real)
    if WITH_SLOPES:
        tl.store(place + 2 * splits * size, slope_of_negatives, mask=is_real)
        tl.store(place + 3 * splits * size, slope_of_positives, mask=is_real)


@triton.jit
def source_slopes(
    scores,  # [C, M]
    weights,  # [C, M], or anything where not WEIGHTED
    is_positive,  # [C, M] uint8
    rows,  # [C, stride] int32
    counts,  # [C] int32
    rates,  # [C]
    by_negatives,  # [C, M]: the derivative by the ranks among sets that hold negatives, at queries
    by_positives,  # [C, M]: that by the ranks among sets that hold positives
    slopes,  # [splits, C, num_live] float64
    num_rows,
    row_stride,
    num_live,
    splits,
    WEIGHTED: tl.constexpr,
    BQ: tl.constexpr,
    BM: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """What every live row gets as a source: σ′ of its pairs with every `splits`-th query block."""
    split = tl.program_id(0) % splits
    source = (tl.program_id(0) // splits) * BM + tl.arange(0, BM)
    problem = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + problem)
    base = problem * num_rows
    inside = source < num_live
    score = tl.load(scores + base + source, mask=inside, other=0.0)[None, :]
    rate = tl.load(rates + problem)
    as_negative = tl.zeros([BM], dtype=tl.float64)
    as_positive = tl.zeros([BM], dtype=tl.float64)
    step = splits * BQ
    for start in range(split * BQ, count, step * BLOCKS):
        negative = tl.zeros([BQ, BM], dtype=score.dtype)
        positive = tl.zeros([BQ, BM], dtype=score.dtype)
        for block in range(0, tl.minimum(BLOCKS, tl.cdiv(count - start, step))):
            number = start + block * step + tl.arange(0, BQ)
            is_real = number < count
            row = tl.load(rows + problem * row_stride + number, mask=is_real, other=0)
            query = tl.load(scores + base + row, mask=is_real, other=0.0)[:, None]
            to_negative = tl.load(by_negatives + base + row, mask=is_real, other=0.0)[:, None]
            to_positive = tl.load(by_positives + base + row, mask=is_real, other=0.0)[:, None]
            x = (score - query) * rate
            small = tl.exp(-tl.abs(x))
            inverse = 1.0 / (1.0 + small)
            is_other = source[None, :] != row[:, None]
            slope = tl.where(is_other, small * inverse * inverse, 0.0)
            negative += slope * to_negative
            positive += slope * to_positive
        as_negative += tl.sum(negative, 0).to(tl.float64)
        as_positive += tl.sum(positive, 0).to(tl.float64)
    own = tl.load(is_positive + base + source, mask=inside, other=0) != 0
    slope = tl.where(own, as_positive, as_negative)
    if WEIGHTED:
        slope *= tl.load(weights + base + source, mask=inside, other=0.0).to(tl.float64)
    size = tl.num_programs(1).to(tl.int64) * num_live
    tl.store(slopes + split * size + problem * num_live + source, slope, mask=inside)


@triton.jit
def panel_moments(
    order,  # [n] int64: the rows, those of a panel together
    places,  # [n] float64 in [−1, 1], by row
    values,  # [K, n], by row
    panels,  # [I] int64: the panel of each item, S for none
    begins,  # [I] int64: the first of its rows, in `order`
    ends,  # [S] int64: where a panel's rows end
    partial,  # [K, p, I] float64, zeros
    num_rows,
    num_items,
    num_panels,
    DEGREE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Σ value · placeᵇ of an item: at most ROWS rows of one panel."""
    item = tl.program_id(0)
    column = tl.program_id(1).to(tl.int64)
    panel = tl.load(panels + item)
    if panel >= num_panels:
        return
    index = tl.load(begins + item) + tl.arange(0, ROWS)
    inside = index < tl.load(ends + panel)
    row = tl.load(order + index, mask=inside, other=0)
    value = tl.load(values + column * num_rows + row, mask=inside, other=0.0).to(tl.float64)
    place = tl.load(places + row, mask=inside, other=0.0)
    target = partial + column * DEGREE * num_items + item
    for _ in tl.static_range(DEGREE):
        tl.store(target, tl.sum(value, 0))
        value *= place
        target += num_items


@triton.jit
def panel_totals(
    partial,  # [K, p, I] float64
    item_ends,  # [S] int64: where a panel's items end
    moments,  # [K, p, S] float64
    num_items,
    num_panels,
    DEGREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moments of a panel, from those of its items."""
    panel = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64) * DEGREE  # of column and power
    begin = tl.load(item_ends + panel - 1, mask=panel > 0, other=0)
    end = tl.load(item_ends + panel)
    for _ in tl.static_range(DEGREE):
        total = tl.zeros([BLOCK], dtype=tl.float64)
        for start in range(begin, end, BLOCK):
            item = start + tl.arange(0, BLOCK)
            total += tl.load(partial + line * num_items + item, mask=item < end, other=0.0)
        tl.store(moments + line * num_panels + panel, tl.sum(total, 0))
        line += 1


@triton.jit
def panel_values(
    slots,  # [n] int32: the panel of each row
    places,  # [n] float64
    is_wanted,  # [n] uint8, or anything where not MASKED
    field,  # [K, p, S] float64
    out,  # [K, n] float64; 0 where not wanted
    num_rows,
    num_panels,
    MASKED: tl.constexpr,
    DEGREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_a field[k, a, panel] · placeᵃ of each row, by Horner's rule."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(1).to(tl.int64)
    inside = row < num_rows
    wanted = inside
    if MASKED:
        wanted &= tl.load(is_wanted + row, mask=inside, other=0) != 0
    slot = tl.load(slots + row, mask=wanted, other=0)
    place = tl.load(places + row, mask=wanted, other=0.0)
    coefficients = field + (column * DEGREE + DEGREE - 1) * num_panels + slot
    value = tl.load(coefficients, mask=wanted, other=0.0)
    for _ in tl.static_range(DEGREE - 1):
        coefficients -= num_panels
        value = value * place + tl.load(coefficients, mask=wanted, other=0.0)
    tl.store(out + column * num_rows + row, value, mask=inside)
