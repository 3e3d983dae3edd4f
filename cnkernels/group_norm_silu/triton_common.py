"""Device functions that group norm's forward and backward kernels share: places in memory, sums by group, moments.

How a tensor is divided among programs, and what rows, runs, spans and columns are, is drawn in `triton_cuts`.
"""

import triton
import triton.language as tl


@triton.jit
def divide(index, divisor, inverse):
    """index // divisor for an index below 2^29, given inverse = 2^30 // divisor + 1: a quarter of a division's work.

    The product is at most one too large, as index * (inverse * divisor - 2^30) is less than divisor * 2^30.
    """
    quotient = tl.umulhi(index * 4, inverse)
    return tl.where(quotient * divisor > index, quotient - 1, quotient)


@triton.jit
def row_tile(
    row,
    rows,
    spatial,
    segments,
    segment_inverse,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    WHOLE_ROWS: tl.constexpr,
):
    """Rows [row, row + BLOCK_R) of a held group.

    Returns offsets from the start of the group [R, W], which of them are real, and of each row [R] its channel within
    the group and its real elements.
    """
    index = row + tl.arange(0, BLOCK_R)  # [R]
    channel = divide(index, segments, segment_inverse)
    column = tl.arange(0, BLOCK_W)
    real = index < rows
    if WHOLE_ROWS:
        offsets = index[:, None] * BLOCK_W + column[None, :]  # [R, W]
        return offsets, real[:, None] & (column >= 0)[None, :], channel, tl.where(real, BLOCK_W, 0)
    else:
        first = (index - channel * segments) * BLOCK_W
        offsets = (channel * spatial + first)[:, None] + column[None, :]
        length = tl.where(real, tl.minimum(spatial - first, BLOCK_W), 0)
        return offsets, real[:, None] & (column[None, :] < (spatial - first)[:, None]), channel, length


@triton.jit
def runs_of(program, runs, run_tiles, group_channels, spatial, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr):
    """The runs of one program of a group that is cut.

    Returns of each run [R] its channel within the group, its index within the channel, its offset from the start of
    the group (int64), the positions from its start to the end of the channel, and whether it is real.
    """
    index = program * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = index // runs
    run = index - channel * runs
    first = run * run_tiles * BLOCK_W
    return channel, run, channel.to(tl.int64) * spatial + first, spatial - first, channel < group_channels


@triton.jit
def load_addend(pointer, index, mask, has_addend):
    """The addend of each channel as float32, 0 where the caller has none: then `pointer` is any tensor's, unread."""
    return tl.load(pointer + index, mask=mask & (has_addend != 0), other=0.0).to(tl.float32)


@triton.jit
def load_channels(pointer, index, mask, default: tl.constexpr):
    """A per-channel vector as float32, or the scalar `default` where the caller has none."""
    if pointer is not None:
        return tl.load(pointer + index, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full(index.shape, default, tl.float32)


@triton.jit
def span_of(
    column,
    channels,
    group_channels,
    span_groups,
    span,  # channels: span_groups * group_channels
    SPLITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A span's first group, its channels [C], and which of these are real.

    `span` comes as one number, of which the compiler knows whether it is a multiple of 16, and is compared by itself:
    so it sees that the channels of a 16-byte load are all real or all not.
    """
    lane = tl.arange(0, BLOCK_C)
    if SPLITS == 1:
        channel = column * span + lane
        return column * span_groups, channel, (lane < span) & (channel < channels)
    else:
        group = column // SPLITS
        channel = group * group_channels + column % SPLITS * BLOCK_C + lane
        return group, channel, channel < (group + 1) * group_channels


@triton.jit
def members(channel, mask, first_group, group_channels, BLOCK_G: tl.constexpr):
    """[BLOCK_G, BLOCK_C] booleans: channel c belongs to the g-th group from first_group."""
    start = ((first_group + tl.arange(0, BLOCK_G)) * group_channels)[:, None]
    return (channel[None, :] >= start) & (channel[None, :] < start + group_channels) & mask[None, :]


@triton.jit
def sum_by_group(values, member):
    """Sum over the channels of each group: [C] -> [G]. Not by a product: a group's NaN is not its neighbour's."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def to_channels(values, member):
    """The group's value at each of its channels: [G] -> [C]."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def merge_moments(count, mean, m2, axis: tl.constexpr):
    """Count, mean and sum of squared deviations of a union, from those of its parts along `axis` (Chan et al., 1979).

    The mean is taken twice, the second time of what the first left: at 1000 +- 0.1 the first loses digits.
    """
    total = tl.sum(count, axis=axis)
    scale = 1.0 / tl.maximum(total, 1.0)
    rough = tl.sum(count * mean, axis=axis) * scale
    rest = mean - tl.expand_dims(rough, axis)
    center = rough + tl.sum(count * rest, axis=axis) * scale
    rest = mean - tl.expand_dims(center, axis)
    return total, center, tl.sum(m2 + count * rest * rest, axis=axis)


@triton.jit
def inverse_deviation(m2, count, eps):
    """1 / sqrt(m2 / count + eps), rounded once: every element of a group inherits its error.

    What the quotient, the sum and the root leave over is computed exactly and put back by one step of Newton's method;
    not where squares overflow or vanish, nor where there is a NaN. eps is float32, not the float64 of a Python float.
    """
    eps = tl.cast(eps, tl.float32)
    quotient = tl.div_rn(m2, count)
    variance = quotient + eps
    eps_kept = variance - quotient
    lost = (quotient - (variance - eps_kept)) + (eps - eps_kept)
    lost += tl.fma(-quotient, count, m2) / count
    root = tl.div_rn(1.0, tl.sqrt_rn(variance))
    product = root * variance
    error = tl.fma(-product, root, 1.0) - tl.fma(root, variance, -product) * root - lost * root * root
    return tl.where((variance > 1e-30) & (variance < 1e30), tl.fma(0.5 * root, error, root), root)


@triton.jit
def activate(z, SILU: tl.constexpr, DTYPE: tl.constexpr):
    """z * sigmoid(z). Where it stays float32 and z > 0, it is z less a part of it, which rounds once and not thrice."""
    if not SILU:
        return z
    if DTYPE != tl.float32:  # noqa: SIM300
        return z * sigmoid(z, DTYPE)
    e = tl.exp(-z)
    gate = tl.div_rn(1.0, 1.0 + e)
    return tl.where((z > 0.0) & (z < 80.0), tl.fma(-z, e * gate, z), z * gate)


@triton.jit
def sigmoid(z, DTYPE: tl.constexpr):
    """Correctly divided where results stay float32, else the square of the hardware's reciprocal square root.

    That root is one instruction; the shortest division that Triton has is six, most of them for the edges of float32.
    """
    if DTYPE == tl.float32:  # noqa: SIM300
        return tl.div_rn(1.0, 1.0 + tl.exp(-z))
    else:
        root = tl.rsqrt(1.0 + tl.exp(-z))
        return root * root
