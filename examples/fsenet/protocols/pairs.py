"""Pairs to verify: drawn from any set of pictures with identities, or read from lists."""

from dataclasses import dataclass

import numpy as np

FOLDS = 10  # of every published set of pairs, and of the drawn ones


@dataclass(frozen=True)
class Pairs:
    """Pairs of pictures to verify.

    Args:
        first: index of a picture, p.
        second: index of the other, p.
        same: whether both show one identity, p.
        fold: of each pair, p. No identity occurs in two folds of drawn pairs, nor of LFW's; other
            lists say what they say.
        identities: of each picture, n; None where they are not known.
    """

    first: np.ndarray
    second: np.ndarray
    same: np.ndarray
    fold: np.ndarray
    identities: np.ndarray | None


def cut_in_folds(count: int, folds: int = FOLDS) -> np.ndarray:
    """Return the fold of each of so many pairs in order; the first folds get one more.

    >>> cut_in_folds(7, folds=3)
    array([0, 0, 0, 1, 1, 2, 2])
    """
    return np.repeat(np.arange(folds), [len(x) for x in np.array_split(np.arange(count), folds)])


def draw_pairs(identities: np.ndarray, pairs_per_fold: int, seed: int, folds: int = FOLDS) -> Pairs:
    """Draw as many genuine as impostor pairs in each of `folds` groups of identities.

    Every pair of a group is as likely as any other of its kind. They are numbered and not written
    out: of n pictures there are n (n - 1) / 2.

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
    groups = [
        np.flatnonzero(np.isin(identities, group))
        for group in np.array_split(np.unique(identities), folds)
    ]
    # of each picture of a group, how many impostor and how many genuine pairs with a later one
    counts = [_count_later(identities[pictures]) for pictures in groups]
    impostor, genuine = np.min([kinds.sum(1) for kinds in counts], 0).tolist()
    count = min(pairs_per_fold // 2, genuine, impostor)
    if count == 0:
        raise ValueError(
            f"identities: a fold of {folds} has {genuine} genuine and {impostor} impostor pairs; "
            "it needs two people, and two pictures of one of them"
        )
    columns: list[list[np.ndarray]] = [[], [], [], []]
    for number, (pictures, kinds) in enumerate(zip(groups, counts, strict=True)):
        for same in (True, False):
            chosen = rng.choice(kinds[int(same)].sum(), count, replace=False)
            i, j = _numbered(identities[pictures], kinds[int(same)], same, chosen)
            values = (pictures[i], pictures[j], np.full(count, same), np.full(count, number))
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


def _count_later(who: np.ndarray) -> np.ndarray:
    """Return how many later pictures show another person, and how many the same; 2 x n."""
    _, person, sizes = np.unique(who, return_inverse=True, return_counts=True)
    place = np.empty(len(who), dtype=np.int64)
    place[np.argsort(person, kind="stable")] = np.arange(len(who))
    same = np.cumsum(sizes)[person] - place - 1
    return np.stack([np.arange(len(who))[::-1] - same, same])


def _numbered(
    who: np.ndarray, later: np.ndarray, same: bool, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs of one kind by their numbers: ordered by the first picture, then the second."""
    ends = np.cumsum(later)
    first = np.searchsorted(ends, numbers, side="right")
    second = np.empty_like(first)
    for pair, (row, number) in enumerate(zip(first, numbers, strict=True)):
        partners = np.flatnonzero((who[row + 1 :] == who[row]) == same)
        second[pair] = row + 1 + partners[number - ends[row]]  # counted from the last
    return first, second
