"""A head whose classes are spread over ranks is the head of one process, on gloo."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributed

SCRIPT = Path(__file__).with_name("scenarios.py")
RANKS = 4
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")


def run(ranks, folder, *arguments):
    """Run a process a rank; return their exit codes and what they wrote to stderr."""
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(ranks), str(folder), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], errors


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank says of each scenario and number of ranks: every process runs all."""
    folder = tmp_path_factory.mktemp("ranks")
    _, errors = run(RANKS, folder)
    files = [folder / f"results-{rank}.json" for rank in range(RANKS)]
    assert all(file.exists() for file in files), "\n".join(errors)[-4000:]
    return [json.loads(file.read_text()) for file in files]


SCENARIOS = re.findall(r"^def (\w+)\(group\):", SCRIPT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("ranks", range(2, RANKS + 1))
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks(results, scenario, ranks):
    for rank in range(ranks):
        found = results[rank].get(f"{scenario}-{ranks}", "not run, because one before it failed")
        assert not found, f"rank {rank}: {found}"


def test_every_scenario_is_run():
    listed = re.search(r"SCENARIOS = \[(.*?)\]", SCRIPT.read_text(), re.DOTALL)[1]
    assert sorted(re.findall(r"\w+", listed.split("#")[0])) == sorted(SCENARIOS)


def test_a_rank_that_is_killed(tmp_path):
    """The others end with an error that says what to do, long before the timeout."""
    codes, _ = run(3, tmp_path, "killed")
    assert codes == [3, -9, 3]
    for rank in (0, 2):
        seconds, error = (tmp_path / f"error-{rank}.txt").read_text().split(" s: ", 1)
        assert float(seconds) < 60
        assert f"class-parallel head: rank {rank} of 3 got no answer" in error
        assert "start them all again from the last checkpoint" in error
