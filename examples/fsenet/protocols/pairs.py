"""Pairs to verify: drawn from any set of pictures with identities, or read from lists."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures to verify.

    Args:
        first: index of a picture, p.
        second: index of the other, p.
        same: whether both show one identity, p.
        fold: of each pair, p; no identity occurs in two folds.
        identities: of each picture, n; None where they are not known.
    """

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    fold: np.ndarray
    identities: np.ndarray | None


def cut_in_folds(count: int, folds: int = 10) -> np.ndarray:
    """Return the fold of each of so many pairs in order; the first folds get one more.

    >>> cut_in_folds(7, folds=3)
    array([0, 0, 0, 1, 1, 2, 2])
    """
    return np.repeat(np.arange(folds), [len(x) for x in np.array_split(np.arange(count), folds)])


def draw_pairs(identities: np.ndarray, pairs_per_fold: int, seed: int, folds: int = 10) -> Pairs:
    """Draw as many genuine as impostor pairs in each of `folds` groups of identities.

    >>> pairs = draw_pairs(np.repeat(np.arange(20), 4), pairs_per_fold=6, seed=0)
    >>> len(pairs.same), pairs.same.mean()
    (60, np.float64(0.5))

    Args:
        identities: of each picture, n; every identity needs two pictures.
        pairs_per_fold: half of them genuine, no pair twice; fewer where the fold with the fewest
            genuine pairs has no more.
        seed: of the draw.
        folds: groups; each needs at least two identities.
    """
    rng = np.random.default_rng(seed)
    candidates = []
    for group in np.array_split(np.unique(identities), folds):
        pictures = np.flatnonzero(np.isin(identities, group))
        i, j = (pictures[side] for side in np.triu_indices(len(pictures), k=1))
        candidates.append((i, j, identities[i] == identities[j]))
    genuine, impostor = (
        min(np.count_nonzero(same == wanted) for _, _, same in candidates)
        for wanted in (True, False)
    )
    count = min(pairs_per_fold // 2, genuine, impostor)
    if count == 0:
        raise ValueError(
            f"identities: a fold of {folds} has {genuine} genuine and {impostor} impostor pairs; "
            "it needs two people, and two pictures of one of them"
        )
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for number, (i, j, same) in enumerate(candidates):
        for wanted in (True, False):
            chosen = rng.choice(np.flatnonzero(same == wanted), count, replace=False)
            values = (i[chosen], j[chosen], same[chosen], np.full(count, number))
            for column, value in zip(columns, values, strict=True):
                column.append(value)
    return Pairs(*(np.concatenate(column) for column in columns), identities=identities)


def strangers(identities: np.ndarray, seed: int) -> np.ndarray:
    """For each picture, the index of a picture of another identity."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(identities))
    while (clash := identities[chosen] == identities).any():
        chosen[clash] = rng.integers(len(identities), size=clash.sum())
    return chosen
