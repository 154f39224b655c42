"""The machine that a run runs on, and how figures are written down with what made them."""

import json
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster here than fp32; emulated it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def versions() -> dict[str, str]:
    """Return what a figure must be read with."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    packages = {name: version(name) for name in ("partlocal", "torch", "timm", "numpy")}
    return {**packages, "python": platform.python_version(), "commit": commit}


def peak_memory_gb() -> float:
    """Return the largest resident size of this process so far."""
    unit = 1e9 if sys.platform == "darwin" else 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def write_json(value: object, path: Path) -> None:
    """Write a JSON file so that it is there as a whole or not at all."""
    scratch = path.with_suffix(".tmp")
    try:
        scratch.write_text(json.dumps(value, indent=2) + "\n")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
