"""The three ways to install, each in an environment of its own: `python -m tests.cnkernels.installs [WAY]`.

pure: `pip install .` where no nvcc is found. compiled: `pip install .` with nvcc. in-place: `make extension`.

Each prints the seconds and the peak memory of the build, all processes together, what `python -m cnkernels.env` then
says of the extension, and its size. What is installed is a copy of the committed tree, in a temporary folder, built for
CNKERNELS_ARCHS, or by default as csrc/build.py does. The dependencies are those of the environment that runs this; only
`make extension` installs its own.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from cnkernels.progress import say
from controlnet.common.command import parser as command_parser

ROOT = Path(__file__).resolve().parents[2]
WAYS = ("pure", "compiled", "in-place")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(session: int) -> int:
    """Of all processes of a session; pages that several share count for each."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            total += int((folder / "statm").read_text().split()[1]) * _PAGE if int(fields[3]) == session else 0
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return total


def measured(command: list, folder: Path, environment: dict[str, str]) -> tuple[float, int]:
    """Runs a command; (seconds, peak of its resident bytes, looked at five times a second)."""
    start, peak = time.monotonic(), 0
    with open(folder.parent / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{(folder.parent / 'log').read_text()}\n{' '.join(map(str, command))} failed")
    return time.monotonic() - start, peak


def environment(*, with_nvcc: bool) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if not with_nvcc:
        folders = variables["PATH"].split(os.pathsep)
        variables["PATH"] = os.pathsep.join(f for f in folders if not (Path(f) / "nvcc").exists())
        variables.pop("CUDA_HOME", None)
        variables.pop("CUDA_PATH", None)
        if Path("/usr/local/cuda/bin/nvcc").exists():  # found whatever the environment says
            variables["CNKERNELS_BUILD"] = "0"
    return variables


def new_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's packages, but not its editable ones; its python."""
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin" / "python"


def install(way: str, work: Path, wheel: Path | None) -> None:
    source = work / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x"], cwd=source, input=archive, check=True)
    variables = environment(with_nvcc=way != "pure")
    if way == "in-place":
        cost = measured(["make", "extension", f"PYTHON={sys.executable}"], source, variables)
        python, folder = source / ".venv" / "bin" / "python", source
    else:
        python, folder = new_environment(work / "venv"), work
        wheels = wheel or work
        cost = measured([python, "-m", "pip", "wheel", "--no-deps", "-w", wheels, "."], source, variables)
        (built,) = wheels.glob("cnkernels-*.whl")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", built], check=True, env=variables)
    report = [python, "-m", "cnkernels.env"]
    lines = subprocess.run(report, cwd=folder, env=variables, check=True, capture_output=True, text=True).stdout
    print(f"{way}: {cost[0]:.0f} s, peak {cost[1] / 1e6:.0f} MB of memory")
    print(*re.findall(r"^extension.*", lines, re.MULTILINE), sep="\n")
    for path in re.findall(r"loaded from (\S+),", lines):
        print(f"its size     {Path(path).stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = command_parser("tests.cnkernels.installs", __doc__, "python -m tests.cnkernels.installs pure")
    parser.add_argument("way", nargs="?", choices=(*WAYS, "all"), default="all")
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="where to leave the compiled wheel")
    options = parser.parse_args()
    for way in WAYS if options.way == "all" else (options.way,):
        say(f"{way}: installing, which takes minutes with nvcc")
        with tempfile.TemporaryDirectory() as work:
            install(way, Path(work), options.wheel and options.wheel.resolve())


if __name__ == "__main__":
    main()
