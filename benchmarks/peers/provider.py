"""One way to do an operation."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from standing import OURS
from torch import Tensor

from partlocal.kernels import Implementation


@dataclass(frozen=True)
class Provider:
    """A way to do an operation.

    Args:
        name: as the tables print it.
        run: from the inputs to one result.
        oracle: what the result must be, from inputs in float64; None is our definition.
        temporaries: tensors of every part x channel x cell that a forward holds.
        compiled: run under `torch.compile`.
        prepare: from the inputs to those of `run`, before anything is timed.
    """

    name: str
    run: Callable[..., Tensor]
    oracle: Callable[..., Tensor] | None = None
    temporaries: int = 0
    compiled: bool = False
    prepare: Callable[..., tuple[Tensor, ...]] | None = None


def with_compiled(name: str, run: Callable[..., Tensor], temporaries: int = 0) -> list[Provider]:
    """Return a way as it is, and compiled, which makes no temporaries."""
    return [
        Provider(name, run, temporaries=temporaries),
        Provider(f"{name}, compiled", run, compiled=True),
    ]


def own_providers(
    ours: Callable[[Implementation], Callable[..., Tensor]],
    device: torch.device,
    other: Implementation = "torch",
) -> list[Provider]:
    """Return this library's ways: what `"auto"` takes, compiled too, and on a GPU the other."""
    found = with_compiled(OURS, ours("auto"))
    if device.type == "cuda":
        name = {"torch": "definition", "triton": "kernel"}[other]
        found.append(Provider(f"{OURS}, {name}", ours(other)))
    return found
