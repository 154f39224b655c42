"""The numbers of the paper that were transcribed, and where they contradict each other."""

import json
from pathlib import Path
from typing import Any

PAPER_TABLES = Path(__file__).parent.parent / "paper_tables.json"


def read_paper() -> dict[str, Any]:
    """Return the content of paper_tables.json."""
    return json.loads(PAPER_TABLES.read_text(encoding="utf-8"))


def paper_row(paper: dict[str, Any], table: int, row: str) -> dict[str, float]:
    """Return what was transcribed of one row: measure -> number, empty if nothing was.

    >>> paper_row(read_paper(), 7, "global")["accuracy"]
    99.67
    """
    return paper["tables"].get(str(table), {}).get("rows", {}).get(row, {})


def conflicts(paper: dict[str, Any], table: int) -> list[str]:
    """Return the contradictions in which a table has part.

    >>> len(conflicts(read_paper(), 14))
    1
    """
    return [
        conflict["says"]
        for conflict in paper["conflicts"]
        if any(cell.split("/")[0] == str(table) for cell in conflict["cells"])
    ]
