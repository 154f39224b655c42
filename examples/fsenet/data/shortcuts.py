"""Can people be told apart without looking at the shape of their parts? Checks of a face world.

Pairs of people that training has not seen are scored by simple measures that a network could fall
back on: colours of the true parts, grey pixels, hair, glasses, background. `shortcut_accuracies`
gives each measure's ten-fold verification accuracy; a fair world keeps colours below 70 %, pixels
below 65 %, and hair, glasses and background at chance.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .face_params import NuisanceRanges, draw_nuisance
from .procedural import Face, render

HAIR = 10
PARTS = range(1, 10)  # skin to lower lip: hair is judged alone


def part_colours(face: Face) -> np.ndarray:
    """Mean colour of each true part but hair [27]; NaN where a part is hidden."""
    colours = np.full((len(PARTS), 3), np.nan)
    for i, label in enumerate(PARTS):
        mask = face.labels == label
        if mask.sum() >= 3:
            colours[i] = face.image[mask].mean(0)
    return colours.ravel()


def grey_pixels(face: Face) -> np.ndarray:
    """The picture as 28x28 grey pixels [784], standardised."""
    grey = face.image.mean(2)
    small = grey.reshape(28, grey.shape[0] // 28, 28, -1).mean((1, 3)).ravel()
    return (small - small.mean()) / (small.std() + 1e-6)


def hair_features(face: Face) -> np.ndarray:
    """Mean colour and coarse shape (7x7 occupancy) of the hair; NaN where there is none."""
    return _masked(face, face.labels == HAIR)


def glasses_features(face: Face) -> np.ndarray:
    """Mean colour and coarse shape of frames and dark lenses; NaN without glasses."""
    return _masked(face, face.glasses)


def background_features(face: Face) -> np.ndarray:
    """Mean and deviation of the background's colour in the two upper corners; NaN where none."""
    s = face.image.shape[0] // 6
    features = []
    for columns in (slice(0, s), slice(-s, None)):
        pixels = face.image[:s, columns][face.labels[:s, columns] == 0]
        enough = len(pixels) >= 20
        features.append(np.r_[pixels.mean(0), pixels.std(0)] if enough else np.full(6, np.nan))
    return np.concatenate(features)


def _masked(face: Face, mask: np.ndarray) -> np.ndarray:
    cells = 7
    if mask.sum() < 20:
        return np.full(3 + cells * cells, np.nan)
    side = mask.shape[0] // cells
    shape = mask.reshape(cells, side, cells, side).mean((1, 3)).ravel()
    return np.concatenate([face.image[mask].mean(0) / 255 * 2, shape])


def draw_pairs(
    rng: np.random.Generator, identities: int, pairs: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Person and sample of both sides of `pairs` pairs [pairs, 2] each, and who is genuine.

    No picture occurs twice, so that pairs are independent given the people.
    """
    same = np.arange(pairs) % 2 == 0
    first = rng.integers(0, identities, pairs)
    other = (first + rng.integers(1, identities, pairs)) % identities
    people = np.stack([first, np.where(same, first, other)], 1)
    samples = np.arange(2 * pairs).reshape(pairs, 2)
    return people, samples, same


def pair_scores(first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    """Cosine and negative distance of standardised features; a feature absent in one is left out.

    Every score is a mean over the features that both pictures have, so absence is no evidence.
    """
    both = np.concatenate([first, second])
    mean, std = np.nanmean(both, 0), np.nanstd(both, 0) + 1e-6
    a, b = (first - mean) / std, (second - mean) / std
    present = ~np.isnan(a) & ~np.isnan(b)
    a, b = np.where(present, a, 0), np.where(present, b, 0)
    count = present.sum(1)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return {
        "cosine": (a * b).sum(1) / (norms + 1e-9),
        "distance": -np.sqrt(((a - b) ** 2).sum(1) / np.maximum(count, 1)),
    }


def ten_fold(scores: np.ndarray, same: np.ndarray) -> float:
    """Accuracy of the best training threshold on the tenth left out, mean of ten folds."""
    order = np.arange(len(scores)) // 2 % 10  # a genuine and an impostor pair go together
    results = []
    for fold in range(10):
        train, test = order != fold, order == fold
        cut = _best_threshold(scores[train], same[train])
        results.append(((scores[test] > cut) == same[test]).mean())
    return float(np.mean(results))


def _best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    order = np.argsort(scores)
    s, y = scores[order], same[order]
    # Accept above the cut: right are the impostors up to it and the genuine pairs above it.
    right = np.concatenate([[0], np.cumsum(~y)]) + y.sum() - np.concatenate([[0], np.cumsum(y)])
    best = int(np.argmax(right))
    edges = np.concatenate([[s[0] - 1], (s[1:] + s[:-1]) / 2, [s[-1] + 1]])
    return float(edges[best])


def shortcut_accuracies(
    seed: int,
    first_identity: int = 0,
    identities: int = 300,
    pairs: int = 3000,
    size: int = 112,
    ranges: NuisanceRanges | None = None,
) -> dict[str, float]:
    """Ten-fold accuracy of each shortcut on people `first_identity`..`+ identities`.

    Glasses are judged on pairs of pictures that both wear them, drawn anew for the purpose; hair
    on pairs that both show it. The better of cosine and distance counts against the world where a
    limit is given; for the chance checks both are averaged, since the better of two is biased.
    """
    rng = np.random.default_rng([seed, 77])
    people, samples, same = draw_pairs(rng, identities, pairs)
    people = people + first_identity
    samples = samples + 1_000_000  # none that training shows
    measures: dict[str, Callable[[Face], np.ndarray]] = {
        "part colours": part_colours,
        "grey pixels": grey_pixels,
        "hair": hair_features,
        "background": background_features,
    }
    features = {name: [[], []] for name in measures}
    for k in range(pairs):
        for side in (0, 1):
            face = render(seed, int(people[k, side]), int(samples[k, side]), size, ranges)
            for name, measure in measures.items():
                features[name][side].append(measure(face))
    results = {}
    for name, (a, b) in features.items():
        results[name] = _judge(np.array(a), np.array(b), same, name in ("part colours",))
    grey = np.array(features["grey pixels"])
    results["grey pixels"] = ten_fold((grey[0] * grey[1]).mean(1), same)
    results["glasses"] = _glasses(seed, people, same, size, ranges)
    return results


def _judge(a: np.ndarray, b: np.ndarray, same: np.ndarray, worst: bool) -> float:
    shown = ~np.isnan(a).all(1) & ~np.isnan(b).all(1)
    scores = pair_scores(a[shown], b[shown])
    values = [ten_fold(s, same[shown]) for s in scores.values()]
    return max(values) if worst else float(np.mean(values))


def _glasses(
    seed: int, people: np.ndarray, same: np.ndarray, size: int, ranges: NuisanceRanges | None
) -> float:
    sides = []
    for side in (0, 1):
        rows = []
        for k, person in enumerate(people[:, side]):
            sample = 2_000_000 + 1000 * (2 * k + side)
            while not draw_nuisance(seed, int(person), sample, ranges).glasses:
                sample += 1
            rows.append(glasses_features(render(seed, int(person), sample, size, ranges)))
        sides.append(np.array(rows))
    return _judge(sides[0], sides[1], same, False)
