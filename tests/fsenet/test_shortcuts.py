"""The shortcut checks: absence is no evidence, leaks are found, and the world is fair."""

import numpy as np
import pytest
from data.faces import TEST_FROM, draw_faces, drawn_test_set
from data.shortcuts import HAIR, pair_scores, shortcut_accuracies


def test_absence_is_no_evidence():
    a = np.array([[1.0, 2.0, np.nan], [0.0, 1.0, 5.0], [2.0, 0.0, 1.0]])
    for score in pair_scores(a, a).values():
        assert np.allclose(score, score.max())


def drawn(identities, samples):
    faces = draw_faces(0, range(TEST_FROM, TEST_FROM + identities), samples)
    images = faces.images.permute(0, 2, 3, 1).numpy()
    return images, faces.labels.numpy(), drawn_test_set(faces, 0).pairs


def test_a_leak_is_found():
    """Paint everybody's background in a colour of their own: that check alone must notice."""
    images, labels, pairs = drawn(40, 4)
    images = images.copy()
    colours = np.random.default_rng(0).integers(0, 256, (40, 3))
    for image, label, who in zip(images, labels, pairs.identities, strict=True):
        image[label == 0] = colours[who]
    found = shortcut_accuracies(images, labels, pairs, 0, glasses_pairs=40)
    assert found["background"]["accuracy"] > 0.95
    assert found["hair"]["accuracy"] < 0.65


def test_too_few_pairs_are_no_reason_to_fail():
    """A fold that has no impostor pair with hair: hair is not measured, all else is."""
    images, labels, pairs = drawn(40, 4)
    before, labels = labels, labels.copy()
    of_fold = pairs.first[(pairs.fold == 3) & ~pairs.same]
    labels[of_fold] = np.where(labels[of_fold] == HAIR, 0, labels[of_fold])
    found = shortcut_accuracies(images, labels, pairs, 0, glasses_pairs=40)
    assert found["hair"]["accuracy"] is None
    assert found["hair"]["standard_error"] is None
    assert found["hair"]["pairs"] < len(pairs.same)
    whole = shortcut_accuracies(images, before, pairs, 0, glasses_pairs=40)
    assert whole["hair"]["accuracy"] is not None
    for name in ("grey pixels", "glasses"):  # which no hair decides
        assert found[name] == whole[name]
    parts = found["part colours"]  # of which nine others are left
    assert parts["accuracy"] > 0.5
    assert parts["pairs"] == len(pairs.same)
    labels[:] = 0
    found = shortcut_accuracies(images, labels, pairs, 0, glasses_pairs=4)
    for name in ("part colours", "hair"):
        assert found[name]["accuracy"] is None, name


@pytest.mark.slow
def test_no_shortcuts():
    found = shortcut_accuracies(*drawn(200, 6), seed=0)
    assert found["part colours"]["accuracy"] <= 0.70
    assert found["grey pixels"]["accuracy"] <= 0.65
    for name in ("hair", "glasses", "background"):
        error = found[name]["standard_error"]
        assert abs(found[name]["accuracy"] - 0.5) < 0.02 + 2 * error, name
