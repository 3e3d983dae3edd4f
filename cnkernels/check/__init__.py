"""Whether the kernels are right on this machine: `python -m cnkernels.check`."""
