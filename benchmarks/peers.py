"""The alternatives to each op. One that is not installed gets a row that says so."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Function = Callable[..., Tensor]
SLOW = ("torch.compile", "flex")  # take seconds to compile on every new shape, and are timed last


def compiled(eager: Function) -> dict[str, Function]:
    """Returns eager and compiled PyTorch as providers. CUDA graphs come from the harness, the same for all."""
    mode = "max-autotune-no-cudagraphs" if torch.cuda.is_available() else "default"
    return {"eager": eager, "torch.compile": torch.compile(eager, mode=mode, dynamic=False)}


def _sdpa(backend: SDPBackend | None) -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        if backend is None:
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    return call


@functools.cache
def _flex() -> Function:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)


def _flex_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flex()(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


def attention() -> dict[str, Function]:
    """Returns the attention functions of other libraries, on [B, S, H, D] tensors."""
    if not torch.cuda.is_available():
        return {"eager": _sdpa(SDPBackend.MATH), "sdpa": _sdpa(None)}
    return {
        "eager": _sdpa(SDPBackend.MATH),
        "sdpa-flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa-efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "flex": _flex_attention,
        "xformers": _xformers_attention,
        "flash-attn": _flash_attention,
    }


def _liger_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    n, channels, height, width = x.shape
    y = LigerGroupNormFunction.apply(x.contiguous().view(n, channels, -1), weight, bias, channels, 32, 1e-5)
    return F.silu(y.view(n, channels, height, width))


def group_norm_silu() -> dict[str, Function]:
    return {"liger": _liger_group_norm_silu} if torch.cuda.is_available() else {}


def _addmm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor) -> Tensor:
    """One product with cuBLASLt's bias epilogue; the scale is folded into weight and bias beforehand."""
    scale = scale.to(x.dtype)
    rows = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    product = torch.addmm(bias * scale, rows, (weight.flatten(1) * scale).t())
    return residual + product.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def zero_conv_add() -> dict[str, Function]:
    return {"addmm": _addmm}


def _liger_geglu(projected: Tensor) -> Tensor:
    """Liger gates with the tanh approximation of GELU: not the same function, as the provider's name says."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    value, gate = projected.chunk(2, dim=-1)
    return LigerGELUMulFunction.apply(gate.contiguous(), value.contiguous())


def geglu() -> dict[str, Function]:
    return {"liger-tanh": _liger_geglu} if torch.cuda.is_available() else {}
