"""How figures are written down: valid JSON, whole files, and what the machine says of itself."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path

import machine
import numpy as np
import pytest
import torch
from machine import (
    choose_precision,
    computes_in_bf16,
    peak_memory_gb,
    to_json,
    versions,
    write_json,
)


def test_json(tmp_path):
    """NaN and infinity are no JSON: null stands for them, in tuples and NumPy's floats too."""
    value = {"f1": {"nose": float("nan"), "skin": np.float64("nan")}, "x": (1, float("-inf"), 0.5)}
    expected = {"f1": {"nose": None, "skin": None}, "x": [1, None, 0.5]}
    assert json.loads(to_json(value), parse_constant=pytest.fail) == expected
    assert "\n" not in to_json(value, indent=None)
    path = tmp_path / "a.json"
    write_json(value, path)
    with pytest.raises(TypeError):
        write_json({"x": object()}, path)
    assert json.loads(path.read_text()) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert doctest.testmod(machine).failed == 0


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    for able, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(machine, "computes_in_bf16", lambda _, able=able: able)
        assert choose_precision("auto", cpu) == expected
        assert choose_precision("fp32", cpu) == "fp32"
        assert choose_precision("bf16", cpu) == "bf16"


@pytest.mark.parametrize("flags", ["fpu avx2", "fpu avx512_bf16", None])
def test_processors(monkeypatch, flags):
    def read_text(_):
        if flags is None:
            raise FileNotFoundError  # no Linux
        return flags

    monkeypatch.setattr(Path, "read_text", read_text)
    assert computes_in_bf16(torch.device("cpu")) == (flags == "fpu avx512_bf16")


def test_versions(monkeypatch):
    """Without git, or run from a clone that is not installed, no result is lost."""
    known = versions()
    assert list(known) == ["partlocal", "torch", "timm", "numpy", "python", "commit"]
    assert known["numpy"] == np.__version__
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "path", [])
    assert versions() == {**known, "commit": "unknown"}


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_memory_of_the_largest_process():
    """A child that took more than this process counts; children count once they have ended."""
    before = peak_memory_gb()
    assert 0.05 < before < 100
    size = int(before * 1e9) + 100_000_000
    subprocess.run([sys.executable, "-c", f"x = b'1' * {size}"], check=True)
    assert size / 1e9 - 0.01 < peak_memory_gb() < size / 1e9 + 0.2


def test_without_the_module_resource(monkeypatch):
    """As on Windows: the file can be imported, and memory is unknown."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "resource", None)
        importlib.reload(machine)
        assert machine.peak_memory_gb() is None
    importlib.reload(machine)
    assert machine.peak_memory_gb() is not None
