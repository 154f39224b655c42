"""Blocks against the whole product, and what is kept of them against sorting all."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.evaluation import Highest, Nearest, score_blocks, search

SIZES = st.integers(1, 7)


@settings(max_examples=80, deadline=None)
@given(SIZES, st.integers(1, 40), st.integers(1, 9), st.integers(1, 11), st.integers(0, 999))
def test_reference(probes, entries, k, block, seed):
    """Whole numbers, so that sums are exact and ties are many."""
    rng = np.random.default_rng(seed)
    p, g = (rng.integers(-2, 3, (n, 3)).astype(np.float16) for n in (probes, entries))
    whole = p.astype(float) @ g.T.astype(float)
    best, top, seen = Nearest(probes, k), Highest(k), np.full(whole.shape, np.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "ROWS", block)
        patch.setattr(search, "COLUMNS", block)
        patch.setattr(search, "_WAITING", seed % 20)
        for rows, columns, scores in score_blocks(p, g):
            assert scores.size <= block * block
            seen[rows, columns] = scores
            best.add(rows, columns, scores)
            top.add(scores)
    np.testing.assert_array_equal(seen, whole)
    kept = min(k, entries)
    for q in range(probes):
        order = sorted(range(entries), key=lambda i: (-whole[q, i], i))[:kept]
        assert best.entries[q].tolist() == order + [-1] * (k - kept)
        assert best.scores[q].tolist() == whole[q, order].tolist() + [-np.inf] * (k - kept)
    np.testing.assert_array_equal(top.scores(), np.sort(whole.ravel())[::-1][:k])


def test_memory():
    """A gallery that is read by slices is never held, however long it is."""

    class Endless:
        shape = (60 * search.COLUMNS, 8)

        def __getitem__(self, rows):
            held.append(rows.stop - rows.start)
            return np.full((held[-1], 8), 1 + rows.start // search.COLUMNS, np.float16)

    held = []
    tracemalloc.start()
    best, top = Nearest(50, 5), Highest(10)
    for rows, columns, scores in score_blocks(np.ones((50, 8)), Endless()):
        best.add(rows, columns, scores)
        top.add(scores)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held == [search.COLUMNS] * 60
    assert peak < 30 * 50 * search.COLUMNS * 4  # thirty blocks; all scores would be sixty
    last = 59 * search.COLUMNS  # entries of the last block are the longest
    assert best.entries[0].tolist() == list(range(last, last + 5))


def test_errors():
    for probes, gallery in ((np.ones(3), np.ones((2, 3))), (np.ones((1, 3)), np.ones((2, 4)))):
        with pytest.raises(ValueError, match=r"must be \[q, d\] and \[g, d\]; got"):
            list(score_blocks(probes, gallery))
    bad = np.ones((5, 2))
    bad[3, 1] = np.nan
    for values in (np.nan, np.inf):
        bad[3, 1] = values
        with pytest.raises(ValueError, match="gallery must be finite; row 3 is not"):
            list(score_blocks(np.ones((1, 2)), bad))
        with pytest.raises(ValueError, match="probes must be finite; row 3 is not"):
            list(score_blocks(bad, np.ones((1, 2))))
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        Nearest(2, 0)
