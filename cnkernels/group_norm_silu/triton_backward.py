"""Group norm with addend and SiLU in Triton: the backward kernels.

    normed = (x + addend - mean) * rstd       z = normed * weight + bias       dz = dy * act'(z)       d = dz * weight
    dx = rstd * (d - mean(d) - normed * mean(d * normed))                means over a group
    dweight = sum(dz * normed)    dbias = sum(dz)                        over samples and positions
    daddend = sum(dx) = rstd * (weight * sum(dz) - S * mean(d) - sum(normed) * mean(d * normed))     over positions

A first pass leaves sums per group and, where a parameter asks, per channel; the second makes dx; the third, of a few
programs, adds the channel sums up in a fixed order. A group that fits in registers is done by the first pass alone.
"""

from dataclasses import replace

import triton
import triton.language as tl

from cnkernels.group_norm_silu.triton_common import (
    ROWS_BACKWARD,
    RUNTIME_OF_ROWS,
    RUNTIME_OF_SPANS,
    SPANS,
    cut_rows,
    cut_spans,
    elementwise_columns,
    fits,
    fold,
    load_channels,
    members,
    partials_block,
    row_tile,
    sigmoid,
    span_of,
    spans_sums_cut,
    spread,
    warps_for,
)
from cnkernels.group_norm_silu.triton_parameters import parameters_launch
from cnkernels.launch import Launch


@triton.jit
def _gradient(x, dy, shift, rstd, weight, bias, mask, SILU: tl.constexpr, DTYPE: tl.constexpr):
    """normed and dz of a tile; zero outside the mask, whatever the parameters are there. None masks nothing."""
    normed = (x - shift) * rstd
    if mask is not None:
        normed = tl.where(mask, normed, 0.0)
    if SILU:
        z = tl.fma(normed, weight, bias)
        gate = sigmoid(z, DTYPE)
        dy = dy * gate * tl.fma(z, 1.0 - gate, 1.0)
    if mask is not None:
        dy = tl.where(mask, dy, 0.0)
    return normed, dy


@triton.jit
def _rows_parameters(
    weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, SILU: tl.constexpr
):
    """Weight, bias and mean - addend of each row's channel, [R]."""
    real = channel < group_channels
    parameter = (index % groups) * group_channels + channel
    weight = load_channels(weight_ptr, parameter, real, 1.0)
    bias = load_channels(bias_ptr if SILU else None, parameter, real, 0.0)
    shift = mean - load_channels(addend_ptr, index * group_channels + channel, real, 0.0)
    return weight, bias, shift


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_fused_bwd_kernel(
    dy_ptr,  # [N, G, D, S]
    x_ptr,  # [N, G, D, S]
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    addend_ptr,  # [N, C] or None
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, G, D, S] or None
    group_sums_ptr,  # [2, N * G]: sum of d, of d * normed
    channel_sums_ptr,  # [3, N, C, segments]: sum of dz, of dz * normed, of normed; or None
    group_plane,
    channel_plane,
    spatial,
    groups,
    group_channels,
    segments,
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
    normed_tiles = ()
    d_tiles = ()
    sums_d = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_dn = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for tile in tl.static_range(TILES):
        start, offsets, mask, channel = row_tile(tile * BLOCK_R, rows, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        weight, bias, shift = _rows_parameters(
            weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, SILU
        )
        x = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + base + start + offsets, mask=mask, other=0.0).to(tl.float32)
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], mask, SILU, x_ptr.dtype.element_ty
        )
        if channel_sums_ptr is not None:
            _store_row_sums(
                channel_sums_ptr + index * rows, tile * BLOCK_R, rows, channel_plane, dz, normed, addend_ptr, BLOCK_R
            )
        d = dz * weight[:, None]
        sums_d += d
        sums_dn += d * normed
        normed_tiles = normed_tiles + (normed,)
        d_tiles = d_tiles + (d,)
    sum_d = tl.sum(sums_d)
    sum_dn = tl.sum(sums_dn)
    tl.store(group_sums_ptr + index, sum_d)
    tl.store(group_sums_ptr + group_plane + index, sum_dn)
    if dx_ptr is not None:
        count = tl.cast(group_channels, tl.float32) * spatial
        mean_d = sum_d / count
        mean_dn = sum_dn / count
        for tile in tl.static_range(TILES):
            start, offsets, mask, _ = row_tile(tile * BLOCK_R, rows, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
            dx = rstd * (d_tiles[tile] - mean_d - normed_tiles[tile] * mean_dn)
            tl.store(dx_ptr + base + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_row_sums(pointer, row, end, plane, dz, normed, addend_ptr, BLOCK_R: tl.constexpr):
    rows = row + tl.arange(0, BLOCK_R)
    tl.store(pointer + rows, tl.sum(dz, axis=1), mask=rows < end)
    tl.store(pointer + plane + rows, tl.sum(dz * normed, axis=1), mask=rows < end)
    if addend_ptr is not None:
        tl.store(pointer + 2 * plane + rows, tl.sum(normed, axis=1), mask=rows < end)


@triton.jit(do_not_specialize=RUNTIME_OF_ROWS)
def _group_norm_silu_rows_sums_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,  # [2, N * G, chunks]
    channel_sums_ptr,  # [3, N, C, segments] or None
    group_plane,
    channel_plane,
    spatial,
    groups,
    group_channels,
    segments,
    chunk_rows,
    chunks,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    """The sums of one chunk of a group."""
    chunk = tl.program_id(0) % chunks
    index = (tl.program_id(0) // chunks).to(tl.int64)
    mean = tl.load(mean_ptr + index)
    rstd = tl.load(rstd_ptr + index)
    base = index * group_channels * spatial
    first = chunk * chunk_rows
    rows = group_channels * segments
    end = tl.minimum(first + chunk_rows, rows)
    sums_d = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    sums_dn = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for row in range(first, end, BLOCK_R):
        start, offsets, mask, channel = row_tile(row, end, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        weight, bias, shift = _rows_parameters(
            weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, SILU
        )
        x = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        dy = tl.load(dy_ptr + base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_last")
        dy = dy.to(tl.float32)
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], mask, SILU, x_ptr.dtype.element_ty
        )
        if channel_sums_ptr is not None:
            _store_row_sums(channel_sums_ptr + index * rows, row, end, channel_plane, dz, normed, addend_ptr, BLOCK_R)
        sums_d += dz * weight[:, None]
        sums_dn += dz * normed * weight[:, None]
    tl.store(group_sums_ptr + index * chunks + chunk, tl.sum(sums_d))
    tl.store(group_sums_ptr + group_plane + index * chunks + chunk, tl.sum(sums_dn))


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
    group_plane,
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
    """dx of one chunk of a group, last chunk first: it is what L2 still holds."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = program % chunks
    index = (program // chunks).to(tl.int64)
    mean = tl.load(mean_ptr + index)
    rstd = tl.load(rstd_ptr + index)
    part = tl.arange(0, BLOCK_P)
    sums = group_sums_ptr + index * partials + part
    count = tl.cast(group_channels, tl.float32) * spatial
    mean_d = tl.sum(tl.load(sums, mask=part < partials, other=0.0)) / count
    mean_dn = tl.sum(tl.load(sums + group_plane, mask=part < partials, other=0.0)) / count
    base = index * group_channels * spatial
    first = chunk * chunk_rows
    end = tl.minimum(first + chunk_rows, group_channels * segments)
    for row in range(first, end, BLOCK_R):
        start, offsets, mask, channel = row_tile(row, end, spatial, segments, BLOCK_R, BLOCK_W, WHOLE_ROWS)
        weight, bias, shift = _rows_parameters(
            weight_ptr, bias_ptr, addend_ptr, mean, index, groups, group_channels, channel, SILU
        )
        x = tl.load(x_ptr + base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + base + start + offsets, mask=mask, other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        normed, dz = _gradient(
            x, dy, shift[:, None], rstd, weight[:, None], bias[:, None], mask, SILU, x_ptr.dtype.element_ty
        )
        dx = rstd * (dz * weight[:, None] - mean_d - normed * mean_dn)
        tl.store(dx_ptr + base + start + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


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
    channel_sums_ptr,  # [3, N, C] or None
    group_plane,
    channel_plane,
    spatial,
    channels,
    groups,
    columns,
    GROUP_CHANNELS: tl.constexpr,
    SPAN_GROUPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SILU: tl.constexpr,
):
    """All positions of a span in one tile: the sums, and dx from registers."""
    column = tl.program_id(0) % columns
    n = (tl.program_id(0) // columns).to(tl.int64)
    first_group, channel, real = span_of(
        column, channels, GROUP_CHANNELS, SPAN_GROUPS, SPAN_GROUPS * GROUP_CHANNELS, 1, BLOCK_C
    )
    statistic = n * groups + channel // GROUP_CHANNELS
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_channels(addend_ptr, n * channels + channel, real, 0.0))[None, :]
    weight = load_channels(weight_ptr, channel, real, 1.0)
    bias = load_channels(bias_ptr if SILU else None, channel, real, 0.0)[None, :]
    base = n * spatial * channels
    position = tl.arange(0, BLOCK_R)
    offsets = position[:, None] * channels + channel[None, :]
    mask = (position < spatial)[:, None] & real[None, :]
    x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    normed, dz = _gradient(x, dy, shift, rstd[None, :], weight[None, :], bias, mask, SILU, x_ptr.dtype.element_ty)
    dz_c = tl.sum(dz, axis=0)  # [C]
    dzn_c = tl.sum(dz * normed, axis=0)
    member = members(channel, real, first_group, GROUP_CHANNELS, BLOCK_G)
    sum_d = fold(dz_c * weight, member)  # [G]
    sum_dn = fold(dzn_c * weight, member)
    if dx_ptr is not None:
        count = tl.cast(GROUP_CHANNELS, tl.float32) * spatial
        mean_d = spread(sum_d / count, member)
        mean_dn = spread(sum_dn / count, member)
        dx = rstd[None, :] * (dz * weight[None, :] - mean_d[None, :] - normed * mean_dn[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if channel_sums_ptr is not None:
        target = channel_sums_ptr + n * channels + channel
        tl.store(target, dz_c, mask=real)
        tl.store(target + channel_plane, dzn_c, mask=real)
        if addend_ptr is not None:
            tl.store(target + 2 * channel_plane, tl.sum(normed, axis=0), mask=real)
    group = first_group + tl.arange(0, BLOCK_G)
    owned = (tl.arange(0, BLOCK_G) < SPAN_GROUPS) & (group < groups)
    target = group_sums_ptr + n * groups + group
    tl.store(target, sum_d, mask=owned)
    tl.store(target + group_plane, sum_dn, mask=owned)


@triton.jit(do_not_specialize=RUNTIME_OF_SPANS)
def _group_norm_silu_spans_sums_kernel(
    dy_ptr,  # [N, S, C]
    x_ptr,  # [N, S, C]
    weight_ptr,
    bias_ptr,
    addend_ptr,
    mean_ptr,
    rstd_ptr,
    group_sums_ptr,  # [2, N * G, chunks, SLOTS]
    channel_sums_ptr,  # [3, N, chunks, C] or None
    group_plane,
    channel_plane,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    GROUP_CHANNELS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
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
    statistic = n * groups + channel // GROUP_CHANNELS
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_channels(addend_ptr, n * channels + channel, real, 0.0))[None, :]
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
            mask = None
            x = tl.load(x_ptr + base + offsets).to(tl.float32)
            dy = tl.load(dy_ptr + base + offsets).to(tl.float32)
        else:
            mask = (position < rows - done)[:, None] & real[None, :]
            x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        normed, dz = _gradient(x, dy, shift, rstd[None, :], weight[None, :], bias, mask, SILU, x_ptr.dtype.element_ty)
        sum_dz += dz
        sum_dzn += dz * normed
        if addend_ptr is not None:
            sum_n += normed
        base += BLOCK_R * channels
    dz_c = tl.sum(sum_dz, axis=0)  # [C]
    dzn_c = tl.sum(sum_dzn, axis=0)
    if channel_sums_ptr is not None:
        target = channel_sums_ptr + (n * chunks + chunk) * channels + channel
        tl.store(target, dz_c, mask=real)
        tl.store(target + channel_plane, dzn_c, mask=real)
        if addend_ptr is not None:
            tl.store(target + 2 * channel_plane, tl.sum(sum_n, axis=0), mask=real)
    first_group = column * BLOCK_C // GROUP_CHANNELS
    member = members(channel, real, first_group, GROUP_CHANNELS, BLOCK_G)
    group = first_group + tl.arange(0, BLOCK_G)
    touched = (group < groups) & (group * GROUP_CHANNELS < (column + 1) * BLOCK_C)
    slot = column - group * GROUP_CHANNELS // BLOCK_C
    target = group_sums_ptr + ((n * groups + group) * chunks + chunk) * SLOTS
    tl.store(target + slot, fold(dz_c * weight, member), mask=touched)
    tl.store(target + group_plane + slot, fold(dzn_c * weight, member), mask=touched)
    last = ((group + 1) * GROUP_CHANNELS - 1) // BLOCK_C - group * GROUP_CHANNELS // BLOCK_C
    for other in tl.static_range(1, SLOTS):
        unreached = touched & (slot == last) & (last < other)
        tl.store(target + other, tl.zeros([BLOCK_G], tl.float32), mask=unreached)
        tl.store(target + group_plane + other, tl.zeros([BLOCK_G], tl.float32), mask=unreached)


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
    group_plane,
    spatial,
    channels,
    groups,
    columns,
    chunk_rows,
    chunks,
    partials,
    touched,  # groups that BLOCK_C channels belong to
    GROUP_CHANNELS: tl.constexpr,
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
    first_group = column * BLOCK_C // GROUP_CHANNELS
    group = first_group + tl.arange(0, BLOCK_G)
    part = tl.arange(0, BLOCK_P)
    sums = group_sums_ptr + (n * groups + group)[:, None] * partials + part[None, :]
    there = ((group < groups) & (tl.arange(0, BLOCK_G) < touched))[:, None] & (part < partials)[None, :]
    count = tl.cast(GROUP_CHANNELS, tl.float32) * spatial
    member = members(channel, real, first_group, GROUP_CHANNELS, BLOCK_G)
    mean_d = spread(tl.sum(tl.load(sums, mask=there, other=0.0), axis=1) / count, member)
    mean_dn = spread(tl.sum(tl.load(sums + group_plane, mask=there, other=0.0), axis=1) / count, member)

    statistic = n * groups + channel // GROUP_CHANNELS
    rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)[None, :]
    shift = tl.load(mean_ptr + statistic, mask=real, other=0.0)
    shift = (shift - load_channels(addend_ptr, n * channels + channel, real, 0.0))[None, :]
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
        normed, dz = _gradient(x, dy, shift, rstd, weight, bias, mask, SILU, x_ptr.dtype.element_ty)
        dx = rstd * (dz * weight - mean_d[None, :] - normed * mean_dn[None, :])
        tl.store(dx_ptr + base + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        base += BLOCK_R * channels


def backward_launches(
    batch: int, channels: int, spatial: int, groups: int, itemsize: int, channels_last: bool, silu: bool
) -> tuple[Launch, Launch | None, Launch, tuple[int, int]]:
    """The launches for the sums, dx (None: the first does it) and the parameters; partials per group, per channel."""
    plan = _spans_launches if channels_last else _rows_launches
    sums, dx, partials, parts, strides = plan(batch, channels, spatial, groups, itemsize, silu)
    planes = {"group_plane": batch * groups * partials, "channel_plane": batch * channels * parts}
    sizes = {"spatial": spatial, "groups": groups, "group_channels": channels // groups, "channels": channels}
    sizes |= {"batch": batch, "parts": parts, "partials": partials, **strides}
    parameters = parameters_launch(sizes | planes)
    sums = replace(sums, sizes=sums.sizes | planes)
    if dx is not None:
        dx = replace(dx, sizes=dx.sizes | {"group_plane": planes["group_plane"]})
    return sums, dx, parameters, (partials, parts)


def _rows_launches(batch, channels, spatial, groups, itemsize, silu):
    cut = cut_rows(batch, channels, spatial, groups)
    strides = {"stride_c": cut.segments, "stride_part": 1}
    sizes = {
        "spatial": spatial,
        "groups": groups,
        "group_channels": channels // groups,
        "segments": cut.segments,
        "BLOCK_W": cut.width,
        "WHOLE_ROWS": spatial % cut.width == 0,
        "SILU": silu,
    }
    if fits(cut.elements, batch * groups, ROWS_BACKWARD):
        sizes |= {"TILES": cut.tiles, "BLOCK_R": cut.tile}
        fused = Launch(_group_norm_silu_rows_fused_bwd_kernel, (batch * groups,), sizes, warps_for(cut.elements))
        return fused, None, 1, cut.segments, strides
    sizes["BLOCK_R"] = cut.block
    sums = sizes | {"chunk_rows": cut.chunk, "chunks": cut.chunks}
    finer = cut_rows(batch, channels, spatial, groups, finer=2)
    dx = sizes | {"chunk_rows": finer.chunk, "chunks": finer.chunks}
    dx |= {"partials": cut.chunks, "BLOCK_P": partials_block(cut.chunks)}
    return (
        Launch(_group_norm_silu_rows_sums_kernel, (batch * groups * cut.chunks,), sums, 8),
        Launch(_group_norm_silu_rows_dx_kernel, (batch * groups * finer.chunks,), dx, 8),
        cut.chunks,
        cut.segments,
        strides,
    )


def _spans_launches(batch, channels, spatial, groups, itemsize, silu):
    cut = cut_spans(batch, channels, spatial, groups, itemsize)
    strides = {"stride_c": 1, "stride_part": channels}
    sizes = {
        "spatial": spatial,
        "channels": channels,
        "groups": groups,
        "GROUP_CHANNELS": channels // groups,
        "SILU": silu,
    }
    held = triton.next_power_of_2(spatial) * cut.width
    if cut.splits == 1 and fits(held, batch * cut.columns, SPANS):
        span = {"columns": cut.columns, "SPAN_GROUPS": cut.groups, "BLOCK_C": cut.width}
        span |= {"BLOCK_G": triton.next_power_of_2(cut.groups), "BLOCK_R": triton.next_power_of_2(spatial)}
        fused = Launch(_group_norm_silu_spans_fused_bwd_kernel, (batch * cut.columns,), sizes | span, warps_for(held))
        return fused, None, 1, 1, strides
    sums, partials = spans_sums_cut(batch, channels, spatial, groups)
    dx = elementwise_columns(batch, channels, spatial, groups)
    dx |= {"partials": partials, "BLOCK_P": partials_block(partials)}
    return (
        Launch(_group_norm_silu_spans_sums_kernel, (batch * sums["columns"] * sums["chunks"],), sizes | sums, 8),
        Launch(_group_norm_silu_spans_dx_kernel, (batch * dx["columns"] * dx["chunks"],), sizes | dx, 8),
        partials,
        sums["chunks"],
        strides,
    )
