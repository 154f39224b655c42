"""What a stage writes while it trains, and what is left of it after a kill."""

import json
import time
from typing import NamedTuple

import pytest
import torch
from fit import fit
from schedule import Schedule
from telemetry import CLOCKS, Fitted, Logbook, check_tensorboard
from torch import Tensor, nn
from workplace import Workplace


class Losses(NamedTuple):
    loss: Tensor


class Scalar(nn.Module):
    """One weight w; the loss is w x mean(x)."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Losses:
        return Losses(self.w * x.mean())


class Killed(Exception):
    """In place of a signal."""


def train(folder, stage="joint", steps=25, kill=None, watch=lambda step: None, **how):
    module = Scalar()

    def batches(first):
        for step in range(first, steps):
            watch(step)
            if step == kill:
                raise Killed
            yield (torch.full((4,), 1.0 + step),)

    optimizer = torch.optim.SGD(module.parameters(), lr=9.0)
    place = Workplace(folder, torch.device("cpu"), **how)
    return fit(stage, module, batches, Schedule(steps, lambda done: 1e-3, optimizer), place)


def rows(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_example(tmp_path):
    """A row is there as soon as its step is over; the gradient of w x mean(x) is mean(x)."""
    seen = {}

    def watch(step):
        if step in (1, 11, 21):
            seen[step] = [row["step"] for row in rows(tmp_path)]
        time.sleep(0.002)

    fitted = train(tmp_path, watch=watch)
    assert seen == {1: [0], 11: [0, 10], 21: [0, 10, 20]}
    found = rows(tmp_path)
    assert found == fitted.history
    assert [row["step"] for row in found] == [0, 10, 20, 24]
    assert [row["grad_norm"] for row in found] == [1.0, 11.0, 21.0, 25.0]
    assert fitted.images == 25 * 4
    for row in found:
        assert row["stage"] == "joint"
        assert row["steps"] == 25
        assert row["lr"] == 1e-3
        assert 0 < row["images_per_second"] < 4 / 0.002
        assert 0.2 < row["data_wait_share"] < 1
        assert 0.05 < row["memory_gb"] < 100


def test_the_clocks(tmp_path):
    """By hand: ten steps of four pictures in two seconds, of which one was waited for."""
    fitted = Fitted(steps=10, seconds=100.0, wait_seconds=7.0, images=40)
    logbook = Logbook("joint", 50, fitted, Workplace(tmp_path, torch.device("cpu")))
    fitted.steps, fitted.seconds, fitted.wait_seconds, fitted.images = 20, 102.0, 8.0, 80
    logbook.note(19, {"lr": 0.1, "loss": 2.0})
    logbook.close()
    (row,) = rows(tmp_path)
    assert [row[name] for name in CLOCKS[:3]] == [20.0, 0.5, 6.0]
    assert row["loss"] == 2.0


def test_killed_and_resumed(tmp_path):
    """No row twice, none lost, none cut short; other stages keep theirs."""
    train(tmp_path, "parser", steps=3)
    with pytest.raises(Killed):  # no checkpoint since the first step
        train(tmp_path, kill=15, checkpoint_seconds=0.0, checkpoint_share=1e-9)
    before = rows(tmp_path)
    assert [row["step"] for row in before] == [0, 2, 0, 10]
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(json.dumps(before[-1] | {"step": 20}) + "\n" + '{"stage": "joint", "st')
    train(tmp_path)
    found = rows(tmp_path)
    assert found[:3] == before[:3]
    assert [(row["stage"], row["step"]) for row in found] == [
        *(("parser", step) for step in (0, 2)),
        *(("joint", step) for step in (0, 10, 20, 24)),
    ]
    alone = tmp_path / "alone"
    alone.mkdir()
    train(alone, "parser", steps=3)
    train(alone)
    for row, other in zip(found, rows(alone), strict=True):
        assert {k: row[k] for k in row if k not in CLOCKS} == {
            k: other[k] for k in other if k not in CLOCKS
        }


def test_other_ranks_write_nothing(tmp_path):
    train(tmp_path, rank=1, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path):
    """Every number of a row, at its step, once, after a kill too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    kept = {"checkpoint_seconds": 0.0, "checkpoint_share": 1e-9, "tensorboard": True}
    with pytest.raises(Killed):
        train(tmp_path, kill=15, **kept)
    history = train(tmp_path, tensorboard=True).history
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard/joint"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"lr", "loss", "grad_norm", *CLOCKS}
    for name in ("lr", "loss", "grad_norm"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], pytest.approx(row[name])) for row in history]
        assert found == expected


def test_errors(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = r"^--tensorboard needs the package tensorboard: pip install tensorboard$"
    with pytest.raises(ValueError, match=message):
        check_tensorboard()
