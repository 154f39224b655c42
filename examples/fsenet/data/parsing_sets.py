"""Parsing sets as they are handed out: pictures, and what a person said about each pixel.

Folders, zips and tars are read where they lie. Files come from strangers: sizes are checked before
anything is decoded, and a label that the set does not have is an error with its file's name.
"""

import io
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image
from protocols.lists import listing
from torch.utils.data import Dataset

from data.archives import DamagedImage, Source
from data.decode import FORMATS, load_rgb
from data.images import is_image
from data.vocabularies import KINDS, Vocabulary


class ParsingPair(NamedTuple):
    """One picture of a parsing set.

    Args:
        image: RGB, uint8.
        target: labels (uint8 `h w`, 255 where nothing is known), or probabilities (float32
            `g h w`, all zeros where nothing is known).
        points: eyes, nose and corners of the mouth (x, y), where the set brings landmarks;
            coordinates count from the corner of the first pixel.
    """

    image: UInt8[np.ndarray, "h w 3"]
    target: Shaped[np.ndarray, "*g h w"]
    points: Float[np.ndarray, "5 2"] | None = None


class ParsingSet(Dataset[ParsingPair]):
    """Pictures with a target each, in the layout of one data set.

    Args:
        path: a folder, `.zip` or `.tar`; folders around the layout are passed over.
        splits: keep these; none keeps all.
        vocabulary: what the labels mean; None for what they mean in the set itself.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no pairs, a picture or its target lacks the other, or there is no
            such split.
    """

    layout: str  # for errors: what is looked for
    kind = "fasseg"  # whose vocabulary it has when none is given

    def __init__(
        self, path: str | Path, splits: Sequence[str] = (), vocabulary: Vocabulary | None = None
    ) -> None:
        self.source = Source(path)
        self.vocabulary, self.splits = vocabulary or KINDS[self.kind], tuple(splits)
        found = self._find()
        if not found:
            raise ValueError(f"{path} holds no pairs {self.layout}")
        names = sorted(found)
        for split in splits:
            if not any(_belongs(found[name], split) for name in names):
                held = sorted({own for splits in found.values() for own in splits})
                raise ValueError(f"{path} holds no split {split!r}; it holds {', '.join(held[:9])}")
        if splits:
            names = [name for name in names if any(_belongs(found[name], s) for s in splits)]
        self.names = tuple(names)

    @property
    def title(self) -> str:
        """How results call the set: `fasseg256.zip:FASSEG:frontal02-test`."""
        return ":".join((self.source.path.name, self.vocabulary.labels.name, *self.splits))

    @abstractmethod
    def _find(self) -> dict[str, tuple[str, ...]]:
        """Return the name of each pair, and to which splits it belongs."""

    @abstractmethod
    def _load(self, name: str) -> ParsingPair:
        """Read one pair."""

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> ParsingPair:
        """Return picture, target, and points where the set has them.

        Raises:
            DamagedImage: a file cannot be decoded, sizes differ, or a label is none of the set.
        """
        name = self.names[index]
        pair = self._load(name)
        if pair.image.shape[:2] != pair.target.shape[-2:]:
            raise DamagedImage(
                f"{self._where(name)}: the picture is {pair.image.shape[1]}x{pair.image.shape[0]}, "
                f"its label map {pair.target.shape[-1]}x{pair.target.shape[-2]}"
            )
        return pair

    def _load_image(self, file: str) -> UInt8[np.ndarray, "h w 3"]:
        return load_rgb(self.source.read(file), self._where(file))

    def _load_grey(self, file: str) -> UInt8[np.ndarray, "h w"]:
        """Return the numbers of a PNG as they are stored, whatever colours a palette gives them."""
        data, where = self.source.read(file), self._where(file)
        load_rgb(data, where)  # refuses what is damaged or too large
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.mode not in ("P", "L"):
            raise DamagedImage(f"{where} has mode {image.mode}: label maps are PNGs of mode P or L")
        return np.array(image)

    def _load_labels(self, file: str) -> UInt8[np.ndarray, "h w"]:
        labels, own = self._load_grey(file), self.vocabulary.labels
        unknown = np.setdiff1d(labels, (*range(len(own)), 255))
        if len(unknown):
            raise DamagedImage(
                f"{self._where(file)} holds label {unknown[0]}: {own.name} has 0 to "
                f"{len(own) - 1}, and 255 for ignore"
            )
        return labels

    def _refuse_alone(self, one: dict[str, str], other: Iterable[str], what: str) -> None:
        if alone := sorted(set(one) - set(other)):
            raise ValueError(
                f"{self.source.path}: {len(alone)} of {len(one)} files have no {what} of the same "
                f"name: {listing([one[name] for name in alone])}"
            )

    def _by_name(self, files: Iterable[tuple[PurePosixPath, PurePosixPath]]) -> dict[str, str]:
        """Return the file of each name; two of one name are refused, since one would be lost."""
        found: dict[str, str] = {}
        for name, file in files:
            other = found.setdefault(name.as_posix(), file.as_posix())
            if other != file.as_posix():
                raise ValueError(
                    f"{self.source.path} holds {other} and {file.as_posix()}: remove one"
                )
        return found

    def _where(self, name: str) -> str:
        return f"{self.source.path}:{name}"


class LabelledPairs(ParsingSet):
    """Pictures and label maps of the same name under `images/` and `labels/`, as in FASSEG.

    A split is a folder around both (`train/images/`), or what the names begin with, up to `_` or
    `-`, such as `"frontal02-test"`.
    """

    layout = "images/NAME and labels/NAME.png"

    def _find(self) -> dict[str, tuple[str, ...]]:
        self._images, self._labels = self._files("images"), self._files("labels")
        self._refuse_alone(self._images, self._labels, "label map")
        self._refuse_alone(self._labels, self._images, "picture")
        return {name: _splits_of(name) for name in self._images}

    def _load(self, name: str) -> ParsingPair:
        image = self._load_image(self._images[name])
        return ParsingPair(image, self._load_labels(self._labels[name]))

    def _files(self, folder: str) -> dict[str, str]:
        paths = [PurePosixPath(name) for name in self.source.names if is_image(name)]
        found = [path for path in paths if path.parent.name == folder]
        return self._by_name([((path.parent.parent / path.stem), path) for path in found])


def _splits_of(name: str) -> tuple[str, ...]:
    folder, _, stem = name.rpartition("/")
    around = (folder.rpartition("/")[2],) if folder else ()
    return (*around, stem.rpartition("_")[0] or stem)


def _belongs(own: tuple[str, ...], split: str) -> bool:
    return any(one == split or one.startswith((f"{split}_", f"{split}-")) for one in own)
