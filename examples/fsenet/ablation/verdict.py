"""What the trials of a table say: means over seeds, and whether the paper's directions appear."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from protocols.rates import fold_rates

from ablation.arms import Arm
from ablation.tables import Row, Table
from ablation.trial import Trial
from partlocal.evaluation import paired_accuracy_test

Verdict = Literal["better", "worse", "not decided"]


class Spread(NamedTuple):
    """A mean over seeds, and the ends of its 95 % interval (Student's t; None of one seed)."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None


def judge(
    table: Table, trials: dict[Arm, Sequence[Trial]], weight: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of a table with their numbers, and its comparisons with their verdicts.

    Args:
        table: which.
        trials: of each arm, one a seed, in the same order.
        weight: of the local half where a row names none.
    """
    rows, correct = [], {}
    for row in table.rows:
        scored = [(t, _cosines(row, t, weight)) for t in trials[row.arm]]
        found = [fold_rates(cosines, t.same, t.fold) for t, cosines in scored]
        correct[row.name] = [folds.correct for _, folds in found]
        rates = [one for one, _ in found]
        measured = {
            "accuracy": [one["accuracy"] for one in rates],
            "auc": [one["auc"] for one in rates],
            "tar_at_far_0.01": [one["tar_at_far"]["strict"]["0.01"] for one in rates],
        }
        spreads = {name: spread(values)._asdict() for name, values in measured.items()}
        errors = [one["standard_error"] for one in rates]
        rows.append({"name": row.name, "by_seed": measured, "over_seeds": spreads,
                     "standard_errors": errors})  # fmt: skip
    compared = [
        {"of_the_paper": claims is table.claims, **compare(first, second, correct)}
        for claims in (table.claims, table.controls)
        for first, second in claims
    ]
    return rows, compared


def compare(first: str, second: str, correct: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Return how much better one row is than another, and whether that may be luck.

    Two sources of luck are looked at apart: the seeds, by the interval of the differences of each
    seed; and the pairs, by McNemar's test over all seeds' pairs. The verdict is that of the seeds,
    and with one seed that of the pairs.
    """
    per_seed = [
        float(a.mean() - b.mean()) for a, b in zip(correct[first], correct[second], strict=True)
    ]
    over_seeds = spread(per_seed)
    test = paired_accuracy_test(np.concatenate(correct[first]), np.concatenate(correct[second]))
    low, high = over_seeds.low, over_seeds.high
    if low is None or high is None:
        margin = 1.96 * test.standard_error
        low, high = test.difference - margin, test.difference + margin
    verdict: Verdict = "not decided"
    if low > 0 or high < 0:
        verdict = "better" if low > 0 else "worse"
    return {
        "first": first,
        "second": second,
        "by_seed": per_seed,
        "difference": over_seeds.mean,
        "interval95": [low, high],
        "pairs": sum(map(len, correct[first])),
        "p_value_over_pairs": test.p_value,
        "verdict": verdict,
    }


def spread(values: Sequence[float]) -> Spread:
    """Return mean, standard deviation and the 95 % interval of the mean.

    >>> [round(number, 2) for number in spread([1.0, 2.0, 3.0])]
    [2.0, 1.0, -0.48, 4.48]
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Spread(mean, None, None, None)
    deviation = float(np.std(values, ddof=1))
    reach = student_t(count - 1) * deviation / math.sqrt(count)
    return Spread(mean, deviation, mean - reach, mean + reach)


def student_t(freedom: int, level: float = 0.95) -> float:
    """Return the two-sided quantile of Student's t.

    >>> round(student_t(4), 3)
    2.776
    """
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    scale /= math.sqrt(freedom * math.pi)
    # with t = tan(u) sqrt(freedom) the density is scale sqrt(freedom) cos(u)^(freedom - 1)
    angles = np.linspace(0, math.pi / 2, 200_001)
    density = scale * math.sqrt(freedom) * np.cos(angles) ** (freedom - 1)
    below = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * angles[1])])
    return math.tan(np.interp(level / 2, below, angles)) * math.sqrt(freedom)


def _cosines(row: Row, trial: Trial, weight: float) -> np.ndarray:
    return trial.cosines(row.vector, weight if row.weight is None else row.weight)
