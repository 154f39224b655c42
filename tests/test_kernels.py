"""Which implementations are there."""

import pytest

from partlocal.kernels import check_implementation


def test_example():
    for implementation in ("auto", "torch"):
        check_implementation(implementation, "part_mask_pool")


def test_errors():
    message = "implementation must be 'auto', 'torch' or 'triton'; got 'cuda'"
    with pytest.raises(ValueError, match=message):
        check_implementation("cuda", "part_mask_pool")
    message = "implementation='triton': part_maps has no Triton kernel in this version; use"
    with pytest.raises(NotImplementedError, match=message):
        check_implementation("triton", "part_maps")
