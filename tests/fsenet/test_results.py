"""The files of a run that `report.py` reads."""

import json

import numpy as np
import pytest
from fit import Fitted
from results import write_results


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
