"""The numbers of the paper that were transcribed, and where they contradict each other."""

import json
from pathlib import Path
from typing import Any

PAPER_TABLES = Path(__file__).parent.parent / "paper_tables.json"
NOT_TRANSCRIBED = "not transcribed"


def read_paper() -> dict[str, Any]:
    """Return the content of paper_tables.json."""
    return json.loads(PAPER_TABLES.read_text(encoding="utf-8"))


def paper_row(paper: dict[str, Any], table: int, row: str) -> dict[str, float]:
    """Return what was transcribed of one row: measure -> number, empty if nothing was.

    >>> paper_row(read_paper(), 7, "global")["accuracy"]
    99.67
    """
    return paper["tables"].get(str(table), {}).get("rows", {}).get(row, {})


def conflicts(paper: dict[str, Any], table: int | None = None) -> list[str]:
    """Return the contradictions in which a table has part, or all, each with its numbers.

    >>> print(conflicts(read_paper(), 8)[0].partition(": ")[2])
    MegaFace(C) Id. 97.53 (table 7, global), 95.03 (table 8, global)
    """
    return [
        f"{conflict['says']}: {_numbers(paper, conflict['cells'])}"
        for conflict in paper["conflicts"]
        if table is None or any(cell.split("/")[0] == str(table) for cell in conflict["cells"])
    ]


def _numbers(paper: dict[str, Any], cells: list[str]) -> str:
    """Return for each measure its numbers, and of each number where it stands."""
    found: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        table, row, measure = cell.split("/")
        value = paper["tables"][table]["rows"].get(row, {}).get(measure)
        number = NOT_TRANSCRIBED if value is None else f"{value:,}"
        place = f"table {table}, {row}" if table.isdigit() else f"{table}, {row}"
        found.setdefault(measure, {}).setdefault(number, []).append(place)
    return "; ".join(
        f"{measure} " + ", ".join(f"{n} ({'; '.join(where)})" for n, where in numbers.items())
        for measure, numbers in found.items()
    )
