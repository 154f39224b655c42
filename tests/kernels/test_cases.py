"""The tests' own tools can fail."""

import pytest
import torch
from cases import LAYOUTS, check, covering, lay_out, pairs


def test_every_pair_of_values_appears():
    axes = {"a": [1, 2, 3], "b": [1, 2, 3, 4], "c": [True, False], "d": ["x", "y", "z"]}

    def allowed(case):
        return case["a"] != 3 or case["b"] == 1

    cases = covering(axes, allowed)
    assert all(map(allowed, cases))
    assert len(cases) < 20  # of 72
    for first, values in axes.items():
        for second, others in axes.items():
            seen = {(case[first], case[second]) for case in cases}
            every = {(x, y) for x in values for y in others}
            if first != second:
                forbidden = {(first, second), (second, first)} & {("a", "b"), ("b", "a")}
                assert len(every - seen) == (3 if forbidden else 0)
    assert len(pairs(axes, allowed)) == 9 + 6 + 9 + 8 + 12 + 6


def test_cases_are_the_same_in_every_run():
    """The order of a set is not, and must not decide which cases are run."""
    cases = covering({"a": [1, 2, 3], "b": "xyz", "c": "pq"})
    text = " ".join("".join(map(str, case.values())) for case in cases)
    assert text == "1xp 1yq 1zp 2xq 2yp 2zq 3xp 3yq 3zp"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_values(layout):
    tensor = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    laid = lay_out(tensor, layout)
    assert torch.equal(laid, tensor[:1].expand_as(tensor) if layout == "expanded" else tensor)
    strides = {
        "contiguous": (60, 20, 5, 1),
        "channels last": (60, 1, 15, 3),
        "sliced": (7 * 9 * 11 * 2, 9 * 11 * 2, 11 * 2, 2),
        "expanded": (0, 20, 5, 1),
        "offset": (60, 20, 5, 1),
    }
    assert laid.stride() == strides[layout]
    assert laid.storage_offset() % 16 == (1 if layout == "offset" else laid.storage_offset() % 16)
    assert laid.untyped_storage().nbytes() >= (60 + 128) * 4  # guards on both sides


def test_new_memory_is_poisoned(device):
    ones = torch.ones(7, device=device)
    assert torch.empty(7, device=device).isnan().all()
    assert torch.empty_like(ones).isnan().all()
    assert ones.new_empty(7, dtype=torch.float16).isnan().all()


def test_check_refuses_what_is_wrong():
    oracle = torch.ones(3, dtype=torch.float64)
    check(torch.ones(3), torch.ones(3), oracle, torch.float32)
    for wrong in (torch.ones(3) + 1e-5, torch.tensor([1, 1, torch.nan]), torch.ones(4)):
        with pytest.raises(AssertionError):
            check(wrong, torch.ones(3), oracle, torch.float32)
    much = torch.tensor([1e9, 1.0], dtype=torch.float64)
    check(much.half(), much.half(), much, torch.float16)
    with pytest.raises(AssertionError):
        check(torch.ones(2).half(), much.half(), much, torch.float16)
