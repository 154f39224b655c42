"""The number rules of every layer: accumulate wide, return narrow, refuse NaN where it is cheap."""

import math

import torch
from torch import Tensor

EPS = 1e-6
NULL = 1e-12  # vectors this short have no direction; the gradient of one would overflow in fp32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums of `dtype` are taken in: float64 stays, all else is float32.

    >>> accumulation_dtype(torch.bfloat16), accumulation_dtype(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(name: str, value: object) -> None:
    """Refuse an array or a list where a tensor is needed, before it fails somewhere inside.

    >>> check_tensor("maps", [1.0])
    Traceback (most recent call last):
    TypeError: maps must be a torch.Tensor; got a list: pass torch.as_tensor(maps)

    Raises:
        TypeError: `value` is no tensor.
    """
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise TypeError(
            f"{name} must be a torch.Tensor; got a {kind}: pass torch.as_tensor({name})"
        )


def result_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a layer's result: that of its input, or autocast's where one is active.

    The active dtype is asked for at every call, so that fp16, bf16 and "off" are all followed;
    like PyTorch's own operations, float64 takes no part in autocast.

    >>> with torch.autocast("cpu", dtype=torch.bfloat16):
    ...     result_dtype(torch.zeros(1)), result_dtype(torch.zeros(1, dtype=torch.float64))
    (torch.bfloat16, torch.float64)
    """
    if tensor.dtype != torch.float64 and autocast_is_on(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def autocast_is_on(device: str) -> bool:
    """Tell whether autocast is active on a type of device.

    >>> autocast_is_on("cpu")
    False
    """
    # `torch.amp.is_autocast_available` would be the question to ask first, but torch 2.11 cannot
    # trace it; "meta" is the device without autocast that layers meet.
    return device != "meta" and torch.is_autocast_enabled(device)


def wide_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right` in the dtype of the two, which autocast may not narrow."""
    if autocast_is_on(left.device.type):
        with torch.autocast(left.device.type, enabled=False):
            return left @ right
    return left @ right


def eager_on_cpu(tensor: Tensor) -> bool:
    """Tell whether a call may look at values, and take a path made for CPUs.

    Elsewhere to wait for values would stall the queue of an accelerator, or break a graph.

    >>> eager_on_cpu(torch.zeros(1))
    True
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def finite_above(tensor: Tensor, low: float) -> bool:
    """Tell whether one look shows all numbers finite and above `low`; False where one may not look.

    What treats the others can be left out then: on small tensors each operation left out counts.

    >>> finite_above(torch.tensor([1.0, 2.0]), 0.5), finite_above(torch.tensor([torch.nan]), 0.5)
    (True, False)
    """
    if not eager_on_cpu(tensor):
        return False
    least, most = torch.aminmax(tensor.detach())
    return least.item() > low and most.item() < math.inf


def refuse_non_finite(result: Tensor, name: str, seen: str) -> None:
    """Raise where `result`, a small tensor, shows that the input `name` was not finite.

    Looking at the result costs little beside the operation, where one may look: in eager calls on
    a CPU. Elsewhere NaN and infinity show up in the result.

    Raises:
        ValueError: `result` holds NaN or infinity.
    """
    if not eager_on_cpu(result):
        return
    # A finite sum is the cheapest proof; that of finite numbers may overflow.
    result = result.detach()
    if not math.isfinite(result.sum().item()) and not torch.isfinite(result).all():
        raise ValueError(
            f"{name} must be finite; got NaN or infinity in {seen}: look for a division by zero "
            f"or an overflow before this layer ({name}.isfinite() shows where)"
        )
