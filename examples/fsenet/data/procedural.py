"""Procedural faces with exact part labels and landmarks, for training and tests without pictures.

    face = render(seed=0, identity=7, sample=3)    # 112x112, aligned to the recognition template
    face.image      # uint8 [112, 112, 3], RGB
    face.labels     # uint8 [112, 112], HELEN's eleven labels, left = viewer's left
    face.points5    # float32 [5, 2], x and y; pixel centres have whole coordinates
    face.points68   # float32 [68, 2], iBUG order
    face.flip()     # mirrored, left and right labels and points swapped

    faces = render_many(0, identities=[0, 0, 1], samples=[0, 1, 0])    # the same, stacked
    data = ProceduralFaces(seed=0, identities=1000, samples_per_identity=20)
    item = data[index]      # {"image": uint8 [3, s, s], "labels": uint8 [s, s], "identity": int,
                            #  "points5", "points68"}; depends on (seed, index) alone

A face is a function of (seed, identity, sample): who it is depends on (seed, identity), how it
was seen on all three (face_params.py). `NuisanceRanges` sets the difficulty: its defaults are
meant for telling people apart, `WILD` for parsers that shall work on photographs.
Occluded pixels are background; clear glasses are see-through (see face_scene.py).

A sheet to look at, rows of identities (`--labels` adds part overlays):

    python examples/fsenet/data/procedural.py sheet.png --identities 8 --samples 12
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from threadpoolctl import ThreadpoolController
from torch.utils.data import Dataset

if not __package__:  # run as a script: make the siblings importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "data"

from errors import one_line_errors
from limits import check_numbers

from partlocal.labels import HELEN

from .face_camera import develop
from .face_canvas import Canvas
from .face_geometry import face_shape
from .face_params import Identity, Nuisance, NuisanceRanges, draw_identity, draw_nuisance
from .face_render import paint_face
from .face_scene import (
    Hair,
    paint_background,
    paint_body,
    paint_glasses,
    paint_hat,
    paint_occluder,
)

# Which of iBUG's 68 points takes the place of each in a mirrored picture.
FLIP68 = np.concatenate(
    [
        [*range(16, -1, -1), *range(26, 16, -1), 27, 28, 29, 30, 35, 34, 33, 32, 31],
        [45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40],
        [54, 53, 52, 51, 50, 49, 48, 59, 58, 57, 56, 55, 64, 63, 62, 61, 60, 67, 66, 65],
    ]
)
_FLIP_LABELS = np.array(HELEN.mirrored, np.uint8)
_POOLS = ThreadpoolController()

DRAWERS = min(4, os.cpu_count() or 1)  # processes that draw many faces


@dataclass(frozen=True)
class Face:
    """One rendered picture with its labels and landmarks."""

    image: np.ndarray  # uint8 [s, s, 3]
    labels: np.ndarray  # uint8 [s, s]
    points5: np.ndarray  # float32 [5, 2]
    points68: np.ndarray  # float32 [68, 2]
    glasses: np.ndarray  # bool [s, s]: frames and dark lenses

    def flip(self) -> Face:
        """The mirrored face; left and right labels and points trade places."""
        edge = self.image.shape[1] - 1
        return Face(
            np.ascontiguousarray(self.image[:, ::-1]),
            np.ascontiguousarray(_FLIP_LABELS[self.labels[:, ::-1]]),
            _mirror(self.points5[[1, 0, 2, 4, 3]], edge),
            _mirror(self.points68[FLIP68], edge),
            np.ascontiguousarray(self.glasses[:, ::-1]),
        )


def render(
    seed: int, identity: int, sample: int, size: int = 112, ranges: NuisanceRanges | None = None
) -> Face:
    """Render picture `sample` of person `identity` of the world `seed`.

    >>> render(0, 1, 2).image.shape
    (112, 112, 3)

    Args:
        seed, identity, sample: non-negative; name the picture.
        size: pixels of its side; the template grows with it.
        ranges: strength of the nuisance; None for the defaults.

    Raises:
        ValueError: a number is negative, or the size below 16.
    """
    if min(seed, identity, sample) < 0:
        raise ValueError(
            f"seed, identity and sample must be >= 0; got {seed}, {identity} and {sample}"
        )
    if size < 16:
        raise ValueError(f"size must be at least 16 pixels; got {size}")
    ranges = ranges or NuisanceRanges()
    person = draw_identity(seed, identity)
    seen = draw_nuisance(seed, identity, sample, ranges)
    return render_face(person, seen, size, ranges)


def render_face(person: Identity, seen: Nuisance, size: int, ranges: NuisanceRanges) -> Face:
    """Render a given person under given circumstances."""
    with _POOLS.limit(limits=1, user_api="blas"):  # threads make matrices this small 4x slower
        return _render_face(person, seen, size, ranges)


def _render_face(person: Identity, seen: Nuisance, size: int, ranges: NuisanceRanges) -> Face:
    rng = np.random.Generator(np.random.SFC64(seen.textures))
    shape = face_shape(person, seen, size)
    canvas = Canvas(size)
    paint_background(canvas, rng)
    hair = Hair(seen, shape, canvas, rng)
    if not seen.bald:
        hair.paint_behind(canvas)
    paint_body(person, seen, shape, canvas, rng)
    light = paint_face(person, seen, shape, canvas, rng)
    if not seen.bald:
        hair.paint_front(canvas)
    if seen.glasses:
        paint_glasses(seen, canvas, rng)
    if seen.hat:
        paint_hat(shape, canvas, rng)
    if seen.occluder != "none":
        paint_occluder(seen, shape, canvas, light, rng)
    image = develop(canvas.colour, seen, ranges, rng)
    return Face(image, canvas.labels, shape.points5, shape.points68, canvas.glasses)


def render_many(
    seed: int,
    identities: Sequence[int],
    samples: Sequence[int],
    size: int = 112,
    ranges: NuisanceRanges | None = None,
) -> Face:
    """Render picture `samples[i]` of person `identities[i]` for all i, stacked in one `Face`."""
    faces = [
        render(seed, int(i), int(j), size, ranges) for i, j in zip(identities, samples, strict=True)
    ]
    names = ("image", "labels", "points5", "points68", "glasses")
    return Face(*(np.stack([getattr(f, name) for f in faces]) for name in names))


class ProceduralFaces(Dataset):
    """`identities` people with `samples_per_identity` pictures each, rendered when asked for.

    Args:
        seed: the world; people of different worlds are different.
        identities: how many people; labels run from 0.
        samples_per_identity: pictures of each.
        size: pixels of a side.
        first_identity: where to start counting, for disjoint training and test people.
        ranges: strength of the nuisance.
    """

    def __init__(
        self,
        seed: int,
        identities: int,
        samples_per_identity: int,
        size: int = 112,
        first_identity: int = 0,
        ranges: NuisanceRanges | None = None,
    ) -> None:
        self.seed, self.identities = seed, identities
        self.samples_per_identity, self.size = samples_per_identity, size
        self.first_identity, self.ranges = first_identity, ranges

    def __len__(self) -> int:
        return self.identities * self.samples_per_identity

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Picture `index`: identity index // samples_per_identity."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must be below {len(self)}; got {index}")
        identity, sample = divmod(index % len(self), self.samples_per_identity)
        face = render(self.seed, self.first_identity + identity, sample, self.size, self.ranges)
        return {
            "image": torch.from_numpy(face.image).permute(2, 0, 1).contiguous(),
            "labels": torch.from_numpy(face.labels),
            "identity": identity,
            "points5": torch.from_numpy(face.points5),
            "points68": torch.from_numpy(face.points68),
        }


def _mirror(points: np.ndarray, edge: float) -> np.ndarray:
    return np.stack([edge - points[:, 0], points[:, 1]], -1).astype(np.float32)


# Colours of the eleven labels in overlays.
PALETTE = np.array(
    [
        [0, 0, 0],
        [235, 190, 160],
        [140, 90, 20],
        [90, 60, 160],
        [30, 90, 255],
        [0, 200, 255],
        [60, 200, 60],
        [255, 40, 40],
        [120, 0, 30],
        [255, 130, 150],
        [90, 60, 40],
    ],
    np.uint8,
)


def overlay(face: Face) -> np.ndarray:
    """The picture, its labels blended in and its points marked; uint8 [s, s, 3]."""
    shown = (0.45 * face.image + 0.55 * PALETTE[face.labels]).astype(np.uint8)
    for points, colour in ((face.points68, (255, 255, 255)), (face.points5, (255, 255, 0))):
        at = np.rint(points).astype(int)
        at = at[((at >= 0) & (at < len(shown))).all(1)]
        shown[at[:, 1], at[:, 0]] = colour
    return shown


def contact_sheet(
    seed: int, identities: int, samples: int, size: int = 112, labels: bool = False
) -> np.ndarray:
    """Rows of people, columns of their pictures; uint8 [rows, columns, 3]."""
    rows = []
    for i in range(identities):
        faces = [render(seed, i, j, size) for j in range(samples)]
        rows.append(np.concatenate([f.image for f in faces], 1))
        if labels:
            rows.append(np.concatenate([overlay(f) for f in faces], 1))
    return np.concatenate(rows, 0)


@dataclass(frozen=True)
class Arguments:
    """Draw a sheet of procedural faces, a row for each person.

    Args:
        path: of the picture that is written, in the format of its suffix.
        seed: of the people.
        identities: rows.
        samples: columns.
        size: height and width of a face, pixels.
        labels: add rows with the parts and points drawn in.
    """

    path: Annotated[Path, tyro.conf.Positional]
    seed: int = 0
    identities: int = 8
    samples: int = 12
    size: int = 112
    labels: bool = False


def main(arguments: Arguments) -> None:
    """Write a contact sheet and print the speed."""
    check_numbers(arguments)
    path, people, samples = arguments.path, arguments.identities, arguments.samples
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} must end in the suffix of a picture's format, such as .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first")
    render(arguments.seed, 0, 0, arguments.size)  # fills the texture bank
    start = time.perf_counter()
    sheet = contact_sheet(arguments.seed, people, samples, arguments.size, arguments.labels)
    rate = people * samples / (time.perf_counter() - start)
    Image.fromarray(sheet).save(path)
    print(f"{path}: {people} people, {samples} pictures each, {rate:.0f} faces/s")


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
