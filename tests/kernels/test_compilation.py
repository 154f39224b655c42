"""Every kernel compiles for GPUs that need not be there, and fits them. Nothing is timed."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from cases import covered, pairs

from partlocal.kernels import negative_logsumexp as head
from partlocal.kernels import part_maps
from partlocal.kernels import part_mask_pool as pool
from partlocal.kernels import structure_correlation as structure

ROOT = Path(__file__).parents[2]
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


def run(*arguments):
    """Run Python without the interpreter of kernels, which keeps them from being compiled."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def reports():
    return json.loads(run("benchmarks/compile_kernels.py", "--json"))


def sets_of(configure, *sizes):
    """The sets of blocks and warps that a configuration chooses, over all sizes."""
    found = (configure(*shape) for shape in product(*sizes))
    return {frozenset((key, x) for key, x in blocks.items() if key in BLOCKS) for blocks in found}


BLOCKS = {f"BLOCK_{axis}" for axis in "BCDKNPSVX"} | {"num_warps", "num_stages"}
DTYPES = ["fp32", "fp16", "bf16"]
EITHER = ["False", "True"]
EVER = [True, False]
PRECISIONS = ["ieee", "tf32", "tf32x3"]
MAPS = {
    "ACTIVATION": ["softmax", "sigmoid", "none"],
    "NORM": ["l2", "sum", "none"],
    "OVER_PARTS": EITHER,
    "MAX": EITHER,
    "logits": DTYPES,
}
STRUCTURE = {"SEEN": EITHER, "seen": ["fp32", "i1", "absent"], "parts": DTYPES}
FLAT = {"FLAT_F": EITHER, "features": DTYPES, "PRECISION": PRECISIONS}
POOL = FLAT | {"FLAT_M": EITHER, "FINISH": EITHER, "NORMALIZE": EITHER}
FINISH = {"MODE": ["sum", "mean", "max"], "NORMALIZE": EITHER}
SPREAD = {"FROM_CELLS": EITHER, "FLAT_M": EITHER, "out": DTYPES, "WHOLE": EITHER}
SPREAD["PRECISION"] = PRECISIONS
TILE = {"x": DTYPES, "w": DTYPES, "UPCAST": EITHER, "PRECISION": PRECISIONS}
# What chooses the blocks of each kernel, over all that it takes, and the flags beside them.
KERNELS = [
    ("maps_kernel", part_maps, ["forward"], [range(1, 1025), [1, 8, 9, 1024]], MAPS),
    ("peaks_kernel", part_maps, ["peaks"], [[1]], {}),
    ("maps_backward_kernel", part_maps, ["backward"], [range(1, 1025), [1, 8, 9, 1024]], MAPS),
    ("forward_kernel", structure, [], [range(1, 257)], STRUCTURE),
    ("backward_kernel", structure, [], [range(1, 257)], STRUCTURE),
    (
        "pool_kernel",
        pool,
        ["sum"],
        [range(1, 1025), EVER, EVER],
        POOL | {"MODE": ["sum", "mean"]},
    ),
    ("pool_kernel", pool, ["max"], [range(1, 1025), EVER, EVER], POOL | {"MODE": ["max"]}),
    ("finish_kernel", pool, ["finish"], [], FINISH),
    ("spread_kernel", pool, ["spread"], [range(1, 1025), EVER], SPREAD),
    ("product_kernel", pool, ["product"], [range(1, 1025), EVER], FLAT),
    ("sums_kernel", head, ["tile"], [range(1, 300), EVER, EVER], TILE),
    ("shares_kernel", head, ["tile"], [range(1, 300), EVER, EVER], TILE),
    ("rows_kernel", head, ["rows"], [[1]], {"w": DTYPES}),
]
# Registers: products of tiles, and lanes of maxima, need them.
PRODUCTS = ["pool_kernel", "spread_kernel", "product_kernel", "sums_kernel", "shares_kernel"]
MOST = dict.fromkeys(PRODUCTS, 255)


def possible(target, case):
    """Whether the flags of a case can meet."""
    # What is not given has no dtype. Products load ahead where rows follow each other evenly, and
    # always where there are cells in place of maps.
    blocks = dict(case["blocks"])
    if "PRECISION" in case and case["PRECISION"] not in precisions(target, case):
        return False
    if "UPCAST" in case:
        half = case["x"] == case["w"] != "fp32"
        tile = blocks["BLOCK_V"] == 128 if half else blocks["BLOCK_V"] == 64
        tile = tile or blocks["num_stages"] == 1
        return tile and case["UPCAST"] == str(not half)
    given = (case.get("SEEN") == "False") == (case.get("seen") == "absent")
    ahead = blocks.get("num_stages") != 1 and case.get("MODE") != "max"
    ahead = ahead or blocks.get("BLOCK_P") == 8  # channels side by side
    if "FROM_CELLS" in case:
        cells = case["FROM_CELLS"] == "True"
        if case["WHOLE"] == ("True" if cells else "False") and (cells or blocks["BLOCK_K"] == 16):
            return False
    if case.get("FROM_CELLS") == "True":
        return ahead and case["FLAT_M"] == "True"
    flat = case.get("FLAT_M" if "FROM_CELLS" in case else "FLAT_F") != "False"
    return given and (flat or not ahead)


def precisions(target, case):
    """In what products are taken."""
    if target == "gfx942" or ("UPCAST" in case and case["x"] == case["w"] != "fp32"):
        return ["ieee"]
    if "UPCAST" in case:
        return ["tf32", "tf32x3"]
    if "out" in case:
        return ["tf32"] if case["out"] == "bf16" else ["tf32x3"]
    return ["tf32x3"] if case["features"] == "fp32" else ["tf32"]


def facts(report, axes):
    """The blocks and the flags of a compiled kernel, as a case of a covering array."""
    flags = report["flags"] | {"blocks": frozenset(report["blocks"].items())}
    if flags.get("SEEN") == "False":
        flags["seen"] = "absent"  # what stands in its place is not read
    return {name: flags[name] for name in axes}


@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize(
    ("kernel", "module", "of", "sizes", "flags"), KERNELS, ids=[f"{x[0]} {x[2]}" for x in KERNELS]
)
def test_every_choice_is_compiled(reports, target, kernel, module, of, sizes, flags):
    """Every set of blocks, with every flag and dtype; and these with each other."""
    axes = {"blocks": sets_of(partial(module.configuration, *of), *sizes), **flags}
    rows = [r for r in reports if (r["kernel"], r["target"]) == (kernel, target)]
    compiled = [facts(r, axes) for r in rows if r["flags"].get("MODE") in axes.get("MODE", [None])]
    seen = set().union(*map(covered, compiled))
    missing = pairs(axes, partial(possible, target)) - seen
    assert not missing, sorted(map(sorted, missing), key=str)[:9]
    assert {case["blocks"] for case in compiled} == axes["blocks"]


def test_number_of_variants(reports):
    """Each costs a quarter of a second."""
    assert 1000 < len(reports) < 1250, len(reports)


def test_fits(reports):
    for report in reports:
        assert report["spills"] == 0, report
        assert report["doubles"] == 0, report
        assert report["shared"] <= SHARED[report["target"]], report
        assert 0 < report["registers"] <= MOST.get(report["kernel"], 128), report


# Of what each kernel reads most: its name, its dtype, the block that lies along memory, and the
# other one.
READ = {
    "forward_kernel": ("other", "parts", "BLOCK_C", "BLOCK_K"),
    "backward_kernel": ("other", "parts", "BLOCK_C", "BLOCK_K"),
    "pool_kernel": ("tile", "features", "BLOCK_P", "BLOCK_C"),
    "product_kernel": ("tile", "features", "BLOCK_P", "BLOCK_C"),
    "sums_kernel": ("right", "w", "BLOCK_D", "BLOCK_V"),
    "shares_kernel": ("right", "w", "BLOCK_D", "BLOCK_V"),
}


def test_loads_are_wide(reports):
    """A thread loads all its numbers of a contiguous row at once, up to 16 bytes."""
    count = dict.fromkeys(READ, 0)
    for report in reports:
        kernel, flags, blocks = report["kernel"], report["flags"], report["blocks"]
        if kernel not in READ or not re.search(r" (layout=|of=\(\d+, ')contiguous", report["case"]):
            continue
        name, dtype, along, across = READ[kernel]
        lanes = 64 if report["target"] == "gfx942" else 32
        share = blocks[along] * blocks[across] // (lanes * blocks["num_warps"])
        bits = {"fp32": 32, "fp16": 16, "bf16": 16}[flags[dtype]]
        widest = min(128, bits * min(share, blocks[along]))
        assert report["loads"][name] == widest, report
        count[kernel] += 1
    assert min(count.values()) >= 9, count


BAD = """
import json, sys
from dataclasses import asdict
import torch, triton
import triton.language as tl
sys.path.insert(0, "benchmarks")
import compile_kernels

@triton.jit
def bad(x, y, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    wide = tl.load(x + i * stride)[:, None] * tl.load(x + i * stride + 1)[None, :]
    total = tl.zeros([SIZE], tl.float32)
    for j in range(stride):
        wide = wide * wide + j
        total += tl.sum(wide, 1)
    tl.store(y + i, total.to(tl.float64) * 0.1)

def operation():
    x = torch.ones(9)
    bad[(1,)](x[1:], x, 3, SIZE=128, num_warps=1)

same = [("bad", operation), ("again", operation)]
print(json.dumps([asdict(report) for report in compile_kernels.reports(same)]))
"""


def test_the_report_shows_what_is_bad(tmp_path):
    script = tmp_path / "bad.py"  # Triton reads the source
    script.write_text(BAD)
    reports = json.loads(run(str(script)))
    assert [report["target"] for report in reports] == list(SHARED)  # compiled once
    for report in reports:
        assert report["loads"] == {"wide": 32}
        assert report["spills"] > 0
        assert report["doubles"] > 0
        assert report["load_bits"] == 32
