"""Write what two runs found into README.md and docs/recipe.md.

    python docs/results.py runs/default-0 runs/lfw-0
    python docs/results.py    # the pages anew, from the metrics.json that are kept

Their metrics.json are kept in docs/evidence/recipe/. Each block of figures stands between two
comments, `<!-- results: NAME -->` and `<!-- end -->`, and is replaced as a whole.
"""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
KEPT, NAMES = DOCS / "evidence/recipe", ("drawn", "lfw")
Metrics = dict[str, Any]


def percent(found: Metrics) -> str:
    """Return an accuracy with its standard error."""
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f}"


def within(value: float, interval: list[float]) -> str:
    """Return a number with its 95 % interval."""
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def side_by_side(drawn: Metrics, lfw: Metrics) -> list[str]:
    """Return the README's table."""
    rows = ["| arm | drawn faces | LFW, folds 8 and 9 |", "|---|---:|---:|"]
    for name, found in drawn["arms"].items():
        rows.append(f"| {name} | {percent(found)} | {percent(lfw['arms'][name])} |")
    return rows


def arms(run: Metrics) -> list[str]:
    """Return the table of one run, with all pairs where they were counted."""
    everywhere = "auc_all_pairs" in next(iter(run["arms"].values()))
    heads = ["arm", "accuracy, %", "AUC (95 % interval)", "rank 1, %"]
    heads += ["AUC, all pairs"] * everywhere
    rows = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, found in run["arms"].items():
        cells = [name, percent(found), within(found["auc"], found["auc_interval"])]
        cells.append(f"{100 * found['rank_1']:.1f}")
        if everywhere:
            cells.append(within(found["auc_all_pairs"], found["auc_all_pairs_interval95"]))
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def paired(run: Metrics) -> list[str]:
    """Return the tests between arms as a list."""
    return [
        f"- {test['a']} − {test['b']}: {100 * test['difference']:+.2f} ± "  # noqa: RUF001
        f"{100 * test['standard_error']:.2f} points, p = {test['p_value']:.2g}"
        for test in run["paired_tests"]
    ]


def energy(run: Metrics) -> list[str]:
    """Return the shares of the local vector in two lines."""
    found = run["energy"]["after training"]
    shares = ", ".join(
        f"{name} {100 * found[name]:.0f} %" for name in ("features", "distances", "cosines")
    )
    cosines = (
        f"{found[f'{name}_mean']:.2f} ± {found[f'{name}_std']:.2f}"
        for name in ("impostor_cosine", "standardized_impostor_cosine")
    )
    return [
        f"Energy of the local vector after training, as the paper has it: {shares};",
        "cosine of strangers {} without and {} with standardising.".format(*cosines),
    ]


def cost(run: Metrics) -> list[str]:
    """Return time and memory of a run."""
    steps = " and ".join(
        f"{run['training'][stage]['seconds'] / 60:.1f}" for stage in ("joint", "global")
    )
    peak = run["peak_memory_gb"]
    memory = "" if peak is None else f" and {peak:.1f} GB"
    return [
        f"The run took {run['seconds']['total']:.0f} s{memory}, the two networks {steps} minutes "
        "of it."
    ]


def quality(run: Metrics) -> list[str]:
    """Return the parser's scores and the shortcuts of a drawn run."""
    found = (f"{name} {percent(row)} %" for name, row in run["shortcuts"].items())
    return [
        f"Parser: macro-F1 {run['parser']['macro_f1']:.3f}. Verification from one thing alone:",
        ", ".join(found) + ".",
    ]


def fill(page: Path, name: str, lines: list[str]) -> None:
    """Replace one block of a page."""
    block = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text()
    if not block.search(text):
        raise ValueError(f"{page} has no block named {name}")
    inside = "\n".join(["", *lines, "", ""])
    page.write_text(block.sub(lambda found: found[1] + inside + found[2], text))


def blocks() -> dict[tuple[Path, str], list[str]]:
    """Return the lines of each block of each page."""
    drawn, lfw = (json.loads((KEPT / f"{name}.json").read_text()) for name in NAMES)
    pieces = {
        "drawn": [arms(drawn), paired(drawn), cost(drawn), quality(drawn), energy(drawn)],
        "lfw": [arms(lfw), paired(lfw), cost(lfw), energy(lfw)],
    }
    found = {(DOCS.parent / "README.md", "arms"): side_by_side(drawn, lfw)}
    for name, parts in pieces.items():
        lines = [line for part in parts for line in ["", *part]]
        found[DOCS / "recipe.md", name] = lines[1:]
    return found


def main(folders: list[str]) -> None:
    """Keep what two runs found, if they are named, and fill every block."""
    for name, folder in zip(NAMES, folders, strict=bool(folders)):
        shutil.copyfile(Path(folder) / "metrics.json", KEPT / f"{name}.json")
    for (page, name), lines in blocks().items():
        fill(page, name, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
