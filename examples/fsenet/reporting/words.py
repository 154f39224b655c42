"""Say in words what the numbers of a run show, and what they do not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import hypot
from typing import Any

from reporting.inputs import number

ALPHA = 0.05
REAL = "joint: both"
CONTROL = "control: "
UNTRAINED = "untrained"
NOTHING = "\N{EN DASH}"
NO_BETTER = "The trained network is no better than the untrained one on these pairs"


@dataclass(frozen=True)
class Comparison:
    """A paired test, turned so that `difference` is the first arm's accuracy less the second's."""

    difference: float
    standard_error: float | None
    p_value: float

    @property
    def won(self) -> bool:
        """Whether the first arm is better beyond chance."""
        return self.difference > 0 and self.p_value < ALPHA


def compare(tests: Sequence[Mapping[str, Any]], first: str, second: str) -> Comparison | None:
    """Find the paired test of two arms, whichever way round the run wrote it."""
    for test in tests:
        difference, p_value = number(test.get("difference")), number(test.get("p_value"))
        names = test.get("a"), test.get("b")
        if difference is None or p_value is None or set(names) != {first, second}:
            continue
        sign = 1 if names == (first, second) else -1
        return Comparison(sign * difference, number(test.get("standard_error")), p_value)
    return None


def percent(value: object, digits: int = 1) -> str:
    """Write a fraction as a percentage, and a dash where there is no number.

    >>> percent(0.9234), percent(None) == NOTHING
    ('92.3 %', True)
    """
    found = number(value)
    return NOTHING if found is None else f"{100 * found:.{digits}f} %"


def with_error(row: Mapping[str, Any]) -> str:
    """Write accuracy ± standard error.

    >>> with_error({"accuracy": 0.9234, "standard_error": 0.0051})
    '92.3 ± 0.5 %'
    """
    accuracy, error = number(row.get("accuracy")), number(row.get("standard_error"))
    if accuracy is None or error is None:
        return percent(accuracy)
    return f"{100 * accuracy:.1f} ± {100 * error:.1f} %"


def plain(value: object, digits: int = 3) -> str:
    """Write a number, and a dash where there is none."""
    found = number(value)
    return NOTHING if found is None else f"{found:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def probability(p: float) -> str:
    """Write a p-value without false precision.

    >>> probability(0.00002), probability(0.0312)
    ('p < 0.001', 'p = 0.031')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def paired_sentence(test: Mapping[str, Any]) -> str:
    """Say a paired test in one sentence of HTML."""
    a, b = str(test.get("a")), str(test.get("b"))
    result = compare([test], a, b)
    names = f"<strong>{escape(a)}</strong>", f"<strong>{escape(b)}</strong>"
    if result is None:
        return f"{names[0]} against {names[1]}: the run gives no usable test."
    size = f"{100 * abs(result.difference):.1f}"
    if result.standard_error is not None:
        size += f" ± {100 * result.standard_error:.1f}"
    p_value = probability(result.p_value).replace(" ", "&nbsp;").replace("<", "&lt;")
    worth = "above" if result.difference >= 0 else "below"
    sentence = f"{names[0]} is {size} points {worth} {names[1]} ({p_value})"
    if result.p_value >= ALPHA:
        return f"{sentence}: this many pairs cannot tell them apart."
    return f"{sentence}: more than the choice of pairs explains."


def learned(arms: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the trained network beats the untrained one by two standard errors.

    >>> learned({UNTRAINED: {"accuracy": 0.6, "standard_error": 0.02}, REAL: {"accuracy": 0.61}})
    False
    """
    found = [number(arms.get(name, {}).get("accuracy")) for name in (UNTRAINED, REAL)]
    errors = [number(arms.get(name, {}).get("standard_error")) for name in (UNTRAINED, REAL)]
    if None in found:
        return True  # the run does not say
    before, after = found
    return after - before > 2 * hypot(*(error or 0.0 for error in errors))


def maps_verdict(arms: Mapping[str, Any], tests: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Say whether real part maps beat the controls: ("good" | "bad" | "open", a sentence).

    >>> tests = [{"a": REAL, "b": "control: mean maps", "difference": 0.03, "p_value": 0.001}]
    >>> maps_verdict({REAL: {}, "control: mean maps": {}}, tests)[1]
    'Real part maps beat the one control: mean maps.'
    """
    if not learned(arms):
        return "open", f"{NO_BETTER}: the run says nothing about what its part maps add."
    controls = [arm for arm in arms if arm.startswith(CONTROL)]
    if REAL not in arms or not controls:
        return "open", "The run holds no control for the part maps, so it cannot say what they add."
    results = {arm.removeprefix(CONTROL): compare(tests, REAL, arm) for arm in controls}
    beaten = [name for name, result in results.items() if result is not None and result.won]
    untested = [name for name, result in results.items() if result is None]
    rest = [name for name in results if name not in beaten and name not in untested]
    count = "the one control" if len(controls) == 1 else f"all {len(controls)} controls"
    tail = f" No paired test was run against {_listed(untested)}." if untested else ""
    if not rest and not untested:
        return "good", f"Real part maps beat {count}: {_listed(beaten)}."
    if not beaten and not rest:
        return "open", "Real part maps were not tested against the controls." + tail
    if not beaten:
        return "bad", (
            f"Real part maps do not beat {_listed(rest)}: what the local half adds here does not "
            f"depend on where the maps point.{tail}"
        )
    lost = f", but not {_listed(rest)}" if rest else ""
    return "bad" if rest else "open", f"Real part maps beat {_listed(beaten)}{lost}.{tail}"


def what_they_are(protocol: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the sentences that keep a reader from making too much of the numbers."""
    seed = config.get("seed")
    size = protocol.get("trained_on")
    tested = f"{protocol.get('pairs')} pairs"
    if people := protocol.get("tested_on"):
        tested += f" of {people}, none of them trained on"
    sizes = [f"Trained on {size}; tested on {tested}."] if size else []
    one_seed = (
        f"One seed{f' ({seed})' if isinstance(seed, int) else ''}. The standard errors cover the "
        "choice of test pairs alone; another seed may move an arm by more than that."
    )
    if protocol.get("name") == "lfw":
        return [
            "These numbers are not comparable to the published 99 % on LFW. Those come from "
            "networks trained on millions of pictures and use all ten folds; here minutes of "
            "training on LFW's own people (those of folds 0 to 7, and of no fold) are tested on "
            "the pairs of folds 8 and 9. They compare the arms of this run with each other.",
            *sizes,
            one_seed,
            "The faces shown on this page are drawn; no picture of LFW is part of it.",
        ]
    drawn = (
        "Synthetic faces: the recipe draws every face it trains and tests on, with no person "
        "tested that was trained on. How hard the task is was chosen by whoever wrote the "
        "drawing. The numbers compare the arms of this run; they say nothing about real faces "
        "and stand beside no published result."
    )
    other = (
        f"Protocol {protocol.get('name')!r}: the numbers compare the arms of this run, and stand "
        "beside a published result only where data and protocol are the same."
    )
    return [drawn if protocol.get("name") == "procedural" else other, *sizes, one_seed]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
