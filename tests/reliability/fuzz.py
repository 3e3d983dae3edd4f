"""Coverage-guided fuzzing of the readers in `targets`, by atheris (libFuzzer).

    pip install -e '.[fuzz]'
    python -m tests.reliability fuzz --seconds 300 [--keep] [TARGET ...]

Each target runs in a process of its own, for its share of the time, from its good files and from the corpus. What it
must not do ends it and leaves the input in a file that is named. `--keep` puts small inputs that reached new branches
into corpus/TARGET.zip; `test_corpus.py` reads them again, without atheris.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
ROOT = Path(__file__).parents[2]
LONGEST = 32768  # bytes of an input
MOST_KEPT = 40  # inputs of a target
READERS = ["controlnet.common.tar", "controlnet.checkpoints", "controlnet.data"]


def corpus(name: str) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the kept inputs of a target."""
    path = CORPUS / f"{name}.zip"
    if path.is_file():
        with zipfile.ZipFile(path) as file:
            for entry in file.namelist():
                yield entry, file.read(entry)


def main(argv: Sequence[str] | None = None) -> int:
    from tests.reliability.targets import TARGETS  # not above: in a target's own process it is imported instrumented

    parser = argparse.ArgumentParser(prog="python -m tests.reliability fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=300, help="of all targets together")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations")
    parser.add_argument("--keep", action="store_true", help="put what reaches new branches into the corpus")
    parser.add_argument("--findings", default=".", help="folder for the inputs that break a promise")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: all)")
    arguments = parser.parse_args(argv)
    names = arguments.targets or list(TARGETS)
    unknown = sorted(set(names) - set(TARGETS))
    if unknown or arguments.seconds < len(names):
        parser.error(
            f"targets {unknown} of {', '.join(TARGETS)}; seconds {arguments.seconds}, at least one for a target"
        )
    found = [_fuzz(name, arguments, arguments.seconds // len(names)) for name in names]
    return 1 if any(found) else 0


def _fuzz(name: str, arguments: argparse.Namespace, seconds: int) -> int:
    """Fuzzes one target and prints a line about it; returns how many inputs broke a promise."""
    with tempfile.TemporaryDirectory() as scratch:
        inputs, begin = Path(scratch, "inputs"), time.monotonic()
        inputs.mkdir()
        for entry, data in corpus(name):
            (inputs / entry).write_bytes(data)
        limits = [f"-max_total_time={seconds}", "-timeout=60", "-rss_limit_mb=3000", f"-seed={arguments.seed}"]
        limits.append(f"-max_len={LONGEST}")
        where = f"-artifact_prefix={Path(arguments.findings).resolve()}/{name}-"
        done = _child(name, scratch, str(inputs), *limits, where)
        runs = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        row = {"target": name, "runs": int(runs[-1]) if runs else 0, "inputs": len(list(inputs.iterdir()))}
        row |= {"defects": int(done.returncode != 0), "seconds": round(time.monotonic() - begin, 1)}
        if done.returncode:  # also where atheris is not installed
            print(done.stderr[-3000:], file=sys.stderr)
        print(json.dumps(row), flush=True)
        if arguments.keep:
            _keep(name, inputs)
        return row["defects"]


def _child(name: str, scratch: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.reliability.fuzz", name, *options]
    environment = {**os.environ, "TMPDIR": scratch}  # libFuzzer ends the process before Python can tidy up
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, errors="replace")


def _keep(name: str, inputs: Path) -> None:
    """Writes corpus/NAME.zip: what reached a branch that nothing before it did, the smallest MOST_KEPT of these."""
    found = {data for path in inputs.iterdir() if len(data := path.read_bytes()) <= LONGEST // 2}
    CORPUS.mkdir(exist_ok=True)
    with zipfile.ZipFile(CORPUS / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for data in sorted(found, key=lambda data: (len(data), data))[:MOST_KEPT]:
            # named by content and without a date: the same inputs make the same file
            entry = zipfile.ZipInfo(hashlib.sha256(data).hexdigest()[:16])
            entry.compress_type = zipfile.ZIP_DEFLATED
            file.writestr(entry, data)


def _fuzz_here(name: str, options: list[str]) -> None:
    """Hands a target of this process to libFuzzer; does not return."""
    import pickletools

    import atheris
    import torch  # before the hook, which is slow where much is imported

    unpickler = torch._weights_only_unpickler.Unpickler
    unpickler.load = atheris.instrument_func(unpickler.load)
    pickletools._genops = atheris.instrument_func(pickletools._genops)
    with atheris.instrument_imports(include=READERS):
        from tests.reliability import targets
    target, folder = targets.TARGETS[name], tempfile.TemporaryDirectory()
    targets.tracemalloc.start()

    def once(data: bytes) -> None:
        targets.attempt(target, target.mend(data), Path(folder.name))

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        return target.mend(atheris.Mutate(data, most))

    inputs = [option for option in options if not option.startswith("-")]
    for number, data in enumerate(target.seeds()):
        Path(inputs[-1], f"seed-{number}").write_bytes(data)
    words = Path(folder.name, "words")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n' for word in target.words))
    options.append(f"-dict={words}")
    atheris.Setup([sys.argv[0], *options], once, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz_here(sys.argv[1], sys.argv[2:])
