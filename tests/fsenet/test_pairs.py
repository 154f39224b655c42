"""Drawn pairs against the list of all that there are."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocols.pairs import draw_pairs


def by_list(identities, pairs_per_fold, seed, folds):
    """The same draw from all pairs of a fold, written out."""
    rng, kinds = np.random.default_rng(seed), []
    for group in np.array_split(np.unique(identities), folds):
        pictures = [i for i, who in enumerate(identities) if who in group]
        every = [(i, j) for n, i in enumerate(pictures) for j in pictures[n + 1 :]]
        kinds.append([[x for x in every if (identities[x[0]] == identities[x[1]]) == same]
                      for same in (True, False)])  # fmt: skip
    count = min(pairs_per_fold // 2, *(len(kind) for pair in kinds for kind in pair))
    return [
        (*pair, same, fold)
        for fold, pair in enumerate(kinds)
        for same, kind in zip((True, False), pair, strict=True)
        for pair in rng.choice(kind, count, replace=False).tolist()
    ]


def drawn(pairs):
    columns = (pairs.first, pairs.second, pairs.same, pairs.fold)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@given(
    sizes=st.lists(st.integers(2, 5), min_size=4, max_size=9),
    pairs_per_fold=st.integers(2, 30),
    folds=st.integers(1, 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_reference(sizes, pairs_per_fold, folds, seed):
    """Pair by pair, for people whose pictures come in any order."""
    people = np.repeat(np.arange(len(sizes)), sizes)
    identities = np.random.default_rng(seed).permutation(people)
    pairs = draw_pairs(identities, pairs_per_fold, seed, folds)
    assert drawn(pairs) == by_list(identities, pairs_per_fold, seed, folds)


def test_sizes():
    """Those of the recipe, and a draw of so many that all pairs are shuffled."""
    for people, samples, each in ((200, 6, 300), (60, 3, 300), (60, 12, 500)):
        identities = np.repeat(np.arange(people), samples)
        assert drawn(draw_pairs(identities, each, 3)) == by_list(identities, each, 3, 10)


def test_properties():
    """Of two people and two, all pairs come as often: 4 impostors, 2 genuine, one of each drawn."""
    seen = Counter()
    for seed in range(2000):
        seen.update((a, b) for a, b, _, _ in drawn(draw_pairs(np.array([0, 1, 1, 0]), 2, seed, 1)))
    expected = {(0, 3): 1000, (1, 2): 1000} | {x: 500 for x in ((0, 1), (0, 2), (1, 3), (2, 3))}
    assert seen == pytest.approx(expected, abs=100)  # five deviations of the least certain


def test_memory():
    """Of 3,000 pictures a fold there are 4.5 million pairs, which are not written out."""
    identities = np.repeat(np.arange(500), 60)
    tracemalloc.start()
    draw_pairs(identities, 300, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * identities.nbytes


def test_errors():
    message = "a fold of 2 has 1 genuine and 0 impostor pairs; it needs two people"
    with pytest.raises(ValueError, match=message):
        draw_pairs(np.array([0, 0, 1, 1]), 6, 0, folds=2)
