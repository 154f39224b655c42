"""One line for what a user can mend, printed by the first process of each machine."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import errors
import pytest
from errors import one_line_errors

SCRIPT = """
import sys, torch
from errors import one_line_errors
from torch import distributed

with one_line_errors():
    if sys.argv[1] == "all, at once":
        raise ValueError("what all find wrong")
    distributed.init_process_group("gloo")
    try:
        if sys.argv[1] == "all":
            raise ValueError("what all find wrong")
        if distributed.get_rank() == 1:
            raise ValueError("what one finds wrong")
        while True:
            distributed.all_reduce(torch.ones(1))
    finally:
        distributed.destroy_process_group()
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("TORCHELASTIC_ERROR_FILE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def ended(error):
    """What a script ends with when this is raised."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    return end.value.code


def test_one_line(tmp_path):
    assert ended(ValueError("--steps must be one")) == "error: --steps must be one"
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "faces.zip").open()
    path = tmp_path / "faces.zip"
    assert ended(missing.value) == f"error: {path}: No such file or directory"
    assert ended(FileNotFoundError("no faces")) == "error: no faces"
    with pytest.raises(RuntimeError, match="of our own"), one_line_errors():
        raise RuntimeError("of our own")


def test_another_process_is_gone(monkeypatch, capsys):
    """It is said at once, and torchrun has the time to see the other one's end first."""
    pauses = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)
    assert ended(RuntimeError("connection closed by peer")) == 1
    assert capsys.readouterr().err.startswith("error: another process of this run has ended")
    assert pauses


def test_torchrun_is_told(tmp_path, monkeypatch):
    """The first process of a machine prints it, too; others where they cannot tell torchrun."""
    report, began = tmp_path / "error.json", int(time.time())
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    for rank, code in (("0", "error: x"), ("1", 1), ("7", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ended(ValueError("x")) == code
        told = json.loads(report.read_text())["message"]
        assert told["message"] == "error: x"
        assert began <= int(told["extraInfo"]["timestamp"]) <= time.time()
        report.unlink()
    for nowhere in (str(tmp_path / "none/error.json"), ""):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", nowhere)
        assert ended(ValueError("x")) == "error: x"


@pytest.mark.parametrize("who", ["all, at once", "all", "one"])
def test_torchrun_says_it_last(tmp_path, who):
    """Whether all processes end with it or one alone, before and after they have joined."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    recipe = Path(errors.__file__).parent
    paths = os.pathsep.join([str(recipe), str(recipe.parents[1])])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", script, who],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    line = "error: what one finds wrong" if who == "one" else "error: what all find wrong"
    printed, _, report = done.stderr.partition("ChildFailedError")
    assert printed.count(line) <= (who != "one"), printed
    said, end = report.strip().splitlines()[-2:]
    assert said.endswith(f" : {line}"), report
    assert set(end) == {"="}
    if who == "one":
        assert re.search(r"Root Cause.*rank +: 1 ", report, re.DOTALL)
