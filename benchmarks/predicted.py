"""A prediction of `python -m cnkernels.aot --model ... --json FILE` beside the measured rows of a benchmark result."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.rows import timed

CASE = ("op", "shape", "dtype", "layout", "direction")
BACKEND = "triton"  # whose launches are predicted


def load(path: Path) -> list[dict[str, Any]]:
    """The predictions of a file, one for each GPU."""
    found = json.loads(path.read_text())
    if "predictions" not in found:
        raise ValueError(f"{path}: no prediction; make one with: python -m cnkernels.aot --model sd15 --json {path}")
    return found["predictions"]


def of_device(predictions: list[dict[str, Any]], device: str) -> dict[str, Any]:
    """The prediction for a device by the name that its driver gives it, such as "NVIDIA H100 80GB HBM3"."""
    for prediction in predictions:
        if prediction["gpu"] in device:
            return prediction
    raise ValueError(f"predicted for {', '.join(p['gpu'] for p in predictions)}, measured on {device}")


def seconds(prediction: dict[str, Any]) -> dict[tuple, dict[str, float]]:
    """Predicted seconds of a call by case, then by what else tells its calls apart: the sum of its launches."""
    found: dict[tuple, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for launch in prediction["launches"]:
        case = tuple({**launch, "dtype": prediction["dtype"]}[key] for key in CASE)
        found[case][launch["options"]] += 1e-6 * max(launch["microseconds"].values())
    return found


def ratios(predictions: list[dict[str, Any]], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {case, options, predicted, measured, ratio}, measured / predicted, of the cases that are in both."""
    predicted = seconds(of_device(predictions, result["machine"]["device"]))
    found = []
    for row in timed(result["rows"]):
        if row["kind"] == "op" and row["provider"] == BACKEND:
            case = tuple(row[key] for key in CASE)
            for options, time in predicted.get(case, {}).items():
                measured = {"predicted": time, "measured": row["median"], "ratio": row["median"] / time}
                found.append({"case": " ".join(case), "options": options, **measured})
    return found
