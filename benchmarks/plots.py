"""Plots a result, each figure in a light and a dark variant, readable on a phone."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks.rows import groups, is_ours, timed

plt.switch_backend("Agg")

THEMES = {
    "light": {"background": "white", "text": "#1f2328", "ours": "#0969da", "peer": "#afb8c1"},
    "dark": {"background": "#0d1117", "text": "#e6edf3", "ours": "#58a6ff", "peer": "#484f58"},
}
MOST_BARS = 24


def _style(theme: dict[str, str]) -> dict[str, Any]:
    text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")
    colours = dict.fromkeys(text, theme["text"])
    backgrounds = dict.fromkeys(("figure.facecolor", "axes.facecolor"), theme["background"])
    return {**colours, **backgrounds, "font.size": 14, "axes.spines.top": False, "axes.spines.right": False}


def _speed_ups(result: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns (case, time of the best peer / our best time) of every op case with both."""
    found = []
    for group in groups(result["rows"], "op").values():
        ours = [r["median"] for r in timed(group) if is_ours(r)]
        peers = [r["median"] for r in timed(group) if not is_ours(r)]
        if ours and peers:
            first = group[0]
            label = f"{first['op']} {first['shape']} {first['dtype']} {first['layout']} {first['direction']}"
            found.append((label, min(peers) / min(ours)))
    return found


def _bars(result: dict[str, Any], theme: dict[str, str]) -> plt.Figure | None:
    found = sorted(_speed_ups(result), key=lambda pair: pair[1])[-MOST_BARS:]
    if not found:
        return None
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.4 * len(found)))
    axes.barh([label for label, _ in found], [ratio for _, ratio in found], color=theme["ours"])
    axes.axvline(1.0, color=theme["text"], linewidth=1)
    axes.set_xlabel("time of the best peer / ours (right of the line: ours is faster)")
    return figure


def _roofline(result: dict[str, Any], theme: dict[str, str]) -> plt.Figure | None:
    """Plots FLOP/s over arithmetic intensity, under the measured roofline."""
    rows = [r for r in timed(result["rows"]) if r["kind"] == "op" and r["floor_flops"]]
    matmul = [v for k, v in result["ceilings_before"].items() if k.startswith("matmul") and v]
    if not rows or not matmul:
        return None
    figure, axes = plt.subplots(figsize=(9, 6))
    bandwidth, peak = result["ceilings_before"]["copy_bytes_per_s"], max(matmul)
    intensities = [2.0**e for e in range(-2, 14)]
    axes.plot(
        intensities, [min(peak, i * bandwidth) for i in intensities], color=theme["text"], label="measured ceiling"
    )
    for ours, colour, label in ((False, theme["peer"], "peers"), (True, theme["ours"], "ours")):
        points = [r for r in rows if is_ours(r) == ours]
        x = [r["floor_flops"] / r["floor_bytes"] for r in points]
        axes.scatter(x, [r["floor_flops"] / r["median"] for r in points], color=colour, label=label, s=40)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("FLOP/s reached")
    axes.legend(frameon=False)
    return figure


def _jobs(result: dict[str, Any], theme: dict[str, str]) -> plt.Figure | None:
    found = {k: timed(g) for k, g in groups(result["rows"], "job").items()}
    found = {k: g for k, g in found.items() if g}
    if not found:
        return None
    heights = [len(g) for g in found.values()]
    figure, axes = plt.subplots(
        len(found), 1, figsize=(9, 1.2 + 0.6 * sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for axis, rows in zip(axes[:, 0], found.values(), strict=True):
        rows = sorted(rows, key=lambda r: -r["median"])
        colours = [theme["ours" if is_ours(r) else "peer"] for r in rows]
        axis.barh([r["provider"] for r in rows], [1e3 * r["median"] for r in rows], color=colours)
        axis.set_title(
            f"{rows[0]['shape']} ({rows[0]['dtype']}): milliseconds, shorter is better", fontsize=14, loc="left"
        )
    return figure


FIGURES = {"speedup": _bars, "roofline": _roofline, "jobs": _jobs}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """Writes <name>-light.png and <name>-dark.png for every figure that the result has rows for."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure_of in FIGURES.items():
        for variant, theme in THEMES.items():
            with plt.rc_context(_style(theme)):
                figure = figure_of(result, theme)
                if figure is None:
                    continue
                path = folder / f"{name}-{variant}.png"
                figure.savefig(path, dpi=110, bbox_inches="tight")
                plt.close(figure)
                written.append(path)
    return written
