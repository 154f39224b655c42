"""The sections of the report: each takes a run and returns HTML."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from reporting.figures import Series, chart, legend, roc
from reporting.inputs import Run, number
from reporting.words import (
    CONTROL,
    NOTHING,
    REAL,
    learned,
    maps_verdict,
    paired_sentence,
    percent,
    plain,
    what_they_are,
    with_error,
)

# The order in which arms are shown, and with it their colours in report.css.
ARMS = (
    *(REAL, "joint: global half", "joint: local half", "global only"),
    *("control: mean maps", "control: another person's maps", "control: uniform maps", "untrained"),
)
# The shortcuts a run must not be decided by, and the accuracy each may reach.
SHORTCUT_LIMITS = {"part colours": (0.0, 0.70), "grey pixels": (0.0, 0.65)}
CHANCE = (0.48, 0.52)
MOMENTS = ("mean", "std")
PAIRED_NOTE = (
    '<p class="note">Both arms on the same pairs; each p-value stands alone, not corrected for '
    "the number of tests.</p>"
)


def ordered(names: Iterable[str]) -> list[str]:
    """Put known arms first, in their order, and others after them."""
    return sorted(names, key=lambda name: ARMS.index(name) if name in ARMS else len(ARMS))


def style(arm: str) -> int:
    """Return the colour of an arm; those the report does not know share the last one."""
    return ARMS.index(arm) if arm in ARMS else len(ARMS) - 1


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], main: str | None = None
) -> str:
    """Return a table in a box of its own that scrolls; cells are HTML, the first heads its row."""
    lines = []
    for first, *cells in rows:
        kind = ' class="main"' if first == main else ""
        tds = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f'<tr{kind}><th scope="row">{first}</th>{tds}</tr>')
    ths = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return (
        f'<figure class="table"><figcaption>{escape(caption)}</figcaption>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<thead><tr>{ths}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></figure>"
    )


def bars(rows: Iterable[tuple[str, str, str]], wide: bool = False) -> str:
    """Return labelled bars from (label, marks inside the track, value), all HTML."""
    cells = "".join(
        f'<div><span>{label}</span><span class="track" aria-hidden="true">{marks}</span>'
        f"<span>{value}</span></div>"
        for label, marks, value in rows
    )
    return f'<div class="bars{" wide" if wide else ""}">{cells}</div>'


def bar(low: float, high: float, kind: str = "") -> str:
    """Return a mark from `low` to `high`, fractions of the track."""
    low, high = min(max(low, 0.0), 1.0), min(max(high, 0.0), 1.0)
    return f'<i class="{kind}" style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i>'


def summary(run: Run) -> str:
    """Who won: the arms, the verdict on the part maps, and what the numbers are not."""
    arms, tests = run.metrics["arms"], run.metrics.get("paired_tests", [])
    ranked = any("rank_1" in row for row in arms.values())
    rows = []
    for arm in ordered(arms):
        row = arms[arm]
        interval = row.get("auc_interval")
        auc = plain(row.get("auc"))
        if isinstance(interval, list) and len(interval) == 2:
            auc += f" <small>{plain(interval[0])} to {plain(interval[1])}</small>"
        cells = [
            escape(arm),
            with_error(row),
            auc,
            percent(row.get("tar_at_far", {}).get("strict", {}).get("0.01")),
        ]
        rows.append([*cells, percent(row.get("rank_1"))] if ranked else cells)
    heads = ["Arm", "Accuracy", "AUC (95 % interval)", "TAR at 1 % FAR"]
    kind, verdict = maps_verdict(arms, tests)
    # between networks that learned nothing, differences have no direction
    told = tests if learned(arms) else []
    words = "".join(f"<li>{paired_sentence(test)}</li>" for test in told)
    caveat = "".join(f"<p>{s}</p>" for s in map(escape, what_they_are(*_protocol(run))))
    return (
        table(
            "Verification by arm, accuracy ± one standard error",
            [*heads, "Rank-1"] if ranked else heads,
            rows,
            main=REAL,
        )
        + f'<p class="verdict {kind}">{escape(verdict)}</p>'
        + (f'<h3>Paired tests</h3>{PAIRED_NOTE}<ul class="words">{words}</ul>' if words else "")
        + f'<div class="caveat"><h3>What these numbers are</h3>{caveat}</div>'
    )


def controls(run: Run) -> str:
    """The joint network under real maps beside the same network under maps of nothing."""
    arms = run.metrics["arms"]
    shown = [a for a in ordered(arms) if a in (REAL, "joint: global half") or CONTROL in a]
    rows = []
    for arm in shown:
        accuracy = number(arms[arm].get("accuracy"))
        error = number(arms[arm].get("standard_error")) or 0.0
        if accuracy is None:
            continue
        at, half = 2 * accuracy - 1, 2 * error
        marks = bar(0, at, "" if arm == REAL else "soft") + bar(at - half, at + half, "error")
        name = f"<strong>{escape(arm)}</strong>" if arm == REAL else escape(arm)
        rows.append((name, marks, with_error(arms[arm])))
    return (
        "<p>One trained network, tested again with its part maps replaced. If a control does as "
        "well, the network does not need to know where the parts are. The global half alone "
        "shows what is left without any map.</p>"
        + bars(rows, wide=True)
        + f"<p>{escape(maps_verdict(arms, run.metrics.get('paired_tests', []))[1])}</p>"
        + '<p class="note">Bars run from chance (50 %) to 100 %; whiskers are one standard error. '
        "The controls replace the maps at test time only: the network was trained with real "
        "ones.</p>"
    )


def verification(run: Run) -> str:
    """ROC of all arms, and how the scores of the main ones spread."""
    same = run.scores["same"]
    by_arm = dict(zip(map(str, run.scores["arm_names"]), run.scores["scores"], strict=True))
    usable = [arm for arm in ordered(by_arm) if np.isfinite(by_arm[arm]).all()]
    damaged = [arm for arm in by_arm if arm not in usable]
    impostors = int((~same).sum())
    if not usable or impostors < 2 or not same.any():
        return "<p>The run left no scores from which curves could be drawn.</p>"
    curves = [Series(arm, *roc(by_arm[arm], same), style(arm)) for arm in usable]
    figure = chart(
        curves,
        f"ROC curves of {len(curves)} arms: {', '.join(usable)}; their areas are in the table",
        *("False accept rate (log scale)", "True accept rate"),
        *((1 / impostors, 1.0), (0.0, 1.0)),
        log_x=True,
    )
    note = f"<p>Scores that are not finite kept out: {escape(', '.join(damaged))}.</p>"
    main = [arm for arm in usable if arm in ARMS[:4]] or usable
    return (
        f'<div class="charts"><figure>{figure}</figure><div class="beside">'
        f"{legend([(a, style(a)) for a in usable])}"
        f'<p class="note">The curves begin where one of {impostors:,} impostor pairs is accepted; '
        "far to the left they rest on few pairs.</p></div></div>"
        + (note if damaged else "")
        + '<h3>Genuine and impostor scores</h3><div class="charts">'
        + "".join(_histogram(arm, by_arm[arm], same) for arm in main)
        + "</div>"
        + legend([("genuine pairs", 0), ("impostor pairs", 2)])
    )


def _histogram(arm: str, scores: np.ndarray, same: np.ndarray) -> str:
    low, high = float(scores.min()), float(scores.max())
    edges = np.linspace(low, high if high > low else low + 1e-3, 41)
    outline = np.repeat(edges, 2)[1:-1]
    heights = [np.histogram(scores[group], edges)[0] / group.sum() for group in (same, ~same)]
    tall = max(float(h.max()) for h in heights)
    series = [
        Series(name, outline, np.repeat(100 * h, 2), colour, filled=True)
        for name, h, colour in zip(("genuine", "impostor"), heights, (0, 2), strict=True)
    ]
    means = [float(scores[group].mean()) for group in (same, ~same)]
    figure = chart(
        series,
        f"Histogram of scores, {arm}: genuine pairs average {means[0]:.2f}, impostor pairs "
        f"{means[1]:.2f}",
        *("Cosine", "Share of the pairs, %"),
        *((float(edges[0]), float(edges[-1])), (0.0, 105 * tall)),
    )
    return f"<figure><h4>{escape(arm)}</h4>{figure}</figure>"


def parser(run: Run) -> str:
    """How well the parser finds each part."""
    scores = run.table("parser")
    f1 = {name: number(value) for name, value in scores.get("f1", {}).items()}
    heads = {
        "macro_f1": "macro F1",
        "mean_f1": "mean F1",
        "helen_overall_f1": "Helen overall F1",
        "miou": "mean IoU",
    }
    words = [f"{name} {plain(scores[key])}" for key, name in heads.items() if key in scores]
    rows = [(escape(n.replace("_", " ")), bar(0, v or 0), plain(v)) for n, v in f1.items()]
    fasseg = scores.get("fasseg")
    extra = ""
    if isinstance(fasseg, dict):
        merged = fasseg["f1"] if isinstance(fasseg.get("f1"), dict) else fasseg
        found = [
            (escape(k), bar(0, v), plain(v)) for k, v in merged.items() if number(v) is not None
        ]
        pictures = [f"{fasseg['pictures']} pictures"] if number(fasseg.get("pictures")) else []
        where = ", ".join(["photographs of FASSEG", str(fasseg.get("split", "")), *pictures])
        extra = f"<h3>F1 per merged label, {escape(where)}</h3>{bars(found)}"
    return (
        f"<p>Overall: {escape(', '.join(words))}.</p>" if words else ""
    ) + f"<h3>F1 per label, held-out drawn faces</h3>{bars(rows)}{extra}"


def energy(run: Run) -> str:
    """Which kind of number the local vector is made of, before and after training."""
    stages = run.table("energy")
    names = ("features", "distances", "cosines")
    parts, rows = [], []
    for stage in sorted(stages, key=lambda s: (s != "at initialisation", s)):
        shares = [number(stages[stage].get(name)) for name in names]
        widths = "".join(f'<i style="width:{100 * (share or 0):.2f}%"></i>' for share in shares)
        parts.append(
            f'<h3>{named(stage)}</h3><div class="shares" aria-hidden="true">{widths}</div>'
        )
        cosines = [
            " ± ".join(plain(stages[stage].get(f"{prefix}impostor_cosine_{x}")) for x in MOMENTS)
            for prefix in ("", "standardized_")
        ]
        rows.append([named(stage), *(percent(share) for share in shares), *cosines])
    key = "".join(
        f'<li><span class="key k{i}"></span>{name}</li>'
        for i, name in enumerate(("part features", "distances", "cosines"))
    )
    return (
        "<p>Shares of the squared length of the local vector. Where distances carry nearly all of "
        "it, every pair of faces looks alike: the impostor cosine sits close to 1.</p>"
        + "".join(parts)
        + f'<ul class="legend">{key}</ul>'
        + table(
            "Energy shares, and impostor cosines (mean ± deviation) before and after standardising",
            ["Stage", "Part features", "Distances", "Cosines", "Impostor cosine", "Standardised"],
            rows,
        )
    )


def shortcuts(run: Run) -> str:
    """What can be told from the pictures without looking at faces."""
    rows = []
    for name, row in run.table("shortcuts").items():
        low, high = SHORTCUT_LIMITS.get(name, CHANCE)
        accuracy = number(row.get("accuracy"))
        limit = (
            f"at most {100 * high:.0f} %" if low == 0 else f"{100 * low:.0f} to {100 * high:.0f} %"
        )
        fits = accuracy is not None and low <= accuracy <= high
        verdict = NOTHING if accuracy is None else "within" if fits else "<strong>outside</strong>"
        rows.append([escape(name), with_error(row), limit, verdict])
    return (
        "<p>A drawn task may be solved by something that is no face. Each row verifies "
        "pairs of drawn faces with one such thing alone.</p>"
        + table("Accuracy from one thing alone", ["From", "Accuracy", "Wanted", "Verdict"], rows)
    )


def named(key: str) -> str:
    """Return a key of the run's files as a heading, escaped."""
    words = escape(key.replace("_", " "))
    return words[:1].upper() + words[1:] if words else words


def _protocol(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    return run.table("protocol"), run.table("config")
