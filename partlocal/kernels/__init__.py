"""Triton twins of the layers, one file per operation; the only place that imports triton."""

import os
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "torch", "triton"]

MAX_LABELS = 1024  # that the kernel of `part_maps` takes

KERNELS = ("part_maps", "part_mask_pool", "structure_correlation", "negative_logsumexp")
FASTER = ("part_maps", "part_mask_pool", "negative_logsumexp")  # measured on an H200
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton reads it once, when a kernel is defined: it must be set before Python starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
AVAILABLE = torch.version.cuda is not None and find_spec("triton") is not None and not INTERPRETED


def check_implementation(implementation: str, operation: str) -> None:
    """Refuse an implementation that `operation` does not have.

    >>> check_implementation("auto", "part_mask_pool")

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: `"triton"` was asked for and `operation` has no kernel.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(
            f"implementation must be 'auto', 'torch' or 'triton'; got {implementation!r}"
        )
    if implementation == "triton" and operation not in KERNELS:
        raise NotImplementedError(
            f"implementation='triton': {operation} has no Triton kernel in this version; "
            "use implementation='auto' or 'torch'"
        )


def runs_kernel(implementation: str, operation: str, fits: bool = True, **tensors: Tensor) -> bool:
    """Tell whether the kernel of `operation` runs on these tensors, by name, or its definition.

    `"auto"` takes a kernel that is `FASTER` on NVIDIA's GPUs, and the definition on all other
    devices, for dtypes without a kernel and where the kernel's limits are passed, `fits`. While a
    model is exported it is always the definition, because an exported program must run where this
    package is not installed.

    >>> runs_kernel("auto", "structure_correlation", parts=torch.ones(1, 6, 128))
    False

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: `"triton"` was asked for and cannot run: the operation has no kernel,
            or a tensor is on another device than a GPU or of a dtype without kernel.
    """
    check_implementation(implementation, operation)
    if implementation == "torch" or torch.compiler.is_exporting():
        return False
    if implementation == "auto":
        given = tensors.values()
        fits = fits and operation in FASTER and AVAILABLE
        return fits and all(x.is_cuda and x.dtype in DTYPES for x in given)
    for name, tensor in tensors.items():
        if tensor.device.type != ("cpu" if INTERPRETED else "cuda"):
            raise NotImplementedError(
                f"implementation='triton': {operation} needs {name} on a CUDA or ROCm device; got "
                f"{tensor.device}: move it there, or use implementation='auto' or 'torch'"
            )
        if tensor.dtype not in DTYPES:
            raise NotImplementedError(
                f"implementation='triton': {operation} needs {name} in float32, float16 or "
                f"bfloat16; got {tensor.dtype}: use implementation='auto' or 'torch'"
            )
    return True
