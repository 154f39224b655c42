import jaxtyping
import pytest
import torch

from partlocal.numerics import accumulation_dtype, refuse_non_finite, result_dtype, wide_matmul


def test_example():
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    wide = [torch.float32, torch.float32, torch.float32, torch.float64]
    assert [accumulation_dtype(dtype) for dtype in dtypes] == wide


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active):
    narrow, double = torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64)
    with torch.autocast("cpu", dtype=active):
        assert result_dtype(narrow) == active
        assert result_dtype(double) == torch.float64
        assert (narrow @ narrow).dtype == active
        assert wide_matmul(narrow, narrow).dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            assert result_dtype(narrow) == torch.float32
    assert result_dtype(narrow) == torch.float32
    assert result_dtype(narrow.half()) == torch.float16


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_errors(monkeypatch, value):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    refuse_non_finite(torch.ones(3), "features", "the pooled parts")
    with pytest.raises(ValueError, match="features must be finite; got NaN or infinity in the po"):
        refuse_non_finite(torch.tensor([1.0, value]), "features", "the pooled parts")


def test_other_devices_are_not_asked():
    refuse_non_finite(torch.empty(3, device="meta"), "features", "the pooled parts")
