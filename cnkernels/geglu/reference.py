"""value * gelu(gate) with the exact (erf) gelu in plain PyTorch. Computed in float32 (float64 in, float64 out)."""

import math

import torch
from torch import Tensor


def geglu_fwd(projected: Tensor) -> Tensor:
    value, gate = _wide(projected).chunk(2, -1)
    return (value * (gate * _normal_cdf(gate))).to(projected.dtype)


def geglu_bwd(dout: Tensor, projected: Tensor) -> Tensor:
    """dvalue and dgate, packed like `projected`."""
    value, gate = _wide(projected).chunk(2, -1)
    dout, cdf = _wide(dout), _normal_cdf(gate)
    density = torch.exp(-0.5 * gate * gate) * (1.0 / math.sqrt(2.0 * math.pi))
    dvalue = dout * (gate * cdf)
    dgate = dout * value * (cdf + gate * density)
    return torch.cat((dvalue, dgate), -1).to(projected.dtype)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float64 if t.dtype == torch.float64 else torch.float32)


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x * (1.0 / math.sqrt(2.0))))
