"""Group norm with addend and SiLU in Triton: the gradients of weight, bias and addend, from sums per channel.

The last kernel of the backward pass (`triton_backward`): it adds up in a fixed order what the first has left.
"""

from collections.abc import Mapping

import triton
import triton.language as tl

from cnkernels.group_norm_silu.triton_common import load_channels
from cnkernels.group_norm_silu.triton_cuts import RUNTIME_OF_SPANS
from cnkernels.launch import Launch

BLOCK_C = 4  # channels of a program: 80 programs for 320 channels; one number, so that all layers share the kernel


@triton.jit(do_not_specialize=[*RUNTIME_OF_SPANS, "batch", "parts", "channels"])
def _group_norm_silu_parameter_gradients_kernel(
    channel_sums_ptr,  # [3, N, parts, C]
    group_sums_ptr,  # [2, N * G, partials]
    weight_ptr,
    rstd_ptr,
    dweight_ptr,  # [C] or None
    dbias_ptr,  # [C] or None
    daddend_ptr,  # [N, C] or None
    stride_channel_sum,
    stride_sum,
    batch,
    spatial,
    channels,
    groups,
    group_channels,
    parts,
    partials,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Adds the channel sums up in a fixed order, for BLOCK_C channels.

    Program 0 of the second axis adds over all samples and parts at once; program n + 1 makes daddend of sample n.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = channel < channels
    base = channel_sums_ptr + channel
    n = tl.program_id(1).to(tl.int64) - 1
    if n < 0:
        if dweight_ptr is not None:
            dweight = _sum_parts(base + stride_channel_sum, batch, parts, channels, channels, real, BLOCK_P, BLOCK_C)
            tl.store(dweight_ptr + channel, dweight.to(dweight_ptr.dtype.element_ty), mask=real)
        if dbias_ptr is not None:
            dbias = _sum_parts(base, batch, parts, channels, channels, real, BLOCK_P, BLOCK_C)
            tl.store(dbias_ptr + channel, dbias.to(dbias_ptr.dtype.element_ty), mask=real)
    elif daddend_ptr is not None:
        base += n * channels * parts
        dz = _sum_parts(base, 1, parts, channels, channels, real, BLOCK_P, BLOCK_C)
        normed = _sum_parts(base + 2 * stride_channel_sum, 1, parts, channels, channels, real, BLOCK_P, BLOCK_C)
        statistic = n * groups + channel // group_channels
        sums = group_sums_ptr + statistic * partials
        count = tl.cast(group_channels, tl.float32) * spatial
        mean_d = _sum_parts(sums, 1, partials, groups, 1, real, BLOCK_P, BLOCK_C) / count
        mean_dn = _sum_parts(sums + stride_sum, 1, partials, groups, 1, real, BLOCK_P, BLOCK_C) / count
        rstd = tl.load(rstd_ptr + statistic, mask=real, other=0.0)
        weight = load_channels(weight_ptr, channel, real, 1.0)
        daddend = rstd * (weight * dz - spatial * mean_d - normed * mean_dn)
        target = daddend_ptr + n * channels + channel
        tl.store(target, daddend.to(daddend_ptr.dtype.element_ty), mask=real)


@triton.jit
def _sum_parts(pointers, samples, parts, per_sample, stride, mask, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[C]: what lies at `pointers`, summed over samples `per_sample * parts` apart and over parts `stride` apart."""
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, samples * parts, BLOCK_P):
        index = start + tl.arange(0, BLOCK_P)
        sample = index // parts
        offset = sample.to(tl.int64) * per_sample * parts + (index - sample * parts) * stride
        there = (index < samples * parts)[:, None] & mask[None, :]
        total += tl.load(pointers[None, :] + offset[:, None], mask=there, other=0.0)
    return tl.sum(total, axis=0)


def parameters_launch(sizes: Mapping[str, int]) -> Launch:
    """The launch for a layer's sizes: all of the kernel's arguments but its tensors and blocks, by name."""
    grid = (triton.cdiv(sizes["channels"], BLOCK_C), 1 + sizes["batch"])
    blocks = {"BLOCK_C": BLOCK_C, "BLOCK_P": 1024 // BLOCK_C}
    return Launch(_group_norm_silu_parameter_gradients_kernel, grid, {**sizes, **blocks}, 4, maxnreg=128)
