"""The shortcut checks: accuracy against a loop, absence is no evidence, and a fair world."""

import numpy as np
import pytest
from data.face_params import NuisanceRanges
from data.procedural import render
from data.shortcuts import draw_pairs, pair_scores, part_colours, shortcut_accuracies, ten_fold


def test_ten_fold_against_a_loop():
    rng = np.random.default_rng(0)
    same = np.arange(200) % 2 == 0
    scores = rng.standard_normal(200) + 1.2 * same
    accuracies = []
    for fold in range(10):
        test = (np.arange(200) // 2 % 10) == fold
        cuts = np.concatenate([[-np.inf], scores[~test]])
        hits = [((scores[~test] > c) == same[~test]).sum() for c in cuts]
        ties = [c for c, h in zip(cuts, hits, strict=True) if h == max(hits)]
        # The cut lies between two scores, and test scores in between may fall on either side.
        accuracies.append([((scores[test] > c) == same[test]).mean() for c in ties])
    low, high = np.mean([min(a) for a in accuracies]), np.mean([max(a) for a in accuracies])
    assert low - 0.03 <= ten_fold(scores, same) <= high + 0.03
    assert ten_fold(same.astype(float), same) == 1.0


def test_pairs_and_scores():
    people, samples, same = draw_pairs(np.random.default_rng(0), 10, 100)
    assert ((people[:, 0] == people[:, 1]) == same).all()
    assert same.sum() == 50
    assert len(np.unique(samples)) == 200
    a = np.array([[1.0, 2.0, np.nan], [0.0, 1.0, 5.0], [2.0, 0.0, 1.0]])
    for score in pair_scores(a, a).values():
        assert np.allclose(score, score.max())  # absence is no evidence
    assert (
        np.isnan(part_colours(render(0, 0, 0, ranges=NuisanceRanges(occluder=0.0)))).sum() % 3 == 0
    )


@pytest.mark.slow
def test_no_shortcuts():
    accuracy = shortcut_accuracies(0, 100_000, 300, 2400)
    assert accuracy["part colours"] <= 0.70
    assert accuracy["grey pixels"] <= 0.65
    for name in ("hair", "glasses", "background"):
        assert abs(accuracy[name] - 0.5) < 0.03, name  # the recipe's 2 points plus noise
