"""How fast the layers are, beside every other way to do their job, on the machine at hand.

    python benchmarks/speed.py            # all shapes
    python benchmarks/speed.py --quick    # a few, in two minutes on two CPU cores

Prints one table and writes benchmarks/results/<machine>/speed.json; `python docs/speed.py` draws
its figures and tables. Every provider is held against its oracle in float64 before it is timed.
Providers take turns, so that what disturbs the machine disturbs all. Losses are printed like wins.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples/fsenet")]

import torch
from common import ceilings, circumstances, interleave, machine, peak_megabytes
from models import model_rows
from peers.provider import Provider
from rows import Row, all_rows
from torch import Tensor

from partlocal.kernels import KERNELS, runs_kernel

# What a result may be off, relative to the largest number of the oracle.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
OURS = "partlocal"
TIE = 0.05


def main() -> None:
    """Time all rows and leave the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few shapes, few runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="rows whose operation or shape holds this text")
    parser.add_argument("--output", type=Path, help="folder of speed.json")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    top = ceilings(device, options.quick)
    found: list[dict[str, Any]] = []
    rows = chain(all_rows(device, options.quick), model_rows(device, options.quick))
    print(*COLUMNS, sep="\t")
    for row in rows:
        if options.only not in f"{row.operation} {row.shape}":
            continue
        for result in measure(row, device, top, options.quick):
            found.append(result)
            print(*(show(result.get(column)) for column in COLUMNS), sep="\t", flush=True)
    summary = summarise(found)
    print(*(f"{name}: {count}" for name, count in summary.items()), sep="\n")
    report = {**circumstances(device), "quick": options.quick, "ceilings": top}
    folder = options.output or ROOT / "benchmarks/results" / machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**report, "summary": summary, "rows": found}, indent=1)
    (folder / "speed.json").write_text(text + "\n")


COLUMNS = (
    "operation", "shape", "provider", "auto", "p20", "p50", "p80", "runs", "ratio", "gb_s",
    "of_floor", "peak_mb", "note",
)  # fmt: skip


def measure(
    row: Row, device: torch.device, top: dict[str, float], quick: bool
) -> Iterator[dict[str, Any]]:
    """Time the providers of a row; one that cannot run, or is wrong, says why instead."""
    torch.compiler.reset()
    ready, notes = {}, {}
    for provider in row.providers:
        why = "not compiled by --quick" if quick and provider.compiled else unfit(provider, row)
        if why:
            notes[provider.name] = why
        else:
            ready[provider.name] = prepared(provider, row)
    times = interleave(ready, device, *((7, 0.2) if quick else (15, 1.0)))
    first = statistics.median(times[row.providers[0].name])
    size = row.values * row.inputs[0].element_size()
    floor = max(size / top["copy_gb_s"] / 1e6, row.flops / rate(row, top) / 1e9)
    for provider in row.providers:
        name = provider.name
        result = {"operation": row.operation, "shape": row.shape, "provider": name}
        if name in notes:
            yield result | {"note": notes[name]}
            continue
        middle, fifths = statistics.median(times[name]), statistics.quantiles(times[name], n=5)
        yield result | {
            "auto": chosen(row) if name.startswith(OURS) else None,
            "p20": fifths[0],
            "p50": middle,
            "p80": fifths[-1],
            "runs": len(times[name]),
            "ratio": middle / first,
            "gb_s": size / middle / 1e6 if size else None,
            "of_floor": floor / middle if size else None,
            "peak_mb": peak_megabytes(ready[name], device),
        }


def prepared(provider: Provider, row: Row) -> Any:
    """Return the provider on the row's inputs, as a function without arguments."""
    inputs = row.inputs
    if provider.prepare is not None:
        inputs = provider.prepare(*inputs)
    run = torch.compile(provider.run, dynamic=False) if provider.compiled else provider.run
    if not row.differentiable:
        return torch.no_grad()(partial(run, *inputs))
    leaves = [
        x.detach().requires_grad_() if wants else x
        for x, wants in zip(inputs, row.differentiable, strict=True)
    ]
    wanted = [x for x in leaves if x.requires_grad]

    def step() -> tuple[Tensor, ...]:
        result = run(*leaves)
        return torch.autograd.grad(result, wanted, torch.ones_like(result))

    return step


def unfit(provider: Provider, row: Row) -> str | None:
    """Return why a provider is not timed: too large, or not what its oracle says."""
    numbers = provider.temporaries * row.largest * (3 if row.differentiable else 1)
    needed = numbers * row.inputs[0].element_size() / 2**30
    if needed > (40 if row.inputs[0].is_cuda else 6):
        return f"needs {needed:.0f} GiB"
    if not row.values:
        return None  # a whole network: its tests say that it is right
    inputs = row.inputs
    ready = inputs if provider.prepare is None else provider.prepare(*inputs)
    run = torch.compile(provider.run, dynamic=False) if provider.compiled else provider.run
    with torch.no_grad():
        found = run(*ready)[:1].double()
        oracle = provider.oracle or row.providers[0].run
        expected = oracle(*(x[:1].double() for x in inputs))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE[row.inputs[0].dtype]:
        return f"wrong: off by {error:.1g} of the largest number"
    return None


def rate(row: Row, top: dict[str, float]) -> float:
    """Return the matrix rate in the dtype of the features."""
    return top.get(f"{str(row.inputs[0].dtype)[6:]}_tflop_s", top["float32_tflop_s"])


def chosen(row: Row) -> str:
    """Return what `implementation="auto"` runs here."""
    operation = row.operation.split()[0].strip(",")
    known = operation if operation in KERNELS else "part_mask_pool"  # the chain's largest part
    return "triton" if runs_kernel("auto", known, inputs=row.inputs[0]) else "torch"


def summarise(found: list[dict[str, Any]]) -> dict[str, int]:
    """Count the rows in which the best of the others is slower, as fast, or faster."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in found:
        if "p50" in result:
            rows.setdefault((result["operation"], result["shape"]), []).append(result)
    count = {"wins": 0, "ties": 0, "losses": 0}
    for results in rows.values():
        others = [
            r["ratio"]
            for r in results
            if not r["provider"].startswith(OURS) and "other result" not in r["provider"]
        ]
        if results[0]["provider"] == OURS and others:
            best = min(others)
            kind = "ties" if abs(best - 1) <= TIE else "wins" if best > 1 else "losses"
            count[kind] += 1
    return count


def show(value: object) -> str:
    """Print a cell of the table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
