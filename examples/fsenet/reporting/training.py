"""The sections of the report about how a run came about: losses, speed, settings."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from reporting.figures import Series, bin_means, chart, legend
from reporting.inputs import Run, number
from reporting.sections import named, table
from reporting.words import percent


def training(run: Run) -> str:
    """Loss curves per stage, and what the training took."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in run.history:
        stages.setdefault(str(line.get("stage", "unnamed")), []).append(line)
    lines = {"loss": "loss", "global_loss": "global half", "local_loss": "local half"}
    charts = "".join(_losses(stage, rows, lines) for stage, rows in stages.items())
    seconds = run.table("seconds")
    took = [(_stage(stage), f"{number(s) or 0:,.0f} s") for stage, s in seconds.items()]
    rates = [
        f"{_stage(stage)}: {speed}"
        for stage, row in run.table("training").items()
        if isinstance(row, dict) and (speed := _speed(row))
    ]
    if wait := _speed(run.metrics):
        rates.append(f"all stages: {wait}")
    memory = number(run.metrics.get("peak_memory_gb"))
    if memory is not None:
        rates.append(f"memory at its peak {memory:.1f} GB")
    return (
        f'<div class="charts">{charts}<div>'
        + (table("Time taken", ["Stage", "Time"], took) if took else "")
        + (f'<p class="note">{"; ".join(rates)}.</p>' if rates else "")
        + "</div></div>"
    )


def _speed(row: Mapping[str, Any]) -> str:
    known = {"images_per_second": "pictures a second", "steps_per_second": "steps a second"}
    words = [f"{row[key]:.3g} {unit}" for key, unit in known.items() if number(row.get(key))]
    wait = number(row.get("data_wait_share"))
    if wait is not None:
        words.append(f"{percent(wait)} of the time spent waiting for data")
    return ", ".join(words)


def _losses(stage: str, rows: list[dict[str, Any]], lines: Mapping[str, str]) -> str:
    def column(key: str) -> np.ndarray:
        return np.array([np.nan if (v := number(r.get(key))) is None else v for r in rows])

    steps = column("step")
    series = [
        Series(label, *bin_means(steps, column(key)), colour)
        for colour, (key, label) in enumerate(lines.items())
        if np.isfinite(column(key) + steps).any()
    ]
    if not series:
        return f"<figure><h3>{_stage(stage)}</h3><p>No finite loss was recorded.</p></figure>"
    end = max(float(np.nanmax(steps)), 1.0)
    tall = max(float(line.y.max()) for line in series) * 1.05 or 1.0
    low = min(0.0, *(float(line.y.min()) for line in series))
    alt = "; ".join(f"{s.label} goes from {s.y[0]:.3g} to {s.y[-1]:.3g}" for s in series)
    figure = chart(series, f"Loss, {stage}: {alt}", "Step", "Loss", (0.0, end), (low, tall))
    rate = column("lr")
    note = f"Means of neighbouring steps; ends at {series[0].y[-1]:.3g}."
    if np.isfinite(rate).any():
        note += f" Learning rate {np.nanmax(rate):.2g} at its highest, {rate[-1]:.2g} at the end."
    key = legend([(s.label, s.style) for s in series]) if len(series) > 1 else ""
    caption = f"<figcaption>{note}</figcaption>"
    return f"<figure><h3>{_stage(stage)}</h3>{figure}{key}{caption}</figure>"


def details(run: Run) -> str:
    """Everything needed to run it again: how it was started, and what it was made of."""
    blocks = [f"<p><code>{escape(command)}</code></p>" for command in run.commands]
    unused = _unused(run.table("config"))
    for name in ("versions", "protocol", "config"):
        values = {key: value for key, value in run.table(name).items() if key not in unused}
        rows = [(escape(key), escape(str(value))) for key, value in _flat(values)]
        if rows:
            box = table(named(name), ["Setting", "Value"], rows).replace(
                "<td>", '<td class="text">'
            )
            blocks.append(f"<details><summary>{named(name)}</summary>{box}</details>")
    return "".join(blocks)


def _unused(config: Mapping[str, Any]) -> set[str]:
    """Return the options that had no part in a run with these."""
    shipped, read = config.get("parser") == "pretrained", bool(config.get("faces"))
    unused = {"parser_options"} if shipped else set()
    if read:
        return unused | ({"identities", "samples"} if shipped else set())
    return unused | {"min_images", "damaged"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _stage(key: str) -> str:
    return named({"joint": "joint network", "global": "global-only network"}.get(key, key))
