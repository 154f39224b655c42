"""The example of a spread head goes on where another number of processes stopped."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

from partlocal import ArcFaceHead

ROOT = Path(__file__).parents[1]
EXAMPLE = str(ROOT / "examples/many_identities.py")
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")


def start(*command):
    return subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True)


def launch(processes, *arguments):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return start(*launcher, EXAMPLE, *arguments)


def torchrun(processes, *arguments, last_line="saved in "):
    run = launch(processes, *arguments)
    *steps, last = run.stdout.splitlines() or [""]
    # On a busy machine gloo's threads sometimes abort a process that has done all and is ending.
    ended = run.returncode == 0 or "terminate called without an active exception" in run.stderr
    assert ended, run.stderr[-3000:]
    assert last_line in last, run.stderr[-3000:]
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


def test_a_folder_in_use(tmp_path):
    """It is resumed, never taken back to an earlier step, and refuses what it was not made with."""
    options = ["--batch-size", "8", "--folder", str(tmp_path)]
    same = [*options, "--identities", "30"]
    torchrun(1, *same, "--steps", "3")
    assert torchrun(1, *same, "--steps", "2", last_line="is at step 3 already: nothing") == []
    assert [line.split()[1] for line in torchrun(1, *same, "--steps", "4")] == ["3"]
    for wrong, message in (
        (
            ["--identities", "31"],
            f"--identities must be 30, with which {tmp_path} was made; got 31",
        ),
        (["--identities", "30", "--sample-rate", "0.5"], "--sample-rate must be 1.0, with which"),
    ):
        run = launch(1, *options, *wrong)
        assert run.returncode != 0
        assert message in run.stderr
        assert 'many_identities.py", line' not in run.stderr


def test_errors(tmp_path):
    for count in ("1", "3", "0"):
        run = launch(2, "--folder", str(tmp_path), "--batch-size", count)
        assert f"--batch-size must be a multiple of the 2 processes; got {count}" in run.stderr
    run = start(EXAMPLE, "--folder", str(tmp_path))
    assert "error: start it with torchrun --nproc_per_node=1" in run.stderr
