"""What a launch executes, from its compiled code: how often each loop turns, and what each unit of a GPU gets to do.

How often a loop turns stands in Triton's IR, as integers of the arguments and of the program's id. The loops of the
machine code are those of the IR in the same order. Code outside of loops counts once a block, whichever way its
branches go.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from cnkernels.aot_sass import Instruction

_INTEGERS = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
    "remsi": np.fmod,
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "andi": np.bitwise_and,
    "ori": np.bitwise_or,
    "extsi": lambda a: a,
    "extui": lambda a: a,
    "trunci": lambda a: a,
    "select": lambda c, a, b: np.where(c, a, b),
}
_COMPARISONS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "slt": np.less,
    "sle": np.less_equal,
    "sgt": np.greater,
    "sge": np.greater_equal,
}
_ASSIGNMENT = re.compile(r"%(\w+)(?::\d+)? = (.*)")
_FOR = re.compile(r"scf\.for %\w+ = %(\w+) to %(\w+) step %(\w+)")


class _Values(dict):
    """Integers of the IR by name, each one array over the programs; what is no integer is absent."""

    def define(self, name: str, text: str, programs: Mapping[str, np.ndarray], grid: Mapping[str, int]) -> None:
        self.pop(name, None)
        kind, _, rest = text.partition(" ")
        namespace, _, operation = kind.partition(".")
        if "tensor<" in rest.rpartition(" : ")[2]:
            return
        operands = [self.get(operand) for operand in re.findall(r"%(\w+)", rest)]
        if kind == "arith.constant" and (constant := re.match(r"(-?\d+) : i\d+|(true|false)", rest)):
            self[name] = np.int64(constant[1]) if constant[1] else constant[2] == "true"
        elif kind == "tt.get_program_id":
            self[name] = programs[rest[0]]
        elif kind == "tt.get_num_programs":
            self[name] = np.int64(grid[rest[0]])
        elif namespace != "arith" or any(operand is None for operand in operands):
            return
        elif operation == "cmpi" and (compare := rest.partition(",")[0]) in _COMPARISONS:
            self[name] = _COMPARISONS[compare](*operands)
        elif operation in _INTEGERS:
            self[name] = _INTEGERS[operation](*operands)


def loop_turns(ttir: str, sizes: Mapping[str, object], grid: Sequence[int]) -> list[int]:
    """How often each `for` of a kernel turns in one launch, over all its programs, in the order of the text.

    Args:
        ttir: the kernel's IR, asm["ttir"] of what Triton compiled.
        sizes: the launch's arguments by name.
        grid: the launch's programs along x, y and z.

    Raises:
        ValueError: how often a loop turns depends on what the kernel reads.
    """
    along = dict(zip("xyz", (*grid, 1, 1)[:3], strict=True))
    programs = dict(zip("xyz", (i.ravel() for i in np.indices(tuple(along.values()))), strict=True))
    values = _Values({name: np.int64(size) for name, size in sizes.items() if type(size) is int})
    turns, regions = [], [np.ones(len(programs["x"]), np.int64)]  # how often each open region is entered, by program
    others = [np.int64(1)]  # how often the else branch of each would be
    for line in (re.sub(r" loc\(.*\)$", "", line.strip()) for line in ttir.splitlines()):
        if line.startswith("} else {"):
            regions[-1] = others[-1]
            continue
        if line.startswith("}") and len(regions) > 1:
            regions.pop(), others.pop()
        assignment = _ASSIGNMENT.match(line)
        if line.endswith("{") and not line.startswith(("module", "tt.func")):
            entered, other = regions[-1], regions[-1]
            text = assignment[2] if assignment else line
            if bounds := _FOR.match(text):
                first, last, step = (values.get(bound) for bound in bounds.groups())
                if first is None or last is None or step is None:
                    raise ValueError(f"how often a loop turns depends on what the kernel reads: {line}")
                entered = regions[-1] * np.maximum(0, -((first - last) // step))
                turns.append(int(entered.sum()))
            elif (condition := re.match(r"scf\.if %(\w+)", text)) and condition[1] in values:
                taken = values[condition[1]]
                entered, other = regions[-1] * taken, regions[-1] * np.logical_not(taken)
            regions.append(entered), others.append(other)
        elif assignment:
            values.define(assignment[1], assignment[2], programs, along)
    return turns


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last address of each loop, an outer one before those inside it."""
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    return sorted(spans, key=lambda span: (span[0], -span[1]))


def executed(code: Sequence[Instruction], turns: Sequence[int], blocks: int) -> Counter[Instruction]:
    """How often a launch executes each instruction, by one warp of each block.

    Args:
        code: the kernel's machine code.
        turns: `loop_turns` of the launch.
        blocks: of the launch.

    Raises:
        ValueError: the loops of the machine code are not those of the IR.
    """
    spans = loops(code)
    by_span = dict(zip(spans, _matched(code, spans, turns), strict=True))
    counts = Counter()
    for instruction in code:
        inside = [span for span in spans if span[0] <= instruction.address <= span[1]]
        counts[instruction] = by_span[inside[-1]] if inside else blocks
    return counts


def _matched(code: Sequence[Instruction], spans: list[tuple[int, int]], turns: Sequence[int]) -> list[int]:
    """The turns of each loop of the machine code.

    An unrolled loop is two there: one of several turns at once, whose loads are a multiple of those of the next, which
    does the rest.
    """
    found, left, extra = [], list(turns), len(spans) - len(turns)
    while len(found) < len(spans) and left:
        total = left.pop(0)
        main, *rest = spans[len(found) : len(found) + 2]
        loads, of_rest = _loads(code, main), _loads(code, rest[0]) if rest and rest[0][0] > main[1] else 0
        if extra > 0 and of_rest and loads > of_rest and loads % of_rest == 0:
            at_once, extra = loads // of_rest, extra - 1
            found += [total // at_once, total % at_once]
        else:
            found.append(total)
    if left or len(found) != len(spans):
        raise ValueError(f"{len(spans)} loops in the machine code, {len(turns)} in the IR")
    return found


def _loads(code: Sequence[Instruction], span: tuple[int, int]) -> int:
    return sum(span[0] <= i.address <= span[1] and i.opcode.startswith("LDG") for i in code)
