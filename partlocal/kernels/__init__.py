"""Triton twins of the layers, one file per operation; the only place that imports triton."""

import os
from typing import Literal

import torch
from torch import Tensor

Implementation = Literal["auto", "torch", "triton"]

KERNELS = ("part_maps", "part_mask_pool", "structure_correlation", "negative_logsumexp")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Triton reads it once, when a kernel is defined: it must be set before Python starts.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


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


def runs_kernel(implementation: str, operation: str, **tensors: Tensor) -> bool:
    """Tell whether the kernel of `operation` runs on these tensors, by name, or its definition.

    `"auto"` takes the definition on every device: no kernel has been measured on a GPU yet, and
    one that was not is not preferred. So does `"triton"` while a model is exported, because an
    exported program must run where this package is not installed.

    >>> runs_kernel("auto", "structure_correlation", parts=torch.ones(1, 6, 128))
    False

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: `"triton"` was asked for and cannot run: the operation has no kernel,
            or a tensor is on another device than a GPU or of a dtype without kernel.
    """
    check_implementation(implementation, operation)
    if implementation != "triton" or torch.compiler.is_exporting():
        return False
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
