"""Triton twins of the layers, one file per operation; the only place that imports triton."""

from typing import Literal

Implementation = Literal["auto", "torch", "triton"]


def check_implementation(implementation: str, operation: str) -> None:
    """Refuse an implementation that cannot run `operation`.

    >>> check_implementation("auto", "part_mask_pool")

    Raises:
        ValueError: `implementation` is unknown.
        NotImplementedError: `"triton"` was asked for and `operation` has no kernel yet.
    """
    if implementation not in ("auto", "torch", "triton"):
        raise ValueError(
            f"implementation must be 'auto', 'torch' or 'triton'; got {implementation!r}"
        )
    if implementation == "triton":
        raise NotImplementedError(
            f"implementation='triton': {operation} has no Triton kernel in this version; "
            "use implementation='auto' or 'torch'"
        )
