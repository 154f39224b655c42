"""Which cases are run, how their inputs lie in memory, and how close a kernel must be."""

from itertools import combinations

import torch
from hypothesis import Phase

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# A kernel may err by so much, relative to the largest number, beyond what PyTorch errs.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# Looking for a smaller case that fails takes minutes in the interpreter.
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
# Kinds of maps, from soft ones.
KINDS = {
    "soft": lambda soft: soft,
    "nothing": lambda soft: soft * 0,
    "one cell": lambda soft: (soft == soft.max()) * soft.clamp(min=0.6),
    "no area": lambda soft: soft * 0.4,
    "too little": lambda soft: (soft == soft.max()) * 0.95e-6,
    "just enough": lambda soft: (soft == soft.max()) * 1.06e-6,
    "tiny": lambda soft: soft * 1e-30,
}
LAYOUTS = ["contiguous", "channels last", "sliced", "expanded", "offset"]


def covering(axes, allowed=lambda case: True):
    """Return cases in which every allowed pair of values of two axes appears: greedy, fixed."""
    cases, missing = [], pairs(axes, allowed)
    while missing:
        # Not by the text of the set, whose order changes from one run of Python to the next.
        case = dict(min(missing, key=lambda pair: sorted(map(str, pair))))
        for name, values in axes.items():
            if name in case:
                continue
            choices = [case | {name: value} for value in values]
            choices = [choice for choice in choices if completes(axes, choice, allowed)]
            case = max(choices, key=lambda choice: len(missing & covered(choice)))
        cases.append({name: case[name] for name in axes})
        missing -= covered(case)
    return cases


def pairs(axes, allowed):
    """Every pair of values that stands in some allowed case."""
    found = set()
    for first, second in combinations(axes, 2):
        for one in axes[first]:
            for other in axes[second]:
                if completes(axes, {first: one, second: other}, allowed):
                    found.add(frozenset([(first, one), (second, other)]))
    return found


def completes(axes, case, allowed):
    """Whether a case that lacks axes is allowed with some value of each."""
    for name, values in axes.items():
        if name not in case:
            return any(completes(axes, case | {name: value}, allowed) for value in values)
    return allowed(case)


def covered(case):
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


def name(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


def lay_out(tensor, layout):
    """Return the same values (expanded: of the first image) in memory surrounded by NaN.

    The second axis is the one that "channels last" makes the fastest.
    """
    if layout == "contiguous":
        shape, order = [1, *tensor.shape], None
    elif layout == "channels last":
        shape, order = [1, *tensor.movedim(1, -1).shape], -1
    elif layout == "sliced":
        shape, order = [1, *(2 * size + 1 for size in tensor.shape)], None
    elif layout == "expanded":
        return lay_out(tensor[:1], "contiguous").expand_as(tensor)
    else:
        shape, order = [1, *tensor.shape], None
    size = torch.Size(shape).numel()
    # What follows is a guard, and so is what precedes; 1 element more breaks the alignment.
    guard = 64 + (layout == "offset")
    memory = torch.full((size + 2 * guard,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = memory[guard : guard + size].view(shape[1:])
    if layout == "sliced":
        view = view[tuple(slice(1, 1 + 2 * size, 2) for size in tensor.shape)]
    if order is not None:
        view = view.movedim(order, 1)
    return view.copy_(tensor)


def check(found, same_dtype, oracle, dtype, least=0.0):
    """Assert that a kernel errs no more than PyTorch in the same dtype, and a tolerance.

    What lies beyond the dtype must be infinite, and the rest is compared. Errors are relative to
    the largest number of the oracle, but to no less than `least`: the size of the terms of sums
    that cancel.
    """
    assert found.dtype == same_dtype.dtype
    assert found.shape == oracle.shape
    limit = torch.finfo(found.dtype).max
    held, beyond = oracle.abs() <= 0.99 * limit, oracle.abs() >= 1.01 * limit
    assert torch.equal(found[beyond].double(), oracle[beyond].sign() * torch.inf)
    found, same_dtype, oracle = found[held], same_dtype[held], oracle[held]
    assert found.isfinite().all()
    if not oracle.numel():
        return
    scale = oracle.abs().max().clamp(min=max(least, 1e-30))
    error, allowed = ((x.double() - oracle).abs().max() / scale for x in (found, same_dtype))
    assert error <= allowed + TOLERANCE[dtype], (error.item(), allowed.item())
