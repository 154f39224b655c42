import inspect
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from partlocal.evaluation import (
    auc,
    roc,
    tar_above_impostors,
    tar_at_far,
    ten_fold_accuracy,
)


@st.composite
def pairs(draw, smallest=4):
    """Scores on a coarse grid (many ties), negative ones included, of both kinds of pairs."""
    count = draw(st.integers(smallest, 40))
    scores = draw(st.lists(st.integers(-6, 6), min_size=count, max_size=count))
    same = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    assume(0 < sum(same) < count)
    return np.array(scores) / 4, np.array(same)


def noisy_pairs(count=600, seed=0):
    generator = np.random.default_rng(seed)
    same = generator.random(count) < 0.5
    return np.round(generator.normal(size=count) + 1.5 * same, 1) - 3, same


def unchecked(function):
    """Step around the annotations, which would refuse wrong shapes before the function does."""
    return inspect.unwrap(function)


def slow_fold_accuracy(scores, same, folds):
    """Decide pair by pair, threshold by threshold."""
    accuracies, thresholds = [], []
    for fold in range(max(folds) + 1):
        train = [i for i in range(len(scores)) if folds[i] != fold]
        test = [i for i in range(len(scores)) if folds[i] == fold]
        best, best_right = math.inf, -1
        for threshold in [math.inf, *sorted({scores[i] for i in train}, reverse=True)]:
            right = sum((scores[i] >= threshold) == same[i] for i in train)
            if right > best_right:
                best, best_right = threshold, right
        accuracies.append(sum((scores[i] >= best) == same[i] for i in test) / len(test))
        thresholds.append(best)
    return accuracies, thresholds


def slow_insightface(a, b, same, folds):
    """The protocol as insightface documents it: a grid of squared distances, first maximum."""
    distances = np.sum(np.square(a - b), 1)
    grid = np.arange(0, 4, 0.01)
    accuracies = []
    for train, test in KFold(folds, shuffle=False).split(distances):
        rates = [np.mean((distances[train] < t) == same[train]) for t in grid]
        accuracies.append(np.mean((distances[test] < grid[np.argmax(rates)]) == same[test]))
    return distances, np.array(accuracies)


class TestTenFoldAccuracy:
    def test_example(self):
        # Fold 0 is judged at the threshold of fold 1 (0.4: both right) and the other way round.
        scores = np.array([0.9, 0.6, 0.5, 0.4, 0.3, -0.2])
        same = np.array([1, 0, 1, 1, 0, 0])
        result = ten_fold_accuracy(scores, same, folds=2)
        np.testing.assert_array_equal(result.thresholds, [0.4, 0.9])
        np.testing.assert_array_equal(result.accuracies, [2 / 3, 2 / 3])
        np.testing.assert_array_equal(result.correct, [True, False, True, False, True, True])
        assert result.mean == pytest.approx(2 / 3)
        assert result.standard_error == 0

    def test_deviations(self):
        result = ten_fold_accuracy(*noisy_pairs())
        accuracies = result.accuracies.tolist()
        mean = sum(accuracies) / 10
        squares = sum((value - mean) ** 2 for value in accuracies)
        assert result.mean == pytest.approx(mean)
        assert result.mean == pytest.approx(result.correct.mean())
        assert result.population_std == pytest.approx(math.sqrt(squares / 10))
        assert result.standard_error == pytest.approx(math.sqrt(squares / 9 / 10))
        assert squares > 0

    def test_first_folds_take_the_remainder(self):
        scores, same = noisy_pairs(count=103)
        by_number = ten_fold_accuracy(scores, same, folds=10)
        ids = np.empty(103, dtype=int)
        for fold, (_, test) in enumerate(KFold(10).split(scores)):
            ids[test] = fold
        np.testing.assert_array_equal(np.bincount(ids), [11, 11, 11, *[10] * 7])
        np.testing.assert_array_equal(by_number.correct, ten_fold_accuracy(scores, same, ids)[-1])

    @given(pairs(smallest=6), st.integers(2, 4), st.randoms())
    @settings(max_examples=60, deadline=None)
    def test_reference(self, data, count, random):
        scores, same = data
        folds = np.array([i % count for i in range(len(scores))])
        random.shuffle(folds)
        assume(all(len(set(same[folds == fold])) == 2 for fold in range(count)))
        result = ten_fold_accuracy(scores, same, folds)
        accuracies, thresholds = slow_fold_accuracy(scores.tolist(), same.tolist(), folds.tolist())
        np.testing.assert_array_equal(result.accuracies, accuracies)
        np.testing.assert_array_equal(result.thresholds, thresholds)

    @given(pairs(smallest=8))
    @settings(max_examples=30, deadline=None)
    def test_properties(self, data):
        scores, same = data
        folds = np.arange(len(scores)) % 2
        assume(all(len(set(same[folds == fold])) == 2 for fold in range(2)))
        result = ten_fold_accuracy(scores, same, folds)
        # Only the order of scores matters, and neither the names of folds nor the order of pairs.
        stretched = ten_fold_accuracy(np.exp(scores), same, np.array(["a", "b"])[folds])
        np.testing.assert_array_equal(result.accuracies, stretched.accuracies)
        turned = ten_fold_accuracy(scores[::-1], same[::-1], folds[::-1])
        np.testing.assert_array_equal(result.correct, turned.correct[::-1])

    @pytest.mark.parametrize("count", [600, 707])
    def test_parity_with_insightface(self, count):
        generator = np.random.default_rng(count)
        same = generator.random(count) < 0.5
        a, noise = generator.normal(size=(2, count, 8))
        b = np.where(same[:, None], a + noise, noise)
        a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
        distances, accuracies = slow_insightface(a, b, same, 10)
        result = ten_fold_accuracy(-distances, same, mode="parity")
        np.testing.assert_array_equal(result.accuracies, accuracies)  # bit for bit
        assert result.mean == np.mean(accuracies)
        assert result.population_std == np.std(accuracies)
        assert np.isin(-result.thresholds, np.arange(0, 4, 0.01)).all()

    def test_parity_accepts_strictly_below(self):
        # 0.25 is a point of the grid; accepting at it would make all pairs right.
        distances = np.array([0.25, 0.26, 0.25, 0.26])
        assert 0.25 in np.arange(0, 4, 0.01)
        result = ten_fold_accuracy(-distances, np.array([1, 0, 1, 0]), folds=2, mode="parity")
        np.testing.assert_array_equal(result.thresholds, [-0.26, -0.26])
        assert result.mean == 1

    def test_inverted_scores_reject_all(self):
        scores = np.array([0.1, 0.9, 0.2, 0.8])
        result = ten_fold_accuracy(scores, np.array([1, 0, 1, 0]), folds=2)
        np.testing.assert_array_equal(result.thresholds, [np.inf, np.inf])
        assert result.mean == 0.5

    def test_errors(self):
        scores, same = np.array([0.9, 0.1, 0.8, 0.2]), np.array([1, 0, 1, 0])
        accuracy = unchecked(ten_fold_accuracy)
        with pytest.raises(ValueError, match=r"folds must be from 2 to the 4 pairs; got 10"):
            accuracy(scores, same)
        with pytest.raises(ValueError, match=r"folds must be from 2 to the 4 pairs; got 1"):
            accuracy(scores, same, folds=1)
        with pytest.raises(ValueError, match=r"fold 1 holds impostor pairs alone: keep the proto"):
            accuracy(scores, same[[0, 2, 1, 3]] * 0 + [1, 0, 0, 0], folds=2)
        with pytest.raises(ValueError, match=r"fold 0 holds genuine pairs alone"):
            accuracy(scores, np.array([1, 1, 0, 0]), folds=2)
        with pytest.raises(ValueError, match=r"folds must be a number or \[p\] with p = 4 .*\[3\]"):
            accuracy(scores, same, folds=np.array([0, 0, 1]))
        with pytest.raises(ValueError, match=r"at least 2 different folds; got \[3\]"):
            accuracy(scores, same, folds=np.array([3, 3, 3, 3]))
        with pytest.raises(ValueError, match=r"scores must be \[p\] with p = 3 .*got \[4\]"):
            accuracy(scores, same[:3], folds=2)
        with pytest.raises(ValueError, match=r"same must be \[p\]; got \[2, 2\]"):
            accuracy(scores, same.reshape(2, 2), folds=2)
        with pytest.raises(ValueError, match="empty: there are no pairs"):
            accuracy(scores[:0], same[:0])
        with pytest.raises(ValueError, match=r"1 of 4 are not, first at index 2: look for zero"):
            accuracy(np.array([0, 1, np.nan, 2]), same, folds=2)
        with pytest.raises(ValueError, match=r"booleans, or 0 and 1; got values like \[-1, 1\]"):
            accuracy(scores, np.array([1, -1, 1, -1]), folds=2)
        with pytest.raises(ValueError, match=r"mode must be 'strict' or 'parity'; got 'exact'"):
            accuracy(scores, same, folds=2, mode="exact")
        with pytest.raises(ValueError, match=r"negated squared distances .*up to 0.9: pass -\(\("):
            accuracy(scores, same, folds=2, mode="parity")


class TestTarAtFar:
    def test_example(self):
        scores = np.array([-0.1, -0.3, -0.5, -0.2, -0.6, -0.7, -0.8])
        same = np.array([1, 1, 1, 0, 0, 0, 0])
        far = np.array([0.01, 0.24, 0.25, 1.0])
        np.testing.assert_array_equal(tar_at_far(scores, same, far), [1 / 3, 1 / 3, 1, 1])
        parity = tar_at_far(scores, same, far, mode="parity")
        np.testing.assert_array_equal(parity, [1 / 3, 1, 1, 1])

    def test_ties_are_accepted_together(self):
        scores, same = np.array([0.5, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])
        assert tar_at_far(scores, same, 0.4) == 0
        assert tar_at_far(scores, same, 0.5) == 1

    @given(pairs(), st.floats(0.001, 1))
    @settings(max_examples=80, deadline=None)
    def test_reference(self, data, far):
        scores, same = data
        best = 0.0
        for threshold in [np.inf, *scores]:
            if np.mean(scores[~same] >= threshold) <= far:
                best = max(best, np.mean(scores[same] >= threshold))
        assert tar_at_far(scores, same, far) == best

    @given(pairs(), st.floats(0.001, 1))
    @settings(max_examples=80, deadline=None)
    def test_parity_reference(self, data, far):
        fars, tars, _ = roc_curve(data[1], data[0])
        fars, tars = np.flipud(fars), np.flipud(tars)
        _, index = min(zip(abs(fars - far), range(len(fars)), strict=True))
        assert tar_at_far(*data, far, mode="parity") == tars[index]

    def test_modes_agree_where_the_rate_is_met(self):
        scores, same = noisy_pairs()
        fars = roc(scores, same).far[1:]
        fars = fars[fars > 0]
        strict, parity = (tar_at_far(scores, same, fars, mode) for mode in ("strict", "parity"))
        np.testing.assert_array_equal(strict, parity)

    def test_errors(self):
        scores, same = np.array([0.9, 0.1]), np.array([1, 0])
        for far in (0.0, -0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=rf"far must be in \(0, 1\]; got {far}"):
                tar_at_far(scores, same, far)
        with pytest.raises(ValueError, match="genuine and impostor pairs; got genuine pairs alone"):
            tar_at_far(scores, np.array([1, 1]), 0.1)
        with pytest.raises(ValueError, match="got impostor pairs alone"):
            tar_at_far(scores, np.array([0, 0]), 0.1)
        with pytest.raises(ValueError, match="mode must be"):
            unchecked(tar_at_far)(scores, same, 0.1, mode="nearest")


class TestRocAndAuc:
    def test_example(self):
        # Of the four pairs of pairs two are won, one is a tie, one is lost.
        assert auc(np.array([-1.0, -3.0, -3.0, -2.0]), np.array([1, 1, 0, 0])) == 2.5 / 4

    @given(pairs())
    @settings(max_examples=80, deadline=None)
    def test_reference(self, data):
        scores, same = data
        assert auc(scores, same) == pytest.approx(roc_auc_score(same, scores), abs=1e-12)
        for mine, reference in zip(roc(scores, same), roc_curve(same, scores), strict=True):
            np.testing.assert_allclose(mine, reference, rtol=1e-12)

    @given(pairs())
    @settings(max_examples=40, deadline=None)
    def test_properties(self, data):
        scores, same = data
        curve = roc(scores, same)
        assert (curve.far[0], curve.tar[0], curve.far[-1], curve.tar[-1]) == (0, 0, 1, 1)
        area = np.sum(np.diff(curve.far) * (curve.tar[1:] + curve.tar[:-1]) / 2)
        assert area == pytest.approx(auc(scores, same))
        assert auc(-scores, same) == pytest.approx(1 - auc(scores, same))

    def test_errors(self):
        for function in (auc, roc):
            with pytest.raises(ValueError, match="got impostor pairs alone"):
                function(np.array([0.1, 0.2]), np.array([0, 0]))
            with pytest.raises(ValueError, match="no pairs to judge"):
                function(np.array([]), np.array([]))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    st.lists(st.integers(-5, 5), min_size=2, max_size=30),
    st.integers(1, 100),
    st.data(),
)
def test_tar_above_impostors(genuine, impostors, percent, data):
    """All impostors or the highest alone: the strict rate of all pairs, and a walk down by hand."""
    far = percent / 100
    genuine, ranked = np.array(genuine) / 4, np.sort(np.array(impostors) / 4)[::-1]
    whole = np.concatenate([genuine, ranked])
    same = np.arange(len(whole)) < len(genuine)
    expected = tar_at_far(whole, same, far)
    nearest = int(np.round(far * len(ranked)))
    level = ranked[nearest - 1] if nearest else np.inf
    by_hand = np.mean(genuine >= level if nearest else genuine > ranked[0])
    enough = min(int(far * len(ranked)) + 1, len(ranked))
    kept = data.draw(st.integers(min(enough + 1, len(ranked)), len(ranked)))
    for some in (ranked[::-1], ranked[:kept]):
        assert tar_above_impostors(genuine, some, far, count=len(ranked)) == expected
        assert tar_above_impostors(genuine, some, far, "nearest", len(ranked)) == by_hand


def test_tar_above_impostors_errors():
    ones = np.ones(3)
    for far in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"far must be in \(0, 1\]; got"):
            tar_above_impostors(ones, ones, far)
    with pytest.raises(ValueError, match=r"impostors must hold the 6 highest of count = 50 scores"):
        tar_above_impostors(ones, ones, 0.1, count=50)
    with pytest.raises(ValueError, match="and not more than count; got 3"):
        tar_above_impostors(ones, ones, 0.1, count=2)
    with pytest.raises(ValueError, match=r"genuine must be finite scores, \[n\] with n > 0; got"):
        tar_above_impostors(ones[:0], ones, 0.1)
    with pytest.raises(ValueError, match="impostors must be finite scores"):
        tar_above_impostors(ones, ones * np.nan, 0.1)
    with pytest.raises(ValueError, match="mode must be 'strict' or 'nearest'; got 'exact'"):
        inspect.unwrap(tar_above_impostors)(ones, ones, 0.1, "exact")
