"""Group norm with addend and SiLU in Triton: the forward kernels, and which of them a call launches.

y = act((x + addend - mean) * rstd * weight + bias)
"""

import triton
import triton.language as tl

from cnkernels.group_norm_silu.triton_common import (
    activate,
    inverse_deviation,
    load_addend,
    load_channels,
    members,
    merge_moments,
    row_tile,
    runs_of,
    span_of,
    sum_by_group,
    to_channels,
)
from cnkernels.group_norm_silu.triton_cuts import (
    MAX_HELD,
    MAX_HELD_SPAN,
    ROW_FORWARD,
    RUN_TILE,
    RUNTIME_OF_ROWS,
    RUNTIME_OF_SPANS,
    columns_of_elements,
    cut_runs,
    cut_spans,
    fits,
    groups_block,
    held_rows,
    partials_block,
    warps_for,
)
from cnkernels.launch import Launch


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_fused_fwd_kernel(
    x_ptr,  # [N, G, D, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    addend_ptr,  # [N, C], read if has_addend
    y_ptr,  # [N, G, D, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    eps,
    has_addend,
    spatial,  # S
    groups,  # G
    group_channels,  # D
    segments,
    segment_inverse,
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

    places = ()
    tiles = ()
    addends = ()
    sums = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_of_addend = tl.zeros([BLOCK_R], tl.float32)
    for tile in tl.static_range(TILES):
        offsets, mask, channel, length = row_tile(
            tile * BLOCK_R, rows, spatial, segments, segment_inverse, BLOCK_R, BLOCK_W, WHOLE_ROWS
        )
        addend = load_addend(addend_ptr, index * group_channels + channel, channel < group_channels, has_addend)
        tiles = tiles + (tl.load(x_ptr + base + offsets, mask=mask, other=0.0),)
        places = places + ((offsets, mask, channel),)
        addends = addends + (addend,)
        sums_of_addend += addend * length
        sums += tiles[tile].to(tl.float32)
    rough = (tl.sum(sums) + tl.sum(sums_of_addend)) / count

    deviations = ()
    sums = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    squares = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in tl.static_range(TILES):
        shift = rough - addends[tile]
        deviation = tl.where(places[tile][1], tiles[tile].to(tl.float32) - shift[:, None], 0.0)
        deviations = deviations + (deviation,)
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
    rest = tl.sum(sums) / count
    rstd = inverse_deviation(tl.sum(squares) - rest * rest * count, count, eps)
    tl.store(mean_ptr + index, rough + rest)
    tl.store(rstd_ptr + index, rstd)

    for tile in tl.static_range(TILES):
        offsets, mask, channel = places[tile]
        real = channel < group_channels
        parameter = (index % groups) * group_channels + channel
        scale = rstd * load_channels(weight_ptr, parameter, real, 1.0)
        bias = load_channels(bias_ptr, parameter, real, 0.0) - rest * scale
        y = activate(tl.fma(deviations[tile], scale[:, None], bias[:, None]), SILU, y_ptr.dtype.element_ty)
        tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


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
    has_addend,
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
    addend = load_addend(addend_ptr, n * channels + channel, real, has_addend)
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32) + addend[None, :]

    count = tl.cast(group_channels, tl.float32) * spatial
    rough = sum_by_group(tl.sum(tl.where(mask, x, 0.0), axis=0), member) / count  # [G]
    deviation = tl.where(mask, x - to_channels(rough, member)[None, :], 0.0)
    rest = sum_by_group(tl.sum(deviation, axis=0), member) / count
    m2 = sum_by_group(tl.sum(deviation * deviation, axis=0), member) - rest * rest * count
    rstd = inverse_deviation(m2, count, eps)

    scale = to_channels(rstd, member) * load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0) - to_channels(rest, member) * scale
    y = activate(tl.fma(deviation, scale[None, :], bias[None, :]), SILU, y_ptr.dtype.element_ty)
    tl.store(y_ptr + base + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)
    group = first_group + tl.arange(0, BLOCK_G)
    owned = (tl.arange(0, BLOCK_G) < span_groups) & (group < groups)
    tl.store(mean_ptr + n * groups + group, rough + rest, mask=owned)
    tl.store(rstd_ptr + n * groups + group, rstd, mask=owned)


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_stats_kernel(
    x_ptr,  # [N, G, D, S]
    addend_ptr,  # [N, C], read if has_addend
    partial_ptr,  # [3, N * G, programs]: count, mean, sum of squared deviations
    stride_moment,
    has_addend,
    spatial,
    group_channels,
    runs,
    run_tiles,
    programs,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Moments of BLOCK_R runs, each about the mean of its first tile, merged.

    The mean of 1 / T of the values is at most sqrt(T - 1) deviations from the mean of all, so taking the squares about
    it instead costs at most log2(T) bits: there is no input for which they cancel, as they do about zero. The addend
    is one number to a run: it moves the mean, and no deviation.
    """
    program = tl.program_id(0) % programs
    index = (tl.program_id(0) // programs).to(tl.int64)
    channel, _, offset, left, real = runs_of(program, runs, run_tiles, group_channels, spatial, BLOCK_R, BLOCK_W)
    column = tl.arange(0, BLOCK_W)
    pointers = x_ptr + (index * group_channels * spatial + offset)[:, None] + column[None, :]
    length = tl.where(real, tl.minimum(left, run_tiles * BLOCK_W), 0)  # [R]

    mask = real[:, None] & (column[None, :] < left[:, None])
    x = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    shift = tl.sum(tl.where(mask, x, 0.0), axis=1) / tl.maximum(tl.minimum(length, BLOCK_W), 1)
    sums = tl.where(mask, x - shift[:, None], 0.0)
    squares = sums * sums
    for tile in range(1, run_tiles):
        start = tile * BLOCK_W
        mask = real[:, None] & ((start + column)[None, :] < left[:, None])
        x = tl.load(pointers + start, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        deviation = tl.where(mask, x - shift[:, None], 0.0)
        sums += deviation
        squares = tl.fma(deviation, deviation, squares)
    count = length.to(tl.float32)
    rest = tl.sum(sums, axis=1) / tl.maximum(count, 1.0)
    m2 = tl.sum(squares, axis=1) - rest * rest * count
    mean = shift + rest + load_addend(addend_ptr, index * group_channels + channel, real, has_addend)
    count, mean, m2 = merge_moments(count, mean, m2, 0)
    target = partial_ptr + index * programs + program
    tl.store(target, count)
    tl.store(target + stride_moment, mean)
    tl.store(target + 2 * stride_moment, m2)


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
    stride_moment,
    has_addend,
    spatial,
    groups,
    group_channels,
    runs,
    run_tiles,
    programs,
    partials,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    """Merges its group's partials, then normalises BLOCK_R runs. Last program first: it is what L2 still holds."""
    from_last = tl.num_programs(0) - 1 - tl.program_id(0)
    program = from_last % programs
    index = (from_last // programs).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    count, mean, m2 = _load_moments(partial_ptr + index * partials + part, stride_moment, part < partials)
    count, mean, m2 = merge_moments(count, mean, m2, 0)
    rstd = inverse_deviation(m2, count, eps)
    if program == 0:
        tl.store(mean_ptr + index, mean)
        tl.store(rstd_ptr + index, rstd)

    channel, _, offset, left, real = runs_of(program, runs, run_tiles, group_channels, spatial, BLOCK_R, BLOCK_W)
    parameter = (index % groups) * group_channels + channel
    scale = rstd * load_channels(weight_ptr, parameter, real, 1.0)
    bias = load_channels(bias_ptr, parameter, real, 0.0)
    shift = mean - load_addend(addend_ptr, index * group_channels + channel, real, has_addend)
    column = tl.arange(0, BLOCK_W)
    offsets = (index * group_channels * spatial + offset)[:, None] + column[None, :]
    for tile in range(run_tiles):
        start = tile * BLOCK_W
        mask = real[:, None] & ((start + column)[None, :] < left[:, None])
        x = tl.load(x_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        y = activate(tl.fma(x - shift[:, None], scale[:, None], bias[:, None]), SILU, y_ptr.dtype.element_ty)
        tl.store(y_ptr + offsets + start, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_moments(pointers, stride_moment, mask):
    count = tl.load(pointers, mask=mask, other=0.0)
    mean = tl.load(pointers + stride_moment, mask=mask, other=0.0)
    return count, mean, tl.load(pointers + 2 * stride_moment, mask=mask, other=0.0)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_stats_kernel(
    x_ptr,  # [N, S, C]
    addend_ptr,
    partial_ptr,  # [3, N * G, chunks * SPLITS]
    stride_moment,
    has_addend,
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
    addend = load_addend(addend_ptr, n * channels + channel, real, has_addend)[None, :]
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
    tl.store(target + stride_moment, mean, mask=owned)
    tl.store(target + 2 * stride_moment, m2, mask=owned)


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
    stride_moment,
    has_addend,
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
    count, mean, m2 = _load_moments(pointers, stride_moment, there[:, None] & (part < partials)[None, :])
    count, mean, m2 = merge_moments(count, mean, m2, 1)
    rstd = inverse_deviation(m2, tl.maximum(count, 1.0), eps)
    if chunk == 0:  # a group belongs to the program that has its first channel
        start = group * group_channels
        owned = (group < groups) & (start >= column * BLOCK_C) & (start < (column + 1) * BLOCK_C)
        tl.store(mean_ptr + n * groups + group, mean, mask=owned)
        tl.store(rstd_ptr + n * groups + group, rstd, mask=owned)

    member = members(channel, real, first_group, group_channels, BLOCK_G)
    scale = to_channels(rstd, member) * load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr, channel, real, 0.0)
    shift = to_channels(mean, member) - load_addend(addend_ptr, n * channels + channel, real, has_addend)
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
    batch: int, channels: int, spatial: int, groups: int, itemsize: int, channels_last: bool, silu: bool, addend: bool
) -> tuple[tuple[Launch, ...], int]:
    """The launches of one forward call, in order, and how many partials a group has between them (0: one launch)."""
    sizes = {"spatial": spatial, "group_channels": channels // groups, "has_addend": int(addend)}
    if channels_last:
        return _spans_launches(batch, channels, spatial, groups, itemsize, silu, sizes)
    return _rows_launches(batch, channels, spatial, groups, silu, sizes)


def _rows_launches(batch, channels, spatial, groups, silu, sizes):
    held = held_rows(ROW_FORWARD, channels, spatial, groups, MAX_HELD)
    if held is not None:
        rows, warps = held
        sizes |= rows | {"groups": groups, "SILU": silu}
        return (Launch(_group_norm_silu_rows_fused_fwd_kernel, (batch * groups,), sizes, warps, maxnreg=80),), 0
    cut = cut_runs(batch, channels, spatial, groups, 16, merged=True)
    partials = cut.programs
    sizes |= {"stride_moment": batch * groups * partials, "BLOCK_W": RUN_TILE}
    apply = {"groups": groups, "partials": partials, "BLOCK_P": partials_block(partials), "SILU": silu}
    elementwise = cut_runs(batch, channels, spatial, groups, 16, merged=False)
    return (
        Launch(_group_norm_silu_rows_stats_kernel, (batch * groups * partials,), sizes | cut.sizes, 8),
        Launch(
            _group_norm_silu_rows_apply_kernel,
            (batch * groups * elementwise.programs,),
            sizes | apply | elementwise.sizes,
            8,
        ),
    ), partials


def _spans_launches(batch, channels, spatial, groups, itemsize, silu, sizes):
    cut = cut_spans(batch, channels, spatial, groups, itemsize)
    sizes |= {"channels": channels, "groups": groups}
    span = {"columns": cut.columns, "span_groups": cut.groups, "span": cut.groups * (channels // groups)}
    span |= {"BLOCK_C": cut.width, "BLOCK_G": groups_block(cut.groups)}
    held = triton.next_power_of_2(spatial) * cut.width
    if cut.splits == 1 and fits(held, batch * cut.columns, MAX_HELD_SPAN):
        block = {"BLOCK_R": triton.next_power_of_2(spatial), "SILU": silu}
        return (
            Launch(
                _group_norm_silu_spans_fused_fwd_kernel, (batch * cut.columns,), sizes | span | block, warps_for(held)
            ),
        ), 0
    sizes["stride_moment"] = batch * groups * cut.partials
    stats = {"SPLITS": cut.splits, "chunk_rows": cut.chunk, "chunks": cut.chunks, "BLOCK_R": cut.block}
    apply = columns_of_elements(batch, channels, spatial, groups)
    apply |= {"partials": cut.partials, "BLOCK_P": partials_block(cut.partials), "SILU": silu}
    return (
        Launch(_group_norm_silu_spans_stats_kernel, (batch * cut.columns * cut.chunks,), sizes | span | stats, 8),
        Launch(_group_norm_silu_spans_apply_kernel, (batch * apply["columns"] * apply["chunks"],), sizes | apply, 8),
    ), cut.partials
