"""Time functions beside each other, find what the machine can do at best, and describe it."""

import ctypes
import gc
import json
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

STOP_AT = 5  # a provider that takes so many times the fastest one's time is run no more
LOOKS = 3  # runs after which that is decided
FEWEST, PATIENCE = 7, {"cpu": 60.0, "cuda": 4.0}  # runs that are enough after so many seconds
LONG = 100.0  # milliseconds after which it does not matter what the caches held before

RESULTS = Path(__file__).parent / "results"
CACHE = 2**27  # bytes, more than the second-level cache of any GPU

Calls = Sequence[Callable[[], object]]


def interleave(
    functions: dict[str, Calls], device: torch.device, runs: int, seconds: float
) -> tuple[dict[str, list[float]], dict[str, bool]]:
    """Return the milliseconds of each function, run in turns so that all see the same machine.

    Args:
        functions: each as calls without arguments that differ in where their inputs lie, run one
            after another: on a GPU, so many that its cache holds none of the next one's.
        device: where they run.
        runs: of each at least, but for the longest rows. One much slower than the fastest stops
            after three, but for the first, which the others are compared with.
        seconds: that the fast ones may fill with more runs, up to ten times `runs`.

    Returns:
        The times, and which functions were replayed as CUDA graphs.
    """
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    ready = {name: _captured(calls, device, pool) for name, calls in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    names, order, began = list(ready), random.Random(0), time.perf_counter()
    for turn in range(10 * runs):
        spent = time.perf_counter() - began
        if (turn >= runs and spent > seconds) or (
            turn >= FEWEST and spent > PATIENCE.get(device.type, 60.0)
        ):
            break
        if turn == LOOKS:
            middle = {name: statistics.median(times[name]) for name in names}
            limit = STOP_AT * min(middle.values())
            names = [n for n in names if n == next(iter(ready)) or middle[n] <= limit]
        for name in order.sample(names, len(names)):
            calls, _ = ready[name]
            if device.type == "cpu" and (not times[name] or times[name][-1] < LONG):
                calls[0]()  # or the caches would be as the one before left them
            times[name].append(_one(calls, device, len(functions[name])))
    return times, {name: graph for name, (_, graph) in ready.items()}


def copies_beyond_cache(size: int) -> int:
    """Return how many inputs of `size` bytes the cache cannot hold together, but 64 at most."""
    return min(1 + CACHE // size, 64)


def _one(calls: Calls, device: torch.device, count: int) -> float:
    """Return the milliseconds of one of `count` calls, which `calls` make."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count
    began = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - began) / count


def _captured(calls: Calls, device: torch.device, pool: Any) -> tuple[Calls, bool]:
    """Warm up; on a GPU return the replay of all calls where they can be captured.

    One graph holds all: between two graphs a GPU waits as long as a small kernel takes. The graphs
    share their memory: nobody reads what one of them leaves.
    """
    for _ in range(3 if device.type == "cuda" else 1):  # a graph is captured after warming up
        calls[0]()
    if device.type != "cuda":
        return calls, False
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
    except RuntimeError:  # such as a copy from the host, which no graph holds
        torch.cuda.synchronize(device)
        return calls, False
    return [graph.replay], True


def peak_megabytes(function: Callable[[], object], device: torch.device) -> float | None:
    """Return by how much the memory in use rises while the function runs (Linux, or a GPU)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _status("VmRSS")
    function()
    return max(0.0, (_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1])


def ceilings(device: torch.device, quick: bool) -> dict[str, float]:
    """Measure the bandwidth of a copy, GB/s, and the rates of matrix products, TFLOP/s."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024 if quick else 2048
    functions: dict[str, Calls] = {}
    sizes = (2**26, 2**28) if on_gpu else (2**25,)  # numbers; a GPU copies some sizes faster
    for size in sizes:
        source, target = torch.ones(size, device=device), torch.empty(size, device=device)
        functions[f"copy {size}"] = [lambda x=source, y=target: y.copy_(x)]
    dtypes = (
        {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if on_gpu
        else {"float32": torch.float32}
    )
    for name, dtype in dtypes.items():
        x = torch.randn(side, side, device=device, dtype=dtype)  # of ones it takes less power
        functions[name] = [lambda x=x: x @ x]
    times = {}
    for name, calls in functions.items():
        times[name] = statistics.median(interleave({name: calls}, device, 7, 1.0)[0][name])
    copies = [8 * size / times.pop(f"copy {size}") / 1e6 for size in sizes]
    found = {"copy_gb_s": max(copies)}
    return found | {f"{name}_tflop_s": 2 * side**3 / ms / 1e9 for name, ms in times.items()}


def machine(device: torch.device) -> str:
    """Return a short name of what the figures belong to, fit for a folder."""
    if device.type == "cuda":
        return re.sub(r"\W+", "-", torch.cuda.get_device_name(device).lower())
    return f"cpu-{platform.machine().lower()}-{torch.get_num_threads()}-threads"


def write_result(name: str, found: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `<name>.json`, with versions, commit and hardware, by default for this machine.

    Args:
        name: of the benchmark.
        found: its numbers, measured on the CPU.
        folder: another one to write to.
    """
    device = torch.device("cpu")
    path = (folder or RESULTS / machine(device)) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"circumstances": circumstances(device), **found}, indent=1) + "\n")
    return path


def circumstances(device: torch.device) -> dict[str, Any]:
    """Return versions, commit and hardware: what a figure is worth nothing without."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *what], check=False, capture_output=True, text=True).stdout.strip()
        for what in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    )
    try:
        import triton  # noqa: PLC0415

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.type == "cuda"
    return {
        "commit": commit + ("+" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "driver": _driver() if on_gpu else None,
        "triton": triton_version,
    }


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()
