"""What the forward and the backward kernels share: how a tensor is cut into programs, and the arithmetic inside one.

Two memory formats, two cuts. Symbols: N batch, C channels, S spatial positions, G groups, D = C / G channels a group.

contiguous     The D * S elements of a group are one run. It is cut into rows of BLOCK_W positions, `segments` rows to a
               channel, so that a row lies in one channel and its weight, bias and addend are one scalar.
channels_last  A position is a run of C channels. A program takes a span of channels and some positions. Spans that
               feed a group reduction are whole groups *and* whole 32-byte sectors (80 channels = 8 groups of 10):
               a group of its own would be a 20-byte request. Channels are reduced first and folded into groups last.

A group that fits in a program's registers is done in one launch that reads it once. Otherwise two: partial results
into a workspace, then the elementwise pass, each program of which merges the partials it needs, in a fixed order.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

PROGRAMS = 4 * 132  # enough for four programs on each SM of an H100; more only adds partials to merge
TILE = 4096  # elements a program has in flight: 16 to a thread at 8 warps
MERGE_TILE = 4096  # largest [groups, partials] tile of one merge
MAX_SPAN = 512  # channels; a wider group is split and its parts merged like chunks
ROWS_FORWARD = 40960  # elements held in registers, in float32: 80 to a thread at 16 warps
ROWS_BACKWARD = 20480  # half: of each of them, two values
SPANS = 16384  # less: the sums of each channel cross the threads

# Numbers that differ from layer to layer, batch to batch and size to size, of which a kernel is no faster for knowing
# whether they are 1 or multiples of 16. What decides the width of loads is not among them: `spatial` where rows of it
# are read, `channels` and `span` where rows of those are.
RUNTIME_OF_ROWS = [
    "plane", "group_plane", "channel_plane", "groups", "group_channels", "segments", "chunk_rows", "chunks", "partials",
]  # fmt: skip
RUNTIME_OF_SPANS = [*RUNTIME_OF_ROWS, "spatial", "span_groups", "columns", "touched"]


@dataclass(frozen=True)
class Rows:
    """The contiguous cut: a group as `rows` rows of `width` positions, taken `block` rows at a time."""

    width: int
    segments: int  # rows per channel
    rows: int  # rows per group
    block: int
    chunk: int  # rows per program, a multiple of block
    chunks: int  # programs per group

    @property
    def tile(self):
        """Rows of a tile where a group is held whole: one of five or fewer, so that few lanes are beyond the last."""
        whole = triton.next_power_of_2(self.rows)
        return whole if whole * self.width <= TILE // 2 else triton.next_power_of_2(triton.cdiv(self.rows, 5))

    @property
    def tiles(self):
        return triton.cdiv(self.rows, self.tile)

    @property
    def elements(self):
        return self.tiles * self.tile * self.width


@dataclass(frozen=True)
class Spans:
    """The channels_last cut of [S, C]: `columns` spans of up to `width` channels, `chunks` chunks of positions."""

    width: int  # BLOCK_C, a power of two
    groups: int  # groups in a span (1 when a group is wider than a span)
    splits: int  # spans in a group (1 when a group fits in a span)
    columns: int
    block: int
    chunk: int
    chunks: int

    @property
    def partials(self):
        return self.chunks * self.splits


def _chunks(rows, block, wanted):
    """Rows per chunk (a multiple of block) and the number of chunks, as near to `wanted` as there are blocks."""
    blocks = triton.cdiv(rows, block)
    chunk = triton.cdiv(blocks, max(1, min(wanted, blocks))) * block
    return chunk, triton.cdiv(rows, chunk)


def cut_rows(batch, channels, spatial, groups, finer=1):
    """`finer` 2 asks for twice the programs: where each has no result to merge, more of them are only an advantage."""
    width = spatial & -spatial
    if width < 8:  # 16-byte loads matter more than the lanes lost at the end of a channel
        width = triton.next_power_of_2(spatial)
    width = min(width, 256)
    segments = triton.cdiv(spatial, width)
    rows = channels // groups * segments
    block = triton.next_power_of_2(min(rows, max(1, TILE // width)))
    wanted = min(triton.cdiv(finer * PROGRAMS, batch * groups), MERGE_TILE)
    return Rows(width, segments, rows, block, *_chunks(rows, block, wanted))


def cut_spans(batch, channels, spatial, groups, itemsize):
    group_channels = channels // groups
    sector = 32 // itemsize
    span = group_channels
    while span % sector and span < channels:
        span += group_channels
    while span * itemsize < 128 and span < channels:  # a whole line where the groups are narrow
        span += span
    if span > MAX_SPAN:
        span = max(1, MAX_SPAN // group_channels) * group_channels
    per_span = min(groups, span // group_channels)
    width = min(triton.next_power_of_2(per_span * group_channels), MAX_SPAN)
    splits = triton.cdiv(group_channels, width)
    columns = triton.cdiv(groups, per_span) * splits
    block = triton.next_power_of_2(min(spatial, max(1, TILE // width)))
    # Each program of the second pass merges [groups of its columns, chunks * splits] partials in one tile.
    merge_width = groups_block(max(per_span, touched_groups(channels, groups)))
    wanted = min(triton.cdiv(PROGRAMS, batch * columns), max(1, MERGE_TILE // (merge_width * splits)))
    return Spans(width, per_span, splits, columns, block, *_chunks(spatial, block, wanted))


def fits(elements, programs, limit):
    """Whether programs holding so many elements each do all in one launch: not if they are few and a GPU would idle."""
    return elements <= (limit if programs >= 128 else limit // 2)


def warps_for(elements):
    """Warps of a program that holds its elements: at most 48 to a thread, until there are 16."""
    return min(16, triton.next_power_of_2(triton.cdiv(elements, 48 * 32)))


def elementwise_columns(batch, channels, spatial, groups):
    """The cut of [S, C] for a pass without reductions, as kernel arguments."""
    width = column_width(channels)
    columns = triton.cdiv(channels, width)
    block = triton.next_power_of_2(min(spatial, TILE // width))
    chunk, chunks = _chunks(spatial, block, triton.cdiv(2 * PROGRAMS, batch * columns))
    touched = touched_groups(channels, groups)
    tile = {"touched": touched, "BLOCK_R": block, "BLOCK_C": width, "BLOCK_G": groups_block(touched)}
    return {"columns": columns, "chunk_rows": chunk, "chunks": chunks} | tile


def spans_sums_cut(batch, channels, spatial, groups):
    """The cut of [S, C] for the backward's sums, as kernel arguments, and the partials that each group has."""
    width, group_channels = column_width(channels), channels // groups
    columns, touched = triton.cdiv(channels, width), touched_groups(channels, groups)
    first = range(0, channels, group_channels)
    slots = max((c + group_channels - 1) // width - c // width + 1 for c in first)
    block = triton.next_power_of_2(min(spatial, max(1, TILE // 2 // width)))  # an element has two values and three sums
    wanted = min(
        triton.cdiv(PROGRAMS, batch * columns), max(1, MERGE_TILE // (touched * triton.next_power_of_2(slots)))
    )
    chunk, chunks = _chunks(spatial, block, wanted)
    tile = {"BLOCK_R": block, "BLOCK_C": width, "BLOCK_G": touched, "SLOTS": slots}
    tile["WHOLE"] = spatial % block == 0 and channels % width == 0
    return {"columns": columns, "chunk_rows": chunk, "chunks": chunks} | tile, chunks * slots


def groups_block(groups):
    """A block that holds so many groups: of one size for all usual layers, so that they share a compiled kernel."""
    return max(8, triton.next_power_of_2(groups))


def partials_block(partials):
    """A block that holds so many partial results, likewise."""
    return max(64, triton.next_power_of_2(partials))


def column_width(channels):
    """Channels per program of an elementwise pass: it need not keep groups whole, so every lane is used."""
    width = min(channels & -channels, 64)
    return width if width >= 16 else min(triton.next_power_of_2(channels), 64)


def touched_groups(channels, groups):
    """Groups that `column_width` adjacent channels can belong to, as a power of two."""
    width, group_channels = column_width(channels), channels // groups
    if width % group_channels == 0:
        touched = width // group_channels
    elif group_channels % width == 0:
        touched = 1
    else:
        touched = triton.cdiv(width - 1, group_channels) + 1
    return triton.next_power_of_2(min(touched, groups))


@triton.jit
def row_tile(row, row_end, spatial, segments, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr, WHOLE_ROWS: tl.constexpr):
    """Where rows [row, row + BLOCK_R) of a contiguous group lie.

    Returns the offset of the tile from the group's start (int64), offsets inside the tile [R, W], which are real, and
    the channel of each row within the group [R].
    """
    rows = row + tl.arange(0, BLOCK_R)  # [R]
    columns = tl.arange(0, BLOCK_W)  # [W]
    channel = rows // segments  # [R]
    mask = (rows < row_end)[:, None]
    if WHOLE_ROWS:
        start = tl.cast(row, tl.int64) * BLOCK_W
        offsets = tl.arange(0, BLOCK_R)[:, None] * BLOCK_W + columns[None, :]  # [R, W]
        mask = mask & (columns >= 0)[None, :]
    else:
        first = row // segments
        start = tl.cast(first, tl.int64) * spatial
        position = (rows - channel * segments)[:, None] * BLOCK_W + columns[None, :]  # [R, W]
        offsets = (channel - first)[:, None] * spatial + position
        mask = mask & (position < spatial)
    return start, offsets, mask, channel


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
    group = channel // group_channels - first_group  # [C]
    return (tl.arange(0, BLOCK_G)[:, None] == group[None, :]) & mask[None, :]


@triton.jit
def fold(values, member):
    """Sum over the channels of each group: [C] -> [G]. Not by a product: a group's NaN is not its neighbour's."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def spread(values, member):
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
    e = tl.exp(-z)
    if DTYPE != tl.float32:  # noqa: SIM300
        return z / (1.0 + e)
    gate = tl.div_rn(1.0, 1.0 + e)
    return tl.where((z > 0.0) & (z < 80.0), tl.fma(-z, e * gate, z), z * gate)


@triton.jit
def sigmoid(z, DTYPE: tl.constexpr):
    """Correctly divided where results stay float32, else by the square of a machine's reciprocal root.

    The root is one instruction; the shortest division that Triton has is six, most of them for the edges of float32.
    """
    if DTYPE == tl.float32:  # noqa: SIM300
        return tl.div_rn(1.0, 1.0 + tl.exp(-z))
    else:
        root = tl.rsqrt(1.0 + tl.exp(-z))
        return root * root


@triton.jit
def rows_elements(first, end, spatial, segments, BLOCK_W: tl.constexpr):
    """Real elements in rows [first, end) of a group: the last row of a channel may be short."""
    whole = (end // segments - first // segments) * spatial
    return whole + tl.minimum(end % segments * BLOCK_W, spatial) - tl.minimum(first % segments * BLOCK_W, spatial)
