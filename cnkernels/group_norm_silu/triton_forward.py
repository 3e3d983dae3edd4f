"""Group norm with addend and SiLU in Triton: the forward kernels, and which of them a call launches.

y = act((x + addend - mean) * rstd * weight + bias)
"""

import triton
import triton.language as tl

from cnkernels.group_norm_silu.triton_common import (
    ROWS_FORWARD,
    RUNTIME_OF_ROWS,
    RUNTIME_OF_SPANS,
    SPANS,
    activate,
    cut_rows,
    cut_spans,
    elementwise_columns,
    fits,
    fold,
    groups_block,
    inverse_deviation,
    load_channels,
    members,
    merge_moments,
    partials_block,
    row_tile,
    rows_elements,
    span_of,
    spread,
    warps_for,
)
from cnkernels.launch import Launch


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_fused_fwd_kernel(
    x_ptr,  # [N, G, D, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    addend_ptr,  # [N, C] or None
    y_ptr,  # [N, G, D, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    eps,
    spatial,  # S
    groups,  # G
    group_channels,  # D
    segments,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One group, held in registers as TILES tiles. The mean is taken twice: no deviation has its rounding error."""
    index = tl.program_id(0).to(tl.int64)  # n * G + g
    rows = group_channels * segments
    count = tl.cast(group_channels, tl.float32) * spatial
    base = index * group_channels * spatial

    tiles = ()
    sums = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in tl.static_range(TILES):
        start, offsets, mask, channel = row_tile(tile * BLOCK_R, rows, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        addend = load_channels(addend_ptr, index * group_channels + channel, channel < group_channels, 0.0)
        x = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0).to(tl.float32) + addend[:, None]
        tiles = tiles + (x,)
        sums += tl.where(mask, x, 0.0)
    rough = tl.sum(sums) / count

    deviations = ()
    sums = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in tl.static_range(TILES):
        _, _, mask, _ = row_tile(tile * BLOCK_R, rows, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        deviation = tl.where(mask, tiles[tile] - rough, 0.0)
        deviations = deviations + (deviation,)
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
    rest = tl.sum(sums) / count
    rstd = inverse_deviation(tl.sum(squares) - rest * rest * count, count, eps)
    tl.store(mean_ptr + index, rough + rest)
    tl.store(rstd_ptr + index, rstd)

    for tile in tl.static_range(TILES):
        start, offsets, mask, channel = row_tile(tile * BLOCK_R, rows, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        real = channel < group_channels
        parameter = (index % groups) * group_channels + channel
        scale = rstd * load_channels(weight_ptr, parameter, real, 1.0)
        bias = load_channels(bias_ptr, parameter, real, 0.0) - rest * scale
        y = activate(tl.fma(deviations[tile], scale[:, None], bias[:, None]), SILU, y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_fused_fwd_kernel(
    x_ptr,  # [N, S, C]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    y_ptr,  # [N, S, C]
    mean_ptr,
    rstd_ptr,
    eps,
    spatial,
    channels,
    groups,
    columns,
    group_channels,
    span_groups,
    span,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SILU: tl.constexpr,
):
    """A span of whole groups at every position, held in registers."""
    column = tl.program_id(0) % columns
    n = (tl.program_id(0) // columns).to(tl.int64)
    first_group, channel, real = span_of(column, channels, group_channels, span_groups, span, 1, BLOCK_C)
    member = members(channel, real, first_group, group_channels, BLOCK_G)
    position = tl.arange(0, BLOCK_R)
    mask = (position < spatial)[:, None] & real[None, :]
    offsets = position[:, None] * channels + channel[None, :]
    base = n * spatial * channels
    addend = load_channels(addend_ptr, n * channels + channel, real, 0.0)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) + addend[None, :]

    count = tl.cast(group_channels, tl.float32) * spatial
    rough = fold(tl.sum(tl.where(mask, x, 0.0), axis=0), member) / count  # [G]
    deviation = tl.where(mask, x - spread(rough, member)[None, :], 0.0)
    rest = fold(tl.sum(deviation, axis=0), member) / count
    m2 = fold(tl.sum(deviation * deviation, axis=0), member) - rest * rest * count
    rstd = inverse_deviation(m2, count, eps)

    scale = spread(rstd, member) * load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0) - spread(rest, member) * scale
    y = activate(tl.fma(deviation, scale[None, :], bias[None, :]), SILU, y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    group = first_group + tl.arange(0, BLOCK_G)
    owned = (tl.arange(0, BLOCK_G) < span_groups) & (group < groups)
    tl.store(mean_ptr + n * groups + group, rough + rest, mask=owned)
    tl.store(rstd_ptr + n * groups + group, rstd, mask=owned)


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_stats_kernel(
    x_ptr,  # [N, G, D, S]
    addend_ptr,
    partial_ptr,  # [3, N * G, chunks]: count, mean, sum of squared deviations
    plane,  # N * G * chunks
    spatial,
    group_channels,
    segments,
    chunk_rows,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):
    """Moments of one chunk of a group, about the mean of its first tile.

    The mean of 1 / T of the values is at most sqrt(T - 1) deviations from the mean of all, so taking the squares about
    it instead costs at most log2(T) bits: there is no input for which they cancel, as they do about zero.
    """
    chunk = tl.program_id(0) % chunks
    index = (tl.program_id(0) // chunks).to(tl.int64)
    first = chunk * chunk_rows
    end = tl.minimum(first + chunk_rows, group_channels * segments)
    base = x_ptr + index * group_channels * spatial

    x, mask = _load_rows(
        base,
        addend_ptr,
        index * group_channels,
        first,
        end,
        spatial,
        group_channels,
        segments,
        BLOCK_R,
        BLOCK_W,
        WHOLE_ROWS,
    )
    in_tile = rows_elements(first, tl.minimum(first + BLOCK_R, end), spatial, segments, BLOCK_W)
    shift = tl.sum(tl.where(mask, x, 0.0)) / in_tile
    sums = tl.where(mask, x - shift, 0.0)
    squares = sums * sums
    for row in range(first + BLOCK_R, end, BLOCK_R):
        x, mask = _load_rows(
            base,
            addend_ptr,
            index * group_channels,
            row,
            end,
            spatial,
            group_channels,
            segments,
            BLOCK_R,
            BLOCK_W,
            WHOLE_ROWS,
        )
        deviation = tl.where(mask, x - shift, 0.0)
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
    count = rows_elements(first, end, spatial, segments, BLOCK_W).to(tl.float32)
    rest = tl.sum(sums) / count
    target = partial_ptr + index * chunks + chunk
    tl.store(target, count)
    tl.store(target + plane, shift + rest)
    tl.store(target + 2 * plane, tl.sum(squares) - rest * rest * count)


@triton.jit
def _load_rows(
    base,
    addend_ptr,
    parameter,
    row,
    end,
    spatial,
    group_channels,
    segments,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):
    """A tile of x + addend as float32, and its mask. Kept in L2 as long as may be: the second pass reads it again."""
    start, offsets, mask, channel = row_tile(row, end, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
    addend = load_channels(addend_ptr, parameter + channel, channel < group_channels, 0.0)
    x = tl.load(base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x + addend[:, None], mask


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_apply_kernel(
    x_ptr,  # [N, G, D, S]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    partial_ptr,  # [3, N * G, partials]
    y_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    plane,
    spatial,
    groups,
    group_channels,
    segments,
    chunk_rows,
    chunks,
    partials,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merges its group's partials, then normalises one chunk. Last chunk first: it is what L2 still holds."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    index = (program // chunks).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    count, mean, m2 = _load_moments(partial_ptr + index * partials + part, plane, part < partials)
    count, mean, m2 = merge_moments(count, mean, m2, 0)
    rstd = inverse_deviation(m2, count, eps)
    if chunk == 0:
        tl.store(mean_ptr + index, mean)
        tl.store(rstd_ptr + index, rstd)

    first = chunk * chunk_rows
    end = tl.minimum(first + chunk_rows, group_channels * segments)
    base = index * group_channels * spatial
    for row in range(first, end, BLOCK_R):
        start, offsets, mask, channel = row_tile(row, end, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        real = channel < group_channels
        parameter = (index % groups) * group_channels + channel
        scale = rstd * load_channels(weight_ptr, parameter, real, 1.0)
        bias = load_channels(bias_ptr, parameter, real, 0.0)
        shift = mean - load_channels(addend_ptr, index * group_channels + channel, real, 0.0)
        x = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = activate(tl.fma(x - shift[:, None], scale[:, None], bias[:, None]), SILU, y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + start + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_moments(pointers, plane, mask):
    count = tl.load(pointers, mask=mask, other=0.0)
    mean = tl.load(pointers + plane, mask=mask, other=0.0)
    return count, mean, tl.load(pointers + 2 * plane, mask=mask, other=0.0)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_stats_kernel(
    x_ptr,  # [N, S, C]
    addend_ptr,
    partial_ptr,  # [3, N * G, chunks * SPLITS]
    plane,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    group_channels,
    span_groups,
    span,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Moments of some positions of a span: each channel's about the mean of its first tile, then the groups'."""
    column = tl.program_id(0) % columns  # neighbours share the DRAM page of a position
    chunk = tl.program_id(0) // columns % chunks
    n = (tl.program_id(0) // columns // chunks).to(tl.int64)
    first_group, channel, real = span_of(column, channels, group_channels, span_groups, span, SPLITS, BLOCK_C)
    addend = load_channels(addend_ptr, n * channels + channel, real, 0.0)[None, :]
    row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, spatial - row)
    base = x_ptr + (n * spatial + row) * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]

    mask = (position < rows)[:, None] & real[None, :]
    x = tl.load(base + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32) + addend
    shift = tl.sum(tl.where(mask, x, 0.0), axis=0) / tl.minimum(rows, BLOCK_R)  # [C]
    sums = tl.where(mask, x - shift[None, :], 0.0)
    squares = sums * sums
    for done in range(BLOCK_R, rows, BLOCK_R):
        base += BLOCK_R * channels
        mask = (position < rows - done)[:, None] & real[None, :]
        x = tl.load(base + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32) + addend
        deviation = tl.where(mask, x - shift[None, :], 0.0)
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
    count = tl.where(real, tl.cast(rows, tl.float32), 0.0)  # [C]
    rest = tl.sum(sums, axis=0) / rows
    m2 = tl.sum(squares, axis=0) - rest * rest * count
    mean = shift + rest

    member = members(channel, real, first_group, group_channels, BLOCK_G)  # [G, C]
    count = tl.where(member, count[None, :], 0.0)
    mean = tl.where(member, mean[None, :], 0.0)
    count, mean, m2 = merge_moments(count, mean, tl.where(member, m2[None, :], 0.0), 1)
    group = first_group + tl.arange(0, BLOCK_G)
    owned = (tl.arange(0, BLOCK_G) < span_groups) & (group < groups)
    target = partial_ptr + (n * groups + group) * (chunks * SPLITS) + chunk * SPLITS + column % SPLITS
    tl.store(target, count, mask=owned)
    tl.store(target + plane, mean, mask=owned)
    tl.store(target + 2 * plane, m2, mask=owned)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_apply_kernel(
    x_ptr,  # [N, S, C]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    partial_ptr,  # [3, N * G, partials]
    y_ptr,
    mean_ptr,
    rstd_ptr,
    eps,
    plane,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    partials,
    group_channels,
    touched,  # groups that BLOCK_C channels belong to
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merges the partials of the groups that BLOCK_C channels touch, then normalises some positions of them."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column = program % columns
    chunk = program // columns % chunks
    n = (program // columns // chunks).to(tl.int64)
    channel = column * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    first_group = column * BLOCK_C // group_channels
    group = first_group + tl.arange(0, BLOCK_G)
    part = tl.arange(0, BLOCK_P)
    pointers = partial_ptr + (n * groups + group)[:, None] * partials + part[None, :]
    there = (group < groups) & (tl.arange(0, BLOCK_G) < touched)
    count, mean, m2 = _load_moments(pointers, plane, there[:, None] & (part < partials)[None, :])
    count, mean, m2 = merge_moments(count, mean, m2, 1)
    rstd = inverse_deviation(m2, tl.maximum(count, 1.0), eps)
    if chunk == 0:  # a group belongs to the program that has its first channel
        start = group * group_channels
        owned = (group < groups) & (start >= column * BLOCK_C) & (start < (column + 1) * BLOCK_C)
        tl.store(mean_ptr + n * groups + group, mean, mask=owned)
        tl.store(rstd_ptr + n * groups + group, rstd, mask=owned)

    member = members(channel, real, first_group, group_channels, BLOCK_G)
    scale = spread(rstd, member) * load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0)
    shift = spread(mean, member) - load_channels(addend_ptr, n * channels + channel, real, 0.0)
    row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, spatial - row)
    base = (n * spatial + row) * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]
    for done in range(0, rows, BLOCK_R):
        mask = (position < rows - done)[:, None] & real[None, :]
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = activate(tl.fma(x - shift[None, :], scale[None, :], bias[None, :]), SILU, y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
        base += BLOCK_R * channels


def forward_launches(
    batch: int, channels: int, spatial: int, groups: int, itemsize: int, channels_last: bool, silu: bool
) -> tuple[tuple[Launch, ...], int]:
    """The launches of one forward call, in order, and how many partials a group has between them (0: one launch)."""
    if channels_last:
        return _spans_launches(batch, channels, spatial, groups, itemsize, silu)
    return _rows_launches(batch, channels, spatial, groups, silu)


def _rows_launches(batch, channels, spatial, groups, silu):
    cut = cut_rows(batch, channels, spatial, groups)
    sizes = {"spatial": spatial, "group_channels": channels // groups}
    tile = {"segments": cut.segments, "BLOCK_W": cut.width, "WHOLE_ROWS": spatial % cut.width == 0}
    if fits(cut.elements, batch * groups, ROWS_FORWARD):
        block = {"groups": groups, "TILES": cut.tiles, "BLOCK_R": cut.tile, "SILU": silu}
        warps = warps_for(cut.elements)
        return (Launch(_group_norm_silu_rows_fused_fwd_kernel, (batch * groups,), sizes | tile | block, warps),), 0
    stats = sizes | tile | {"plane": batch * groups * cut.chunks, "BLOCK_R": cut.block}
    stats |= {"chunk_rows": cut.chunk, "chunks": cut.chunks}
    finer = cut_rows(batch, channels, spatial, groups, finer=2)
    apply = stats | {"groups": groups, "partials": cut.chunks, "chunk_rows": finer.chunk, "chunks": finer.chunks}
    apply |= {"BLOCK_P": partials_block(cut.chunks), "SILU": silu}
    return (
        Launch(_group_norm_silu_rows_stats_kernel, (batch * groups * cut.chunks,), stats, 8),
        Launch(_group_norm_silu_rows_apply_kernel, (batch * groups * finer.chunks,), apply, 8),
    ), cut.chunks


def _spans_launches(batch, channels, spatial, groups, itemsize, silu):
    cut = cut_spans(batch, channels, spatial, groups, itemsize)
    sizes = {"spatial": spatial, "channels": channels, "groups": groups, "group_channels": channels // groups}
    span = {"columns": cut.columns, "span_groups": cut.groups, "span": cut.groups * (channels // groups)}
    span |= {"BLOCK_C": cut.width, "BLOCK_G": groups_block(cut.groups)}
    held = triton.next_power_of_2(spatial) * cut.width
    if cut.splits == 1 and fits(held, batch * cut.columns, SPANS):
        block = {"BLOCK_R": triton.next_power_of_2(spatial), "SILU": silu}
        return (
            Launch(
                _group_norm_silu_spans_fused_fwd_kernel, (batch * cut.columns,), sizes | span | block, warps_for(held)
            ),
        ), 0
    sizes["plane"] = batch * groups * cut.partials
    stats = {"SPLITS": cut.splits, "chunk_rows": cut.chunk, "chunks": cut.chunks, "BLOCK_R": cut.block}
    apply = elementwise_columns(batch, channels, spatial, groups)
    apply |= {"partials": cut.partials, "BLOCK_P": partials_block(cut.partials), "SILU": silu}
    return (
        Launch(_group_norm_silu_spans_stats_kernel, (batch * cut.columns * cut.chunks,), sizes | span | stats, 8),
        Launch(_group_norm_silu_spans_apply_kernel, (batch * apply["columns"] * apply["chunks"],), sizes | apply, 8),
    ), cut.partials
