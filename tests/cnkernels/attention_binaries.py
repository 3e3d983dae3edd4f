"""Records which calls of attention make Triton compile a kernel; as a program, prints a line of names per call.

Runs as on an sm_90 GPU up to the launch: a call that needs a new binary compiles it.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from cnkernels.attention import triton_kernels


class Sm90:
    """What a launch asks of a driver before it starts a kernel."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def record_compilations():
    compiled = []
    run = jit.JITFunction.run

    def count(kernel):
        return sum(len(cache[0]) for cache in kernel.device_caches.values())

    def compile_only(self, *arguments, grid, warmup, **options):
        before = count(self)
        run(self, *arguments, grid=grid, warmup=True, **options)
        if count(self) > before:
            compiled.append(self.fn.__name__)

    driver.set_active(Sm90())
    jit.JITFunction.run = compile_only
    return compiled


def call(batch, queries, keys, heads, scale, packed=False):
    length = max(queries, keys)
    if packed:
        q, k, v = torch.zeros(batch, length, 3, heads, 40, dtype=torch.float16).unbind(2)
    else:
        q, k, v = torch.zeros(3, batch, length, heads, 40, dtype=torch.float16)
    q, k, v = q[:, :queries], k[:, :keys], v[:, :keys]
    out, lse = triton_kernels.attention_fwd(q, k, v, scale)
    triton_kernels.attention_bwd(torch.zeros_like(out), q, k, v, out, lse, scale, (True, True, True))


def main():
    compiled = record_compilations()
    for arguments in (
        (2, 4096, 4096, 8, 0.2),
        (2, 1025, 4097, 16, 1.0),
        (3, 1600, 1600, 8, 0.3, True),
        (2, 4096, 77, 8, 0.2),
        (5, 900, 77, 8, 1.0),
    ):
        compiled.clear()
        call(*arguments)
        print(*compiled)


if __name__ == "__main__":
    main()
