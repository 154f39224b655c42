"""The number rules of every layer: accumulate wide, return narrow, refuse NaN where it is cheap."""

import torch
from torch import Tensor

EPS = 1e-6


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of `dtype` are taken in: float64 stays, all else is float32.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a layer's result: that of its input, or autocast's where one is active.

    The active dtype is asked for at every call, so that fp16, bf16 and "off" are all followed;
    like PyTorch's own operations, float64 takes no part in autocast.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     result_dtype(torch.zeros(1)), result_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.bfloat16, torch.float64)
    """
    device = tensor.device.type
    if (
        tensor.dtype != torch.float64
        and torch.amp.is_autocast_available(device)
        and torch.is_autocast_enabled(device)
    ):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def wide_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in the dtype of the two, which autocast may not narrow."""
    device = left.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return left @ right
    return left @ right


def refuse_non_finite(result: Tensor, name: str, seen: str) -> None:
    """Raise where `result`, a small tensor, shows that the input `name` was not finite.

    Looking at the result costs nothing beside the operation, but waiting for it would stall the
    queue of an accelerator and break a graph: only eager calls on a CPU are checked. Elsewhere
    NaN and infinity show up in the result.

    Raises:
        ValueError: `result` holds NaN or infinity.
    """
    if result.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if not torch.isfinite(result.detach()).all():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {seen}: look for a division by zero "
            f"or an overflow before this layer ({name}.isfinite() shows where)"
        )
