"""Runs the tests of the ops with many seeds and instruction sets: none may fail, and each must catch every mutant.

    python -m tests.cnkernels.campaign FOLDER [--seeds 8] [--sets SET ...] [--mutants 5] [--tightest 200] [--jobs 1]

Three parts, each for every instruction set: all op tests for some seeds; all mutants for some seeds; and the twelve
tests that came closest to failing, in any set, for many seeds. FOLDER gets a JSON file for each piece as it is done; a
run that was stopped goes on where it was, and pieces of other sources are done anew. The end is a table, in
FOLDER/summary.md as well, and an exit status of 1 if anything failed. With the defaults about two hours of one core.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlnet.common.command import parser as command_parser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("cnkernels", "csrc", "tests/cnkernels", "tests/conftest.py")
TESTS = Path("tests", "cnkernels")
OPS = (
    "attention",
    "geglu",
    "group_norm_silu",
    "zero_conv_add",
    "aten",
)  # files of tests that compare have one of these
MUTANTS = TESTS / "test_mutations.py::test_mutant_is_caught"
DOZEN, CHUNK = 12, 25  # tests that are tried for many seeds; seeds in one piece of that


def instruction_sets() -> dict[str, dict[str, str]]:
    """Name -> environment. Each variable is read once, when its library is loaded; what a CPU lacks changes nothing."""
    simd = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    wide = [name for name in simd if name.startswith("AVX512") or name == "X86_V4"]
    return {
        "default": {},
        "avx512-without-bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
        "avx2": {
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "NPY_DISABLE_CPU_FEATURES": " ".join(wide),
            "OPENBLAS_CORETYPE": "Haswell",
        },
        "lowest": {
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "NPY_DISABLE_CPU_FEATURES": " ".join(simd),
            "OPENBLAS_CORETYPE": "Nehalem",
        },
    }


@dataclass(frozen=True)
class Piece:
    """One subprocess: some tests, for consecutive seeds, under one instruction set."""

    part: str  # "tests", "mutants" or "tightest"
    instructions: str
    first: int
    count: int
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        last = self.first + self.count - 1
        return f"{self.part}, {self.instructions}, seed{f's {self.first} to {last}' if self.count > 1 else f' {last}'}"


class Campaign:
    """Pieces that are done, by their files; what the sources and the tests of a piece were is in the file's name."""

    def __init__(self, folder: Path, jobs: int):
        self._folder, self._jobs, self._sets = folder, jobs, instruction_sets()
        folder.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        for path in sorted(p for source in SOURCES for p in [ROOT / source, *(ROOT / source).rglob("*")]):
            if path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
        self._sources = digest.hexdigest()

    def _file(self, piece: Piece) -> Path:
        what = hashlib.sha256(f"{self._sources} {piece.tests}".encode()).hexdigest()[:12]
        return self._folder / f"{piece.part}-{piece.instructions}-{piece.first}-{piece.count}-{what}.json"

    def result(self, piece: Piece) -> dict | None:
        path = self._file(piece)
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, pieces: Iterable[Piece]) -> None:
        """Those that are not done, with a line on each."""
        pieces = list(pieces)
        todo = [piece for piece in pieces if self.result(piece) is None]
        if len(todo) < len(pieces):
            print(f"{len(pieces) - len(todo)} of {len(pieces)} were done before", flush=True)
        begin = time.monotonic()
        with ThreadPoolExecutor(self._jobs) as pool:
            running = {pool.submit(self._carry_out, piece): piece for piece in todo}
            for done, future in enumerate(as_completed(running), 1):
                future.result()
                found = self.result(running[future])
                left = (time.monotonic() - begin) / done * (len(todo) - done) / 60
                tightest = max((one["used"] for one in found["tightest"]), default=0.0)
                print(
                    f"{done} of {len(todo)}: {running[future].name}: {found['passed']} passed, "
                    f"{len(found['failures'])} failed, closest {tightest:.2f} of what is allowed, "
                    f"{found['seconds']:.0f} s; about {left:.0f} min left",
                    flush=True,
                )

    def _carry_out(self, piece: Piece) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | self._sets[piece.instructions]
        with tempfile.TemporaryDirectory(dir=self._folder) as scratch:
            output = Path(scratch) / "found.json"
            command = [sys.executable, "-m", "tests.cnkernels.campaign_worker", "--output", str(output)]
            command += ["--first", str(piece.first), "--count", str(piece.count), *piece.tests]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode or not output.exists():
                raise RuntimeError(f"{piece.name}: the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            os.replace(output, self._file(piece))


def op_tests() -> tuple[str, ...]:
    """Files whose tests compare by the rule."""
    files = sorted((ROOT / TESTS).glob("test_*.py"))
    return tuple(str(p.relative_to(ROOT)) for p in files if any(op in p.stem for op in OPS))


def tightest(results: Iterable[Mapping]) -> list[dict]:
    """The closest comparison of each test, over all results, the closest first."""
    worst: dict[str, dict] = {}
    for one in (one for found in results for one in found["tightest"]):
        if one["used"] > worst.get(one["test"], {"used": 0.0})["used"]:
            worst[one["test"]] = one
    return sorted(worst.values(), key=lambda one: -one["used"])


def table(campaign: Campaign, pieces: list[Piece], sets: list[str]) -> str:
    """Instruction sets by what came of each part, and the failures and the dozen in words."""
    lines = [
        "| instructions | seeds | tests a seed | failures | closest | mutants caught | seeds of the dozen | closest |"
    ]
    lines.append("| --- " * 8 + "|")
    failed, closest = [], []
    for name in sets:
        of = {part: [p for p in pieces if p.instructions == name and p.part == part] for part in PARTS}
        found = {part: [campaign.result(p) for p in of[part]] for part in PARTS}
        failed += [(name, f) for results in found.values() for one in results for f in one["failures"]]
        closest += found["tests"] + found["tightest"]
        used = {part: max((t["used"] for one in found[part] for t in one["tightest"]), default=0.0) for part in PARTS}
        per_seed = sorted({one["passed"] + len(one["failures"]) for one in found["tests"]})
        escaped = sum(len(one["failures"]) for one in found["mutants"])
        caught = sum(one["passed"] for one in found["mutants"])
        cells = [
            name,
            len(of["tests"]),
            " to ".join(map(str, sorted({*per_seed[:1], *per_seed[-1:]}))),
            sum(len(one["failures"]) for part in ("tests", "tightest") for one in found[part]),
            f"{used['tests']:.2f}",
            f"{caught} of {caught + escaped}, {len(of['mutants'])} seeds" if of["mutants"] else "",
            sum(p.count for p in of["tightest"]),
            f"{used['tightest']:.2f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [""] + [f"FAILED {name}, seed {f['seed']}: {f['test']}: {f['message']}" for name, f in failed]
    lines += ["", "Closest, as a part of what is allowed:"]
    for one in tightest(closest)[:DOZEN]:
        lines.append(f"- {one['used']:.2f}: {one['test']}, {one['name']}, {one['measure']} of {one['elements']}")
    return "\n".join(lines)


PARTS = ("tests", "mutants", "tightest")


def main() -> None:
    examples = "python -m tests.cnkernels.campaign results --seeds 1 --sets default --mutants 1 --tightest 10"
    parser = command_parser("tests.cnkernels.campaign", __doc__, examples)
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("--first", type=int, default=0, help="the first seed of each part")
    parser.add_argument("--seeds", type=int, default=8, help="seeds of all op tests")
    parser.add_argument(
        "--sets", nargs="+", choices=instruction_sets(), default=["default", "avx512-without-bf16", "avx2"]
    )
    parser.add_argument("--mutants", type=int, default=5, help="seeds of all mutants")
    parser.add_argument("--tightest", type=int, default=200, help="seeds of the dozen closest tests")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args()
    campaign, files = Campaign(options.folder, options.jobs), op_tests()
    pieces = [
        Piece(part, name, options.first + number, 1, tests)
        for part, count, tests in (("tests", options.seeds, files), ("mutants", options.mutants, (str(MUTANTS),)))
        for number in range(count)
        for name in options.sets
    ]
    campaign.run(pieces)
    results = [campaign.result(p) for p in pieces if p.part == "tests"]
    dozen = tuple(sorted(one["test"] for one in tightest(results)[:DOZEN]))
    many = [
        Piece("tightest", name, first, min(CHUNK, options.first + options.tightest - first), dozen)
        for first in range(options.first, options.first + options.tightest, CHUNK)
        for name in options.sets
        if dozen
    ]
    campaign.run(many)
    text = table(campaign, pieces + many, options.sets)
    (options.folder / "summary.md").write_text(text + "\n")
    print(text)
    sys.exit("FAILED" in text)


if __name__ == "__main__":
    main()
