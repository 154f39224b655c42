"""The whole recipe as a user runs it: bad input in one line, and a tiny run killed and resumed."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint import last_but_one, load_checkpoint
from PIL import Image
from run_folder import LOCK
from safetensors.torch import load_file
from telemetry import CLOCKS

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "examples/fsenet/train.py"
TINY = [
    "--test-identities=40 --test-samples=4 --identities=8 --samples=4",
    "--parser-options.width=8 --parser-options.grid=32 --parser-options.steps=12",
    "--parser-options.batch-size=8 --steps=12 --batch-size=8 --precision=fp32",
]
TINY = " ".join(TINY).split()
STAGES = ("parser", "joint", "global")

# Bad inputs one after another in one process, each as if it were a process of its own.
CALLS = """
import contextlib, io, json, os, runpy, sys
results = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, error, code = ["train.py", *arguments], io.StringIO(), 0
    with contextlib.redirect_stderr(error):
        try:
            runpy.run_path(os.environ["TRAIN"], run_name="__main__")
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):  # what the interpreter does with it
                print(code, file=sys.stderr)
                code = 1
    results.append((code or 0, error.getvalue()))
print(json.dumps(results))
"""


def environment():
    paths = os.pathsep.join([str(TRAIN.parent), str(ROOT)])
    return {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "TRAIN": str(TRAIN),
        "CUDA_VISIBLE_DEVICES": "",
    }


def png():
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_bad_input(tmp_path, lfw_like):
    """One line on stderr, exit code 1, and no folder of a run that never began."""
    junk = tmp_path / "junk.zip"
    junk.write_bytes(b"PK no zip" * 20)
    truncated = tmp_path / "truncated.zip"
    with zipfile.ZipFile(truncated, "w") as archive:
        for person in range(130):
            for number in range(2):
                data = png()[: 900 if person + number == 77 else None]
                archive.writestr(f"P{person}/{number}.png", data)
    (tmp_path / "file").write_text("")
    old = tmp_path / "old"
    old.mkdir()
    (old / "options.json").write_text(json.dumps({"steps": 3}))
    lfw, own = ["--profile", "lfw", "--faces"], lfw_like(tmp_path / "lfw.zip")
    cases = {
        "missing": [
            "--faces",
            "nowhere",
            "nowhere does not exist: pass pictures of people",
        ],
        "corrupt": ["--faces", str(junk), "junk.zip is no zip file, or a damaged one"],
        "truncated": ["--faces", str(truncated), "truncated.zip:P7"],
        "few": ["--faces", str(tmp_path / "file"), "file is no zip file"],
        "unwritable": ["--output", str(tmp_path / "file"), "file cannot be written (File exists)"],
        "again": ["--output", str(old), "old holds a run: pass --resume, or another --output"],
        "others": ["--output", str(old), "--resume", "old was started with"],
        "nothing": ["--resume", "default-0 does not exist: leave --resume out"],
        "backbone": ["--backbone", "no_such_net", "--backbone: timm knows no 'no_such_net'"],
        "lfw": ["--profile", "lfw", "--profile lfw needs --faces: LFW as a folder or zip"],
        "not lfw": [*lfw, str(truncated), "with its lists (pairs.txt), alone; got "],
        "lfw and more": [*lfw, str(own), str(own), f"alone; got {own} {own}: leave --profile out"],
        "paper": ["--profile", "paper", "--profile paper needs --faces: pictures of people"],
        "profile": ["--profile", "huge", "invalid choice"],
        "batch": ["--batch-size", "0", "--batch-size must be between 2 and"],
        "negative": ["--batch-size=-4", "--batch-size must be between 2 and"],
        "large": ["--batch-size", "40", "--batch-size must be at most the number of pictures, 32"],
        "larger": [
            "--parser-options.batch-size=40",
            "r-options.batch-size must be at most the num",
        ],
        "micro": ["--accumulate", "3", "a multiple of the 1 processes x 3 micro-batches, at least"],
        "ema": ["--ema", "1", "--ema must be between 0 and 0.999999; got 1"],
        "width": ["--parser-options.width", "7", "width must be even and at least 2; got 7"],
        "dim": ["--part-dim=-3", "--part-dim must be between 1 and"],
        "seed": ["--seed=-1", "--seed must be between 0 and"],
        "nobody": ["--identities", "0", "--identities must be between 2 and"],
        "nan": ["--lr", "nan", "--lr must be between 0 and 1000; got nan"],
        "order": ["--milestones", "0.9", "0.7", "each larger than the one before, such as 0.7 0.9"],
        "empty": ["--parsing", str(old), "old holds no pairs images/NAME"],
        "no pictures": ["--faces", str(old), "old holds no pictures (1 files)"],
    }
    calls = [TINY + case[:-1] for case in cases.values()]
    done = subprocess.run(
        [sys.executable, "-c", CALLS, json.dumps(calls)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for (name, case), (code, error) in zip(
        cases.items(), json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert case[-1] in error, (name, error)
        assert "Traceback" not in error, name
        if name == "profile":  # the parser of the command line frames its message
            assert code == 2
            assert "lfw" in error
            continue
        # progress bars write to stderr too, and rewrite their line with carriage returns
        lines = [line for line in error.split("\n") if line and "it/s]" not in line]
        assert len(lines) == 1, (name, error)
        assert lines[0].startswith("error: "), name
        assert code == 1, name
    assert not list(tmp_path.glob("runs/*"))
    assert [p.name for p in old.iterdir()] == ["options.json"]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(arguments, cwd, log, ranks=1, machines=()):
    """Run the recipe in one process, in several, or as torchrun does on a machine of several."""
    command = [sys.executable, str(TRAIN)]
    if ranks > 1 or machines:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        where = machines or ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        command = [sys.executable, *torchrun, *where, str(TRAIN)]
    return subprocess.Popen(
        command + TINY + arguments,
        cwd=cwd,
        env=environment(),
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(arguments, cwd, ranks=1):
    path = cwd / "log.txt"
    with path.open("w") as log:
        process = start(arguments, cwd, log, ranks)
        try:
            code = process.wait(500)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, path.read_text()[-4000:]
    return path.read_text()


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def same_runs(a, b):
    for part in ("network", "baseline"):
        same_weights(a / part / "model.safetensors", b / part / "model.safetensors")
    with np.load(a / "scores.npz") as x, np.load(b / "scores.npz") as y:
        for name in x.files:
            assert np.array_equal(x[name], y[name]), name
    for stage in STAGES:
        x, y = (load_checkpoint(folder / f"{stage}.pt") for folder in (a, b))
        assert timeless(x["fitted"]["history"]) == timeless(y["fitted"]["history"])
        assert x["fitted"]["steps"] == 12
    rows = [[json.loads(line) for line in (run / "history.jsonl").open()] for run in (a, b)]
    assert timeless(rows[0]) == timeless(rows[1])


def timeless(rows):
    return [{name: row[name] for name in row if name not in CLOCKS} for row in rows]


def check_left(folder):
    left = {path.name for path in folder.iterdir()}
    expected = {"options.json", "metrics.json", "history.jsonl", "scores.npz", "faces.npz"}
    assert {*expected, "report.html", "network", "baseline"} <= left
    assert not [name for name in left - {LOCK} if name.startswith(".") or name.endswith(".tmp")]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["steps"] == 12
    assert set(metrics["training"]) == set(STAGES)
    arms = {"untrained", "global only", "joint: global half", "joint: local half", "joint: both"}
    controls = {f"control: {n} maps" for n in ("mean", "another person's", "uniform")}
    assert set(metrics["arms"]) == arms | controls
    assert metrics["protocol"]["identities"] == 40
    assert set(metrics["energy"]) == {"at initialisation", "after training"}

    # the report finds in the metrics what it looks for
    page = (folder / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    assert re.search(r"At initialisation \d+\.\d % \d+\.\d % \d+\.\d % [-−\d]", text)  # noqa: RUF001
    assert re.search(r"part colours \d+\.\d ± \d\.\d % at most 70 %", text)
    assert re.search(r"grey pixels \d+\.\d ± \d\.\d % at most 65 %", text)
    assert "– ± –" not in text  # noqa: RUF001


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """The tiny recipe, killed in every stage, ends in the bits of the run that was not."""
    printed = finish(["--output", "whole"], tmp_path)
    assert "joint: both" in printed
    assert "report: " in printed
    check_left(tmp_path / "whole")
    kills = 0
    arguments = ["--output", "killed"]
    with (tmp_path / "killed.txt").open("w") as log:
        # the first checkpoint of a stage is its end here, so a kill right after it hits the next
        for stage in (None, *STAGES):
            process = start(arguments, tmp_path, log)
            arguments = ["--output", "killed", "--resume"]
            seen = tmp_path / "killed" / ("options.json" if stage is None else f"{stage}.pt")
            deadline = time.monotonic() + 300
            while not seen.exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.01)
            time.sleep(0.3)
            kills += process.poll() is None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert kills >= 3, (tmp_path / "killed.txt").read_text()[-3000:]
    before = (tmp_path / "killed" / "joint.pt").stat().st_mtime_ns
    finish(arguments, tmp_path)
    assert (tmp_path / "killed" / "joint.pt").stat().st_mtime_ns == before, "trained again"
    check_left(tmp_path / "killed")
    same_runs(tmp_path / "whole", tmp_path / "killed")

    # a stage of another architecture, and a damaged one
    good = tmp_path / "killed" / "joint.pt"
    last_but_one(good).unlink(missing_ok=True)
    for wrong, message in (
        ((tmp_path / "killed" / "parser.pt").read_bytes(), "was saved by another architecture ("),
        (good.read_bytes()[:5000], "is damaged or no checkpoint ("),
    ):
        good.write_bytes(wrong)
        with (tmp_path / "wrong.txt").open("w") as log:
            assert start(arguments, tmp_path, log).wait(300) == 1
        text = (tmp_path / "wrong.txt").read_text()
        assert f"error: killed/joint.pt {message}" in text
        assert "Traceback" not in text
        assert (tmp_path / "killed" / "options.json").exists()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """torchrun with gloo, end to end; bad input ends both processes and leaves nothing."""
    finish(["--output", "two"], tmp_path, ranks=2)
    check_left(tmp_path / "two")
    one = load_checkpoint(tmp_path / "two" / "joint.pt")
    losses = [row["loss"] for row in one["fitted"]["history"]]
    assert all(np.isfinite(losses))
    assert all(torch.isfinite(t).all() for t in one["module"].values())

    with (tmp_path / "wrong.txt").open("w") as log:
        process = start(["--output", "bad", "--faces", "nowhere"], tmp_path, log, ranks=2)
        assert process.wait(300) != 0
    text = (tmp_path / "wrong.txt").read_text()
    assert "error: nowhere does not exist: pass pictures of people" in text
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds children in /proc")
def test_two_machines(tmp_path):
    """Two agents with a folder each, killed, and gone on with by both and then by one process."""

    def both(arguments, until=None):
        port, processes = free_port(), []
        for node in range(2):
            (tmp_path / f"node-{node}").mkdir(exist_ok=True)
            where = ["--nnodes=2", f"--node_rank={node}", "--master_addr=127.0.0.1"]
            with (tmp_path / f"node-{node}.txt").open("w") as log:
                processes.append(
                    start(
                        ["--output", "run", *arguments], tmp_path / f"node-{node}", log,
                        machines=[*where, f"--master_port={port}"],
                    )
                )  # fmt: skip
        for process in processes:
            while until is not None and not until.exists() and process.poll() is None:
                time.sleep(0.05)
        if until is not None:
            for process in processes:  # torchrun's children live in sessions of their own
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
                for pid in (process.pid, *map(int, children.split())):
                    os.kill(pid, signal.SIGKILL)
        return [process.wait(500) for process in processes]

    run = tmp_path / "node-0/run"
    assert both([], until=run / "parser.pt") == [-signal.SIGKILL] * 2
    assert both(["--resume"], until=run / "joint.pt") == [-signal.SIGKILL] * 2
    assert not (tmp_path / "node-1/run").exists()
    finish(["--output", "run", "--resume", "--workers=1"], tmp_path / "node-0")
    check_left(run)
    starts = [json.loads(line) for line in (run / "starts.jsonl").open()]
    assert [row["processes"] for row in starts] == [2, 2, 1]
    steps = [(row["stage"], row["step"]) for row in map(json.loads, (run / "history.jsonl").open())]
    assert steps == [(stage, step) for stage in STAGES for step in (0, 10, 11)]
