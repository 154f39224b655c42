"""Write what the benchmarks found into docs/speed.md, and draw its figures.

    python benchmarks/speed.py
    python benchmarks/compile_kernels.py --summary > benchmarks/results/compiled.tsv
    python docs/speed.py

Reads benchmarks/results/*/speed.json, one folder a machine, and compiled.tsv.
"""

import json
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from standing import OURS, Results, is_ours, others, rows_of, standing

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks/results"


CUT_OFF = "**This run was cut off**: what is in no table here was not measured on this machine."


def layers(report: dict[str, Any]) -> list[Results]:
    """Return the rows of this library's layers that have another way beside them."""
    rows = rows_of(report["rows"])
    return [r for r in rows if is_ours(r[0]) and eager(others(r))]


def title(result: dict[str, Any]) -> str:
    """Return the shape and the direction of a row."""
    layout = " (NHWC)" if result["layout"] == "NHWC" and "NHWC" not in result["shape"] else ""
    return f"{result['shape']}{layout}, {result['dtype']}, forward {result['direction']}".replace(
        "forward forward", "forward"
    )


def number(value: float | None) -> str:
    """Return three digits."""
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def eager(results: Results) -> Results:
    """Return those that `torch.compile` has not touched."""
    return [r for r in results if not compiled(r)]


def compiled(result: dict[str, Any]) -> bool:
    """Tell whether `torch.compile` made this one."""
    return result["provider"].endswith(", compiled")


def fused(results: Results) -> Results:
    """Return those that `torch.compile` has made."""
    return [r for r in results if compiled(r)]


def is_broadcast(result: dict[str, Any]) -> bool:
    """Tell whether this is the product of all parts and all channels."""
    return result["provider"].startswith("broadcast")


def table(rows: list[Results]) -> list[str]:
    """Return the rows of one operation."""
    lines = [
        "| shape and direction | ms | of the floor | best other, eager | its time / ours | "
        "broadcast / ours | ours compiled / ours | best other compiled / ours | "
        "our definition / ours | MB | broadcast, MB |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for results in rows:
        own, rest = results[0], others(results)
        best = eager(rest)[0]
        broadcast = next(filter(is_broadcast, eager(rest)), {})
        own_fused, definition = (
            next((r for r in results if r["provider"] == f"{OURS}, {how}"), {})
            for how in ("compiled", "definition")
        )
        best_fused = next(iter(fused(rest)), {})
        cells = [title(own), number(own["p50"]), number(own.get("of_floor")), best["provider"]]
        ratios = (best, broadcast, own_fused, best_fused, definition)
        cells += [number(r.get("ratio")) for r in ratios]
        cells += [number(r.get("peak_mb")) for r in (own, broadcast)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def counts(ours: Results, rest: list[Results]) -> str:
    """Return in how many rows ours is faster, as fast, or slower than the best of the rest."""
    found = Counter(
        standing(min(o["p50"] for o in r) / own["p50"])
        for own, r in zip(ours, rest, strict=True)
        if r
    )
    return (
        f"faster in {found['wins']} of {found.total()} rows, as fast in {found['ties']}, "
        f"slower in {found['losses']}"
    )


def standings(rows: list[Results]) -> list[str]:
    """Return how often ours is faster, eager and compiled."""
    own = [r[0] for r in rows]
    both = [r for r in rows if len(r) > 1 and r[1]["provider"] == f"{OURS}, compiled"]
    return [
        f"- ours, eager, against the best of the others, eager: "
        f"{counts(own, [eager(others(r)) for r in rows])};",
        f"- ours, compiled, against the best of the others, eager or compiled: "
        f"{counts([r[1] for r in both], [others(r) for r in both])};",
        f"- ours, eager, against the best of the others, eager or compiled: "
        f"{counts(own, [others(r) for r in rows])}.",
    ]


def other_projects(rows: list[Results]) -> list[str]:
    """Return what other ways of pooling cost, whose results differ from ours."""
    lines = ["| shape and direction | way | its time / ours |", "|---|---|---:|"]
    for results in rows:
        for result in results:
            if "other result" in result["provider"] and not result.get("bytes_per_class"):
                name = result["provider"].removesuffix(" (other result)")
                cells = f"{result['operation']}, {title(result)} | {name}"
                lines.append(f"| {cells} | {number(result['ratio'])} |")
    return lines


def networks(rows: list[Results]) -> list[str]:
    """Return what parts cost a whole network."""
    lines = ["| what | shape | way | ms | against global only |", "|---|---|---|---:|---:|"]
    for results in rows:
        for r in results:
            ratio = number(r["ratio"]) if len(results) > 1 else ""
            cells = [r["operation"], r["shape"], r["provider"], number(r["p50"]), ratio]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def heads(rows: list[Results]) -> list[str]:
    """Return what every way to train over classes takes, in time and memory."""
    lines = [
        "| shape and direction | way | ms | its time / ours | MB | bytes a class |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for results in rows:
        for r in results:
            if r.get("bytes_per_class") is not None:
                numbers = (r["p50"], r["ratio"], r["peak_mb"], r["bytes_per_class"])
                lines.append(
                    f"| {title(r)} | {r['provider']} | {' | '.join(map(number, numbers))} |"
                )
    return lines if len(lines) > 2 else []


def losses(rows: list[Results]) -> list[str]:
    """Return the rows in which another is faster by more than a tie, eager or compiled."""
    found = [(r[0], o) for r in rows for o in (eager(others(r))[:1] + fused(others(r))[:1])]
    lines = [
        f"- {own['operation']}, {title(own)}: {best['provider']} takes {number(best['ratio'])} of "
        f'our time; `"auto"` takes {own["auto"] or "each layer by its own rule"}.'
        for own, best in found
        if standing(best["ratio"]) == "losses"
    ]
    return lines or ["No row is lost."]


def section(report: dict[str, Any], figure: str) -> list[str]:
    """Return all that one machine found."""
    operations = layers(report)
    whole = [r for r in rows_of(report["rows"]) if not is_ours(r[0])]
    top = report["ceilings"]
    rates = ", ".join(
        f"{number(1000 * rate)} GFLOP/s in {name.removesuffix('_tflop_s')}"
        for name, rate in top.items()
        if name.endswith("_tflop_s")
    )
    versions = f"torch {report['torch']}, Python {report['python']}"
    lines = [
        f"### {report['device']}, {report['threads']} threads",
        "",
        f"Commit {report['commit']}, {report['date']}; {versions}; {report['seconds']} s in all. A "
        f"copy moves {number(top['copy_gb_s'])} GB/s, matrix products reach {rates}. A difference "
        "of 5 % counts:",
        "",
        *([] if report.get("whole", True) else [CUT_OFF, ""]),
        *standings(operations),
        "",
        f"![Time of the best other way and of the broadcast product]({figure})",
        "",
    ]
    for operation in dict.fromkeys(r[0]["operation"] for r in operations):
        of_it = [r for r in operations if r[0]["operation"] == operation and others(r)]
        lines += [f"#### {operation}", "", *table(of_it), ""]
    if over_classes := heads(operations):
        lines += ["#### Time and memory of the head", "", *over_classes, ""]
    lines += ["#### Where another way is faster", "", *losses(operations), ""]
    if whole:
        lines += ["#### Whole networks", "", *networks(whole), ""]
    lines += ["#### Other ways, of another result", "", *other_projects(operations)]
    return lines


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw for each row how long the others take, where we take 1."""
    rows = layers(report)
    figure, axis = plt.subplots(figsize=(9, 1 + 0.2 * len(rows)))
    names = [f"{r[0]['operation']}, {title(r[0])}" for r in rows]
    best = [eager(others(r))[0]["ratio"] for r in rows]
    ways = {
        "best other way, compiled": ("tab:green", [fused(others(r))[:1] for r in rows]),
        "broadcast": (
            "tab:orange",
            [[o for o in eager(others(r)) if is_broadcast(o)] for r in rows],
        ),
    }
    places = range(len(rows))
    axis.axvline(1, color="black", linewidth=0.8)
    axis.scatter(best, places, color="tab:blue", label="best other way, eager", zorder=3)
    for label, (colour, found) in ways.items():
        known = [(x[0]["ratio"], y) for x, y in zip(found, places, strict=True) if x]
        if known:
            axis.scatter(*zip(*known, strict=True), color=colour, marker="|", label=label)
    axis.set_xscale("log")
    axis.set_xlabel("its time / ours (right of the line: we are faster)")
    axis.set_yticks(places, names, fontsize=6)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.grid(axis="x", linewidth=0.3)
    axis.legend(loc="lower right", fontsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)


def sections() -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield what each machine found, and where its figure goes."""
    for path in sorted(RESULTS.glob("*/speed.json")):
        yield json.loads(path.read_text()), DOCS / f"speed-{path.parent.name}.png"


def kernels() -> list[str]:
    """Return what the compiled kernels take, as a table."""
    *rows, version = (RESULTS / "compiled.tsv").read_text().splitlines()
    heads, *rest = (row.split("\t") for row in rows)
    lines = [f"With {version}; shared memory in bytes, loads in bits.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rest)]


def blocks() -> dict[str, list[str]]:
    """Return what stands on the page, by the name of the block."""
    found = [x for report, figure in sections() for x in ["", *section(report, figure.name)]]
    return {"speed": found[1:], "kernels": kernels()}


def main() -> None:
    """Fill the blocks of the page, and draw the figures."""
    fill = runpy.run_path(str(DOCS / "results.py"))["fill"]
    for name, lines in blocks().items():
        fill(DOCS / "speed.md", name, lines)
    for report, figure in sections():
        draw(report, figure)


if __name__ == "__main__":
    main()
