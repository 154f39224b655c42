"""What is printed of pairs, against loops."""

import numpy as np
import pytest
from protocols.rates import FARS, fold_rates


def test_fold_rates():
    """The nearest of all false accept rates may lie above the one asked for; strict is below."""
    rng = np.random.default_rng(0)
    same = np.tile([True, False, False], 300)
    scores = rng.normal(size=900) + 1.5 * same
    found, folds = fold_rates(scores, same, np.repeat(np.arange(10), 90))
    assert found["accuracy"] == pytest.approx(folds.correct.mean())
    assert found["standard_error"] == pytest.approx(folds.correct.std() / np.sqrt(900))
    corners = [(np.mean(scores[~same] >= t), np.mean(scores[same] >= t)) for t in [9.0, *scores]]
    for far in FARS:
        strict = max(tar for rate, tar in corners if rate <= far)
        gap = min(abs(rate - far) for rate, _ in corners)
        nearest = max(tar for rate, tar in corners if abs(rate - far) == gap)
        assert found["tar_at_far"]["strict"][str(far)] == pytest.approx(strict)
        assert found["tar_at_far"]["parity"][str(far)] == pytest.approx(nearest)
    # 600 impostors: 0.001 is nearer to one of them than to none
    assert found["tar_at_far"]["strict"]["0.001"] < found["tar_at_far"]["parity"]["0.001"]
    assert 0 < found["tar_at_far"]["strict"]["0.001"] < found["tar_at_far"]["strict"]["0.01"]
