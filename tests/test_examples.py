"""The example of a spread head goes on where another number of processes stopped."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from partlocal import ArcFaceHead

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={processes}", str(ROOT / "examples/many_identities.py")]
    run = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    *steps, last = run.stdout.splitlines() or [""]
    # On a busy machine gloo's threads sometimes abort a process that has done all and is ending.
    ended = run.returncode == 0 or "terminate called without an active exception" in run.stderr
    assert ended, run.stderr[-3000:]
    assert last.startswith("saved in "), run.stderr[-3000:]
    return steps


@pytest.mark.parametrize("rate", ["1.0", "0.5"])
def test_many_identities(rate, tmp_path):
    options = ["--identities", "701", "--batch-size", "32", "--sample-rate", rate]
    folder = ["--folder", str(tmp_path / "spread"), *options]
    begun = torchrun(2, *folder, "--steps", "11")
    assert [line.split()[1] for line in begun] == ["0", "10"]
    assert begun[0].endswith("351 rows here")
    further = torchrun(1, *folder, "--steps", "21")
    assert [line.split()[1] for line in further] == ["20"]
    assert further[0].endswith("701 rows here")
    head = ArcFaceHead.from_pretrained(tmp_path / "spread/head")
    assert head.num_classes == 701
    if rate == "1.0":  # of samples, those of two processes are others than those of one
        alone = torchrun(1, "--folder", str(tmp_path / "alone"), *options, "--steps", "21")
        assert alone[-1] == further[-1]
