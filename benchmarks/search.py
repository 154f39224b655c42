"""How long the exact search among a million takes, and how much memory.

    python benchmarks/search.py  # 512 numbers in fp32, then 2,680 in fp16: 5.4 GB of disk
    python benchmarks/search.py --widths 2680 --distractors 100000

What MegaFace asks for, as `evaluate.py` does it: 4,000 probes against all distractors, which lie in
an `.npy` on disk with their names beside it. Their rows are looked up by name, then read, checked
and brought to length 1 a block at a time; kept are the thousand best of each probe, and the highest
of all scores, as many as a FAR of 1e-4 needs. Every width is searched in a process of its own,
whose largest resident size is printed, and the processor's seconds, first those of the looking up,
beside the clock's: on a busy machine the clock says little. For 16 probes all products are then
taken again in fp32, without the search's code: the entries found must be the same, and the largest
difference of scores is printed. Writes search.json, by default to benchmarks/results/<machine>/.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples/fsenet"), str(ROOT / "benchmarks"), str(ROOT)]

import numpy as np
from common import write_result
from embeddings import embedding_rows
from machine import peak_memory_gb
from protocols.megaface import Shown, search
from tqdm import tqdm

SAMPLE = 16
HALF_FROM = 1024  # numbers of an embedding from which it is stored in half precision
BLOCK = 20_000  # embeddings that are drawn at once


def main() -> None:
    """Draw, search, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--widths", type=int, nargs="*", default=[512, 2680])
    parser.add_argument("--distractors", type=int, default=10**6)
    parser.add_argument("--probes", type=int, default=4000)
    parser.add_argument("--folder", type=Path, help="for the files; else the system's")
    parser.add_argument("--output", type=Path, help="folder for search.json")
    parser.add_argument("--search", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.search is not None:
        print(json.dumps(measure(options.search, options.probes)))
        return
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{cores} cores, load {load:.1f} before; {options.probes} probes")
    columns = ("distractors", "width", "kind", "CPU of names", "seconds", "of CPU", "GB", "same",
               "difference")  # fmt: skip
    print(*columns, sep="\t")
    rows = []
    for width in options.widths:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            file = Path(folder) / "distractors.npy"
            dtype = np.float16 if width >= HALF_FROM else np.float32
            draw(file, options.distractors, width, np.dtype(dtype))
            command = [sys.executable, __file__, "--search", file, "--probes", options.probes]
            done = subprocess.run(
                list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True
            )
            found = json.loads(done.stdout)
        times = (f"{found[part]:.0f}" for part in ("names", "seconds", "cpu"))
        kind = np.dtype(dtype).name
        rows.append({"distractors": options.distractors, "width": width, "kind": kind} | found)
        numbers = (*times, f"{found['gb']:.2f}", found["same"], f"{found['difference']:.1e}")
        print(options.distractors, width, kind, *numbers, sep="\t", flush=True)
    after = os.getloadavg()[0]
    print(f"load {after:.1f} after")
    found = {"cores": cores, "load": [load, after], "probes": options.probes, "rows": rows}
    print(write_result("search", found, options.output))


def draw(path: Path, count: int, width: int, dtype: np.dtype) -> None:
    """Write unit vectors of random directions, and their names."""
    with path.with_suffix(".txt").open("w") as names:
        names.writelines(f"{number // 1000}/{number}.jpg\n" for number in range(count))
    rng = np.random.default_rng(0)
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count, width)}
    with path.open("wb") as file:  # not mapped: a process begins with the size of its parent
        np.lib.format.write_array_header_1_0(file, header)
        for begin in tqdm(range(0, count, BLOCK), desc="drawing", disable=None):
            file.write(unit(rng, min(BLOCK, count - begin), width).astype(dtype).tobytes())


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Return unit vectors of random directions."""
    vectors = rng.standard_normal((count, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measure(path: Path, probes: int) -> dict[str, float | bool]:
    """Search a file, and look at a sample of what was found."""
    names = path.with_suffix(".txt").read_text().splitlines()  # as the devkit's list has them
    worked = time.process_time()
    gallery = embedding_rows(path, names)
    everybody = np.arange(len(gallery))
    looked_up = time.process_time() - worked
    vectors = unit(np.random.default_rng(1), probes, gallery.shape[1])
    impostors = probes * len(gallery)
    began, worked = time.perf_counter(), time.process_time()
    nearest, highest = search(vectors, Shown(gallery, everybody, everybody < 0), impostors)
    top, best, entries = highest.scores(), nearest.scores, nearest.entries
    seconds, cpu = time.perf_counter() - began, time.process_time() - worked
    gb = peak_memory_gb()

    sample = np.linspace(0, probes - 1, SAMPLE).astype(int)
    whole = np.empty((SAMPLE, len(gallery)), np.float32)
    for begin in range(0, len(gallery), BLOCK):
        block = gallery[begin : begin + BLOCK].astype(np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)  # half precision has changed it
        whole[:, begin : begin + BLOCK] = vectors[sample] @ block.T
    differences, same = [], True
    for row, probe in zip(whole, sample, strict=True):
        differences.append(np.abs(row[entries[probe]] - best[probe]).max())
        # All but those that rounding may order otherwise: at the edge of what is kept.
        sure = np.flatnonzero(row > best[probe, -1] + 1e-6)
        same &= bool(np.isin(sure, entries[probe]).all())
        assert top[0] >= row.max() - 1e-6
    return {
        "names": looked_up, "seconds": seconds, "cpu": cpu, "gb": gb or float("nan"), "same": same,
        "difference": float(max(differences)),
    }  # fmt: skip


if __name__ == "__main__":
    main()
