"""Vectors that must have a direction, for a cosine is taken of them."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from protocols.lists import listing


def check_directions(
    sizes: Float[np.ndarray, " n"],
    called: Callable[[Int[np.ndarray, " b"]], Sequence[object]],
    where: object,
    least: float = 0.0,
) -> None:
    """Refuse vectors that are zero or not finite, with the names of all of them.

    >>> check_directions(np.array([2.0, 0.0]), lambda bad: [f"{n}.jpg" for n in bad], "e.npz")
    Traceback (most recent call last):
    ValueError: e.npz: 1 embeddings are zero, and have no cosine: 1.jpg

    Args:
        sizes: of each vector its length, or its largest number; NaN if one number is.
        called: returns the names of some of them.
        where: they lie.
        least: size up to which a vector is zero.

    Raises:
        ValueError: see above.
    """
    for what, bad in (("not finite", ~np.isfinite(sizes)),
                      ("zero, and have no cosine", sizes <= least)):  # fmt: skip
        if bad.any():
            names = listing(called(np.flatnonzero(bad)))
            raise ValueError(f"{where}: {bad.sum()} embeddings are {what}: {names}")
