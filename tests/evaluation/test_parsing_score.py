import inspect
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, jaccard_score

from partlocal.evaluation import ParsingScore

FACE = ("background", "skin", "eye", "nose", "hair")
INNER = {"inner": ("eye", "nose")}

label_maps = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


def filled(pairs, labels=FACE, groups=None):
    score = ParsingScore(labels, groups)
    predicted, target = np.array(pairs).T
    score.update(predicted, target)
    return score


def test_example():
    score = ParsingScore(FACE, INNER)
    score.update(
        predicted=np.array([[0, 1, 2, 2], [3, 3, 4, 0]]),
        target=np.array([[0, 1, 2, 3], [3, 3, 0, 255]]),
    )
    assert score.confusion.tolist() == [
        [1, 0, 0, 0, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 2, 0],
        [0, 0, 0, 0, 0],
    ]
    assert score.f1 == pytest.approx(
        {"background": 2 / 3, "skin": 1, "eye": 2 / 3, "nose": 4 / 5, "hair": 0}
    )
    assert score.mean_f1 == pytest.approx((1 + 2 / 3 + 4 / 5 + 0) / 4)
    assert score.mean_iou == pytest.approx((1 / 2 + 1 + 1 / 2 + 2 / 3 + 0) / 5)
    assert score.overall_f1 == 1  # a piece of nose called eye is right


@given(label_maps)
@settings(max_examples=60, deadline=None)
def test_reference(pairs):
    predicted, target = np.array(pairs).T
    score = filled(pairs, groups=INNER)
    f1 = f1_score(target, predicted, labels=range(5), average=None, zero_division=np.nan)
    np.testing.assert_allclose(list(score.f1.values()), f1)
    seen = np.union1d(predicted, target)
    iou = jaccard_score(target, predicted, labels=seen, average=None)
    assert score.mean_iou == pytest.approx(iou.mean())
    np.testing.assert_allclose(np.array(list(score.iou.values()))[seen], iou)
    if seen.max() > 0:
        assert score.mean_f1 == pytest.approx(np.nanmean(f1[1:]))
    inner = [np.isin(labels, (2, 3)) for labels in (target, predicted)]
    if (inner[0] | inner[1]).any():
        assert score.overall_f1 == pytest.approx(f1_score(*inner, zero_division=0))
    else:
        assert np.isnan(score.overall_f1)


@given(label_maps, label_maps)
@settings(max_examples=30, deadline=None)
def test_properties(first, second):
    """One matrix over the data set: pictures may come in any order and any batches."""
    together = filled(first + second)
    apart = filled(second)
    apart.update(*np.array(first).T)
    np.testing.assert_array_equal(together.confusion, apart.confusion)


def test_merging_groups():
    labels = ("background", "skin", "left_brow", "left_eye", "right_eye", "hair")
    coarse = ("background", "skin", "hair", "eyes", "mouth")
    table = np.array([0, 1, 2, 3, 3, 2])
    matrix = np.zeros((5, 6))
    matrix[table, range(6)] = 1
    predicted, target = np.random.default_rng(0).integers(0, 6, size=(2, 4, 16, 16))

    score = ParsingScore(labels)
    score.update(predicted, target)
    merged = score.merge(matrix, coarse)
    expected = ParsingScore(coarse)
    expected.update(table[predicted], table[target])
    np.testing.assert_array_equal(merged.confusion, expected.confusion)
    assert np.isnan(merged.f1["mouth"])
    assert merged.mean_f1 == pytest.approx(np.mean([merged.f1[n] for n in coarse[1:4]]))
    assert score.merged_f1("left_eye", "right_eye") == pytest.approx(merged.f1["eyes"])

    other = ParsingScore(coarse)  # the maps are coarse already, the parser is not
    other.update(predicted, table[target], merge=matrix)
    np.testing.assert_array_equal(other.confusion, expected.confusion)


def test_label_set_like():
    labels = SimpleNamespace(labels=FACE, groups=INNER)
    assert ParsingScore(labels).labels == FACE
    assert filled([(2, 3)], labels).overall_f1 == 1
    assert filled([(2, 3)], labels, groups={"inner": ("skin", "nose")}).overall_f1 == 0


def test_helen():
    labels = pytest.importorskip("partlocal.labels")
    score = ParsingScore(labels.HELEN)
    score.update(np.array([4, 5, 7, 1, 0]), np.array([5, 5, 9, 10, 6]))
    assert score.overall_f1 == pytest.approx(2 * 3 / 7)

    coarse = labels.LabelSet("coarse", ("background", "skin", "eyes", "mouth"))
    merged = ParsingScore(coarse)
    merged.update(
        np.array([4, 5, 7, 1, 10]), np.array([2, 2, 3, 2, 0]), merge=labels.HELEN.remap(coarse)
    )
    assert merged.f1 == pytest.approx({"background": 1, "skin": 0, "eyes": 4 / 5, "mouth": 1})


def test_errors():
    score = ParsingScore(FACE)
    zeros = np.zeros((2, 2), dtype=int)
    with pytest.raises(ValueError, match="nothing was scored yet: call update"):
        _ = score.mean_f1
    with pytest.raises(ValueError, match=r"predicted must be \[2, 2\] \(as target\); got \[2, 1\]"):
        inspect.unwrap(ParsingScore.update)(score, zeros[:, :1], zeros)
    with pytest.raises(ValueError, match=r"predicted must hold labels from 0 to 4; got 5"):
        score.update(zeros + 5, zeros)
    with pytest.raises(ValueError, match=r"target must hold labels from 0 to 4; got -1"):
        score.update(zeros, zeros - 1)
    with pytest.raises(ValueError, match=r"predicted must hold integer labels; got float64: take"):
        score.update(zeros / 2, zeros)
    assert not score.confusion.any()  # a refused update leaves nothing behind
    with pytest.raises(ValueError, match=r"merge matrix must be \[5, m\]; got \[4, 4\]"):
        score.update(zeros, zeros, merge=np.eye(4))
    with pytest.raises(ValueError, match=r"merge matrix must be \[2, 5\]; got \[2, 4\]"):
        score.merge(np.eye(2, 4), ["a", "b"])
    with pytest.raises(ValueError, match=r"each column of the merge matrix must hold one 1"):
        score.merge(np.ones((2, 5)), ["a", "b"])
    with pytest.raises(ValueError, match=r"no label or group is called chin; there are backgrou"):
        score.merged_f1("chin")
    with pytest.raises(ValueError, match="no label or group is called inner"):
        _ = score.overall_f1
    with pytest.raises(ValueError, match="no label or group is called chin"):
        ParsingScore(FACE, {"low": ("chin",)})
    for labels in ([], ["skin", "skin"]):
        with pytest.raises(ValueError, match="labels must be different names"):
            ParsingScore(labels)
