"""The sections of the report that show faces: parts as the parser sees them, and pairs compared."""

from html import escape

import numpy as np

from partlocal import HELEN
from reporting.figures import heat_overlay, label_overlay, part_colour, png_uri
from reporting.inputs import Run, number
from reporting.sections import bar, bars, table
from reporting.words import plain


def parsed_faces(run: Run, people: int = 4, heated: int = 2) -> str:
    """Two faces each of some people with their labels on top, and a few with a map per part."""
    faces = run.faces
    labels = [*HELEN.labels, *(f"label {i}" for i in range(len(HELEN.labels), 256))]
    colours = [part_colour(name, i) for i, name in enumerate(labels)]
    cards = []
    for person in np.unique(faces["identity"])[:people]:
        rows = np.flatnonzero(faces["identity"] == person)[:2]
        shown = "".join(_face(run, row, f"person {person}, picture {row}") for row in rows)
        overlays = "".join(
            f'<img width="112" height="112" alt="Parts found in person {person}, picture {row}" '
            f'src="{png_uri(label_overlay(faces["images"][row], faces["labels"][row], colours))}">'
            for row in rows
        )
        cards.append(
            f'<figure><div class="two">{shown}{overlays}</div>'
            f"<figcaption>Person {person}</figcaption></figure>"
        )
    found = [int(i) for i in np.unique(faces["labels"]) if i > 0]
    key = "".join(
        f'<li><span class="key" style="background:{colours[i]}"></span>{_words(labels[i])}</li>'
        for i in found
    )
    names = [str(name) for name in faces["part_names"]]
    heats = "".join(_heat(run, row, names) for row in _spread(faces["identity"], heated))
    grid = " by ".join(str(size) for size in faces["maps"].shape[2:])
    return (
        "<p>Above, faces as drawn; below, the label the trained parser gives each pixel. Left and "
        "right are the viewer's.</p>"
        f'<ul class="legend">{key}</ul><div class="faces">{"".join(cards)}</div>'
        f"<h3>Part maps</h3><p>What the local half pools with: the map of each part on its "
        f"{grid} grid, laid over the face.</p>"
        '<ul class="legend"><li>0 <span class="ramp"></span> 1</li></ul>' + heats
    )


def _heat(run: Run, row: int, names: list[str]) -> str:
    image, maps = run.faces["images"][row], run.faces["maps"][row]
    visible = run.faces["visibility"][row]
    who = f"person {run.faces['identity'][row]}"
    cells = [f"<figure>{_face(run, row, who)}<figcaption>as drawn</figcaption></figure>"]
    for name, part_map, seen in zip(names, maps, visible, strict=True):
        alt = f"Map of {_words(name)}, {who}, visibility {seen:.2f}"
        cells.append(
            f'<figure><img width="112" height="112" alt="{alt}" '
            f'src="{png_uri(heat_overlay(image, part_map))}">'
            f"<figcaption>{_words(name)}</figcaption></figure>"
        )
    return f'<div class="maps">{"".join(cells)}</div>'


def compared_pairs(run: Run) -> str:
    """A genuine and an impostor pair, part by part, beside the means over all pairs shown."""
    faces = run.faces
    weight = number(run.table("config").get("local_weight"))
    weight = 0.6 if weight is None else weight
    first, second = np.triu_indices(len(faces["identity"]), 1)
    halves = [
        np.einsum("pd,pd->p", v[first], v[second])
        for v in map(_unit, (faces["global"], faces["local"]))
    ]
    joined = (halves[0] + weight**2 * halves[1]) / (1 + weight**2)
    unit = _unit(faces["parts"])
    parts = np.einsum("pkc,pkc->pk", unit[first], unit[second])
    there = np.linalg.norm(faces["parts"].astype(np.float64), axis=-1) > 0
    parts[~(there[first] & there[second])] = np.nan
    same = faces["identity"][first] == faces["identity"][second]
    names = [_words(str(name)) for name in faces["part_names"]]

    cards, means, counts = [], [], []
    for kind, group in (("Genuine", same), ("Impostor", ~same)):
        rows = np.flatnonzero(group & np.isfinite(joined))
        counts.append(len(rows))
        means.append(_mean(parts[rows]))
        if not len(rows):
            cards.append(f"<div><h3>{kind} pair</h3><p>The run holds none.</p></div>")
            continue
        # The median pair: the best or worst would show more than the network can do.
        pair = rows[np.argsort(joined[rows], kind="stable")[(len(rows) - 1) // 2]]
        whole = [("both halves", joined), ("global half", halves[0]), ("local half", halves[1])]
        whole = [(f"<strong>{name}</strong>", values[pair]) for name, values in whole]
        shown = "".join(
            _face(run, row, f"person {faces['identity'][row]}, one of the {kind.lower()} pair")
            for row in (first[pair], second[pair])
        )
        marks = [
            (name, _signed(value, "soft" if i < len(whole) else ""), _cosine(value))
            for i, (name, value) in enumerate([*whole, *zip(names, parts[pair], strict=True)])
        ]
        cards.append(f'<div><h3>{kind} pair</h3><div class="two">{shown}</div>{bars(marks)}</div>')
    gaps = [
        (name, _cosine(g), _cosine(i), plain(float(g - i), 2))
        for name, g, i in zip(names, *means, strict=True)
    ]
    return (
        "<p>Cosine of the two faces' vectors of the same part. The joined similarity weighs the "
        f"local half by {weight:g}. Each pair is the median of its kind among the faces "
        "kept for this page, by joined similarity, without the mirrored pictures.</p>"
        f'<div class="pairs">{"".join(cards)}</div>'
        + '<p class="note">Bars run from &minus;1 to 1, from the middle. A part that is not '
        "visible in both faces has no cosine.</p>"
        + table(
            f"Mean cosine per part over all pairs of these faces ({counts[0]:,} genuine, "
            f"{counts[1]:,} impostor)",
            ["Part", "Genuine", "Impostor", "Gap"],
            gaps,
        )
    )


def _signed(value: float, kind: str) -> str:
    middle = '<i class="zero" style="left:50%"></i>'
    if not np.isfinite(value):
        return middle
    low, high = sorted((0.5, 0.5 + value / 2))
    return bar(low, high, kind) + middle


def _cosine(value: float) -> str:
    return plain(float(value), 2) if np.isfinite(value) else "absent"


def _mean(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    total = np.where(known, values, 0).sum(0)
    return np.where(known.any(0), total / known.sum(0).clip(1), np.nan)


def _unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=-1, keepdims=True).clip(1e-12)


def _spread(identity: np.ndarray, count: int) -> list[int]:
    return [int(np.flatnonzero(identity == person)[0]) for person in np.unique(identity)[:count]]


def _face(run: Run, row: int, who: str) -> str:
    return (
        f'<img width="112" height="112" alt="Drawn face of {escape(who)}" '
        f'src="{png_uri(run.faces["images"][row])}">'
    )


def _words(name: str) -> str:
    return escape(name.replace("_", " "))
