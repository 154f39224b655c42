"""Which implementations are there, and where a kernel runs."""

import re

import jaxtyping
import pytest
import torch

from partlocal import kernels, negative_logsumexp, part_maps, part_mask_pool, structure_correlation
from partlocal.kernels import KERNELS, check_implementation, runs_kernel


def test_example():
    for implementation in ("auto", "torch"):
        check_implementation(implementation, "part_maps")
        for operation in KERNELS:
            assert not runs_kernel(implementation, operation, parts=torch.ones(1))
    for operation in KERNELS:
        check_implementation("triton", operation)


def test_a_kernel_is_chosen_by_device_and_dtype(monkeypatch):
    """An object that says so stands for a tensor on a GPU."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    monkeypatch.setattr(kernels, "AVAILABLE", True)

    class OnGpu:
        device = torch.device("cuda:1")
        dtype = torch.bfloat16
        is_cuda = True

    for operation in KERNELS:
        assert runs_kernel("triton", operation, parts=OnGpu())
        assert runs_kernel("auto", operation, parts=OnGpu()) == (operation in kernels.FASTER)
        assert not runs_kernel("torch", operation, parts=OnGpu())
        assert not runs_kernel("auto", operation, fits=False, parts=OnGpu())
        assert not runs_kernel("auto", operation, parts=OnGpu(), seen=torch.ones(1))
        OnGpu.dtype = torch.float64
        with pytest.raises(NotImplementedError, match="needs parts in float32, float16 or"):
            runs_kernel("triton", operation, parts=OnGpu())
        assert not runs_kernel("auto", operation, parts=OnGpu())
        OnGpu.dtype = torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("cuda", "structure_correlation"),
            ValueError,
            "implementation must be 'auto', 'torch' or 'triton'; got 'cuda'",
        ),
        (
            ("triton", "resize_maps"),
            NotImplementedError,
            "implementation='triton': resize_maps has no Triton kernel in this version; "
            "use implementation='auto' or 'torch'",
        ),
        (
            ("triton", "structure_correlation"),
            NotImplementedError,
            "implementation='triton': structure_correlation needs parts on a CUDA or ROCm "
            "device; got cpu: move it there, or use implementation='auto' or 'torch'",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        runs_kernel(*arguments, parts=torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("operation", KERNELS)
def test_nothing_is_launched_on_a_cpu(operation, dtype, monkeypatch):
    """Outside of Triton's interpreter: the error comes before the kernel."""
    triton = pytest.importorskip("triton")
    launched = []
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: launched.append(1))
    x = torch.ones(1, 3, 4, 4, dtype=dtype)
    call, arguments = {
        "part_maps": (part_maps, (x, (0,), 2)),
        "part_mask_pool": (part_mask_pool, (x, x)),
        "structure_correlation": (structure_correlation, (x[0],)),
        "negative_logsumexp": (negative_logsumexp, (x[0, 0], x[0, 1], torch.zeros(4).long(), 4.0)),
    }[operation]
    with pytest.raises(NotImplementedError, match=f"{operation} needs .* got cpu: move it there"):
        call(*arguments, implementation="triton")
    assert not launched
