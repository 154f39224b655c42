"""Rates of pairs that several protocols print, by name, strict and as peers count."""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from partlocal.evaluation import FoldAccuracy, auc, tar_at_far, ten_fold_accuracy

FARS = (1e-3, 1e-2, 1e-1)  # of some thousands of pairs; a lower rate would be that of no accept
MODES: tuple[Literal["strict", "parity"], ...] = ("strict", "parity")
IMPOSTOR_MODES: tuple[tuple[str, Literal["strict", "nearest"]], ...] = (
    ("strict", "strict"),
    ("parity", "nearest"),  # as peers count who have the scores of impostors alone
)


def fold_rates(
    scores: Float[np.ndarray, " p"], same: Bool[np.ndarray, " p"], fold: Int[np.ndarray, " p"]
) -> tuple[dict[str, Any], FoldAccuracy]:
    """Return what is printed of pairs in folds, and how each pair was decided.

    The standard error is that of a share of independent pairs; over folds it is LFW's official one.

    Args:
        scores: cosines.
        same: whether a pair shows one person.
        fold: of each pair.
    """
    folds = ten_fold_accuracy(scores, same, fold)
    share = float(folds.correct.mean())
    return {
        "accuracy": folds.mean,
        "standard_error": float(np.sqrt(share * (1 - share) / len(folds.correct))),
        "standard_error_over_folds": folds.standard_error,
        "auc": auc(scores, same),
        "tar_at_far": tar_at_fars(scores, same, FARS),
    }, folds


def tar_at_fars(
    scores: Float[np.ndarray, " p"], same: Bool[np.ndarray, " p"], fars: tuple[float, ...]
) -> dict[str, dict[str, float]]:
    """Return the rates of genuine pairs that are accepted, strict and as insightface counts."""
    return {m: named(fars, tar_at_far(scores, same, np.array(fars), m)) for m in MODES}


def as_insightface(scores: np.ndarray, same: np.ndarray, fold: np.ndarray) -> dict[str, float]:
    """Return accuracy and deviation of cosines as its `verification.py` counts: by distances."""
    folds = ten_fold_accuracy(np.minimum(2 * scores - 2, 0), same, fold, "parity")
    return {"accuracy": folds.mean, "std": folds.population_std}


def named(keys: Iterable[float], values: Any) -> dict[str, float]:
    """Return rates by what they were asked for at.

    >>> named((0.01, 0.1), np.array([0.5, 1.0]))
    {'0.01': 0.5, '0.1': 1.0}
    """
    return dict(zip(map(str, keys), np.asarray(values).tolist(), strict=True))
