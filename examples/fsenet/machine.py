"""The machine that a run runs on, and how figures are written down with what made them."""

import ctypes
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
from checkpoint import whole_file

import partlocal

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def choose_precision(wanted: str, device: torch.device) -> str:
    """Return `wanted`, and for `"auto"` bf16 where the machine computes in it."""
    if wanted != "auto":
        return wanted
    return "bf16" if computes_in_bf16(device) else "fp32"


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster here than fp32; emulated it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False


def keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MB that are freed, for the next operation to take.

    It hands them back to the kernel otherwise, and a training step on a CPU spends a tenth of its
    time on faulting the same pages in again. Were larger ones kept, a run of 2 GB took 9. Other C
    libraries are left as they are.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            trim_threshold, mmap_threshold = -1, -3  # from malloc.h
            libc.mallopt(mmap_threshold, 2**25)
            libc.mallopt(trim_threshold, 2**29)


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
    modules = (partlocal, torch, timm, numpy)
    packages = {module.__name__: str(module.__version__) for module in modules}
    return {**packages, "python": platform.python_version(), "commit": commit}


def plain_command(arguments: list[str]) -> str:
    """Return a command line without the folders that its files lie in.

    >>> plain_command(["/home/ann/train.py", "--faces", "data/lfw.zip", "--output=/tmp/a b"])
    "train.py --faces lfw.zip '--output=a b'"
    """
    names = [re.sub(r"[^=]*/(?=[^/])", "", argument) for argument in arguments]
    return shlex.join(names)


def peak_memory_gb() -> float | None:
    """Return the largest resident size that this process or a child has reached, in GB.

    Of the children that have ended the system keeps the largest alone. It is not added to this
    process's own size: what is forked shares memory. None where the system does not say (Windows).
    """
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    sizes = [
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return round(max(sizes) * unit / 1e9, 2)


def device_memory_gb(device: torch.device) -> float | None:
    """Return the most memory, in GB, that tensors took on a GPU, or this process on a CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return peak_memory_gb()


def finite(value: Any) -> Any:
    """Return plain data with None for every number that is not finite, which JSON cannot hold.

    >>> finite({"f1": [0.5, float("nan")]})
    {'f1': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: object, indent: int | None = 2) -> str:
    """Return valid JSON: null stands for what is not finite."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def write_json(value: object, path: Path) -> None:
    """Write a JSON file so that it is there as a whole or not at all."""
    text = to_json(value) + "\n"
    with whole_file(path) as file:
        file.write(text.encode())
