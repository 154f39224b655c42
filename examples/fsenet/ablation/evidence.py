"""A judged table as text, as JSON and as a figure."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from checkpoint import whole_file
from machine import write_json
from matplotlib import pyplot as plt

from ablation.paper import NOT_TRANSCRIBED


def write_evidence(found: dict[str, Any], folder: Path) -> Path:
    """Write `table<N>-<data>.json` and the figure beside it; `-quick` where it is no evidence."""
    name = f"table{found['table']}-{found['data']}" + ("" if found["evidence"] else "-quick")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(found, folder / f"{name}.json")
    with whole_file(folder / f"{name}.png") as file:
        figure = draw(found) if "rows" in found else draw_times(found)
        figure.savefig(file, format="png", dpi=110)
    plt.close("all")
    return folder / f"{name}.json"


def print_table(found: dict[str, Any]) -> None:
    """Print the paper's column beside ours, then the claims, then the paper's contradictions."""
    size = f"{count_seeds(found)}, {found['steps']} steps"
    print(f"\n{_head(found)}; {found['data']}, {size}{_kind(found)}")
    print(f"{'':<32} {'accuracy, %':>14} {'AUC':>7} {'TAR@1%':>8}  paper")
    for row in found["rows"]:
        numbers = row["over_seeds"]
        print(
            f"{row['name']:<32} {percent(numbers['accuracy']):>14} {numbers['auc']['mean']:7.4f} "
            f"{100 * numbers['tar_at_far_0.01']['mean']:8.1f}  {in_paper(row['paper'])}"
        )
    for claim in found["claims"]:
        print(f"  {claim_text(claim)}")
    paper = [claim["verdict"] for claim in found["claims"] if claim["of_the_paper"]]
    print(
        f"  of the paper's {len(paper)} directions {paper.count('better')} appear, "
        f"{paper.count('worse')} are reversed, {paper.count('not decided')} are not decided"
        if found["seeds"] > 1
        else "  one seed shows no direction: its intervals are those of its pairs, and another "
        "seed may say otherwise"
    )
    _print_conflicts(found)


def print_times(found: dict[str, Any]) -> None:
    """Print table 14."""
    circumstances = f"{found['backbone']}, {found['threads']} threads, {found['precision']}"
    print(f"\n{_head(found)}; {circumstances}{_kind(found)}")
    print(f"{'':<20} {'ms a picture':>12} {'seconds':>9} {'pictures':>9}  paper")
    for row in found["times"]:
        print(
            f"{row['name']:<20} {row['milliseconds']:12.2f} {row['seconds']:9.1f} "
            f"{row['pictures']:9}  {in_paper(row['paper'])}"
        )
    _print_conflicts(found)


def claim_text(claim: dict[str, Any]) -> str:
    """Return one comparison with what was found of it."""
    low, high = (100 * end for end in claim["interval95"])
    said = claim["verdict"]
    if len(claim["by_seed"]) == 1:  # the interval is that of the pairs, and no direction
        said = {"better": "higher on these pairs", "worse": "lower on these pairs"}.get(said, said)
    elif claim["of_the_paper"]:
        said = {"better": "the paper's direction", "worse": "against the paper"}.get(said, said)
    return (
        f"{claim['first']} against {claim['second']}: {said} "
        f"({100 * claim['difference']:+.2f} points, {low:+.2f} to {high:+.2f}; over "
        f"{claim['pairs']} pairs p = {claim['p_value_over_pairs']:.2g})"
    )


def count_seeds(found: dict[str, Any]) -> str:
    """Return how many seeds a table is of, in words."""
    return f"{found['seeds']} seed" + "s" * (found["seeds"] > 1)


def percent(numbers: dict[str, float | None]) -> str:
    """Return a mean and the deviation over seeds, in percent."""
    mean, deviation = numbers["mean"], numbers["deviation"]
    assert mean is not None
    return f"{100 * mean:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def in_paper(cells: dict[str, float]) -> str:
    """Return what was transcribed of a row of the paper."""
    return ", ".join(f"{name} {value:g}" for name, value in cells.items()) or NOT_TRANSCRIBED


def draw(found: dict[str, Any]) -> plt.Figure:
    """Return the figure of a table."""
    rows = found["rows"]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.34 * len(rows)), layout="constrained")
    draw_rows(axes, rows)
    axes.set_title(f"{_head(found)}; {found['data']}{_kind(found)}", fontsize=10)
    return figure


def draw_times(found: dict[str, Any]) -> plt.Figure:
    """Return the figure of table 14."""
    figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    names = [row["name"] for row in found["times"]]
    axes.barh(names, [row["milliseconds"] for row in found["times"]], color="C0")
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a picture")
    axes.set_title(f"{_head(found)}; {found['threads']} threads{_kind(found)}", fontsize=10)
    return figure


def draw_rows(axes: plt.Axes, rows: list[dict[str, Any]]) -> None:
    """Draw one dot a seed, the mean and its 95 % interval, a row an arm."""
    for place, row in enumerate(rows):
        seeds = [100 * value for value in row["by_seed"]["accuracy"]]
        over = row["over_seeds"]["accuracy"]
        axes.plot(seeds, [place] * len(seeds), "o", color="0.7", markersize=4, zorder=1)
        if over["low"] is not None:
            axes.plot([100 * over["low"], 100 * over["high"]], [place] * 2, color="C0", lw=2)
        axes.plot(100 * over["mean"], place, "D", color="C0", markersize=5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", color="0.9")
    several = any(row["over_seeds"]["accuracy"]["low"] is not None for row in rows)
    axes.set_xlabel(f"accuracy, %: {'seeds, mean, 95 % interval' if several else 'one seed'}")


def _head(found: dict[str, Any]) -> str:
    return f"Table {found['table']}, {found['title']}"


def _kind(found: dict[str, Any]) -> str:
    return "" if found["evidence"] else " (runs, not evidence)"


def _print_conflicts(found: dict[str, Any]) -> None:
    for text in found["conflicts"]:
        print(f"  the paper contradicts itself: {text}")
