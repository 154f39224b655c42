"""Uncertainty: how far a verification result may be luck."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from partlocal.evaluation.verification import check_binary, check_both_kinds, check_pairs


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    low: float
    high: float


class PairedTest(NamedTuple):
    """What `paired_accuracy_test` found."""

    difference: float
    standard_error: float
    p_value: float


def auc_interval(
    scores: Shaped[np.ndarray, " p"],
    identities: Shaped[np.ndarray, "p 2"],
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap the AUC over identities, since pairs that share a person are not independent.

    People are drawn with replacement; a person drawn m times brings each genuine pair m times and
    an impostor pair counts as often as both of its people do (m times n).

    >>> identities = np.array([[0, 0], [1, 1], [2, 2], [0, 1], [1, 2], [2, 0]])
    >>> auc_interval(np.array([0.9, 0.5, 0.8, 0.6, 0.1, 0.3]), identities, resamples=100)
    Interval(low=0.33333333333333337, high=1.0)

    Args:
        scores: one number a pair, higher for more similar.
        identities: who is on the two pictures; equal ids make a genuine pair.
        resamples: how many times to draw (a million pairs take about 2 ms a draw).
        level: the share of resampled values inside the interval.
        seed: equal seeds give equal intervals.

    Raises:
        ValueError: as `auc`, or `identities` is no `p 2`, or `level` is outside (0, 1).

    Source: Bolle, Ratha, Pankanti, "Error analysis of pattern recognition systems: the subsets
        bootstrap", CVIU 93 (2004); percentile interval.
    """
    identities = np.asarray(identities)
    if identities.ndim != 2 or identities.shape[1] != 2:
        raise ValueError(f"identities must be [p, 2]; got {list(identities.shape)}")
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples must be >= 1 and level in (0, 1); got {resamples} and {level}")
    scores, same = check_pairs(scores, identities[:, 0] == identities[:, 1])
    check_both_kinds(same)
    people, index = np.unique(identities, return_inverse=True)
    index = index.reshape(identities.shape)  # numpy 2.0 and 2.1 disagree about the shape
    order = np.argsort(index[~same][:, 0])
    first, second = index[~same][order][:, 0], index[~same][order][:, 1].copy()
    starts = np.append(0, np.flatnonzero(np.diff(first)) + 1)
    # Among the genuine scores an impostor's is at an even place if between two, odd if equal.
    values, rank = np.unique(scores[same], return_inverse=True)
    impostors = scores[~same][order]
    place = np.searchsorted(values, impostors, "left") + np.searchsorted(values, impostors, "right")

    generator = np.random.default_rng(seed)
    aucs: list[float] = []
    weight, worse = np.empty(len(impostors)), np.empty(len(impostors))
    below = np.zeros(2 * len(values) + 1)  # weight of genuine pairs below each place, ties half
    while len(aucs) < resamples:
        drawn = generator.multinomial(len(people), np.full(len(people), 1 / len(people)))
        drawn = drawn.astype(np.float64)
        genuine = np.bincount(rank, weights=drawn[index[same][:, 0]])
        below[2::2] = np.cumsum(genuine)
        below[1::2] = (below[:-1:2] + below[2::2]) / 2
        # mode="clip" only because numpy buffers `out` without it.
        np.take(drawn, second, out=weight, mode="clip")
        np.take(below, place, out=worse, mode="clip")
        worse *= weight
        total = below[-1] * (np.add.reduceat(weight, starts) @ drawn[first[starts]])
        if total > 0:  # a draw without genuine or without impostor pairs has no AUC: draw again
            lost = np.add.reduceat(worse, starts) @ drawn[first[starts]]
            aucs.append(1 - float(lost / total))
    low, high = np.quantile(aucs, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def paired_accuracy_test(
    correct_a: Shaped[np.ndarray, " p"], correct_b: Shaped[np.ndarray, " p"]
) -> PairedTest:
    """Compare two systems on the same pairs: accuracy of a less that of b, and is it luck?

    >>> a = np.array([1, 1, 1, 1, 1, 1, 0, 1])
    >>> b = np.array([1, 0, 0, 0, 0, 1, 1, 1])
    >>> result = paired_accuracy_test(a, b)  # b is wrong alone on 4 pairs, a on 1
    >>> [round(value, 3) for value in result]
    [0.375, 0.263, 0.375]

    Args:
        correct_a: where system a decided rightly (`FoldAccuracy.correct`).
        correct_b: the same pairs for system b.

    Returns:
        difference, its standard error, and the two-sided exact McNemar p-value, both as if pairs
        were independent.

    Raises:
        ValueError: lengths differ, there are fewer than two pairs, or values are not binary.

    Source: McNemar, Psychometrika 12 (1947), with the exact binomial distribution.
    """
    a, b = check_binary(correct_a, "correct_a"), check_binary(correct_b, "correct_b")
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(
            "correct_a and correct_b must be [p] and [p] with the same p >= 2; "
            f"got {list(a.shape)} and {list(b.shape)}"
        )
    difference = a.astype(np.float64) - b
    only_a, only_b = np.count_nonzero(a & ~b), np.count_nonzero(b & ~a)
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    steps = np.arange(1, fewer + 1)
    # log of (discordant choose i): the numbers themselves overflow beyond about a thousand pairs.
    log_choose = np.concatenate([[0.0], np.cumsum(np.log((discordant - steps + 1) / steps))])
    p_value = 2 * np.exp(log_choose - discordant * np.log(2)).sum()
    return PairedTest(
        difference=float(difference.mean()),
        standard_error=float(difference.std(ddof=1) / np.sqrt(len(a))),
        p_value=min(1.0, float(p_value)),
    )
