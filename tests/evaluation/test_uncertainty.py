import inspect
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from partlocal.evaluation import auc, auc_interval, paired_accuracy_test


def unchecked(function):
    """Step around the annotations, which would refuse wrong shapes before the function does."""
    return inspect.unwrap(function)


def all_pairs(seed=0, people=12, pictures=3, signal=1.0):
    """Scores of all pairs of pictures, spoiled by how recognisable each person is."""
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(people), pictures)
    i, j = np.triu_indices(len(ids), 1)
    identities = np.stack([ids[i], ids[j]], 1)
    own = generator.normal(size=people)
    scores = generator.normal(size=len(i)) + own[ids[i]] / 2 + own[ids[j]] / 2
    return np.round(scores + signal * (ids[i] == ids[j]), 1), identities


class TestAucInterval:
    def test_reference(self):
        """Repeat every pair as often as it was drawn, and ask for the plain AUC."""
        scores, identities = all_pairs(people=6)
        same = identities[:, 0] == identities[:, 1]
        generator = np.random.default_rng(5)
        values = []
        for _ in range(40):
            drawn = generator.multinomial(6, np.full(6, 1 / 6))
            first, second = drawn[identities].T
            times = np.where(same, first, first * second)
            values.append(auc(np.repeat(scores, times), np.repeat(same, times)))
        interval = auc_interval(scores, identities, resamples=40, level=0.9, seed=5)
        assert interval == pytest.approx(np.quantile(values, [0.05, 0.95]))
        assert interval.low < interval.high

    def test_properties(self):
        scores, identities = all_pairs()
        interval = auc_interval(scores, identities, resamples=100, seed=1)
        assert interval == auc_interval(scores, identities, resamples=100, seed=1)
        assert interval != auc_interval(scores, identities, resamples=100, seed=2)
        value = auc(scores, identities[:, 0] == identities[:, 1])
        assert interval.low < value < interval.high
        narrow = auc_interval(scores, identities, resamples=100, level=0.5, seed=1)
        assert interval.low < narrow.low < narrow.high < interval.high
        # Names and the order of pairs do not matter.
        order = np.random.default_rng(0).permutation(len(scores))
        names = np.array([f"person {i:02}" for i in range(12)])[identities]
        shuffled = auc_interval(scores[order], names[order][:, ::-1], resamples=100, seed=1)
        assert shuffled == pytest.approx(interval)

    def test_covers_the_truth(self):
        """A 90 % interval over people holds the AUC of the population about as often."""
        truth = np.mean(
            [
                auc(scores, identities[:, 0] == identities[:, 1])
                for scores, identities in (all_pairs(seed, people=60) for seed in range(30))
            ]
        )
        hits = 0
        for seed in range(60):
            low, high = auc_interval(*all_pairs(seed + 100, people=40), 60, level=0.9)
            hits += low <= truth <= high
        assert 45 <= hits <= 60

    def test_errors(self):
        scores, identities = all_pairs(people=3)
        with pytest.raises(ValueError, match=r"identities must be \[p, 2\]; got \[36\]"):
            unchecked(auc_interval)(scores, identities[:, 0])
        with pytest.raises(ValueError, match=r"scores must be \[p\] with p = 35"):
            unchecked(auc_interval)(scores, identities[1:])
        with pytest.raises(ValueError, match="got impostor pairs alone"):
            auc_interval(scores, np.stack([np.zeros(36), np.ones(36)], 1))
        for resamples, level in ((0, 0.9), (10, 1.0), (10, 0.0)):
            with pytest.raises(ValueError, match=r"resamples must be >= 1 and level in \(0, 1\)"):
                auc_interval(scores, identities, resamples, level)


class TestPairedAccuracyTest:
    def test_example(self):
        # a alone is right on 5 of 10 pairs, b alone on none: p = 2 / 2^5.
        a, b = np.ones(10, dtype=bool), np.array([True] * 5 + [False] * 5)
        result = paired_accuracy_test(a, b)
        assert result.difference == 0.5
        assert result.p_value == pytest.approx(2 / 32)
        assert result.standard_error == pytest.approx(math.sqrt(0.25 * 10 / 9 / 10))

    @given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 30))
    @settings(max_examples=60, deadline=None)
    def test_reference(self, only_a, only_b, both):
        assume(only_a + only_b + both > 1)
        a = np.repeat([1, 0, 1], [only_a, only_b, both])
        b = np.repeat([0, 1, 1], [only_a, only_b, both])
        result = paired_accuracy_test(a, b)
        n, fewer = only_a + only_b, min(only_a, only_b)
        tail = sum(math.comb(n, i) for i in range(fewer + 1))
        assert result.p_value == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-9)
        assert result.difference == pytest.approx(a.mean() - b.mean())
        back = paired_accuracy_test(b, a)
        assert back == pytest.approx((-result.difference, result.standard_error, result.p_value))

    def test_many_pairs(self):
        # Beyond the range of floats: 2^-40000 and the binomials overflow, their product does not.
        a = np.repeat([1, 0], [20_300, 19_700])
        tail = sum(math.comb(400, i) for i in range(186))
        small = paired_accuracy_test(np.repeat([1, 0], [215, 185]), np.repeat([0, 1], [215, 185]))
        assert small.p_value == pytest.approx(2 * tail / 2**400)
        z = 600 / math.sqrt(40_000)  # the normal approximation, with its continuity correction
        normal = math.erfc((z - 1 / 200) / math.sqrt(2))
        assert paired_accuracy_test(a, 1 - a).p_value == pytest.approx(normal, rel=1e-3)

    def test_is_calibrated(self):
        generator = np.random.default_rng(0)
        draws = generator.random((400, 2, 300)) < 0.7
        p_values = np.array([paired_accuracy_test(a, b).p_value for a, b in draws])
        assert np.mean(p_values <= 0.05) <= 0.07
        assert np.mean(p_values <= 0.5) >= 0.35

    def test_errors(self):
        a = np.array([True, False])
        with pytest.raises(ValueError, match=r"same p >= 2; got \[2\] and \[1\]"):
            unchecked(paired_accuracy_test)(a, a[:1])
        with pytest.raises(ValueError, match=r"same p >= 2; got \[0\] and \[0\]"):
            paired_accuracy_test(a[:0], a[:0])
        with pytest.raises(ValueError, match=r"correct_b must hold booleans, or 0 and 1"):
            paired_accuracy_test(a, np.array([0.5, 1.0]))
