"""How fast the layers are, beside every other way to do their job, on the machine at hand.

    python benchmarks/speed.py            # all shapes
    python benchmarks/speed.py --quick    # a few small ones, within two minutes on two CPU cores

Prints one table and writes benchmarks/results/<machine>/speed.json, or with --quick and --only
runs/speed/<machine>/speed.json; `python docs/speed.py` draws figures and tables of the whole. Every
provider is held against its oracle in float64 before it is timed. Providers take turns, so that
what disturbs the machine disturbs all. Losses are printed like wins.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples/fsenet")]

import torch
from common import (
    Calls,
    ceilings,
    circumstances,
    copies_beyond_cache,
    interleave,
    machine,
    peak_megabytes,
)
from models import model_rows
from peers.provider import Provider
from rows import Row, all_rows
from standing import OURS, ROW, is_ours, others, rows_of, standing
from torch import Tensor

from partlocal.kernels import KERNELS, runs_kernel

# What a result may be off, relative to the largest number of the oracle.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MOST_CHECKED = 10**6  # classes that are held against the oracle; the memory holds no more


def main() -> None:
    """Time all rows and leave the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few and small shapes, few runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="rows whose operation or shape holds this text")
    parser.add_argument("--output", type=Path, help="folder of speed.json")
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    options = parser.parse_args()
    device, began = torch.device(options.device), time.perf_counter()
    torch.manual_seed(0)
    report = circumstances(device) | {"quick": options.quick}
    whole = not options.quick and not options.only
    results = ROOT / ("benchmarks/results" if whole else "runs/speed")
    folder = options.output or results / machine(device)
    folder.mkdir(parents=True, exist_ok=True)
    before = earlier(folder / "speed.json", report) if options.resume else {}
    top = before.get("ceilings") or ceilings(device, options.quick)
    found: list[dict[str, Any]] = before.get("rows", [])
    report = before | report
    done = {tuple(result[x] for x in ROW) for result in found}
    print(*COLUMNS, sep="\t")
    for row in chain(all_rows(device, options.quick), model_rows(device, options.quick)):
        if options.only not in f"{row.operation} {row.shape}" or identity(row) in done:
            continue
        for result in measure(row, device, top, options.quick):
            found.append(result)
            print(*(show(result.get(column)) for column in COLUMNS), sep="\t", flush=True)
        report |= {
            "seconds": before.get("seconds", 0) + round(time.perf_counter() - began),
            "ceilings": top,
            "whole": False,
            "summary": summarise(found, device),
            "rows": found,
        }
        (folder / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    if not found:
        raise SystemExit(f"--only {options.only!r}: no operation or shape holds this text")
    report["whole"] = whole
    (folder / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    print(*(f"{name}: {count}" for name, count in report["summary"].items()), sep="\n")
    print(f"{report['seconds']} s; written to {folder / 'speed.json'}")


def earlier(path: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Return what a run that was cut off has left, if it ran under the same circumstances."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    changed = [key for key in report if found.get(key) != report[key] and key != "date"]
    if changed:
        raise SystemExit(f"--resume: {path} is of another {', '.join(changed)}: start anew")
    return found


def identity(row: Row) -> tuple[str, ...]:
    """Return what tells a row from all others, as results hold it."""
    dtype = str(row.inputs[0].dtype)[6:]
    return row.operation, row.direction, row.shape, row.layout, dtype


COLUMNS = (
    "operation", "direction", "shape", "layout", "dtype", "provider", "auto", "p20", "p50", "p80",
    "runs", "graph", "ratio", "gb_s", "of_copy", "tflop_s", "of_matrix", "of_floor", "peak_mb",
    "bytes_per_class", "note",
)  # fmt: skip


def measure(
    row: Row, device: torch.device, top: dict[str, float], quick: bool
) -> Iterator[dict[str, Any]]:
    """Time the providers of a row; one that cannot run, or is wrong, says why instead."""
    torch.compiler.reset()
    ready, notes = {}, {}
    for provider in row.providers:
        skipped = provider.compiled and not compiles(row, quick)
        why = "not compiled here" if skipped else unfit(provider, row)
        if why:
            notes[provider.name] = why
        else:
            ready[provider.name] = calls(provider, row)
    seconds = 0.1 if quick or device.type == "cuda" else 1.0
    times, graphs = interleave(ready, device, 5 if quick else 15, seconds)
    own = times.get(row.providers[0].name)
    size = row.values * row.inputs[0].element_size()
    dtype = str(row.inputs[0].dtype)[6:]
    matrix = top.get(f"{dtype}_tflop_s", top["float32_tflop_s"])
    floor = max(size / top["copy_gb_s"] / 1e6, row.flops / matrix / 1e9)
    for provider in row.providers:
        name = provider.name
        result = dict(zip(ROW, identity(row), strict=True)) | {"provider": name}
        if name in notes:
            yield result | {"note": notes[name]}
            continue
        middle, fifths = (
            statistics.median(times[name]),
            statistics.quantiles(times[name], n=5, method="inclusive"),
        )
        result |= {
            "auto": chosen(row) if name == OURS else None,
            "p20": fifths[0],
            "p50": middle,
            "p80": fifths[-1],
            "runs": len(times[name]),
            "graph": graphs[name],
            "ratio": middle / statistics.median(own) if own else None,
        }
        if size:
            rates = {"gb_s": size / middle / 1e6, "tflop_s": row.flops / middle / 1e9}
            result |= rates | {
                "of_copy": rates["gb_s"] / top["copy_gb_s"],
                "of_matrix": rates["tflop_s"] / matrix,
                "of_floor": floor / middle,
            }
        peak = peak_megabytes(ready[name][0], device)
        a_class = 2**20 * peak / row.classes if row.classes and peak is not None else None
        yield result | {"peak_mb": peak, "bytes_per_class": a_class}


def compiles(row: Row, quick: bool) -> bool:
    """Tell whether compiled ways are run: for some shapes, because it takes minutes."""
    return not quick and row.compiled


def calls(provider: Provider, row: Row) -> Calls:
    """Return the provider on the row's inputs, as functions without arguments.

    On a GPU there are as many, each with inputs of its own, as its cache cannot hold together, but
    64 at most: the inputs of the smallest rows stay in the cache.
    """
    run = torch.compile(provider.run, dynamic=False) if provider.compiled else provider.run
    copies = 1
    if row.inputs[0].is_cuda and row.values:  # a whole network passes through the cache
        copies = copies_beyond_cache(sum(x.nbytes for x in row.inputs))
    return [call(run, provider, row, fresh=bool(i)) for i in range(copies)]


def call(run: Callable[..., Tensor], provider: Provider, row: Row, fresh: bool) -> Callable:
    """Return `run` on the row's inputs, or on fresh copies of them."""
    inputs = tuple(x.clone() if fresh else x for x in row.inputs)
    if provider.prepare is not None:
        inputs = provider.prepare(*inputs)
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
    """Return why a provider is not timed: too large, failing, or not what its oracle says."""
    numbers = provider.temporaries * row.largest * (3 if row.differentiable else 1)
    needed = numbers * row.inputs[0].element_size() / 2**30
    if needed > (40 if row.inputs[0].is_cuda else 6):
        return f"needs {needed:.0f} GiB"
    checked = row
    if row.classes > MOST_CHECKED:
        x, weight, labels = row.inputs
        checked = replace(row, inputs=(x, weight[:MOST_CHECKED], labels % MOST_CHECKED))
    if row.differentiable:  # gradients in float32: half precision has ties, which some ways share
        wide = tuple(x.float() if x.is_floating_point() else x for x in checked.inputs)
        checked = replace(checked, inputs=wide)
    try:
        found = calls(provider, checked)[0]()
    except Exception as error:  # such as no compiler, no memory, or a kernel that takes too much
        return f"fails: {str(error).splitlines()[0][:80]}"
    if not row.values:
        return None  # a whole network: its tests say that it is right
    oracle = provider.oracle or row.providers[0].run
    some = slice(None if row.classes else 1)  # all classes, or the first picture alone
    single = [x[some].double() if x.is_floating_point() else x[some] for x in checked.inputs]
    if row.differentiable:
        leaves = [x.requires_grad_(w) for x, w in zip(single, row.differentiable, strict=True)]
        result = oracle(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        expected = torch.autograd.grad(result, wanted, torch.ones_like(result))
    else:
        found, expected = (found,), (oracle(*single),)
    for one, other in zip(found, expected, strict=True):
        error = ((one[some].double() - other).abs().max() / other.abs().max()).item()
        if not error <= TOLERANCE[checked.inputs[0].dtype]:
            return f"wrong: off by {error:.1g} of the largest number"
    return None


def chosen(row: Row) -> str | None:
    """Return what `implementation="auto"` runs here; a network has no single answer."""
    operation = row.operation.split()[0]
    operation = {"margin_softmax": "negative_logsumexp"}.get(operation, operation)
    if operation not in KERNELS:
        return None
    return "triton" if runs_kernel("auto", operation, inputs=row.inputs[0]) else "torch"


def summarise(found: list[dict[str, Any]], device: torch.device) -> dict[str, int]:
    """Count the rows in which the best of the others is slower, as fast, or faster.

    On a GPU the definition is what the others do, so a row where `auto` takes it is a tie at most.
    """
    count = {"wins": 0, "ties": 0, "losses": 0}
    for results in rows_of(found):
        if is_ours(results[0]) and others(results):
            kind = standing(others(results)[0]["ratio"])
            borrowed = results[0]["auto"] == "torch" and device.type != "cpu"
            count["ties" if borrowed and kind == "wins" else kind] += 1
    return count


def show(value: object) -> str:
    """Print a cell of the table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
