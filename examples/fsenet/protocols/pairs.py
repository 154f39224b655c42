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
        identities: of each picture, n.
    """

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    fold: np.ndarray
    identities: np.ndarray


def draw_pairs(identities: np.ndarray, pairs_per_fold: int, seed: int, folds: int = 10) -> Pairs:
    """Draw as many genuine as impostor pairs in each of `folds` groups of identities.

    >>> pairs = draw_pairs(np.repeat(np.arange(20), 4), pairs_per_fold=6, seed=0)
    >>> len(pairs.same), pairs.same.mean()
    (60, np.float64(0.5))

    Args:
        identities: of each picture, n; every identity needs two pictures.
        pairs_per_fold: half of them genuine, no pair twice.
        seed: of the draw.
        folds: groups; each needs at least two identities.
    """
    rng = np.random.default_rng(seed)
    groups = np.array_split(np.unique(identities), folds)
    first, second, same, fold = [], [], [], []
    for number, group in enumerate(groups):
        pictures = np.flatnonzero(np.isin(identities, group))
        i, j = (pictures[side] for side in np.triu_indices(len(pictures), k=1))
        genuine = identities[i] == identities[j]
        for wanted in (True, False):
            available = np.flatnonzero(genuine == wanted)
            count = pairs_per_fold // 2
            if len(available) < count:
                raise ValueError(
                    f"pairs_per_fold: fold {number} has {len(available)} "
                    f"{'genuine' if wanted else 'impostor'} pairs, fewer than {count}: "
                    "draw fewer pairs, or more samples of more identities"
                )
            chosen = rng.choice(available, count, replace=False)
            first.append(i[chosen])
            second.append(j[chosen])
            same.append(np.full(count, wanted))
            fold.append(np.full(count, number))
    columns = [np.concatenate(column) for column in (first, second, same, fold)]
    return Pairs(*columns, identities=identities)


def strangers(identities: np.ndarray, seed: int) -> np.ndarray:
    """For each picture, the index of a picture of another identity."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(identities))
    while (clash := identities[chosen] == identities).any():
        chosen[clash] = rng.integers(len(identities), size=clash.sum())
    return chosen
