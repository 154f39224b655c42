import inspect

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from partlocal.evaluation import Standings, rank_k, standings, tpir_at_fpir
from partlocal.evaluation import search as blocks


@st.composite
def searches(draw):
    """Scores with many ties; the gallery may hold a person twice; some probes are strangers."""
    gallery = draw(st.lists(st.integers(0, 4), min_size=2, max_size=7))
    probes = draw(st.lists(st.integers(0, 6), min_size=2, max_size=12))
    cells = len(gallery) * len(probes)
    scores = draw(st.lists(st.integers(-4, 4), min_size=cells, max_size=cells))
    shape = (len(probes), len(gallery))
    return np.array(scores, float).reshape(shape) / 4, np.array(gallery), np.array(probes)


def slow_rank(scores, gallery, probe):
    """Walk down the sorted gallery until a mate comes; others go first in ties. None: no mate."""
    order = sorted(range(len(gallery)), key=lambda i: (-scores[i], gallery[i] == probe))
    for rank, i in enumerate(order, start=1):
        if gallery[i] == probe:
            return rank
    return None


def test_example():
    gallery, probes = np.array(["ann", "bob", "ann", "eve"]), np.array(["ann", "bob", "eve"])
    scores = np.array(
        [
            [-0.9, -0.5, -0.1, -0.6],  # ann: the second picture of ann is first
            [-0.2, -0.3, -0.4, -0.9],  # bob: behind one ann
            [-0.1, -0.2, -0.3, -0.3],  # eve: level with the third, so fourth
        ]
    )
    ks = np.array([1, 2, 3, 4])
    np.testing.assert_allclose(rank_k(scores, gallery, probes, ks), [1 / 3, 2 / 3, 2 / 3, 1])
    assert rank_k(scores, gallery, probes) == 1 / 3


@given(searches())
@settings(max_examples=80, deadline=None)
def test_reference(search):
    scores, gallery, probes = search
    mated = np.isin(probes, gallery)
    assume(mated.any())
    scores, probes = scores[mated], probes[mated]
    ranks = [slow_rank(s, gallery.tolist(), p) for s, p in zip(scores, probes, strict=True)]
    for k in range(1, len(gallery) + 1):
        expected = np.mean([rank <= k for rank in ranks])
        assert rank_k(scores, gallery, probes, k) == expected
    assert rank_k(scores, gallery, probes, len(gallery)) == 1


def test_left_out_entries():
    """All pictures against all: -inf on the diagonal takes the probe out of its own gallery."""
    ids = np.array([0, 0, 1, 1])
    scores = np.array([[9, 1, 2, 0], [1, 9, 0, 0], [0, 0, 9, 1], [0, 0, 1, 9.0]])
    assert rank_k(scores, ids, ids) == 1
    np.fill_diagonal(scores, -np.inf)
    assert rank_k(scores, ids, ids) == 3 / 4


@given(searches(), st.sampled_from([0.01, 0.1, 0.25, 0.3, 0.5, 1.0]))
@settings(max_examples=80, deadline=None)
def test_open_set_reference(search, fpir):
    scores, gallery, probes = search
    mated = np.isin(probes, gallery)
    assume(mated.any() and not mated.all())
    alarms = scores[~mated].max(1)
    best = 0.0
    for threshold in [-np.inf, *alarms]:
        if np.mean(alarms > threshold) <= fpir:
            found = [
                slow_rank(s, gallery.tolist(), p) == 1 and s[gallery == p].max() > threshold
                for s, p in zip(scores[mated], probes[mated], strict=True)
            ]
            best = max(best, np.mean(found))
    assert tpir_at_fpir(scores, gallery, probes, fpir) == best

    place = max(int(len(alarms) * fpir) - 1, 0)
    threshold = sorted(alarms, reverse=True)[place]
    found = [
        s[gallery == p].max() > max(threshold, s[gallery != p].max(initial=-np.inf))
        for s, p in zip(scores[mated], probes[mated], strict=True)
    ]
    parity = tpir_at_fpir(scores, gallery, probes, fpir, mode="parity")
    assert parity == np.mean(found)
    assert parity <= best


def test_open_set_rates():
    scores, gallery = np.array([[0.9], [0.5], [0.1], [0.8], [0.4], [0.3]]), np.array([7])
    probes = np.array([7, 7, 7, 1, 2, 3])
    rates = tpir_at_fpir(scores, gallery, probes, np.array([0.3, 1 / 3, 2 / 3, 1.0]))
    np.testing.assert_allclose(rates, [1 / 3, 2 / 3, 2 / 3, 1])


def test_errors():
    scores, gallery, probes = np.eye(3), np.array([0, 1, 2]), np.array([0, 1, 5])
    with pytest.raises(ValueError, match=r"1 of 3 probes have no mate .*index 2: leave them out"):
        rank_k(scores, gallery, probes)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k must be from 1 to the 3 gallery entries; got {k}"):
            rank_k(scores, gallery, gallery, k)
    with pytest.raises(ValueError, match=r"scores must be \[q, g\] = \[2, 3\], a row a probe; got"):
        inspect.unwrap(rank_k)(scores, gallery, probes[:2])
    with pytest.raises(ValueError, match=r"must be \[g\] and \[q\]; got \[3\] and \[3, 1\]"):
        inspect.unwrap(rank_k)(scores, gallery, probes[:, None])
    with pytest.raises(ValueError, match=r"empty, \[0, 3\]: there is nobody"):
        rank_k(scores[:0], gallery, probes[:0])
    for value in (np.nan, np.inf):
        broken = scores.copy()
        broken[1, 2] = value
        with pytest.raises(ValueError, match=r"1 are not, first at \[1, 2\]: look for zero"):
            rank_k(broken, gallery, gallery)
    with pytest.raises(ValueError, match="with and without mates; got none of strangers"):
        tpir_at_fpir(scores, gallery, gallery, 0.1)
    with pytest.raises(ValueError, match="got none with a mate in the gallery"):
        tpir_at_fpir(scores, gallery, probes + 10, 0.1)
    with pytest.raises(ValueError, match=r"fpir must be in \(0, 1\]; got 0.0"):
        tpir_at_fpir(scores, gallery, probes, 0.0)
    found = standings(np.eye(2), np.eye(2), gallery[:2], probes[:2])
    message = "mode must be 'strict', 'parity' or 'nearest'; got 'exact'"
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(Standings.tpir_at_fpir)(found, 0.1, mode="exact")
    with pytest.raises(ValueError, match=r"must be one a vector, \[2\] and \[2\], and not"):
        standings(np.eye(2), np.eye(2), gallery[:1], probes[:2])


@settings(max_examples=60, deadline=None)
@given(searches(), st.integers(1, 3))
def test_vectors(search, block):
    """Searched in blocks, with products that are the drawn scores, as if the scores were given."""
    scores, gallery, probes = search
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "ROWS", block)
        patch.setattr(blocks, "COLUMNS", block)
        found = standings(scores, np.eye(len(gallery)), gallery, probes)
    for q, probe in enumerate(probes):
        mine, others = scores[q][gallery == probe], scores[q][gallery != probe]
        assert found.mated[q] == bool(len(mine))
        assert found.mate[q] == mine.max(initial=-np.inf)
        assert found.other[q] == others.max(initial=-np.inf)
        assert found.ahead[q] == sum(x >= mine.max(initial=-np.inf) for x in others)
    mated = found.of(found.mated)
    if found.mated.any():
        ranks = np.arange(1, len(gallery) + 1)
        expected = rank_k(scores[found.mated], gallery, probes[found.mated], ranks)
        np.testing.assert_array_equal(mated.rank_k(ranks), expected)
    if found.mated.any() and not found.mated.all():
        for mode in ("strict", "parity", "nearest"):
            expected = tpir_at_fpir(scores, gallery, probes, 0.4, mode)
            assert found.tpir_at_fpir(0.4, mode) == expected


def test_nearest():
    """Ten strangers of scores 0.1 to 1, by hand: 0.14 is nearer to one of them, 0.04 to none."""
    mates = np.array([1.0, 0.95, 0.3])
    scores = np.concatenate([mates, np.arange(1, 11) / 10])[:, None]
    probes = np.array([0, 0, 0, *range(1, 11)])
    found = tpir_at_fpir(scores, np.array([0]), probes, np.array([0.04, 0.14, 0.26]), "nearest")
    np.testing.assert_allclose(found, [0, 1 / 3, 2 / 3])
