"""Read what was timed row by row, and how ours stands beside the others."""

from collections.abc import Iterable, Iterator
from typing import Any

OURS = "partlocal"
TIE = 0.05  # a difference in time that counts as none
ROW = ("operation", "direction", "shape", "layout", "dtype")
Results = list[dict[str, Any]]  # of one row: the first is what the others are compared with


def rows_of(found: Iterable[dict[str, Any]]) -> Iterator[Results]:
    """Yield what was timed, row by row, where the first was."""
    rows: dict[tuple[str, ...], Results] = {}
    for result in found:
        rows.setdefault(tuple(result[x] for x in ROW), []).append(result)
    for results in rows.values():
        timed = [r for r in results if "p50" in r]
        if timed and timed[0] is results[0]:
            yield timed


def is_ours(result: dict[str, Any]) -> bool:
    """Tell whether a result comes from this library's layers."""
    return result["provider"].split(",")[0] == OURS


def others(results: Results) -> Results:
    """Return those who come to the same result without this library, the fastest first."""
    found = [r for r in results if not is_ours(r) and "(other result)" not in r["provider"]]
    return sorted(found, key=lambda r: r["p50"])


def standing(ratio: float) -> str:
    """Return how ours stands beside one that takes `ratio` of its time.

    >>> standing(0.9), standing(1.02), standing(1.2)
    ('losses', 'ties', 'wins')
    """
    if abs(ratio - 1) <= TIE:
        return "ties"
    return "wins" if ratio > 1 else "losses"
