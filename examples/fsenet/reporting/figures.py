"""Draw the pictures of the report: line charts and histograms as SVG, faces as data-URI PNGs."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

# Drawn for a phone: at 375 px a figure keeps its own scale, so its text stays readable.
WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 22, 38

# Left and right differ in lightness too, so that the sides stay apart without colour vision.
PART_COLOURS = {
    "skin": "#f2b48a",
    "left_brow": "#6b3fa0",
    "right_brow": "#c39bea",
    "left_eye": "#0b5cad",
    "right_eye": "#63c1ff",
    "nose": "#2e9e4f",
    "upper_lip": "#c2183c",
    "inner_mouth": "#5e0d21",
    "lower_lip": "#ff7d95",
    "hair": "#d3a400",
}
OTHER_COLOURS = ("#008080", "#e06000", "#808000", "#a05070", "#607080", "#a0d0a0")
HEAT = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]])


@dataclass(frozen=True)
class Series:
    """One line or step outline of a chart; `style` is the number of its colour in report.css."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int = 0
    filled: bool = False


def part_colour(name: str, index: int) -> str:
    """Return the colour of a part, a fixed one for the parts of a face."""
    return PART_COLOURS.get(name, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers inside an interval, about `count` of them.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(0, 2300)
    [0.0, 500.0, 1000.0, 1500.0, 2000.0]
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def chart(
    series: Sequence[Series],
    alt: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    log_x: bool = False,
) -> str:
    """Return an SVG line chart; lines are told apart by colour and dash (see `legend`)."""
    (x0, x1), (y0, y1) = x_range, y_range
    if log_x:
        x0, x1 = math.log10(x0), math.log10(x1)
        x_ticks = [(float(e), f"{10.0**e:g}") for e in range(math.ceil(x0 - 1e-9), int(x1) + 1)]
    else:
        x_ticks = [(t, _minus(t)) for t in ticks(x0, x1)]
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: np.ndarray, y: np.ndarray) -> str:
        across = LEFT + wide * (x - x0) / (x1 - x0)
        down = TOP + high * (1 - (np.clip(y, y0, y1) - y0) / (y1 - y0))
        return " ".join(f"{a:.1f},{d:.1f}" for a, d in zip(across, down, strict=True))

    marks = []
    for value in ticks(y0, y1):
        y = TOP + high * (1 - (value - y0) / (y1 - y0))
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{_minus(value)}</text>')  # fmt: skip
    for value, text in x_ticks:
        x = LEFT + wide * (value - x0) / (x1 - x0)
        edge = min(x, WIDTH - 3.3 * len(text))
        marks.append(f'<line class="tick" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP + high}" '
                     f'y2="{TOP + high + 4}"/><text x="{edge:.1f}" y="{TOP + high + 16}" '
                     f'text-anchor="middle">{text}</text>')  # fmt: skip
    lines = []
    for line in series:
        keep = np.isfinite(line.x) & np.isfinite(line.y)
        x, y = line.x[keep], line.y[keep]
        points = at(np.log10(x) if log_x else x, y)
        shape = f'<polyline class="line s{line.style}" points="{points}"/>'
        if line.filled and len(x):
            foot = at(x[[-1, 0]], np.array([y0, y0]))
            shape = f'<polygon class="fill s{line.style}" points="{points} {foot}"/>{shape}'
        lines.append(shape)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(alt)}">'
        f'{"".join(marks)}<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{TOP + high}" '
        f'y2="{TOP + high}"/>{"".join(lines)}'
        f'<text class="name" x="2" y="12">{escape(y_label)}</text>'
        f'<text class="name" x="{LEFT + wide / 2}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Return the key of a chart: a piece of each line and its name."""
    items = "".join(
        f'<li><svg viewBox="0 0 28 8" aria-hidden="true"><line class="line s{style}" '
        f'x1="0" x2="28" y1="4" y2="4"/></svg>{escape(label)}</li>'
        for label, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def roc(scores: np.ndarray, same: np.ndarray, points: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """Return (FAR, TAR) at score thresholds, spread evenly in log FAR.

    >>> far, tar = roc(np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, False, True, False]))
    >>> far.tolist(), tar.tolist()  # one false accept buys 0.9; the second buys 0.3 as well
    ([0.5, 1.0], [0.5, 1.0])
    """
    impostors = np.sort(scores[~same])[::-1]
    genuine = np.sort(scores[same])
    if not len(impostors) or not len(genuine):
        return np.zeros(0), np.zeros(0)
    ranks = np.unique(np.geomspace(1, len(impostors), points).round().astype(int)) - 1
    thresholds = impostors[ranks]  # ties accept together, so FAR is counted, not read off the rank
    accepted = len(impostors) - np.searchsorted(impostors[::-1], thresholds, side="left")
    passed = len(genuine) - np.searchsorted(genuine, thresholds, side="left")
    return accepted / len(impostors), passed / len(genuine)


def bin_means(x: np.ndarray, y: np.ndarray, bins: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return means over runs of neighbouring points, at most `bins` of them.

    >>> bin_means(np.arange(6.0), np.array([4.0, 2.0, 3.0, 1.0, 1.0, 1.0]), bins=3)
    (array([0.5, 2.5, 4.5]), array([3., 2., 1.]))
    """
    keep = np.isfinite(x) & np.isfinite(y)
    chunks = np.array_split(np.arange(keep.sum()), min(bins, max(1, int(keep.sum()))))
    x, y = x[keep], y[keep]
    chunks = [c for c in chunks if len(c)]
    return np.array([x[c].mean() for c in chunks]), np.array([y[c].mean() for c in chunks])


def png_uri(pixels: np.ndarray) -> str:
    """Return uint8 pixels `h w 3` as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def label_overlay(image: np.ndarray, labels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """Colour a grey face by its labels; label 0, the background, keeps the grey."""
    palette = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in colours], float)
    alpha = np.where(labels == 0, 0.0, 0.62)[..., None]
    return _blend(_grey(image), palette[labels], alpha)


def heat_overlay(image: np.ndarray, part_map: np.ndarray) -> np.ndarray:
    """Glow where a part map `h w` is high, on a darkened grey face; the scale is fixed, 0 to 1."""
    small = np.nan_to_num(part_map.astype(np.float32)).clip(0, 1)
    size = image.shape[1], image.shape[0]
    value = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(value, stops, HEAT[:, i]) for i in range(3)], axis=-1)
    return _blend(0.75 * _grey(image), colour, (0.15 + 0.75 * value)[..., None])


def _minus(value: float) -> str:
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def _grey(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None].repeat(3, axis=-1)


def _blend(under: np.ndarray, over: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    return (under * (1 - alpha) + over * alpha).round().clip(0, 255).astype(np.uint8)
