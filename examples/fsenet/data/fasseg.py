"""Pictures with a label map each, `images/` and `labels/`, as in FASSEG; aligned by their labels.

Recognition sees faces on a 112x112 template, so a parser must be trained and tested on faces that
lie there too. A label map says where: the centroids of its eyes, nose and mouth.

Source: Khan, Mauro, Leonardi, "Multi-class semantic segmentation of faces", ICIP 2015 (FASSEG).
"""

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.archives import DamagedImage, Source
from data.images import is_image, load_rgb
from partlocal.alignment import ARCFACE_TEMPLATE, similarity_from_points
from partlocal.labels import HELEN, LabelSet

FASSEG = LabelSet("FASSEG", ("background", "skin", "hair", "eyes", "nose", "mouth"))
"""Skin has ears and neck, hair has the eyebrows; left and right are one label."""

_LEFT_EYE, _RIGHT_EYE, _NOSE, *_CORNERS = np.array(ARCFACE_TEMPLATE)
# The centroid of a nose lies above its tip, where the template's third point is: by 5.6 pixels,
# measured over FASSEG's frontal02-train brought to the template by eyes and mouth alone.
_NOSE_RISE = 5.6
_TARGETS = np.stack(
    [_LEFT_EYE, _RIGHT_EYE, _NOSE - (0, _NOSE_RISE), (_CORNERS[0] + _CORNERS[1]) / 2]
)


def helen_to_fasseg() -> Float[Tensor, "6 11"]:
    """Return the 0/1 matrix from HELEN's labels to FASSEG's.

    >>> FASSEG.labels[helen_to_fasseg().argmax(0)[HELEN.index("left_brow")]]
    'hair'
    """
    return HELEN.remap(FASSEG, into={"left_brow": "hair", "right_brow": "hair"})


class ParsingPairs(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Pictures and label maps of the same name under `images/` and `labels/`, folder or zip.

    Items are (uint8 `h w 3`, uint8 `h w`); 255 in a label map means "ignore".

    Args:
        path: a folder or `.zip`.
        split: keep the names that begin with it and `_` or `-`, such as `"frontal02-test"`.
        label_set: what the numbers in the label maps mean.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no pairs, or a picture or a label map lacks the other.
    """

    def __init__(
        self, path: str | Path, split: str | None = None, label_set: LabelSet = FASSEG
    ) -> None:
        self.source, self.label_set = Source(path), label_set
        self._images, self._labels = self._files("images"), self._files("labels")
        for one, other, what in (
            (self._images, self._labels, "label map"),
            (self._labels, self._images, "picture"),
        ):
            if alone := sorted(set(one) - set(other)):
                raise ValueError(
                    f"{path}: {one[alone[0]]} has no {what} of the same name"
                    + (f", nor have {len(alone) - 1} others" if alone[1:] else "")
                )
        names = sorted(self._images)
        if split is not None:
            starts = sorted({name.rsplit("_", 1)[0] for name in names})
            names = [name for name in names if name.startswith((f"{split}_", f"{split}-"))]
            if not names:
                raise ValueError(
                    f"{path} holds no split {split!r}; it holds {', '.join(starts[:9])}"
                )
        if not names:
            raise ValueError(f"{path} holds no pairs images/NAME and labels/NAME.png")
        self.names = tuple(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(
        self, index: int
    ) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
        """Return picture and label map.

        Raises:
            DamagedImage: one cannot be decoded, sizes differ, or a label is none of the set.
        """
        name = self.names[index]
        image = load_rgb(self.source.read(self._images[name]), self._where(self._images[name]))
        labels = self._load_labels(self._labels[name])
        if image.shape[:2] != labels.shape:
            raise DamagedImage(
                f"{self._where(name)}: the picture is {image.shape[1]}x{image.shape[0]}, its "
                f"label map {labels.shape[1]}x{labels.shape[0]}"
            )
        return image, labels

    def _load_labels(self, file: str) -> UInt8[np.ndarray, "h w"]:
        data, where = self.source.read(file), self._where(file)
        load_rgb(data, where)  # refuses what is damaged or too large
        image = Image.open(io.BytesIO(data))
        if image.mode not in ("P", "L"):
            raise DamagedImage(f"{where} has mode {image.mode}: label maps are PNGs of mode P or L")
        labels = np.array(image)
        unknown = np.setdiff1d(labels, (*range(len(self.label_set)), 255))
        if len(unknown):
            raise DamagedImage(
                f"{where} holds label {unknown[0]}: {self.label_set.name} has 0 to "
                f"{len(self.label_set) - 1}, and 255 for ignore"
            )
        return labels

    def _files(self, folder: str) -> dict[str, str]:
        paths = [PurePosixPath(name) for name in self.source.names if is_image(name)]
        return {path.stem: str(path) for path in paths if path.parts[:-1] == (folder,)}

    def _where(self, name: str) -> str:
        return f"{self.source.path}:{name}"


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
    return np.stack([part.mean(0) for part in (*eyes, nose, mouth)])


def align_pair(
    image: UInt8[np.ndarray, "h w 3"],
    labels: UInt8[np.ndarray, "h w"],
    label_set: LabelSet = FASSEG,
    size: int = 112,
) -> tuple[UInt8[np.ndarray, "s s 3"], UInt8[np.ndarray, "s s"]] | None:
    """Bring a face to the recognition template by its own label map.

    The picture is sampled bilinearly, after an antialiased reduction where the template is smaller
    than the face; the label map by its nearest pixel. Outside is black and background.

    Args:
        image: RGB.
        labels: its label map.
        label_set: what the numbers mean.
        size: height and width of the result; the template is scaled with it.

    Returns:
        both aligned, or None where `points_from_labels` finds too little.
    """
    points = points_from_labels(labels, label_set)
    if points is None:
        return None
    goal = torch.from_numpy(_TARGETS * (size / 112))
    # Pillow asks where in the input an output pixel comes from: the way back.
    back = similarity_from_points(goal[None], torch.from_numpy(points))[0].numpy()
    zoom = np.hypot(*back[:, 0])  # input pixels an output pixel
    reduced = Image.fromarray(image)
    if zoom > 1:
        width, height = (max(1, round(side / zoom)) for side in reduced.size)
        reduced = reduced.resize((width, height), Image.Resampling.BILINEAR)
    shrink = np.array([[reduced.width / image.shape[1]], [reduced.height / image.shape[0]]])
    aligned = _warp(reduced, back * shrink, size, Image.Resampling.BILINEAR)
    map_ = _warp(Image.fromarray(labels), back, size, Image.Resampling.NEAREST)
    return aligned, map_


@dataclass(frozen=True)
class AlignedPairs:
    """What `aligned_pairs` found: tensors of the faces kept, and the names of those left out."""

    images: UInt8[Tensor, "n 3 s s"]
    labels: Int[Tensor, "n s s"]
    names: tuple[str, ...]
    skipped: tuple[str, ...]  # profiles, whose second eye is hidden


def aligned_pairs(pairs: ParsingPairs, size: int = 112, progress: bool = True) -> AlignedPairs:
    """Decode and align a whole set.

    Raises:
        DamagedImage: a picture or label map is damaged.
        ValueError: no face of the set can be aligned.
    """
    images, labels, kept, skipped = [], [], [], []
    for index in tqdm(range(len(pairs)), desc="aligning", disable=not progress):
        aligned = align_pair(*pairs[index], pairs.label_set, size)
        if aligned is None:
            skipped.append(pairs.names[index])
            continue
        images.append(aligned[0])
        labels.append(aligned[1])
        kept.append(pairs.names[index])
    if not kept:
        raise ValueError(
            f"{pairs.source.path}: none of {len(pairs)} label maps shows two eyes, nose and mouth"
        )
    return AlignedPairs(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack(labels)).long(),
        tuple(kept),
        tuple(skipped),
    )


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


def _warp(image: Image.Image, back: np.ndarray, size: int, how: Image.Resampling) -> np.ndarray:
    data = tuple(back.ravel().tolist())
    return np.array(image.transform((size, size), Image.Transform.AFFINE, data, resample=how))
