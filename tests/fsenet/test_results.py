"""The files of a run that `report.py` reads."""

import json
import os

import numpy as np
import pytest
from results import write_results
from telemetry import Fitted


def test_numbers_that_are_not_finite(tmp_path):
    """A label that no picture shows has no F1; JSON has no NaN."""
    stage = Fitted([{"step": 0, "loss": float("inf")}, {"step": 1, "loss": 2.0}], 1.0, 0.0, 2)
    metrics = {"parser": {"f1": {"hair": float("nan"), "skin": 0.5}}, "peak_memory_gb": None}
    scores = {"both": np.array([0.5, 0.1])}
    write_results(tmp_path, metrics, {"joint": stage}, np.array([True, False]), scores, {})

    def read(text):
        return json.loads(text, parse_constant=pytest.fail)

    written = read((tmp_path / "metrics.json").read_text())
    assert written["parser"] == {"f1": {"hair": None, "skin": 0.5}}
    assert written["peak_memory_gb"] is None
    rows = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [read(row)["loss"] for row in rows] == [None, 2.0]


FILES = ("history.jsonl", "scores.npz", "faces.npz", "metrics.json")


@pytest.mark.parametrize("number", range(len(FILES)))
def test_a_full_disk(tmp_path, monkeypatch, number):
    """Whichever file it befalls, each is the old one as a whole or the new one."""
    flushed = []

    def fsync(_):
        flushed.append(FILES[len(flushed)])
        if len(flushed) > number:
            raise OSError(28, "No space left on device")

    def write(loss):
        stages = {"joint": Fitted([{"loss": loss}])}
        scores = {"both": np.array([loss, 0.1])}
        same = np.array([True, False])
        write_results(tmp_path, {"auc": loss}, stages, same, scores, {"x": np.array(loss)})

    def read():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write(0.25)
    old = read()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space"):
            write(0.75)
    found = read()
    write(0.75)
    new = read()
    assert set(old) == set(FILES)
    expected = {name: (new if name in FILES[:number] else old)[name] for name in FILES}
    assert found == expected
