"""Group norm with addend and SiLU in Triton: the backward kernels.

    normed = (x + addend - mean) * rstd       z = normed * weight + bias       dz = dy * act'(z)       d = dz * weight
    dx = rstd * (d - mean(d) - normed * mean(d * normed))                means over a group
    dweight = sum(dz * normed)    dbias = sum(dz)                        over samples and positions
    daddend = sum(dx) = rstd * (weight * sum(dz) - S * mean(d) - sum(normed) * mean(d * normed))     over positions

A first pass leaves sums per group and, where a parameter asks, per channel; the second makes dx; the third, of a few
programs, adds the channel sums up in a fixed order. A group that fits in registers is done by the first pass alone.

The first pass leaves parts of three sums of each channel, [3, N, parts, C]: of dz, of dz * normed and of normed.
`write_sums` says how many of the three some gradient needs.
"""

from dataclasses import replace

import triton
import triton.language as tl

from cnkernels.group_norm_silu.triton_common import (
    divide,
    load_addend,
    load_channels,
    members,
    row_tile,
    runs_of,
    sigmoid,
    span_of,
    sum_by_group,
    to_channels,
)
from cnkernels.group_norm_silu.triton_cuts import (
    MAX_HELD,
    MAX_HELD_SPAN,
    ROW_BACKWARD,
    RUN_TILE,
    RUNTIME_OF_ROWS,
    RUNTIME_OF_SPANS,
    columns_of_elements,
    columns_of_sums,
    cut_runs,
    cut_spans,
    held_rows,
    inverse,
    partials_block,
    warps_for,
)
from cnkernels.group_norm_silu.triton_parameters import parameters_launch
from cnkernels.launch import Launch


@triton.jit
def _gradient(x, dy, shift, rstd, weight, bias, SILU: tl.constexpr, DTYPE: tl.constexpr):
    """normed and dz of a tile.

    Nothing is masked here. Where loads gave zeros for what is beyond an edge, dz is zero, or NaN where the channel's
    own is; normed is not zero there.
    """
    normed = (x - shift) * rstd
    if SILU:
        z = tl.fma(normed, weight, bias)
        gate = sigmoid(z, DTYPE)
        dy = dy * gate * tl.fma(z, 1.0 - gate, 1.0)
    return normed, dy


@triton.jit
def _rows_parameters(
    weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, has_addend, SILU: tl.constexpr
):
    """Weight, bias and mean - addend of each row's channel, [R]."""
    real = channel < group_channels
    parameter = (index % groups) * group_channels + channel
    weight = load_channels(weight_ptr, parameter, real, 1.0)
    bias = load_channels(bias_ptr if SILU else None, parameter, real, 0.0)
    shift = mean - load_addend(addend_ptr, index * group_channels + channel, real, has_addend)
    return weight, bias, shift


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_fused_bwd_kernel(
    dy_ptr,  # [N, G, D, S]
    x_ptr,  # [N, G, D, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    addend_ptr,  # [N, C], read if has_addend
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, G, D, S] or None
    group_sums_ptr,  # [2, N * G]: sum of d, of d * normed
    channel_sums_ptr,  # [3, N, segments, C], written if write_sums
    stride_sum,
    stride_channel_sum,
    has_addend,
    write_sums,
    spatial,
    groups,
    group_channels,
    segments,
    segment_inverse,
    TILES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """One group, its normed and d held in registers as TILES tiles."""
    index = tl.program_id(0).to(tl.int64)  # n * G + g
    mean = tl.load(mean_ptr + index)
    rstd = tl.load(rstd_ptr + index)
    base = index * group_channels * spatial
    rows = group_channels * segments
    places = ()
    tiles = ()
    for tile in tl.static_range(TILES):  # all loads, before anything waits for one
        offsets, mask, channel, _ = row_tile(
            tile * BLOCK_R, rows, spatial, segments, segment_inverse, BLOCK_R, BLOCK_W, WHOLE_ROWS
        )
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0)
        tiles = tiles + ((x, tl.load(dy_ptr + base + offsets, mask=mask, other=0.0)),)
        places = places + ((offsets, mask, channel),)

    normed_tiles = ()
    d_tiles = ()
    sums_d = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_dn = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in tl.static_range(TILES):
        _, mask, channel = places[tile]
        weight, bias, shift = _rows_parameters(
            weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, has_addend, SILU
        )
        x = tiles[tile][0].to(tl.float32)
        dy = tiles[tile][1].to(tl.float32)
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], SILU, x_ptr.dtype.element_ty
        )
        if write_sums > 0:
            real = channel < group_channels
            segment = tile * BLOCK_R + tl.arange(0, BLOCK_R) - channel * segments
            part = (index // groups * segments + segment) * groups + index % groups
            target = channel_sums_ptr + part * group_channels + channel
            tl.store(target, tl.sum(dz, axis=1), mask=real)
            tl.store(target + stride_channel_sum, tl.sum(dz * normed, axis=1), mask=real)
            if write_sums > 2:
                in_row = normed if WHOLE_ROWS else tl.where(mask, normed, 0.0)
                tl.store(target + 2 * stride_channel_sum, tl.sum(in_row, axis=1), mask=real)
        d = dz * weight[:, None]
        sums_d += d
        sums_dn = tl.fma(d, normed, sums_dn)
        normed_tiles = normed_tiles + (normed,)
        d_tiles = d_tiles + (d,)
    sum_d = tl.sum(sums_d)
    sum_dn = tl.sum(sums_dn)
    tl.store(group_sums_ptr + index, sum_d)
    tl.store(group_sums_ptr + stride_sum + index, sum_dn)
    if dx_ptr is not None:
        count = tl.cast(group_channels, tl.float32) * spatial
        mean_d = sum_d / count
        mean_dn = sum_dn / count
        for tile in tl.static_range(TILES):
            dx = rstd * (d_tiles[tile] - mean_d - normed_tiles[tile] * mean_dn)
            target = dx_ptr + base + places[tile][0]
            tl.store(target, dx.to(dx_ptr.dtype.element_ty), mask=places[tile][1])


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,  # [2, N * G, programs]
    channel_sums_ptr,  # [3, N, runs, C], written if write_sums
    stride_sum,
    stride_channel_sum,
    has_addend,
    write_sums,
    spatial,
    groups,
    group_channels,
    runs,
    run_tiles,
    programs,
    SUM_NORMED: tl.constexpr,
    WHOLE_RUNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SILU: tl.constexpr,
):
    """The sums of BLOCK_R runs: a thread adds up what it reads, and the threads of a run meet after the loop."""
    program = tl.program_id(0) % programs
    index = (tl.program_id(0) // programs).to(tl.int64)
    mean = tl.load(mean_ptr + index)
    rstd = tl.load(rstd_ptr + index)
    channel, run, offset, left, real = runs_of(program, runs, run_tiles, group_channels, spatial, BLOCK_R, BLOCK_W)
    weight, bias, shift = _rows_parameters(
        weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, has_addend, SILU
    )
    column = tl.arange(0, BLOCK_W)
    offsets = (index * group_channels * spatial + offset)[:, None] + column[None, :]
    sums_dz = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_dzn = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_n = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in range(run_tiles):
        start = tile * BLOCK_W
        mask = real[:, None] & ((start + column)[None, :] < left[:, None])
        x = tl.load(x_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(dy_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], SILU, x_ptr.dtype.element_ty
        )
        sums_dz += dz
        sums_dzn = tl.fma(dz, normed, sums_dzn)
        if SUM_NORMED:
            sums_n += normed if WHOLE_RUNS else tl.where(mask, normed, 0.0)
    dz_r = tl.where(real, tl.sum(sums_dz, axis=1), 0.0)  # [R]
    dzn_r = tl.where(real, tl.sum(sums_dzn, axis=1), 0.0)
    if write_sums > 0:
        part = (index // groups * runs + run) * groups + index % groups
        target = channel_sums_ptr + part * group_channels + channel
        tl.store(target, dz_r, mask=real)
        tl.store(target + stride_channel_sum, dzn_r, mask=real)
        if SUM_NORMED:
            tl.store(target + 2 * stride_channel_sum, tl.sum(sums_n, axis=1), mask=real)
    target = group_sums_ptr + index * programs + program
    tl.store(target, tl.sum(dz_r * weight))
    tl.store(target + stride_sum, tl.sum(dzn_r * weight))


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    group_sums_ptr,  # [2, N * G, partials]
    stride_sum,
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
    """dx of BLOCK_R runs, last program first: it is what L2 still holds."""
    from_last = tl.num_programs(0) - 1 - tl.program_id(0)
    program = from_last % programs
    index = (from_last // programs).to(tl.int64)
    mean = tl.load(mean_ptr + index)
    rstd = tl.load(rstd_ptr + index)
    part = tl.arange(0, BLOCK_P)
    sums = group_sums_ptr + index * partials + part
    count = tl.cast(group_channels, tl.float32) * spatial
    mean_d = tl.sum(tl.load(sums, mask=part < partials, other=0.0)) / count
    mean_dn = tl.sum(tl.load(sums + stride_sum, mask=part < partials, other=0.0)) / count

    channel, _, offset, left, real = runs_of(program, runs, run_tiles, group_channels, spatial, BLOCK_R, BLOCK_W)
    weight, bias, shift = _rows_parameters(
        weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, has_addend, SILU
    )
    column = tl.arange(0, BLOCK_W)
    offsets = (index * group_channels * spatial + offset)[:, None] + column[None, :]
    for tile in range(run_tiles):
        start = tile * BLOCK_W
        mask = real[:, None] & ((start + column)[None, :] < left[:, None])
        x = tl.load(x_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + offsets + start, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], SILU, x_ptr.dtype.element_ty
        )
        dx = rstd * (dz * weight[:, None] - mean_d - normed * mean_dn)
        tl.store(dx_ptr + offsets + start, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_fused_bwd_kernel(
    dy_ptr,  # [N, S, C]
    x_ptr,  # [N, S, C]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,  # [N, S, C] or None
    group_sums_ptr,  # [2, N * G]
    channel_sums_ptr,  # [3, N, C], written if write_sums
    stride_sum,
    stride_channel_sum,
    has_addend,
    write_sums,
    spatial,
    channels,
    groups,
    columns,
    group_channels,
    group_inverse,
    span_groups,
    span,
    SUM_NORMED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SILU: tl.constexpr,
):
    """All positions of a span in one tile: the sums, and dx from registers."""
    column = tl.program_id(0) % columns
    n = (tl.program_id(0) // columns).to(tl.int64)
    first_group, channel, real = span_of(column, channels, group_channels, span_groups, span, 1, BLOCK_C)
    statistic = n * groups + divide(channel, group_channels, group_inverse)
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_addend(addend_ptr, n * channels + channel, real, has_addend))[None, :]
    weight = load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr if SILU else None, channel, real, 0.0)[None, :]
    base = n * spatial * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]
    mask = (position < spatial)[:, None] & real[None, :]
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    normed, dz = _gradient(x, dy, shift, rstd[None, :], weight[None, :], bias, SILU, x_ptr.dtype.element_ty)
    dz_c = tl.sum(dz, axis=0)  # [C]
    dzn_c = tl.sum(dz * normed, axis=0)
    member = members(channel, real, first_group, group_channels, BLOCK_G)
    sum_d = sum_by_group(dz_c * weight, member)  # [G]
    sum_dn = sum_by_group(dzn_c * weight, member)
    if write_sums > 0:
        target = channel_sums_ptr + n * channels + channel
        tl.store(target, dz_c, mask=real)
        tl.store(target + stride_channel_sum, dzn_c, mask=real)
        if SUM_NORMED:
            sum_n = tl.sum(tl.where((position < spatial)[:, None], normed, 0.0), axis=0)
            tl.store(target + 2 * stride_channel_sum, sum_n, mask=real)
    group = first_group + tl.arange(0, BLOCK_G)
    owned = (tl.arange(0, BLOCK_G) < span_groups) & (group < groups)
    target = group_sums_ptr + n * groups + group
    tl.store(target, sum_d, mask=owned)
    tl.store(target + stride_sum, sum_dn, mask=owned)
    if dx_ptr is not None:
        count = tl.cast(group_channels, tl.float32) * spatial
        mean_d = to_channels(sum_d / count, member)
        mean_dn = to_channels(sum_dn / count, member)
        dx = rstd[None, :] * (dz * weight[None, :] - mean_d[None, :] - normed * mean_dn[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_sums_kernel(
    dy_ptr,  # [N, S, C]
    x_ptr,  # [N, S, C]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,  # [2, N * G, chunks, slots]
    channel_sums_ptr,  # [3, N, chunks, C], written if write_sums
    stride_sum,
    stride_channel_sum,
    has_addend,
    write_sums,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    group_channels,
    group_inverse,
    slots,
    SUM_NORMED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WHOLE: tl.constexpr,
    SILU: tl.constexpr,
):
    """Sums over some positions of BLOCK_C channels, which need not be whole groups: every lane is used.

    A group has a slot for each program of channels that it reaches; those that it does not reach hold zero. WHOLE: no
    tile is ragged.
    """
    column = tl.program_id(0) % columns
    chunk = tl.program_id(0) // columns % chunks
    n = (tl.program_id(0) // columns // chunks).to(tl.int64)
    channel = column * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    statistic = n * groups + divide(channel, group_channels, group_inverse)
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_addend(addend_ptr, n * channels + channel, real, has_addend))[None, :]
    weight = load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr if SILU else None, channel, real, 0.0)[None, :]
    row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, spatial - row)
    base = (n * spatial + row) * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]

    sum_dz = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_dzn = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    sum_n = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for done in range(0, rows, BLOCK_R):
        if WHOLE:
            x = tl.load(x_ptr + base + offsets).to(tl.float32)
            dy = tl.load(dy_ptr + base + offsets).to(tl.float32)
        else:
            mask = (position < rows - done)[:, None] & real[None, :]
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        normed, dz = _gradient(x, dy, shift, rstd[None, :], weight[None, :], bias, SILU, x_ptr.dtype.element_ty)
        sum_dz += dz
        sum_dzn += dz * normed
        if SUM_NORMED:
            sum_n += normed if WHOLE else tl.where((position < rows - done)[:, None], normed, 0.0)
        base += BLOCK_R * channels
    dz_c = tl.sum(sum_dz, axis=0)  # [C]
    dzn_c = tl.sum(sum_dzn, axis=0)
    if write_sums > 0:
        target = channel_sums_ptr + (n * chunks + chunk) * channels + channel
        tl.store(target, dz_c, mask=real)
        tl.store(target + stride_channel_sum, dzn_c, mask=real)
        if SUM_NORMED:
            tl.store(target + 2 * stride_channel_sum, tl.sum(sum_n, axis=0), mask=real)
    first_group = divide(column * BLOCK_C, group_channels, group_inverse)
    member = members(channel, real, first_group, group_channels, BLOCK_G)
    group = first_group + tl.arange(0, BLOCK_G)
    touched = (group < groups) & (group * group_channels < (column + 1) * BLOCK_C)
    first_column = group * group_channels // BLOCK_C
    slot = column - first_column
    last = ((group + 1) * group_channels - 1) // BLOCK_C - first_column
    target = group_sums_ptr + ((n * groups + group) * chunks + chunk) * slots
    tl.store(target + slot, sum_by_group(dz_c * weight, member), mask=touched)
    tl.store(target + stride_sum + slot, sum_by_group(dzn_c * weight, member), mask=touched)
    other = tl.arange(0, BLOCK_S)[None, :]
    unreached = (touched & (slot == last))[:, None] & (other > last[:, None]) & (other < slots)  # [G, S]
    zeros = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    tl.store(target[:, None] + other, zeros, mask=unreached)
    tl.store(target[:, None] + stride_sum + other, zeros, mask=unreached)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_dx_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    group_sums_ptr,  # [2, N * G, partials]
    stride_sum,
    has_addend,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    partials,
    group_channels,
    group_inverse,
    touched,  # groups that BLOCK_C channels belong to
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
):
    """dx of some positions of BLOCK_C channels, last positions first."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    column = program % columns
    chunk = program // columns % chunks
    n = (program // columns // chunks).to(tl.int64)
    channel = column * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    first_group = divide(column * BLOCK_C, group_channels, group_inverse)
    group = first_group + tl.arange(0, BLOCK_G)
    part = tl.arange(0, BLOCK_P)
    sums = group_sums_ptr + (n * groups + group)[:, None] * partials + part[None, :]
    there = ((group < groups) & (tl.arange(0, BLOCK_G) < touched))[:, None] & (part < partials)[None, :]
    count = tl.cast(group_channels, tl.float32) * spatial
    member = members(channel, real, first_group, group_channels, BLOCK_G)
    mean_d = to_channels(tl.sum(tl.load(sums, mask=there, other=0.0), axis=1) / count, member)
    mean_dn = to_channels(tl.sum(tl.load(sums + stride_sum, mask=there, other=0.0), axis=1) / count, member)

    statistic = n * groups + divide(channel, group_channels, group_inverse)
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)[None, :]
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_addend(addend_ptr, n * channels + channel, real, has_addend))[None, :]
    weight = load_channels(weight_ptr, channel, real, 1.0)[None, :]
    bias = load_channels(bias_ptr if SILU else None, channel, real, 0.0)[None, :]
    row = chunk * chunk_rows
    rows = tl.minimum(chunk_rows, spatial - row)
    base = (n * spatial + row) * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]
    for done in range(0, rows, BLOCK_R):
        mask = (position < rows - done)[:, None] & real[None, :]
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        normed, dz = _gradient(x, dy, shift, rstd, weight, bias, SILU, x_ptr.dtype.element_ty)
        dx = rstd * (dz * weight - mean_d[None, :] - normed * mean_dn[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        base += BLOCK_R * channels


def backward_launches(
    batch: int,
    channels: int,
    spatial: int,
    groups: int,
    itemsize: int,
    channels_last: bool,
    silu: bool,
    addend: bool,
    write_sums: int,
) -> tuple[Launch, Launch | None, Launch, tuple[int, int]]:
    """The launches for the sums, dx (None: the first does it) and the parameters; partials per group, per channel.

    Args:
        write_sums: how many of the three sums per channel are needed: 0 without gradients of parameters, 2 for those of
            weight and bias, 3 for that of the addend.
    """
    sizes = {"spatial": spatial, "groups": groups, "group_channels": channels // groups}
    common = sizes | {"has_addend": int(addend), "SILU": silu}
    plan = _spans_launches if channels_last else _rows_launches
    sums, dx, partials, parts = plan(batch, channels, spatial, groups, itemsize, common, write_sums > 2)
    strides = {"stride_sum": batch * groups * partials, "stride_channel_sum": batch * channels * parts}
    sums = replace(sums, sizes=sums.sizes | strides | {"write_sums": write_sums})
    if dx is not None:
        dx = replace(dx, sizes=dx.sizes | {"stride_sum": strides["stride_sum"]})
    sizes |= {"channels": channels, "batch": batch, "parts": parts, "partials": partials}
    return sums, dx, parameters_launch(sizes | strides), (partials, parts)


def _rows_launches(batch, channels, spatial, groups, itemsize, sizes, sum_normed):
    most = MAX_HELD if batch * groups >= 128 else MAX_HELD // 2  # fewer programs than a GPU can run leave it idle
    held = held_rows(ROW_BACKWARD, channels, spatial, groups, most)
    if held is not None:
        rows, warps = held
        fused = Launch(_group_norm_silu_rows_fused_bwd_kernel, (batch * groups,), sizes | rows, warps)
        return fused, None, 1, rows["segments"]
    sizes["BLOCK_W"] = RUN_TILE
    cut = cut_runs(batch, channels, spatial, groups, 16, merged=True)
    partials = cut.programs
    sums = sizes | cut.sizes | {"SUM_NORMED": sum_normed}
    sums["WHOLE_RUNS"] = not sum_normed or spatial % RUN_TILE == 0  # the other sums have no need to know
    elementwise = cut_runs(batch, channels, spatial, groups, 16, merged=False)
    dx = sizes | elementwise.sizes | {"partials": partials, "BLOCK_P": partials_block(partials)}
    return (
        Launch(_group_norm_silu_rows_sums_kernel, (batch * groups * partials,), sums, 8),
        Launch(_group_norm_silu_rows_dx_kernel, (batch * groups * elementwise.programs,), dx, 8),
        partials,
        cut.runs,
    )


def _spans_launches(batch, channels, spatial, groups, itemsize, sizes, sum_normed):
    cut = cut_spans(batch, channels, spatial, groups, itemsize)
    sizes |= {"channels": channels, "group_inverse": inverse(channels // groups)}
    held = triton.next_power_of_2(spatial) * cut.width
    if cut.splits == 1 and held <= MAX_HELD_SPAN // 2:  # of dy and of x: with more, sm_89 to sm_100 spill
        span = {"columns": cut.columns, "span_groups": cut.groups, "span": cut.groups * (channels // groups)}
        span |= {"BLOCK_C": cut.width, "BLOCK_G": max(2, triton.next_power_of_2(cut.groups))}
        span |= {"BLOCK_R": triton.next_power_of_2(spatial), "SUM_NORMED": sum_normed}
        fused = Launch(_group_norm_silu_spans_fused_bwd_kernel, (batch * cut.columns,), sizes | span, warps_for(held))
        return fused, None, 1, 1
    sums, partials = columns_of_sums(batch, channels, spatial, groups)
    sums["SUM_NORMED"] = sum_normed
    dx = columns_of_elements(batch, channels, spatial, groups)
    dx |= {"partials": partials, "BLOCK_P": partials_block(partials)}
    programs = sums["columns"] * sums["chunks"]
    return (
        Launch(_group_norm_silu_spans_sums_kernel, (batch * programs,), sizes | sums, 8),
        Launch(_group_norm_silu_spans_dx_kernel, (batch * dx["columns"] * dx["chunks"],), sizes | dx, 8),
        partials,
        sums["chunks"],
    )
