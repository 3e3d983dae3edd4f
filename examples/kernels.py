"""Runs the four ops on random tensors, forward and backward: python examples/kernels.py"""

import torch

import cnkernels

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.float32

# A packed projection of queries, keys and values, read in place: [batch, tokens, 3, heads, head dimension].
qkv = torch.randn(2, 64, 3, 8, 40, device=device, dtype=dtype, requires_grad=True)
out = cnkernels.attention(*qkv.unbind(2))

x = torch.randn(2, 320, 16, 16, device=device, dtype=dtype).to(memory_format=torch.channels_last)
weight, bias, embedding = (torch.randn(*shape, device=device, dtype=dtype) for shape in ((320,), (320,), (2, 320)))
normed = cnkernels.group_norm_silu(x, 32, weight, bias, addend=embedding)

zero_conv = torch.zeros(320, 320, 1, 1, device=device, dtype=dtype)
added = cnkernels.zero_conv_add(normed, zero_conv, bias, residual=x, scale=0.8)  # x + 0.8 * (conv(normed) + bias)

gated = cnkernels.geglu(torch.randn(2, 64, 2 * 1280, device=device, dtype=dtype))

out.float().square().mean().backward()
for name, tensor in {"attention": out, "group_norm_silu": normed, "zero_conv_add": added, "geglu": gated}.items():
    print(f"{name:<16} {list(tensor.shape)} {tensor.dtype}")
print(f"gradient of qkv  {list(qkv.grad.shape)}")
