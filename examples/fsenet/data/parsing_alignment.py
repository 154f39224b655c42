"""Bring the pictures of parsing sets to the template of recognition, their targets with them.

Recognition sees faces on a 112x112 template, so a parser must be trained and tested on faces that
lie there too. Landmarks say where a face is, or its label map does: the centroids of eyes, nose and
mouth.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.archives import DamagedImage
from data.parsing_sets import ParsingPair, ParsingSet
from data.procedural import DRAWERS
from data.vocabularies import FASSEG
from partlocal.alignment import ARCFACE_TEMPLATE, similarity_from_points
from partlocal.labels import LabelSet

_LEFT_EYE, _RIGHT_EYE, _NOSE, *_CORNERS = np.array(ARCFACE_TEMPLATE)
# The centroid of a nose lies above its tip, where the template's third point is: by 5.6 pixels,
# measured over FASSEG's frontal02-train brought to the template by eyes and mouth alone.
_NOSE_RISE = 5.6
_TARGETS = np.stack(
    [_LEFT_EYE, _RIGHT_EYE, _NOSE - (0, _NOSE_RISE), (_CORNERS[0] + _CORNERS[1]) / 2]
)
_FEW = 500  # pictures that processes of their own would not align sooner


def points_from_labels(
    labels: UInt8[np.ndarray, "h w"], label_set: LabelSet = FASSEG
) -> Float[np.ndarray, "4 2"] | None:
    """Find the centroids of both eyes (left in the picture first), nose and mouth.

    >>> face = np.zeros((20, 20), np.uint8)
    >>> face[5, 4:7] = face[5, 13:16] = 3  # eyes
    >>> face[10, 10], face[15, 8:13] = 4, 5
    >>> points_from_labels(face)
    array([[ 5.5,  5.5],
           [14.5,  5.5],
           [10.5, 10.5],
           [10.5, 15.5]])

    Args:
        labels: label map; coordinates count from the corner of its first pixel.
        label_set: one with `left_eye` and `right_eye`, or with `eyes` alone, which are parted
            where the gap across the face is widest.

    Returns:
        points (x, y), or None where a part is missing or only one eye is seen.
    """

    def pixels(*names: str) -> np.ndarray:
        members = [m for n in names for m in label_set.groups.get(n, (n,))]
        rows, columns = np.nonzero(np.isin(labels, [label_set.index(m) for m in members]))
        return np.stack([columns, rows], 1) + 0.5

    nose, mouth = pixels("nose"), pixels("mouth")
    if not len(nose) or not len(mouth):
        return None
    if "left_eye" in label_set.labels:
        eyes = [pixels("left_eye"), pixels("right_eye")]
        if label_set.side == "subject":
            eyes.reverse()
    else:
        eyes = _part_eyes(pixels("eyes"), mouth.mean(0))
    if any(len(eye) == 0 for eye in eyes):
        return None
    points = np.stack([part.mean(0) for part in (*eyes, nose, mouth)])
    return None if np.ptp(points, 0).max() < 1 else points


def align_pair(
    pair: ParsingPair, label_set: LabelSet = FASSEG, size: int = 112
) -> tuple[UInt8[np.ndarray, "s s 3"], Shaped[np.ndarray, "*g s s"]] | None:
    """Bring a face to the recognition template by its landmarks, or else by its own label map.

    Pictures and probabilities are sampled bilinearly, after an antialiased reduction where the
    template is smaller than the face; labels by their nearest pixel. Outside is black and
    background.

    Args:
        pair: picture, target, and points or None.
        label_set: what the target's numbers or channels mean.
        size: height and width of the result; the template is scaled with it.

    Returns:
        picture and target, aligned, or None where `points_from_labels` finds too little.
    """
    image, target = pair.image, pair.target
    soft = target.ndim == 3
    points, goal = pair.points, np.array(ARCFACE_TEMPLATE)
    if points is None:
        labels = target.argmax(0).astype(np.uint8) if soft else target
        points, goal = points_from_labels(labels, label_set), _TARGETS
    if points is None:
        return None
    # Pillow asks where in the input an output pixel comes from: the way back.
    way = torch.from_numpy(goal * (size / 112))
    back = similarity_from_points(way[None], torch.from_numpy(points))[0].numpy()
    aligned = _resample(Image.fromarray(image), back, size)
    background = label_set.labels.index("background") if "background" in label_set.labels else 255
    if soft:
        channels = [
            _resample(Image.fromarray(channel), back, size, float(index == background))
            for index, channel in enumerate(target)
        ]
        return aligned, np.stack(channels)
    nearest = Image.Resampling.NEAREST
    return aligned, _warp(Image.fromarray(target), back, size, nearest, background)


@dataclass(frozen=True)
class AlignedPairs:
    """What `aligned_pairs` found: tensors of the faces kept, and the names of those left out.

    Args:
        images: the pictures.
        targets: labels `n s s`, or probabilities `n g s s` in 255ths.
        names: of those kept.
        skipped: profiles, whose second eye is hidden.
        lost: what was damaged, with the reason.
    """

    images: UInt8[Tensor, "n 3 s s"]
    targets: UInt8[Tensor, "n *g s s"]
    names: tuple[str, ...]
    skipped: tuple[str, ...]
    lost: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


def aligned_pairs(
    pairs: ParsingSet, size: int = 112, damaged: int = 0, progress: bool = True
) -> AlignedPairs:
    """Decode and align a whole set into memory: a labelled picture of 112x112 takes 50 kB.

    Args:
        pairs: the set.
        size: height and width of the pictures.
        damaged: how many pictures may be; each is named and left out.
        progress: show a bar.

    Raises:
        ValueError: no face of the set can be aligned, or more pictures are damaged.
    """
    images = np.empty((len(pairs), size, size, 3), np.uint8)
    targets: UInt8[np.ndarray, "n *g s s"] | None = None
    kept, skipped, lost = [], [], []
    bar = tqdm(_align_each(pairs, size), "aligning", len(pairs), disable=not progress)
    for name, found in zip(pairs.names, bar, strict=True):
        if isinstance(found, str):
            lost.append(found)
            print(f"left out: {found}", file=sys.stderr)
            if len(lost) > damaged:
                raise ValueError(f"{found} ({len(lost)} damaged, and --damaged allows {damaged})")
        elif found is None:
            skipped.append(name)
        else:
            if targets is None:
                targets = np.empty((len(pairs), *found[1].shape), np.uint8)
            images[len(kept)], targets[len(kept)] = found
            kept.append(name)
    if targets is None:
        raise ValueError(
            f"{pairs.source.path}: none of {len(pairs)} label maps shows two eyes, nose and mouth"
        )
    return AlignedPairs(
        torch.from_numpy(images[: len(kept)]).permute(0, 3, 1, 2),
        torch.from_numpy(targets[: len(kept)]),
        tuple(kept),
        tuple(skipped),
        tuple(lost),
    )


class _Aligning(Dataset[tuple[np.ndarray, np.ndarray] | str | None]):
    """Align each picture when it is asked for; a damaged one is the text that says so."""

    def __init__(self, pairs: ParsingSet, size: int) -> None:
        self.pairs, self.size = pairs, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | str | None:
        try:
            pair = self.pairs[index]
        except DamagedImage as error:
            return str(error)
        aligned = align_pair(pair, self.pairs.vocabulary.labels, self.size)
        if aligned is not None and aligned[1].dtype != np.uint8:
            return aligned[0], np.rint(255 * aligned[1]).astype(np.uint8)
        return aligned


def _align_each(
    pairs: ParsingSet, size: int
) -> Iterator[tuple[np.ndarray, np.ndarray] | str | None]:
    workers = DRAWERS if len(pairs) > _FEW else 0
    # As they are: tensors from another process would keep a file open each.
    loader = DataLoader(
        _Aligning(pairs, size), batch_size=None, num_workers=workers, collate_fn=_unchanged
    )
    return iter(loader)


def _unchanged(item: Any) -> Any:
    return item


def _part_eyes(pixels: np.ndarray, mouth: np.ndarray) -> list[np.ndarray]:
    """Split the pixels of both eyes at the widest gap across the face; empty if there is none."""
    nothing = [pixels[:0], pixels[:0]]
    if len(pixels) < 2:
        return nothing
    down = mouth - pixels.mean(0)
    across = np.array([down[1], -down[0]]) / max(np.linalg.norm(down), 1e-6)
    place = pixels @ across
    order = np.argsort(place, kind="stable")
    gaps = np.diff(place[order])
    cut = int(gaps.argmax()) + 1
    left, right = pixels[order[:cut]], pixels[order[cut:]]
    # One eye, even a speckled one, has no gap as wide as a fifth of the whole.
    if gaps.max() < 0.2 * np.ptp(place) or min(len(left), len(right)) < 0.1 * len(pixels):
        return nothing
    return [left, right]


def _resample(
    image: Image.Image, back: Float[np.ndarray, "2 3"], size: int, outside: float = 0
) -> np.ndarray:
    zoom = np.hypot(*back[:, 0])  # input pixels an output pixel
    width, height = image.size
    if zoom > 1:
        reduced = (max(1, round(width / zoom)), max(1, round(height / zoom)))
        image = image.resize(reduced, Image.Resampling.BILINEAR)
    shrink = np.array([[image.width / width], [image.height / height]])
    return _warp(image, back * shrink, size, Image.Resampling.BILINEAR, outside)


def _warp(
    image: Image.Image,
    back: Float[np.ndarray, "2 3"],
    size: int,
    how: Image.Resampling,
    outside: float,
) -> np.ndarray:
    data, fill = tuple(back.ravel().tolist()), (0, 0, 0) if image.mode == "RGB" else outside
    affine = Image.Transform.AFFINE
    return np.array(image.transform((size, size), affine, data, resample=how, fillcolor=fill))
