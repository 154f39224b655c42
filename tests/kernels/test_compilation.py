"""Every kernel compiles for GPUs that need not be there, and fits them. Nothing is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_all_is_compiled(reports):
    structure = dict.fromkeys(["forward_kernel", "backward_kernel"], 10)
    pool = {"pool_kernel": 20, "finish_kernel": 3, "spread_kernel": 20, "product_kernel": 10}
    maps = dict.fromkeys(["maps_kernel", "peaks_kernel", "maps_backward_kernel"], 20)
    for kernel, least in (maps | structure | pool).items():
        for target in SHARED:
            cases = [r for r in reports if (r["kernel"], r["target"]) == (kernel, target)]
            assert len(cases) >= least


def test_fits(reports):
    for report in reports:
        assert report["spills"] == 0, report
        assert report["doubles"] == 0, report
        assert report["shared"] <= SHARED[report["target"]], report
        assert 0 < report["registers"] <= 128, report


def test_loads_are_wide(reports):
    """A thread loads 16 bytes of features at once (AMD: 8; the maximum, whose tile is small: 4)."""
    reading = ("forward_kernel", "backward_kernel", "pool_kernel", "product_kernel")
    aligned = [r for r in reports if r["kernel"] in reading and "c=128" in r["case"]]
    aligned = [r for r in aligned if "crop" not in r["case"]]
    assert len(aligned) > 50
    for report in aligned:
        least = 64 if report["target"] == "gfx942" else 128
        if report["case"].startswith("max"):
            least //= 2
        assert report["load_bits"] >= least, report


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

print(json.dumps([asdict(compile_kernels.report("bad", *row))
                  for row in compile_kernels.compile_launches(operation)]))
"""


def test_the_report_shows_what_is_bad(tmp_path):
    script = tmp_path / "bad.py"  # Triton reads the source
    script.write_text(BAD)
    reports = json.loads(run(str(script)))
    assert [report["target"] for report in reports] == list(SHARED)
    for report in reports:
        assert report["spills"] > 0
        assert report["doubles"] > 0
        assert report["load_bits"] == 32
