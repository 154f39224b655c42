"""What every kernel needs to be launched, registered and differentiated twice."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# The default of fusion differs between versions of Triton. Without a limit NVIDIA's assembler
# settles for few registers and spills a number or two; AMD's has no such option.
LAUNCH: dict[str, int] = {"enable_fp_fusion": True}
LARGE = dict(LAUNCH)  # for products of tiles, which take half of all registers
if not torch.version.hip:
    LAUNCH["maxnreg"], LARGE["maxnreg"] = 128, 255


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Make the device of `tensor` the current one: Triton launches there, wherever tensors lie."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def power_of_two(number: int, low: int, high: int) -> int:
    """Return the power of two from `number` up, kept within two others.

    >>> power_of_two(6, 1, 64), power_of_two(6, 16, 64), power_of_two(100, 16, 64)
    (8, 16, 64)
    """
    return min(max(1 << (number - 1).bit_length(), low), high)


def derive(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    """Return the gradients of all inputs of `function` by autograd, themselves differentiable."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [x if x.requires_grad else x.detach().requires_grad_() for x in inputs]
        result = function(*inputs)
        return torch.autograd.grad(
            result, inputs, grad, create_graph=create_graph, materialize_grads=True
        )
