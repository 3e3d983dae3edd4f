"""Makes tables and plots of the files in benchmarks/results/, and compares two of them.

    python -m benchmarks.report [FILE] [--readme README.md] [--plots FOLDER]
    python -m benchmarks.report --compare OLD NEW
    python -m benchmarks.report [FILE] --predicted PREDICTION

PREDICTION is what `python -m cnkernels.aot --model NAME --json PREDICTION` wrote: its times beside those measured.

FILE is the newest result by default. With --readme, the text between the marks `<!-- benchmarks -->` and
`<!-- /benchmarks -->` of that file is replaced by the tables.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import predicted
from benchmarks.rows import Rows, groups, is_ours, key, load, newest, timed
from controlnet.common.command import parser as command_parser

OPEN, CLOSE = "<!-- benchmarks -->", "<!-- /benchmarks -->"


def _duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _table(header: list[str], body: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in body])


def op_table(rows: Rows) -> str:
    """Makes one line per case: our best time, the fraction of the lower bound, the best peer, and the speed-up."""
    body = []
    for group in groups(rows, "op").values():
        ours = sorted((r for r in timed(group) if is_ours(r)), key=lambda r: r["median"])
        peers = sorted((r for r in timed(group) if not is_ours(r)), key=lambda r: r["median"])
        first = group[0]
        case = [f"`{first['op']}`", first["shape"], first["dtype"], first["layout"], first["direction"]]
        if not ours:
            reasons = "; ".join(f"{r['provider']}: {r['reason']}" for r in group if is_ours(r))
            body.append([*case, reasons or "no backend", "", "", ""])
            continue
        best, peer = ours[0], peers[0] if peers else None
        ahead = "" if peer is None else f"{peer['median'] / best['median']:.2f}x"
        ahead += "" if peer is None or peer["median"] >= best["median"] else " (slower)"
        time = f"{_duration(best['median'])} ({best['provider']})"
        rival = "" if peer is None else f"{_duration(peer['median'])} ({peer['provider']})"
        body.append([*case, time, f"{best['fraction_of_floor']:.0%}", rival, ahead])
    header = ["op", "shape", "dtype", "layout", "direction", "ours", "of the floor", "best peer", "speed-up"]
    return _table(header, body)


def job_table(rows: Rows) -> str:
    body = []
    for group in groups(rows, "job").values():
        for row in group:
            if "reason" in row:
                body.append([row["shape"], row["provider"], row["reason"], "", ""])
                continue
            memory = "" if row["peak_memory"] is None else f"{row['peak_memory'] / 2**30:.1f} GiB"
            spread = f"{_duration(row['median'])} ({_duration(row['p20'])} to {_duration(row['p80'])})"
            body.append([row["shape"], row["provider"], spread, f"{row['per_second']:.3g}", memory])
    return _table(["job", "provider", "time", "per second", "peak memory"], body)


def tables(result: dict[str, Any]) -> str:
    """Makes the section of the README."""
    m = result["machine"]
    versions = ", ".join(
        f"{name} {m[name]}" for name in ("torch", "triton", "cuda", "driver", "diffusers") if m.get(name)
    )
    where = f"Measured on {m['device']} ({versions}) at commit {str(m['commit'])[:10]}, {m['date'][:10]}."
    where += "" if result.get("finished", True) else " The run was cut short."
    ops, jobs = (any(row["kind"] == kind for row in result["rows"]) for kind in ("op", "job"))
    parts = [where, op_table(result["rows"]) if ops else "", job_table(result["rows"]) if jobs else ""]
    return "\n\n".join(part for part in parts if part)


def write_readme(path: Path, text: str) -> None:
    """Replaces the text between the marks."""
    readme = path.read_text()
    if readme.count(OPEN) != 1 or readme.count(CLOSE) != 1:
        raise ValueError(f"{path}: expected the marks {OPEN} and {CLOSE} once each")
    before, rest = readme.split(OPEN)
    path.write_text(f"{before}{OPEN}\n{text}\n{CLOSE}{rest.split(CLOSE)[1]}")


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Compares two results: new time / old time of every common row, with the ratio's p20 to p80 range."""
    before = {key(row): row for row in timed(old["rows"])}
    body = []
    for row in timed(new["rows"]):
        if key(row) in before:
            was = before[key(row)]
            ratio = row["median"] / was["median"]
            low, high = row["p20"] / was["p80"], row["p80"] / was["p20"]
            verdict = "same" if low <= 1 <= high else "faster" if ratio < 1 else "slower"
            case = " ".join(str(part) for part in key(row)[1:] if part)
            body.append([case, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict])
    return _table(["row", "new / old", "within noise", "verdict"], body)


EXAMPLES = """
python -m benchmarks.report --readme README.md --plots docs/images
python -m benchmarks.report --compare before.json after.json
python -m benchmarks.report --predicted prediction.json
"""


def against_prediction(predictions: list[dict[str, Any]], result: dict[str, Any]) -> str:
    """Measured / predicted time of every case in both."""
    body = [
        [row["case"], row["options"], _duration(row["predicted"]), _duration(row["measured"]), f"{row['ratio']:.2f}"]
        for row in predicted.ratios(predictions, result)
    ]
    return _table(["case", "predicted with", "predicted", "measured", "measured / predicted"], body)


def main() -> None:
    parser = command_parser("benchmarks.report", __doc__, EXAMPLES)
    parser.add_argument("result", nargs="?", type=Path, help="default: the newest in benchmarks/results/")
    parser.add_argument("--readme", type=Path, help="file whose marked section is replaced")
    parser.add_argument("--plots", type=Path, help="folder for the plots (needs matplotlib)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"))
    parser.add_argument("--predicted", type=Path, metavar="PREDICTION", help="compare with this prediction instead")
    options = parser.parse_args()
    if options.compare:
        print(compare(*map(load, options.compare)))
        return
    result = load(options.result or newest())
    if options.predicted:
        print(against_prediction(predicted.load(options.predicted), result))
        return
    text = tables(result)
    print(text)
    if options.readme:
        write_readme(options.readme, text)
    if options.plots:
        from benchmarks import plots

        for path in plots.draw(result, options.plots):
            print(path)


if __name__ == "__main__":
    main()
