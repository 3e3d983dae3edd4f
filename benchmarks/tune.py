"""Which backend serves which call on a GPU, from a result measured there.

    python -m benchmarks.tune RESULT.json [--output cnkernels/tuning/<gpu>.json]

For each op, dtype, head dimension and size, the backend whose forward and backward together took the least time.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from benchmarks import report
from cnkernels import dispatch, tuning


def choices(rows: report.Rows) -> dict[str, list[dict[str, Any]]]:
    """The `choices` of a tuning file. A call that fewer than two backends were timed on leaves nothing to choose."""
    times: dict[tuple, dict[str, dict[tuple, float]]] = {}
    for row in report.timed(rows):
        if row["kind"] == "op" and row["provider"] in dispatch.BACKENDS:
            call = (row["op"], row["dtype"], row["head_dim"], row["size"])
            case = (row["shape"], row["layout"], row["direction"])
            times.setdefault(call, {}).setdefault(row["provider"], {})[case] = row["median"]
    found: dict[str, list[dict[str, Any]]] = {}
    for (op, dtype, head_dim, size), by_backend in times.items():
        common = set.intersection(*(set(cases) for cases in by_backend.values()))
        if len(by_backend) < 2 or not common:
            continue
        fastest = min(by_backend, key=lambda b: sum(by_backend[b][case] for case in common))
        entry = {"dtype": dtype, "head_dim": head_dim, "size": size, "backend": fastest}
        found.setdefault(op, []).append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("result", type=Path, help="a file of benchmarks/results/, measured on the GPU in question")
    parser.add_argument("--output", type=Path, help="default: the file of that GPU in cnkernels/tuning/")
    options = parser.parse_args()
    result = report.load(options.result)
    output = options.output or tuning.FOLDER / tuning.file_name(result["machine"]["device"])
    text = json.dumps({"machine": result["machine"], "choices": choices(result["rows"])}, indent=1)
    partial = output.with_suffix(".partial")
    partial.write_text(text + "\n")
    os.replace(partial, output)
    print(output)


if __name__ == "__main__":
    main()
