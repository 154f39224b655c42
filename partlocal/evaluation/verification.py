"""Verification: do two pictures show one person? Scores of pairs in, rates and intervals out.

A score is any number that is higher for more similar pairs: a cosine, or a negated distance.
Nothing here interpolates, and tied scores are always accepted or rejected together.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

Mode = Literal["strict", "parity"]
_THRESHOLDS_OF_INSIGHTFACE = np.arange(0, 4, 0.01)


class FoldAccuracy(NamedTuple):
    """What `ten_fold_accuracy` measured; f folds, p pairs."""

    mean: float
    standard_error: float  # of the mean over folds: sample deviation / sqrt(f), as LFW reports it
    population_std: float  # what insightface prints: about 3 times the standard error
    thresholds: Float[np.ndarray, " f"]
    accuracies: Float[np.ndarray, " f"]
    correct: Bool[np.ndarray, " p"]  # each pair decided with the threshold of its own fold


class Roc(NamedTuple):
    """The corners of a ROC curve, from (0, 0) to (1, 1)."""

    far: Float[np.ndarray, " t"]
    tar: Float[np.ndarray, " t"]
    thresholds: Float[np.ndarray, " t"]  # accept at or above; the first is inf


def ten_fold_accuracy(
    scores: Shaped[np.ndarray, " p"],
    same: Shaped[np.ndarray, " p"],
    folds: int | Shaped[np.ndarray, " p"] = 10,
    mode: Mode = "strict",
) -> FoldAccuracy:
    """Accuracy over folds, each at the threshold that is best on all the other folds.

    >>> scores = np.array([0.9, 0.2, 0.8, 0.3, 0.4, 0.5])
    >>> same = np.array([1, 0, 1, 0, 1, 0])
    >>> result = ten_fold_accuracy(scores, same, folds=3)
    >>> result.thresholds, result.accuracies
    (array([0.8, 0.9, 0.8]), array([1. , 0.5, 0.5]))

    Args:
        scores: one number a pair, higher for more similar.
        same: True or 1 where both pictures show one person.
        folds: how many contiguous folds to cut (the first `p mod folds` get one pair more), or
            one fold id a pair. Two folds of a larger protocol work: each is judged at the
            threshold of the other.
        mode: `"strict"` accepts scores at or above a threshold chosen among the distinct training
            scores and infinity; of equally good ones the highest. `"parity"` is insightface's
            grid of squared distances 0, 0.01, ..., 3.99, accepted strictly below, of equally good
            ones the lowest: bit for bit its result, when scores are `-((a - b) ** 2).sum(1)` of
            unit vectors.

    Raises:
        ValueError: there are no pairs, lengths differ, values are not finite or not binary, a
            fold lacks one of the two kinds of pairs, or parity scores are positive.
    """
    scores, same = check_pairs(scores, same)
    _check_mode(mode)
    if mode == "parity" and scores.max() > 0:
        raise ValueError(
            "scores must be negated squared distances (<= 0) for mode='parity'; got up to "
            f"{scores.max():.4g}: pass -((a - b) ** 2).sum(1), or 2 * cosine - 2"
        )
    fold_ids = _check_folds(folds, same)
    thresholds, accuracies = [], []
    correct = np.empty(len(scores), dtype=bool)
    for fold in range(fold_ids.max() + 1):
        test = fold_ids == fold
        if mode == "strict":
            threshold = _best_threshold(scores[~test], same[~test])
            accepted = scores[test] >= threshold
        else:
            threshold = _best_distance(-scores[~test], same[~test])
            accepted = -scores[test] < threshold
        correct[test] = accepted == same[test]
        thresholds.append(threshold if mode == "strict" else -threshold)
        accuracies.append(np.count_nonzero(correct[test]) / np.count_nonzero(test))
    return FoldAccuracy(
        mean=float(np.mean(accuracies)),
        standard_error=float(np.std(accuracies, ddof=1) / np.sqrt(len(accuracies))),
        population_std=float(np.std(accuracies)),
        thresholds=np.array(thresholds),
        accuracies=np.array(accuracies),
        correct=correct,
    )


def tar_at_far(
    scores: Shaped[np.ndarray, " p"],
    same: Shaped[np.ndarray, " p"],
    far: float | Float[np.ndarray, " t"],
    mode: Mode = "strict",
) -> float | Float[np.ndarray, " t"]:
    """Return the share of genuine pairs accepted where impostors are accepted at a given rate.

    >>> scores = np.array([0.9, 0.7, 0.5, 0.8, 0.4, 0.3, 0.2])
    >>> same = np.array([1, 1, 1, 0, 0, 0, 0])
    >>> tar_at_far(scores, same, 0.2), tar_at_far(scores, same, 0.25)
    (0.3333333333333333, 1.0)
    >>> tar_at_far(scores, same, 0.2, mode="parity")  # 0.25 is nearer to 0.2 than 0 is
    1.0

    Args:
        scores: one number a pair, higher for more similar.
        same: True or 1 where both pictures show one person.
        far: false accept rates in (0, 1], one or several.
        mode: `"strict"` is the highest rate whose FAR is at most `far`; a `far` below one
            impostor's share therefore means no false accept. `"parity"` is insightface's
            `eval_ijbc.py`: the point of the ROC curve with the nearest FAR, which may lie above
            the one asked for.

    Raises:
        ValueError: as `ten_fold_accuracy`, or `far` is outside (0, 1], or all pairs are of one
            kind.
    """
    scores, same = check_pairs(scores, same)
    check_both_kinds(same)
    _check_mode(mode)
    asked = np.asarray(far, dtype=np.float64)
    if not np.all((asked > 0) & (asked <= 1)):
        raise ValueError(f"far must be in (0, 1]; got {far}")
    if mode == "strict":
        _, false, true = _curve(scores, same)
        index = np.searchsorted(false / false[-1], asked, side="right") - 1
        tar = true[index] / true[-1]
    else:
        fars, tars, _ = roc(scores, same)
        # Searched from the end, so that of equally near points the one with the highest TAR wins.
        nearest = [np.argmin(np.abs(fars[::-1] - value)) for value in asked.ravel()]
        tar = tars[::-1][nearest].reshape(asked.shape)
    return tar if asked.ndim else float(tar)


def tar_above_impostors(
    genuine: Shaped[np.ndarray, " m"],
    impostors: Shaped[np.ndarray, " n"],
    far: float | Float[np.ndarray, " t"],
    mode: Literal["strict", "nearest"] = "strict",
    count: int | None = None,
) -> float | Float[np.ndarray, " t"]:
    """Return the share of genuine pairs accepted, where only the highest impostors are at hand.

    >>> genuine, impostors = np.array([0.9, 0.7, 0.5]), np.array([0.8, 0.6])
    >>> tar_above_impostors(genuine, impostors, 0.001, count=1000)  # one of them may pass
    0.6666666666666666

    Billions of impostor pairs are never held: at a FAR of 1e-6, a millionth of them and one decide.

    Args:
        genuine: scores, higher for more similar.
        impostors: scores; of `count` of them the highest.
        far: false accept rates in (0, 1], one or several.
        mode: `"strict"` as in `tar_at_far`. `"nearest"` accepts at or above the impostor whose
            place is nearest to `far * count`, rounded to even; where that is 0, above all.
        count: of all impostor pairs; None if all are there.

    Raises:
        ValueError: a list is empty or not finite, `far` is outside (0, 1], or too few impostors
            are there for it.
    """
    genuine, impostors = np.asarray(genuine, np.float64), np.asarray(impostors, np.float64)
    asked = np.asarray(far, dtype=np.float64)
    count = len(impostors) if count is None else count
    if mode not in ("strict", "nearest"):
        raise ValueError(f"mode must be 'strict' or 'nearest'; got {mode!r}")
    if not np.all((asked > 0) & (asked <= 1)):
        raise ValueError(f"far must be in (0, 1]; got {far}")
    for name, scores in (("genuine", genuine), ("impostors", impostors)):
        if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise ValueError(
                f"{name} must be finite scores, [n] with n > 0; got {list(scores.shape)}"
            )
    highest = np.sort(impostors)[::-1]
    if count < len(highest) or (count > len(highest) and (asked * count >= len(highest)).any()):
        raise ValueError(
            f"impostors must hold the {int(asked.max() * count) + 1} highest of count = {count} "
            f"scores for far = {asked.max():g}, and not more than count; got {len(highest)}"
        )
    if mode == "strict":
        rates = np.arange(len(highest) + 1) / count
        allowed = np.searchsorted(rates, asked, side="right") - 1
        accepted = genuine > np.append(highest, -np.inf)[allowed][..., None]
    else:
        accepted = genuine >= nearest_thresholds(highest, asked, count)[..., None]
    tar = accepted.mean(-1)
    return tar if asked.ndim else float(tar)


def nearest_thresholds(
    highest: Float[np.ndarray, " n"], rates: np.ndarray, count: int
) -> np.ndarray:
    """Return scores at or above which lie `rates` of `count`, as nearly as can be.

    Args:
        highest: of `count` scores, in descending order.
        rates: wanted.
        count: of all scores.
    """
    places = np.round(rates * count).astype(int)
    above = np.nextafter(highest[0], np.inf)
    return np.where(places > 0, highest[np.maximum(places, 1) - 1], above)


def roc(scores: Shaped[np.ndarray, " p"], same: Shaped[np.ndarray, " p"]) -> Roc:
    """Return the ROC curve without the points that lie evenly on a straight piece of it.

    >>> far, tar, thresholds = roc(np.array([0.9, 0.8, 0.4, 0.3]), np.array([1, 0, 1, 0]))
    >>> far, tar
    (array([0. , 0. , 0.5, 0.5, 1. ]), array([0. , 0.5, 0.5, 1. , 1. ]))

    Raises:
        ValueError: as `tar_at_far`.
    """
    scores, same = check_pairs(scores, same)
    check_both_kinds(same)
    thresholds, false, true = _curve(scores, same)
    # The same points as sklearn.metrics.roc_curve, on which published IJB numbers stand.
    bends = (np.diff(false[1:], 2) != 0) | (np.diff(true[1:], 2) != 0)
    keep = np.ones(len(false), dtype=bool)
    keep[2:-1] = bends
    return Roc(false[keep] / false[-1], true[keep] / true[-1], thresholds[keep])


def auc(scores: Shaped[np.ndarray, " p"], same: Shaped[np.ndarray, " p"]) -> float:
    """Return the chance that a genuine pair scores above an impostor pair; a tie counts half.

    >>> auc(np.array([0.9, 0.5, 0.5, -0.1]), np.array([True, True, False, False]))
    0.875

    Raises:
        ValueError: as `tar_at_far`.
    """
    scores, same = check_pairs(scores, same)
    check_both_kinds(same)
    genuine, impostors = scores[same], np.sort(scores[~same])
    below = np.searchsorted(impostors, genuine, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(impostors, genuine, side="right").sum(dtype=np.int64)
    return int(below + not_above) / (2 * len(genuine) * len(impostors))


def _best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    thresholds, false, true = _curve(scores, same)
    return float(thresholds[np.argmax(true - false)])  # accuracy is true - false plus a constant


def _best_distance(distances: np.ndarray, same: np.ndarray) -> float:
    grid = _THRESHOLDS_OF_INSIGHTFACE
    true = np.searchsorted(np.sort(distances[same]), grid, side="left")
    false = np.searchsorted(np.sort(distances[~same]), grid, side="left")
    return float(grid[np.argmax(true - false)])


def _curve(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count false and true accepts at inf and at every distinct score, highest first."""
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each run of ties
    true = np.cumsum(same)[last]
    false = last + 1 - true
    return (
        np.concatenate([[np.inf], scores[last]]),
        np.concatenate([[0], false]),
        np.concatenate([[0], true]),
    )


def _check_mode(mode: str) -> None:
    if mode not in ("strict", "parity"):
        raise ValueError(f"mode must be 'strict' or 'parity'; got {mode!r}")


def check_binary(values: np.ndarray, name: str) -> np.ndarray:
    """Return `values` as booleans `p`, or raise."""
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{name} must be [p]; got {list(values.shape)}")
    if values.dtype != bool and not np.isin(values, (0, 1)).all():
        found = np.unique(values)[:5].tolist()
        raise ValueError(f"{name} must hold booleans, or 0 and 1; got values like {found}")
    return values.astype(bool)


def check_pairs(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores as float64 `p` and `same` as booleans `p`, or raise."""
    scores, same = np.asarray(scores, dtype=np.float64), check_binary(same, "same")
    if scores.shape != same.shape:
        raise ValueError(
            f"scores must be [p] with p = {len(same)} (as same); got {list(scores.shape)}"
        )
    if not len(scores):
        raise ValueError("scores and same are empty: there are no pairs to judge")
    if bad := np.count_nonzero(~np.isfinite(scores)):
        raise ValueError(
            f"scores must be finite; {bad} of {len(scores)} are not, first at index "
            f"{np.argmin(np.isfinite(scores))}: look for zero or overflowing embeddings"
        )
    return scores, same


def check_both_kinds(same: np.ndarray) -> None:
    """Raise unless there are genuine and impostor pairs."""
    if same.all() or not same.any():
        kind = "genuine" if same.all() else "impostor"
        raise ValueError(f"same must hold genuine and impostor pairs; got {kind} pairs alone")


def _check_folds(folds: int | np.ndarray, same: np.ndarray) -> np.ndarray:
    """Return one fold index a pair, from 0."""
    if np.ndim(folds) == 0:
        count = int(folds)
        if not 2 <= count <= len(same):
            raise ValueError(f"folds must be from 2 to the {len(same)} pairs; got {count}")
        parts = np.array_split(np.arange(len(same)), count)
        fold_ids = np.repeat(np.arange(count), [len(part) for part in parts])
    else:
        if np.shape(folds) != same.shape:
            raise ValueError(
                f"folds must be a number or [p] with p = {len(same)} (as same); "
                f"got {list(np.shape(folds))}"
            )
        names, fold_ids = np.unique(np.asarray(folds), return_inverse=True)
        if len(names) < 2:
            raise ValueError(f"folds must name at least 2 different folds; got {names.tolist()}")
    pairs, genuine = np.bincount(fold_ids), np.bincount(fold_ids, weights=same)
    one_kind = np.flatnonzero((genuine == 0) | (genuine == pairs))
    if len(one_kind):
        kind = "genuine" if genuine[one_kind[0]] else "impostor"
        raise ValueError(
            f"every fold must hold genuine and impostor pairs; fold {one_kind[0]} holds {kind} "
            "pairs alone: keep the protocol's order of pairs, interleave the two kinds, or pass "
            "one fold id a pair"
        )
    return fold_ids
