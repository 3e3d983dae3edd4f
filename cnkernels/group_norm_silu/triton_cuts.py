"""How group norm's Triton kernels divide a tensor among programs: sizes, worked out on the host.

N batch, C channels, S spatial positions, G groups, D = C / G channels of a group. Two memory formats, two divisions.

contiguous, [N, C, S]: the D * S elements of a group are adjacent, one channel after the other.

    group             | channel 0             | channel 1             | ... | channel D-1           |
                      |<--------- S --------->|<--------- S --------->|     |<--------- S --------->|
    held in registers | row | row | row | ro. | row | row | row | ro. |     | row | row | row | ro. |
    cut over programs | run       | run       | run       | run       |     | run       | run       |
                      |<---- program 0 ------>|<---- program 1 ------>|     |<---- last program --->|

A group that fits is held in the registers of one program as rows of 16 or 64 positions, `segments` rows to a channel,
the last of them short where S is not a multiple. A larger group is cut: each channel into `runs` runs, of `run_tiles`
tiles of RUN_TILE positions. A program takes BLOCK_R adjacent runs of one group and walks along all of them at once, so
that weight, bias and addend are read once, and sums over a run stay with its threads until the loop has ended.

channels_last, [N, S, C]: a position is C adjacent channels, and a group is a stripe of D of them at every position.

                      channel 0      D      2D      3D      4D      5D      6D
    position 0                | grp 0 | grp 1 | grp 2 | grp 3 | grp 4 | grp 5 |
    position 1                |       |       |       |       |       |       |
     ...             chunk 0  |<------ span 0 ------->|<------ span 1 ------->|   whole groups
     ...             chunk 1  |                       |                       |
     ...                      |<- column 0 ->|<- column 1 ->|<- column 2 ->| ...  wherever groups end

A program takes a chunk of positions of some channels. Statistics, and everything where a chunk is all positions, take
spans: whole groups that are also whole 32-byte sectors (8 groups of 10 channels; one group of 10 would be a request of
20 bytes). Elementwise passes and the backward's sums take columns of up to 64 channels, of which every lane is used;
there a group lies in one column or in several, which its slots count, and a column touches several groups.

Whole groups in registers are one launch that reads once. Otherwise there are two: partial results into a workspace,
then the elementwise pass, each program of which merges the partials that it needs, in a fixed order.
"""

from dataclasses import dataclass

import triton

PROGRAMS = 4 * 132  # enough for four programs on each SM of an H100; more only adds partials to merge
TILE = 4096  # elements a program has in flight: 16 to a thread at 8 warps
MERGE_TILE = 4096  # largest [groups, partials] tile of one merge
MAX_SPAN = 512  # channels; a wider group is split and its parts merged like chunks
MAX_HELD_SPAN = 16384  # elements of a span in registers; less than of rows: the sums of each channel cross the threads
ROW_FORWARD = 16  # positions of a row: few, so that the images of most sizes have whole ones
ROW_BACKWARD = 64  # more: each row leaves its sums
MAX_HELD = 20480  # elements of a group in registers; beyond, one program a multiprocessor would not hide its own loads
RUN_TILE = 256  # positions: what a warp reads at once, 16 bytes of half precision a thread

# Numbers that differ from layer to layer, batch to batch and size to size, of which a kernel is no faster for knowing
# whether they are 1 or multiples of 16. What decides the width of loads is not among them: `spatial` where a kernel
# reads along positions, `channels` and `span` where it reads along channels.
RUNTIME_OF_ROWS = [
    "has_addend", "write_sums", "stride_moment", "stride_sum", "stride_channel_sum", "groups", "group_channels",
    "segments", "segment_inverse", "runs", "run_tiles", "programs", "partials",
]  # fmt: skip
RUNTIME_OF_SPANS = [
    "has_addend", "write_sums", "stride_moment", "stride_sum", "stride_channel_sum", "groups", "group_channels",
    "group_inverse", "spatial", "span_groups", "columns", "chunk_rows", "chunks", "partials", "touched", "slots",
]  # fmt: skip


HELD_TILES = 5  # of a group in registers, each of 8 elements a thread
HELD_WARPS = (4, 8, 16)  # of the program that holds it: few sizes, so that few kernels are compiled


@dataclass(frozen=True)
class Runs:
    """Runs of [N, C, S]: `runs` to a channel, of `tiles` tiles of RUN_TILE positions, `block` to a program."""

    block: int
    runs: int
    tiles: int
    programs: int  # of a group

    @property
    def sizes(self):
        """As kernel arguments."""
        return {"BLOCK_R": self.block, "runs": self.runs, "run_tiles": self.tiles, "programs": self.programs}


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


def inverse(divisor):
    """For `triton_common.divide`."""
    return 2**30 // divisor + 1


def held_rows(width, channels, spatial, groups, most):
    """The rows of a group that is held, of `width` positions, as kernel arguments, and the warps that hold it.

    None where a group has more than `most` elements.
    """
    segments = triton.cdiv(spatial, width)
    elements = channels // groups * segments * width
    whole = spatial % width == 0
    tile = {warps: 8 * 32 * warps for warps in (HELD_WARPS if whole else HELD_WARPS[1:])}  # rare sizes share a kernel
    warps = next((warps for warps in tile if elements <= min(most, HELD_TILES * tile[warps])), None)
    if warps is None:
        return None
    rows = {"segments": segments, "segment_inverse": inverse(segments)}
    rows |= {"TILES": HELD_TILES, "BLOCK_R": tile[warps] // width, "BLOCK_W": width}
    return rows | {"WHOLE_ROWS": whole}, warps


def cut_runs(batch, channels, spatial, groups, block, merged):
    """Runs for at least PROGRAMS programs, or for as many as there are tiles; for twice as many if none is merged.

    Args:
        block: runs of a program.
        merged: whether each program leaves a result that others merge. Where none does, more programs cost nothing.
    """
    tiles = triton.cdiv(spatial, RUN_TILE)
    programs = PROGRAMS if merged else 2 * PROGRAMS
    wanted = min(triton.cdiv(programs, batch * groups), MERGE_TILE // 2)
    length = min(tiles, max(1, channels // groups * tiles // (wanted * block)))
    runs = triton.cdiv(tiles, length)
    return Runs(block, runs, triton.cdiv(tiles, runs), triton.cdiv(channels // groups * runs, block))


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


def _chunks(rows, block, wanted):
    """Rows per chunk (a multiple of block) and the number of chunks, as near to `wanted` as there are blocks."""
    blocks = triton.cdiv(rows, block)
    chunk = triton.cdiv(blocks, max(1, min(wanted, blocks))) * block
    return chunk, triton.cdiv(rows, chunk)


def fits(size, programs, limit):
    """Whether programs holding so much each do all in one launch: not if they are few and a GPU would idle."""
    return size <= (limit if programs >= 128 else limit // 2)


def warps_for(elements):
    """Warps of a program that holds its elements: at most 48 to a thread, until there are 16."""
    return min(16, triton.next_power_of_2(triton.cdiv(elements, 48 * 32)))


def columns_of_elements(batch, channels, spatial, groups):
    """The cut of [S, C] for a pass without reductions, as kernel arguments."""
    width = column_width(channels)
    columns = triton.cdiv(channels, width)
    block = triton.next_power_of_2(min(spatial, TILE // width))
    chunk, chunks = _chunks(spatial, block, triton.cdiv(2 * PROGRAMS, batch * columns))
    touched = touched_groups(channels, groups)
    tile = {"touched": touched, "BLOCK_R": block, "BLOCK_C": width, "BLOCK_G": groups_block(touched)}
    return {"columns": columns, "chunk_rows": chunk, "chunks": chunks} | tile


def columns_of_sums(batch, channels, spatial, groups):
    """The cut of [S, C] for the backward's sums, as kernel arguments, and the partials that each group has."""
    width, group_channels = column_width(channels), channels // groups
    columns, touched = triton.cdiv(channels, width), touched_groups(channels, groups)
    first = range(0, channels, group_channels)
    slots = max((c + group_channels - 1) // width - c // width + 1 for c in first)
    block = triton.next_power_of_2(min(spatial, max(1, TILE // 2 // width)))  # an element has two values and three sums
    merge_width = groups_block(touched) * triton.next_power_of_2(slots)
    wanted = min(triton.cdiv(PROGRAMS, batch * columns), max(1, MERGE_TILE // merge_width))
    chunk, chunks = _chunks(spatial, block, wanted)
    tile = {"slots": slots, "BLOCK_R": block, "BLOCK_C": width, "BLOCK_G": groups_block(touched)}
    tile["BLOCK_S"] = max(4, triton.next_power_of_2(slots))
    tile["WHOLE"] = spatial % block == 0 and channels % width == 0
    return {"columns": columns, "chunk_rows": chunk, "chunks": chunks} | tile, chunks * slots


def groups_block(groups):
    """A block that holds so many groups: of one size for all usual layers, so that they share a compiled kernel."""
    return max(8, triton.next_power_of_2(groups))


def partials_block(partials):
    """A block that holds so many partial results, likewise."""
    return max(64, triton.next_power_of_2(partials))


def column_width(channels):
    """Channels of a column, which need not keep groups whole, so that every lane is used."""
    width = min(channels & -channels, 64)
    return width if width >= 16 else min(triton.next_power_of_2(channels), 64)


def touched_groups(channels, groups):
    """Groups that the channels of a column can belong to, as a power of two."""
    width, group_channels = column_width(channels), channels // groups
    if width % group_channels == 0:
        touched = width // group_channels
    elif group_channels % width == 0:
        touched = 1
    else:
        touched = triton.cdiv(width - 1, group_channels) + 1
    return triton.next_power_of_2(min(touched, groups))
