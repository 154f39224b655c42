"""Write the tables of docs/evidence/*.json into docs/evidence.md.

    python examples/fsenet/ablate.py --table 7 11 13 --seeds 5
    python docs/evidence.py

Two blocks of the page hold tables: our rows with the paper's numbers beside them, then what was
found of each comparison. One says where the paper contradicts itself.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples/fsenet"))

from ablation.evidence import claim_text, count_seeds, in_paper, percent
from ablation.paper import conflicts, read_paper

DOCS = Path(__file__).parent
DATA = {"procedural": "drawn faces", "lfw": "LFW, its own folds"}


def blocks() -> dict[str, list[str]]:
    """Return the lines of each block of the page."""
    found = [json.loads(path.read_text()) for path in sorted((DOCS / "evidence").glob("*.json"))]
    found.sort(key=lambda table: (table["table"], table["data"] != "procedural"))
    proofs = [line for table in found if table["evidence"] for line in section(table)]
    runs = [line for table in found if not table["evidence"] for line in section(table)]
    contradictions = [f"- {text}" for text in conflicts(read_paper())]
    folds = [line for table in found if table.get("by_folds") for line in by_folds(table)]
    return {"evidence": proofs[:-1], "folds": folds, "runs": runs[:-1], "conflicts": contradictions}


def section(table: dict[str, Any]) -> list[str]:
    """Return one table with its heading and its comparisons."""
    commits = " and ".join(table["versions"]["commit"])
    data = "" if "times" in table else f": {DATA[table['data']]}"
    head = f"### Table {table['table']}, {table['title']}{data}"
    lines = [head, "", f"{_circumstances(table)}, {table['precision']}, commit {commits}.", ""]
    lines += times(table) if "times" in table else arms(table)
    if table["evidence"]:
        name = f"table{table['table']}-{table['data']}.png"
        lines += ["", f"![The same table as a figure](evidence/{name})"]
    said = [f"- {claim_text(claim)}" for claim in table.get("claims", []) if table["evidence"]]
    return [*lines, "", *said, *[""] * bool(said)]


def arms(table: dict[str, Any]) -> list[str]:
    """Return the table of accuracies."""
    lines = ["| arm | accuracy, % | AUC | TAR at FAR 1 %, % | paper |", "|---|---:|---:|---:|---|"]
    for row in table["rows"]:
        over = row["over_seeds"]
        cells = [row["name"], percent(over["accuracy"]), f"{over['auc']['mean']:.4f}"]
        cells += [f"{100 * over['tar_at_far_0.01']['mean']:.1f}", in_paper(row["paper"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_folds(table: dict[str, Any]) -> list[str]:
    """Return what the networks that were tested on LFW's folds 8 and 9 scored, if there are some.

    One seed: its intervals are those over pairs, 1.96 standard errors to either side.
    """
    if table["table"] != 7 or [8, 9] not in (seeds := [x["folds"] for x in table["by_folds"]]):
        return []
    seed = seeds.index([8, 9])
    lines = ["| arm | accuracy, % (95 %) |", "|---|---:|"]
    for row in table["rows"]:
        share, reach = row["by_seed"]["accuracy"][seed], 1.96 * row["standard_errors"][seed]
        lines.append(f"| {row['name']} | {100 * share:.2f} ({100 * (share - reach):.2f} to "
                     f"{100 * (share + reach):.2f}) |")  # fmt: skip
    claims = table["by_folds"][seed]["claims"]
    return [*lines, "", *(f"- {claim_text(claim)}" for claim in claims)]


def times(table: dict[str, Any]) -> list[str]:
    """Return the table of times."""
    rows = ["| | ms a picture | seconds | pictures | paper |", "|---|---:|---:|---:|---|"]
    return rows + [
        f"| {row['name']} | {row['milliseconds']:.2f} | {row['seconds']:.1f} | {row['pictures']} "
        f"| {in_paper(row['paper'])} |"
        for row in table["times"]
    ]


def _circumstances(table: dict[str, Any]) -> str:
    if "times" in table:
        return f"`{table['backbone']}`, {table['threads']} threads"
    return f"{count_seeds(table)}, {table['steps']} steps"


def main() -> None:
    """Fill the blocks of the page."""
    fill = runpy.run_path(str(DOCS / "results.py"))["fill"]
    for name, lines in blocks().items():
        fill(DOCS / "evidence.md", name, lines)


if __name__ == "__main__":
    main()
