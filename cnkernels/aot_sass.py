"""Machine code as text, read: instructions, the loop that does the work, and which unit executes what.

The text is that of `cuobjdump -sass`, for kernels of Triton and of CUDA alike.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

PIPES = ("tensor", "mufu", "fma", "alu", "memory", "uniform", "control")

_BY_PREFIX = {  # what an opcode begins with, in the order of the search
    "tensor": ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA", "UTC", "WARPGROUP"),
    "mufu": ("MUFU", "F2F.", "F2I", "I2F", "FRND"),
    "memory": ("LD", "ST", "SHFL", "ATOM", "RED", "UTMA", "UBLKCP", "SYNCS", "MATCH", "CCTL", "R2S"),
    "control": (
        "BRA", "BRX", "BAR", "BSYNC", "BSSY", "BREAK", "DEPBAR", "EXIT", "RET", "CALL", "NOP", "WARPSYNC", "YIELD",
        "MEMBAR", "ERRBAR", "FENCE", "NANOSLEEP", "ACQBULK", "ELECT", "UCGABAR",
    ),
    "uniform": ("U", "R2UR", "S2UR", "S2R", "CS2"),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "HFMA", "HADD", "HMUL", "HMNMX"),
}  # fmt: skip


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers, such as LDGSTS.E.BYPASS.128
    target: int | None  # of a branch

    @property
    def pipe(self) -> str:
        """The unit that executes it, one of `PIPES`; "alu" is everything that the others do not name."""
        for pipe, prefixes in _BY_PREFIX.items():
            if self.opcode.startswith(prefixes):
                return pipe
        return "alu"


_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE)


def functions(sass: str) -> dict[str, str]:
    """The text of each function, by its (mangled) name; of the last image, where there are several."""
    parts = re.split(r"^\s*Function : (\S+)\s*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def instructions(function: str) -> list[Instruction]:
    """Every instruction of a function in order, without the padding after its end."""
    found = []
    for address, opcode, operands in _LINE.findall(function):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands.strip()) if opcode.startswith("BRA") else None
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if target else None))
    while found and (found[-1].opcode == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


def innermost_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The loops that contain no other: from the target of each backward branch to the branch."""
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    inner = [
        (begin, end)
        for begin, end in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans)
    ]
    return [[i for i in code if begin <= i.address <= end] for begin, end in sorted(inner)]


def hot_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The innermost loop with the most products, else that moves the most bytes of global memory, else the most MUFU.

    Of loops with equally many of all three the shortest: a loop over what remains at the edges takes more instructions
    for the same work. Empty where there is no loop.
    """

    def work(loop):
        pipes = count(loop)
        return pipes["tensor"], sum(map(_global_bytes, loop)), pipes["mufu"], -len(loop)

    return max(innermost_loops(code), key=work, default=[])


def _global_bytes(instruction: Instruction) -> int:
    """What a thread moves between global memory and elsewhere."""
    if not instruction.opcode.startswith(("LDG", "STG")):
        return 0
    width = re.search(r"\.[US]?(8|16|64|128)\b", instruction.opcode)
    return int(width[1]) // 8 if width else 4


def count(code: Sequence[Instruction]) -> Counter:
    """Instructions by pipe."""
    return Counter(i.pipe for i in code)


def opcodes(code: Sequence[Instruction]) -> Counter:
    """Instructions by opcode, without modifiers."""
    return Counter(i.opcode.partition(".")[0] for i in code)
