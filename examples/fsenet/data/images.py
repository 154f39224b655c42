"""Pictures sorted by person, `<identity>/<image>`, in a folder or inside an archive left packed."""

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Sequence
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from protocols.lists import listing
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.archives import DamagedImage, Source
from data.damage import Damage
from data.decode import load_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FINGERPRINTED = 16  # pictures


class Pieces(NamedTuple):
    """Pictures that are read together, for shuffles that do not read each piece many times.

    Args:
        number: of the piece of each picture, n.
        together: pieces that memory holds at a time.
    """

    number: Int[np.ndarray, " n"]
    together: int


class IdentityPictures(Dataset[tuple[Tensor, int]]):
    """Pictures and whose they are, wherever they lie; labels number the identities in order.

    Args:
        path: where they lie.
        identities: keep these alone; None keeps all.
        size: height and width that every picture is brought to when it is read (bilinear,
            antialiased); None leaves it as it is stored.
        damage: how many pictures may be left out; by default none.

    Raises:
        ValueError: an identity asked for is not there, or more pictures are damaged.
    """

    def __init__(
        self,
        path: str | Path,
        identities: Collection[str] | None = None,
        size: int | None = None,
        damage: Damage | None = None,
    ) -> None:
        self.damage = damage or Damage()
        self.path, names, self.labels = self._open(Path(path))
        self.identities, self.size = tuple(names), size
        self._places = np.arange(len(self.labels))  # of those kept, among all
        if identities is not None:
            self._keep(identities)

    @abstractmethod
    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        """Return where pictures lie, all identities, sorted, and the number of each picture's."""

    def keep(self, identities: Collection[str]) -> Self:
        """Return the pictures of these identities, numbered anew.

        Raises:
            ValueError: one of them is not there.
        """
        found = copy(self)
        found._keep(identities)
        return found

    def take(self, chosen: Int[np.ndarray, " m"]) -> Self:
        """Return some of the pictures, their identities numbered anew.

        Args:
            chosen: their indices.
        """
        found = copy(self)
        found._take(chosen)
        return found

    def _keep(self, identities: Collection[str]) -> None:
        wanted = set(identities)
        if unknown := sorted(wanted - set(self.identities)):
            raise ValueError(
                f"{self.path} holds no pictures of {listing([*map(repr, unknown)])}: of the "
                f"{len(wanted)} identities asked for, {len(unknown)} are not there"
            )
        keep = np.array([name in wanted for name in self.identities])
        self._take(np.flatnonzero(keep[self.labels]))

    def _take(self, chosen: Int[np.ndarray, " m"]) -> None:
        used, self.labels = np.unique(self.labels[chosen], return_inverse=True)
        self._places = self._places[chosen]
        self.identities = tuple(self.identities[number] for number in used.tolist())

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return `<identity>/<image>` of one picture."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Return where one picture lies, as errors call it."""

    @property
    def pieces(self) -> Pieces | None:
        """Which pictures are read together; None where each is read alone."""
        return None

    @property
    def paths(self) -> tuple[str, ...]:
        """The names of all pictures."""
        return tuple(map(self.name, range(len(self))))

    def fingerprint(self) -> str:
        """Return a hash of the people, of whose each picture is, and of a few pictures' bytes.

        A set of other people, of other pictures or in another order has another hash. One in which
        a few pictures were replaced may have the same: to tell, all would have to be read.
        """
        digest = hashlib.sha256("\n".join(self.identities).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        for index in np.linspace(0, len(self) - 1, FINGERPRINTED).astype(int).tolist():
            with suppress(DamagedImage):
                digest.update(self.read(index))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.load(index).copy()).permute(2, 0, 1), int(self.labels[index])

    def load(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return one picture.

        Raises:
            DamagedImage: see `load_rgb`; or it must be resized and is not square.
        """
        picture = load_rgb(self.read(index), self.where(index))
        height, width = picture.shape[:2]
        if self.size is None or height == width == self.size:
            return picture
        if height != width:  # to stretch it would change the face
            raise DamagedImage(
                f"{self.where(index)} is {width}x{height}, not square: cut out and align "
                "the faces first (docs/how-to/alignment.md)"
            )
        resized = Image.fromarray(picture).resize((self.size,) * 2, Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def __repr__(self) -> str:
        count = f"{len(self)} pictures of {len(self.identities)} identities"
        return f"{type(self).__name__}({str(self.path)!r}): {count}"


class SourcePictures(IdentityPictures):
    """Pictures that are files of a folder, zip or tar; see `IdentityPictures`.

    `_open` sets `source`, the names of all pictures, and what stands before each name there.
    """

    source: Source
    _names: Sequence[str]
    _prefix: str

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""
        return self.source.read(self._file(index))

    def name(self, index: int) -> str:
        """Return the path of one picture below what stands before all."""
        return self._names[self._places[index]]

    def where(self, index: int) -> str:
        """Return where one picture lies, as errors call it."""
        return f"{self.source.path}:{self._file(index)}"

    def _file(self, index: int) -> str:
        return self._prefix + self.name(index)


class IdentityFolder(SourcePictures):
    """Pictures from `<identity>/<image>` in a folder, a zip or a tar.

    One folder around all identities (`images/` in many archives) is left out of the paths. The
    order is that of the sorted paths; labels number the identities that are kept, in their order.

    Args:
        path: see `Source`.
        identities, size, damage: see `IdentityPictures`. What counts as damaged: a name that an
            archive holds once more, of which the last is read; the end that a tar lacks.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no pictures, one does not lie in the folder of an identity, more are
            damaged than allowed, or an identity asked for is not there.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self.source = Source(path, self.damage.add)
        images = [name for name in self.source.names if is_image(name)]
        if not images:
            raise ValueError(
                f"{path} holds no pictures ({len(self.source.names)} files): expected "
                f"<identity>/<image> with one of {' '.join(IMAGE_SUFFIXES)}"
            )
        outer = {name.split("/")[0] for name in images}
        self._prefix = ""
        if len(outer) == 1 and all(name.count("/") == 2 for name in images):
            self._prefix = outer.pop() + "/"
        paths = [name[len(self._prefix) :] for name in images]
        for name in paths:
            if name.count("/") != 1:
                raise ValueError(f"{path} holds {name!r}, which is not <identity>/<image>: move it")
        owners = [name.split("/")[0] for name in paths]
        self._names = tuple(paths)
        people, labels = np.unique(owners, return_inverse=True)
        return self.source.path, people.tolist(), labels


def decode_all(
    folder: IdentityPictures, progress: bool = True
) -> tuple[IdentityPictures, UInt8[Tensor, "n 3 h w"]]:
    """Decode a small set into memory: all of LFW at 112 is 500 MB and takes 7 s of one core.

    Args:
        folder: what to decode, in its order.
        progress: show a bar.

    Returns:
        What could be decoded, and it, channels last in memory.

    Raises:
        ValueError: more are damaged than the folder allows, or sizes differ.
    """
    pictures, good = np.empty(0, dtype=np.uint8), list[int]()
    for index in tqdm(range(len(folder)), desc="decoding", disable=not progress):
        try:
            picture = folder.load(index)
        except DamagedImage as error:
            folder.damage.add(error)
            continue
        if not good:
            pictures = np.empty((len(folder), *picture.shape), dtype=np.uint8)
        height, width = pictures.shape[1:3]
        if picture.shape != pictures.shape[1:]:
            raise ValueError(
                f"{folder.name(index)} is {picture.shape[1]}x{picture.shape[0]} and "
                f"{folder.name(good[0])} is {width}x{height}: pass size= to resize them"
            )
        pictures[len(good)] = picture
        good.append(index)
    if not good:
        raise ValueError(f"{folder.path} holds no picture that can be decoded")
    images = torch.from_numpy(pictures[: len(good)]).permute(0, 3, 1, 2)
    return folder if len(good) == len(folder) else folder.take(np.array(good)), images


def is_image(name: str) -> bool:
    """Tell by the suffix; files that an operating system hides beside pictures are none."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def without_suffix(name: str) -> str:
    """Return the name of a picture without its suffix; people may have a dot in theirs.

    >>> without_suffix("a/Sammy_Davis_Jr._0001.JPG"), without_suffix("a/Sammy_Davis_Jr._0001")
    ('a/Sammy_Davis_Jr._0001', 'a/Sammy_Davis_Jr._0001')
    """
    stem, dot, suffix = name.rpartition(".")
    return stem if (dot + suffix).lower() in IMAGE_SUFFIXES else name
