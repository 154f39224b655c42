"""Can people be told apart without looking at the shape of their parts? Checks of a face world.

Pairs of people that training has not seen are scored by simple measures that a network could fall
back on: colours of the true parts, grey pixels, hair, glasses, background. `shortcut_accuracies`
gives each measure's ten-fold verification accuracy; a fair world keeps colours below 70 %, pixels
below 65 %, and hair, glasses and background at chance.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from protocols.pairs import Pairs
from torch.utils.data import DataLoader, Dataset

from data.face_params import draw_nuisance
from data.procedural import DRAWERS, render
from partlocal.evaluation import ten_fold_accuracy

HAIR = 10
GLASSES_FROM = 2_000_000  # people who are drawn for the check of glasses alone
PARTS = range(1, 10)  # skin to lower lip: hair is judged alone


def part_colours(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colour of each true part but hair [27]; NaN where a part is hidden."""
    colours = np.full((len(PARTS), 3), np.nan)
    for i, label in enumerate(PARTS):
        mask = labels == label
        if mask.sum() >= 3:
            colours[i] = image[mask].mean(0)
    return colours.ravel()


def grey_pixels(image: np.ndarray, _: np.ndarray) -> np.ndarray:
    """The picture as 28x28 grey pixels [784], standardised."""
    grey = image.mean(2)
    small = grey.reshape(28, grey.shape[0] // 28, 28, -1).mean((1, 3)).ravel()
    return (small - small.mean()) / (small.std() + 1e-6)


def hair_features(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colour and coarse shape (7x7 occupancy) of the hair; NaN where there is none."""
    return _masked(image, labels == HAIR)


def background_features(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean and deviation of the background's colour in the two upper corners; NaN where none."""
    s = image.shape[0] // 6
    features = []
    for columns in (slice(0, s), slice(-s, None)):
        pixels = image[:s, columns][labels[:s, columns] == 0]
        enough = len(pixels) >= 20
        features.append(np.r_[pixels.mean(0), pixels.std(0)] if enough else np.full(6, np.nan))
    return np.concatenate(features)


def _masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Mean colour and coarse shape (7x7 occupancy) of a mask; NaN where it is all but empty."""
    cells = 7
    if mask.sum() < 20:
        return np.full(3 + cells * cells, np.nan)
    side = mask.shape[0] // cells
    shape = mask.reshape(cells, side, cells, side).mean((1, 3)).ravel()
    return np.concatenate([image[mask].mean(0) / 255 * 2, shape])


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


MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], bool]] = {
    "part colours": (part_colours, True),
    "grey pixels": (grey_pixels, True),
    "hair": (hair_features, False),
    "background": (background_features, False),
}


def shortcut_accuracies(
    images: UInt8[np.ndarray, "n h w 3"],
    labels: UInt8[np.ndarray, "n h w"],
    pairs: Pairs,
    seed: int,
    glasses_pairs: int = 2400,
) -> dict[str, dict[str, float | None]]:
    """Ten-fold accuracy of each shortcut, with the standard error of a share of pairs.

    Both are None where a fold has no genuine or no impostor pair that shows the thing.

    Glasses are judged on pairs of pictures that both wear them, drawn anew for the purpose; hair
    on pairs that both show it. The better of cosine and distance counts where a limit is given;
    for the chance checks both are averaged, since the better of two is biased.

    Args:
        images: of people that training has not seen.
        labels: their exact label maps.
        pairs: to verify.
        seed: of the world, for the pictures with glasses.
        glasses_pairs: how many to draw.
    """
    faces = list(zip(images, labels, strict=True))
    results = {}
    for name, (measure, worst) in MEASURES.items():
        features = np.array([measure(image, label) for image, label in faces])
        first, second = features[pairs.first], features[pairs.second]
        results[name] = _judge(first, second, pairs.same, pairs.fold, worst)
    results["glasses"] = _glasses(seed, glasses_pairs)
    return results


def _judge(
    a: np.ndarray, b: np.ndarray, same: np.ndarray, fold: np.ndarray, worst: bool
) -> dict[str, float | None]:
    shown = ~np.isnan(a).all(1) & ~np.isnan(b).all(1)
    kinds = {(f, s) for f, s in zip(fold[shown].tolist(), same[shown].tolist(), strict=True)}
    if len(kinds) < 2 * len(np.unique(fold)):
        return {"accuracy": None, "standard_error": None, "pairs": int(shown.sum())}
    scores = pair_scores(a[shown], b[shown]).values()
    found = [ten_fold_accuracy(s, same[shown], fold[shown]).mean for s in scores]
    accuracy = max(found) if worst else float(np.mean(found))
    error = float(np.sqrt(accuracy * (1 - accuracy) / shown.sum()))
    return {"accuracy": accuracy, "standard_error": error, "pairs": int(shown.sum())}


def _glasses(seed: int, pairs: int) -> dict[str, float | None]:
    """Draw pairs of pictures with glasses; no picture occurs twice."""
    rng = np.random.default_rng([seed, 77])
    same = np.arange(pairs) % 2 == 0
    first = GLASSES_FROM + rng.integers(0, 300, pairs)
    other = GLASSES_FROM + (first - GLASSES_FROM + rng.integers(1, 300, pairs)) % 300
    people = np.concatenate([first, np.where(same, first, other)]).tolist()
    loader = DataLoader(_WithGlasses(seed, people), batch_size=25, num_workers=DRAWERS)
    features = np.concatenate([batch.numpy() for batch in loader])
    fold = np.arange(pairs) // 2 % 10
    return _judge(features[:pairs], features[pairs:], same, fold, worst=False)


class _WithGlasses(Dataset[np.ndarray]):
    """Features of the glasses in a new picture of each of `people`."""

    def __init__(self, seed: int, people: list[int]) -> None:
        self.seed, self.people = seed, people

    def __len__(self) -> int:
        return len(self.people)

    def __getitem__(self, index: int) -> np.ndarray:
        person, sample = self.people[index], 1000 * index
        while not draw_nuisance(self.seed, person, sample).glasses:
            sample += 1
        face = render(self.seed, person, sample)
        return _masked(face.image, face.glasses)
