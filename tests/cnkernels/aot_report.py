"""Compiles cases of one op for every architecture and prints each as a line of JSON, for test_aot.py.

    python -m tests.cnkernels.aot_report OP EVERY

Where machine code is bounded (`READ`) the first case of each kernel, elsewhere one in EVERY of each kernel's cases.
"""

import json
import sys

from cnkernels import aot

READ = (80, 89, 90, 120)  # architectures whose inner loops have bounds


def first_of_each_kernel(op: str, arch: int) -> list[int]:
    first = {}
    for index, case in enumerate(aot.cases(op, arch)):
        first.setdefault(case.kernel.__name__, index)
    return list(first.values())


def main(op: str, every: str) -> None:
    jobs = []
    for i, arch in enumerate(aot.ARCHITECTURES):
        chosen = first_of_each_kernel(op, arch) if arch in READ else aot.sample(op, arch, int(every), i)
        jobs += [(op, index, arch) for index in chosen]
    for (_, index, arch), compiled in zip(jobs, aot.compile_all(jobs), strict=True):
        case = aot.cases(op, arch)[index]
        row = {"kernel": case.kernel.__name__, "case": case.name, "arch": arch, "faults": compiled.faults}
        row |= {"warps": case.num_warps, "pipes": compiled.loop or compiled.code}
        row["constants"] = {name: value for name, value in case.constexprs.items() if isinstance(value, int)}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
