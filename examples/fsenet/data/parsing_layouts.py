"""The layouts of Helen, LaPa, CelebAMask-HQ and iBugMask, and the choice among all of them.

Sources: Smith et al., "Exemplar-based face parsing", CVPR 2013 (Helen); Liu et al., "A new dataset
and boundary-attention semantic segmentation for face parsing", AAAI 2020 (LaPa); Lee et al.,
"MaskGAN", CVPR 2020 (CelebAMask-HQ); Lin et al., "RoI tanh-polar transformer network for face
parsing in the wild", Image and Vision Computing 112, 2021 (iBugMask).
"""

import math
from pathlib import PurePosixPath

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from protocols.lists import listing

from data.archives import DamagedImage, Source
from data.images import is_image
from data.parsing_sets import LabelledPairs, ParsingPair, ParsingSet
from data.vocabularies import KINDS, read_vocabulary
from partlocal.labels import CELEBAMASK_HQ


def open_parsing_set(choice: str) -> ParsingSet:
    """Open `PATH:KIND:SPLITS`, such as `fasseg256.zip:fasseg:frontal02-train,multipose01-train`.

    `KIND` is one of `vocabularies.KINDS`, or the path of a JSON with a label set, for pictures
    under `images/` and label maps under `labels/`. `SPLITS` may be left out: `LaPa:lapa`.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the choice is written otherwise, or see `ParsingSet` and `read_vocabulary`.
    """
    path, kind, splits = _parse(choice)
    vocabulary = read_vocabulary(kind)
    reader = _READERS.get(kind, LabelledPairs)
    if kind == "celebamask-hq" and _holds_masks(path):
        reader = CelebAMaskHQ
    return reader(path, splits, vocabulary)


class Helen(ParsingSet):
    """Helen as Smith et al. labelled it: eleven maps of probabilities a picture.

    `images/NAME.jpg`, `labels/NAME/NAME_lbl00.png` to `_lbl10.png`, and the lists `exemplars.txt`
    (2,000 pictures, split `train`), `tuning.txt` (230, `val`) and `testing.txt` (100, `test`). The
    probabilities of a pixel are brought to sum up to 1.
    """

    layout = "images/NAME.jpg and labels/NAME/NAME_lbl00.png that exemplars.txt and so on name"
    kind = "helen"

    def _find(self) -> dict[str, tuple[str, ...]]:
        self._root = _root(self.source.names, "exemplars.txt", "tuning.txt", "testing.txt")
        found: dict[str, tuple[str, ...]] = {}
        for file, split in (("exemplars", "train"), ("tuning", "val"), ("testing", "test")):
            if (listed := f"{self._root}{file}.txt") not in self.source:
                continue
            for line in self.source.text(listed).splitlines():
                if name := line.rpartition(",")[2].strip():  # "1 , 100032540_1"
                    found[name] = (*found.get(name, ()), split)
        there = set(self.source.names)
        needed = {file: name for name in found for file in self._files(name)}
        if missing := sorted(needed.keys() - there):
            raise ValueError(
                f"{self.source.path} lacks {len(missing)} of the {len(needed)} files that its "
                f"lists name: {listing(missing)}"
            )
        return found

    def _files(self, name: str) -> list[str]:
        maps = range(len(self.vocabulary.labels))
        labels = [f"{self._root}labels/{name}/{name}_lbl{index:02}.png" for index in maps]
        return [f"{self._root}images/{name}.jpg", *labels]

    def _load(self, name: str) -> ParsingPair:
        file, *maps = self._files(name)
        image, numbers = self._load_image(file), [self._load_grey(one) for one in maps]
        for one, number in zip(maps, numbers, strict=True):
            if number.shape != numbers[0].shape:
                raise DamagedImage(f"{self._where(one)} has another size than {maps[0]}")
        weights = np.stack(numbers).astype(np.float32)
        return ParsingPair(image, weights / weights.sum(0).clip(min=1))


class LaPa(LabelledPairs):
    """LaPa: `SPLIT/images`, `SPLIT/labels` and `SPLIT/landmarks`, with 106 points a picture."""

    layout = "SPLIT/images/NAME.jpg, SPLIT/labels/NAME.png and SPLIT/landmarks/NAME.txt"
    kind = "lapa"

    def _find(self) -> dict[str, tuple[str, ...]]:
        found = super()._find()
        there = set(self.source.names)
        self._points = {name: _beside(file, "landmarks") for name, file in self._images.items()}
        files = {name for name, file in self._points.items() if file in there}
        self._refuse_alone(self._images, files, "landmarks")
        return found

    def _load(self, name: str) -> ParsingPair:
        points = _five_of_106(self.source.text(self._points[name]), self._where(name))
        return super()._load(name)._replace(points=points)


class IBugMask(LabelledPairs):
    """iBugMask: `SPLIT/NAME.jpg` with its label map `SPLIT/NAME.png` beside it."""

    layout = "SPLIT/NAME.jpg and SPLIT/NAME.png"
    kind = "ibugmask"

    def _files(self, folder: str) -> dict[str, str]:
        wanted = {"images": (".jpg", ".jpeg"), "labels": (".png",)}[folder]
        paths = [PurePosixPath(name) for name in self.source.names if is_image(name)]
        found = [path for path in paths if path.suffix.lower() in wanted]
        return self._by_name([(path.with_suffix(""), path) for path in found])


class CelebAMaskHQ(ParsingSet):
    """CelebAMask-HQ as it is handed out: a mask for each part that a picture shows.

    `CelebA-HQ-img/N.jpg` of 1024 pixels, `CelebAMask-HQ-mask-anno/K/NNNNN_PART.png` of 512, to
    which the picture is reduced. Where masks overlap, a later one of the official order covers an
    earlier one. `CelebA-HQ-to-CelebA-mapping.txt` says to which of CelebA's splits `train`, `val`
    and `test` a picture belongs.
    """

    layout = "CelebA-HQ-img/N.jpg and CelebAMask-HQ-mask-anno/K/NNNNN_PART.png"
    kind = "celebamask-hq"

    def _find(self) -> dict[str, tuple[str, ...]]:
        self._masks: dict[str, dict[int, str]] = {}
        images = {}
        for file in filter(is_image, self.source.names):
            path = PurePosixPath(file)
            if path.parent.name == "CelebA-HQ-img" and path.stem.isdecimal():
                images[path.stem] = file
            elif "CelebAMask-HQ-mask-anno" in path.parts[:-1]:
                number, _, part = path.stem.partition("_")
                if number.isdecimal() and part in _CELEBA_PARTS:
                    label = CELEBAMASK_HQ.index(_CELEBA_PARTS[part])
                    other = self._masks.setdefault(str(int(number)), {}).setdefault(label, file)
                    if other != file:
                        raise ValueError(f"{self.source.path} holds {other} and {file}: remove one")
        self._images = images
        first = {name: next(iter(masks.values())) for name, masks in self._masks.items()}
        self._refuse_alone(images, first, "masks")
        self._refuse_alone(first, images, "picture")
        splits = self._splits()
        return {name: splits.get(int(name), ()) for name in sorted(images, key=int)}

    def _splits(self) -> dict[int, tuple[str, ...]]:
        name = "CelebA-HQ-to-CelebA-mapping.txt"
        file = _root(self.source.names, name) + name
        if file not in self.source:
            return {}
        found = {}
        for number, line in enumerate(self.source.text(file).splitlines()[1:], start=2):
            words = line.split()
            if len(words) < 2 or not words[0].isdecimal() or not words[1].isdecimal():
                raise ValueError(
                    f"{self._where(file)}, line {number}: expected two numbers and a name; "
                    f"got {line[:60]!r}"
                )
            original = int(words[1])
            split = "train" if original < _VAL_FROM else "val" if original < _TEST_FROM else "test"
            found[int(words[0])] = (split,)
        return found

    def _load(self, name: str) -> ParsingPair:
        labels: UInt8[np.ndarray, "h w"] | None = None
        for label, file in sorted(self._masks[name].items()):
            mask = self._load_mask(file)
            if labels is None:
                labels = np.zeros(mask.shape, np.uint8)
            if mask.shape != labels.shape:
                raise DamagedImage(f"{self._where(file)} has another size than the masks before it")
            labels[mask] = label
        assert labels is not None  # a picture without masks was refused
        image = self._load_image(self._images[name])
        if image.shape[:2] != labels.shape and image.shape[0] * labels.shape[1] == (
            image.shape[1] * labels.shape[0]
        ):
            reduced = Image.fromarray(image).resize(labels.shape[::-1], Image.Resampling.BILINEAR)
            image = np.asarray(reduced)
        return ParsingPair(image, labels)

    def _load_mask(self, file: str) -> np.ndarray:
        return self._load_image(file)[..., 0] > 0  # white on black, stored as RGB


_READERS: dict[str, type[ParsingSet]] = {
    "helen": Helen,
    "lapa": LaPa,
    "ibugmask": IBugMask,
    "ibugmask-14": IBugMask,
}

# In the files' names `l_lip` is the lower lip but `l_eye` the left eye; see partlocal/labels.py.
_CELEBA_PARTS = {
    **{name: name for name in ("skin", "nose", "hair", "hat", "neck")},
    **{"eye_g": "glasses", "l_eye": "left_eye", "r_eye": "right_eye", "l_brow": "left_brow"},
    **{"r_brow": "right_brow", "l_ear": "left_ear", "r_ear": "right_ear"},
    **{"mouth": "inner_mouth", "u_lip": "upper_lip", "l_lip": "lower_lip"},
    **{"ear_r": "earring", "neck_l": "necklace", "cloth": "clothes"},
}
_VAL_FROM, _TEST_FROM = 162_771, 182_638  # pictures of CelebA, counted as the mapping does


def _parse(choice: str) -> tuple[str, str, list[str]]:
    path, _, last = choice.rpartition(":")
    kind, splits = last, ""
    if last not in KINDS and not last.endswith(".json"):
        (path, _, kind), splits = path.rpartition(":"), last
    if not path:
        raise ValueError(
            f"a parsing set is written PATH:KIND:SPLITS, with KIND one of {', '.join(KINDS)} or "
            f"a .json; got {choice!r}"
        )
    return path, kind, [split for split in splits.split(",") if split]


def _holds_masks(path: str) -> bool:
    return any("CelebAMask-HQ-mask-anno/" in name for name in Source(path).names)


def _root(names: tuple[str, ...], *files: str) -> str:
    """Return the folder in which one of the files lies, with its slash; the outermost."""
    found = [
        name[: -len(file)] for name in names for file in files if f"/{name}".endswith(f"/{file}")
    ]
    return min(found, key=len, default="")


def _beside(file: str, folder: str) -> str:
    path = PurePosixPath(file)
    return (path.parent.parent / folder / f"{path.stem}.txt").as_posix()


def _five_of_106(text: str, where: str) -> Float[np.ndarray, "5 2"]:
    """Return the centroids of the eyes' outlines, the tip of the nose, the corners of the mouth."""
    try:
        count, *numbers = map(float, text.split())
    except ValueError:
        raise DamagedImage(f"{where}: its landmarks are no numbers") from None
    if count != 106 or len(numbers) != 212 or not all(map(math.isfinite, numbers)):
        raise DamagedImage(f"{where}: expected 106 and 106 landmarks; got {len(numbers) / 2:g}")
    points = np.array(numbers).reshape(106, 2) + 0.5  # whole numbers are the centres of pixels
    eyes = points[66:74].mean(0), points[75:83].mean(0)
    five = np.stack([*eyes, points[54], points[84], points[90]])
    if np.ptp(five, 0).max() < 1:
        raise DamagedImage(f"{where}: its landmarks lie in one place")
    return five
