"""What a run found, as files for `report.py` and as a table for the terminal."""

from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import whole_file
from machine import to_json, write_json
from reporting.words import NO_BETTER, learned
from telemetry import Fitted


def write_results(
    folder: Path,
    metrics: dict[str, Any],
    stages: dict[str, Fitted],
    same: np.ndarray,
    scores: dict[str, np.ndarray],
    faces: dict[str, np.ndarray],
) -> None:
    """Write metrics.json, history.jsonl, scores.npz and faces.npz.

    Args:
        folder: of the run.
        metrics: everything that is a number.
        stages: the curves.
        same: whether the pictures of a pair show one person, p.
        scores: of each arm, p.
        faces: what `show_faces` returns.
    """
    metrics = {**metrics, "training": {name: speed(stage) for name, stage in stages.items()}}
    rows = [row for stage in stages.values() for row in stage.history]
    with whole_file(folder / "history.jsonl") as file:
        file.writelines((to_json(row, indent=None) + "\n").encode() for row in rows)
    table = np.stack(list(scores.values())).astype(np.float32)
    with whole_file(folder / "scores.npz") as file:
        np.savez(file, same=same, arm_names=np.array(list(scores)), scores=table)
    with whole_file(folder / "faces.npz") as file:
        np.savez(file, **faces)
    write_json(metrics, folder / "metrics.json")


def speed(stage: Fitted) -> dict[str, float]:
    """Return how fast a stage went and which share of the time it waited for data."""
    seconds = max(stage.seconds, 1e-9)
    return {
        "steps": stage.steps,
        "seconds": round(stage.seconds, 1),
        "steps_per_second": round(stage.steps / seconds, 2),
        "images_per_second": round(stage.images / seconds, 1),
        "data_wait_share": round(stage.wait_seconds / seconds, 4),
    }


def print_results(metrics: dict[str, Any]) -> None:
    """Print the table of a run."""
    for name, found in metrics["shortcuts"].items():
        accuracy = "too few pairs"
        if found["accuracy"] is not None:
            accuracy = _percent(found["accuracy"], found["standard_error"])
        print(f"shortcut: {name:<24} {accuracy:>17}")
    parser = metrics["parser"]
    print(f"parser: macro-F1 {parser['macro_f1']:.3f}, mIoU {parser['miou']:.3f}")
    if "fasseg" in parser:
        scores = ", ".join(f"{name} {f1:.2f}" for name, f1 in parser["fasseg"]["f1"].items())
        print(f"parser on FASSEG: {scores}")
    print(f"\n{'arm':<34} {'accuracy':>17} {'AUC':>7} {'rank 1':>8}")
    for name, arm in metrics["arms"].items():
        accuracy = _percent(arm["accuracy"], arm["standard_error"])
        print(f"{name:<34} {accuracy:>17} {arm['auc']:7.4f} {100 * arm['rank_1']:6.1f} %")
    if not learned(metrics["arms"]):
        print(f"{NO_BETTER}: its differences say nothing")
        metrics = {**metrics, "paired_tests": []}
    for test in metrics["paired_tests"]:
        difference = _percent(test["difference"], test["standard_error"], "+")
        print(f"{test['a']} - {test['b']}: {difference}, p = {test['p_value']:.2g}")
    memory = metrics["peak_memory_gb"]
    peak = "unknown memory" if memory is None else f"{memory:.1f} GB"
    print(f"\n{metrics['seconds']['total']:.0f} s, {peak} at the peak")


def table(protocol: str, arms: dict[str, dict[str, Any]]) -> str:
    """Return the main figures of an evaluation, a line each and a column an arm.

    >>> print(table("lfw", {"both": {"accuracy": 0.75, "standard_error": 0.1, "auc": 0.8}}))
    lfw, %                             both
    accuracy                  75.00 ± 10.00
    AUC                       80.00

    Args:
        protocol: its name.
        arms: numbers of each.
    """
    columns = [figures(arm) for arm in arms.values()]
    lines = [f"{protocol + ', %':<22}" + "".join(f" {name:>16}" for name in arms)]
    for name in columns[0]:
        values = (f"{100 * rate:8.2f}" + (f" ± {100 * error:5.2f}" if error is not None else "")
                  for rate, error in (column[name] for column in columns))  # fmt: skip
        lines.append((f"{name:<22}" + "".join(f" {value:<16}" for value in values)).rstrip())
    return "\n".join(lines)


def figures(arm: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Return the main rates of an arm, strict ones, and the spread of those that have one."""
    mean, spread = arm.get("mean", arm), arm.get("std", {})
    found = {}
    if "accuracy" in mean:
        found["accuracy"] = mean["accuracy"], mean["standard_error"]
    for key, title in (("auc", "AUC"), ("rank_1", "rank 1")):
        if key in mean:
            found[title] = mean[key], None
    titles = {"tar_at_far": "TAR at FAR", "tpir_at_fpir": "TPIR at FPIR", "rank": "rank"}
    for key, title in titles.items():
        rates, errors = (x.get("strict", x) for x in (mean.get(key, {}), spread.get(key, {})))
        found |= {f"{title} {at}": (rate, errors.get(at)) for at, rate in rates.items()}
    return found


def _percent(share: float, error: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.2f} ± {100 * error:.2f} %"
