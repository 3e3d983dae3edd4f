"""torch.ops.cnkernels.geglu and its backward: schema, validation, fake kernels, autograd."""

import torch
from torch import Tensor

from cnkernels import dispatch, layout, register
from cnkernels.errors import expect

_NAME = "geglu"


def _validate(projected: Tensor) -> None:
    register.expect_floating(_NAME, "projected", projected)
    fits = projected.dim() >= 1 and projected.shape[-1] % 2 == 0
    expect(fits, _NAME, "projected", "[..., 2C], its last dimension even", f"shape {list(projected.shape)}")


def _forward(projected):
    _validate(projected)
    if projected.numel() == 0:
        return fake_forward(projected)
    return dispatch.implementation(_NAME, projected).geglu_fwd(layout.adjacent(projected))


def fake_forward(projected):
    _validate(projected)
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


def _backward(dout, projected):
    if projected.numel() == 0:
        return _fake_backward(dout, projected)
    return dispatch.implementation(_NAME, projected).geglu_bwd(layout.adjacent(dout), layout.adjacent(projected))


def _fake_backward(dout, projected):
    return projected.new_empty(projected.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, dout):
    return torch.ops.cnkernels.geglu_backward(dout, *ctx.saved_tensors)


register.op(
    _NAME, "(Tensor projected) -> Tensor", _forward, fake_forward, setup_context=_setup_context, autograd=_autograd
)
register.op(f"{_NAME}_backward", "(Tensor dout, Tensor projected) -> Tensor", _backward, _fake_backward)
