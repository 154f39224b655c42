"""The benchmark times nothing that is wrong, and the docs show what it found."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def speed():
    """The script's own functions, whose neighbours it finds by itself."""
    before = list(sys.path)
    yield runpy.run_path(str(ROOT / "benchmarks/speed.py"))
    sys.path[:] = before


@pytest.fixture(scope="module")
def rows(speed):
    """Every kind of row on inputs that take no time."""
    import rows  # noqa: PLC0415

    tiny = rows.Shape(2, 8, 6, 5, 3)
    return [
        *rows.pool_rows("tiny", tiny, torch.float32, CPU),
        *rows.pool_rows("tiny", rows.Shape(2, 8, 6, 5, 3, "NHWC"), torch.float32, CPU),
        *rows.maps_rows(1, torch.float32, CPU),
        *rows.correlation_rows("face", 2, torch.float32, CPU),
    ]


def test_every_way_matches_its_oracle(speed, rows):
    eager = [(p, row) for row in rows for p in row.providers if not p.compiled]
    assert len(eager) > 50
    for provider, row in eager:
        assert speed["unfit"](provider, row) is None, (provider.name, row.operation)


def test_a_wrong_way_is_not_timed(speed, rows):
    from peers.provider import Provider  # noqa: PLC0415

    right = rows[0].providers[0].run
    wrong = {
        "wrong: off by 0.01": Provider("scaled", lambda f, m: 1.01 * right(f, m)),
        "wrong: off by nan": Provider("nan", lambda f, m: right(f, m) * torch.nan),
        "fails: no memory": Provider("failing", lambda f, m: raise_("no memory")),
        "needs 12 GiB": Provider("large", right, temporaries=12 * 2**28 // rows[0].largest + 1),
    }
    for why, provider in wrong.items():
        assert speed["unfit"](provider, rows[0]).startswith(why)
    # A result that is right, and a gradient that is not.
    backward = next(row for row in rows if row.differentiable == (True, False))
    loose = Provider("detached", lambda f, m: right(f.detach(), m) + 0 * right(f, m))
    assert speed["unfit"](loose, backward).startswith("wrong")


def raise_(text):
    raise RuntimeError(text)


def test_turns():
    from common import interleave  # noqa: PLC0415

    called = []
    calls = {name: [lambda n=name: called.append(n)] for name in "ab"}
    times, graphs = interleave(calls, CPU, 5, 0.0)
    assert not any(graphs.values())
    assert {name: len(ms) for name, ms in times.items()} == {"a": 5, "b": 5}
    assert called.count("a") == called.count("b") == 1 + 2 * 5  # each run on warm caches
    fast, slow = [lambda: None], [lambda: torch.ones(2**21).sin()]
    times, _ = interleave({"fast": fast, "slow": slow}, CPU, 5, 0.0)
    assert len(times["slow"]) == 3
    times, _ = interleave({"slow": slow, "fast": fast}, CPU, 5, 0.0)
    assert len(times["slow"]) == 5  # the first is what others are compared with


def test_one_command(tmp_path):
    command = [sys.executable, "benchmarks/speed.py", "--quick", "--only", "structure_correlation"]
    subprocess.run([*command, "--output", str(tmp_path)], cwd=ROOT, check=True)
    report = json.loads((tmp_path / "speed.json").read_text())
    timed = [row for row in report["rows"] if "p50" in row]
    assert {row["provider"] for row in timed} == {"partlocal", "cdist", "broadcast"}
    for row in timed:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["of_floor"] > 0
    assert {row["auto"] for row in timed if row["provider"] == "partlocal"} == {"torch"}
    assert sum(report["summary"].values()) == 2
    assert {"commit", "date", "torch", "triton", "device", "threads"} <= set(report)


def test_the_page_shows_what_was_found():
    """`python docs/speed.py` writes it."""
    page = runpy.run_path(str(ROOT / "docs/speed.py"))
    text = (ROOT / "docs/speed.md").read_text()
    for lines in page["blocks"]().values():
        assert len(lines) > 20
        assert "\n".join(lines) in text
    for _, figure in page["sections"]():
        assert figure.exists()


def test_loading(tmp_path):
    """Every format is read, beside torchvision's folder and a list of files."""
    command = [sys.executable, "benchmarks/loading.py", "--pictures", "100", "--workers", "0"]
    command += ["--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    heads, *rows, written = (line.split("\t") for line in done.stdout.splitlines())
    assert heads == ["way", "0 workers"]
    formats = ["folder", "zip", "tar", "rec", "shards", "parquet", "arrow"]
    assert [row[0] for row in rows] == ["torchvision", "pillow", *formats]
    assert all(float(row[1]) > 0 for row in rows)
    kept = json.loads(Path(*written).read_text())
    assert kept["pictures_per_second"] == {name: [int(rate)] for name, rate in rows}
    assert kept["circumstances"]["commit"]


def test_search(tmp_path):
    """The search among a few finds what all products find."""
    command = [sys.executable, "benchmarks/search.py", "--widths", "16", "1024", "--probes", "20"]
    command += ["--distractors", "3000", "--output", str(tmp_path), "--folder", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = json.loads((tmp_path / "search.json").read_text())["rows"]
    assert [(row["width"], row["kind"]) for row in rows] == [(16, "float32"), (1024, "float16")]
    assert all(row["same"] and row["difference"] < 1e-6 for row in rows)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "search.json"]
