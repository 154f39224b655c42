"""Bring pictures of people from one format into another, without decoding them.

    python examples/fsenet/data/convert.py faces/ train.rec
    python examples/fsenet/data/convert.py ms1m-retinaface-t1/ faces.zip
    python examples/fsenet/data/convert.py lfw112.zip lfw112.tar --damaged 3

Reads and writes a folder, zip or tar of `<identity>/<image>`, and insightface's `.rec`. The bytes
of every picture stay as they are. A picture that cannot be decoded is named and left out, up to
`--damaged` of them. At the end what was written is read again and compared. A `.rec` holds no
names: from one, identities are called by their number and pictures by their key.
"""

import hashlib
import io
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from limits import check_numbers
from tqdm import tqdm

from data.archives import DamagedImage
from data.images import IdentityPictures, load_rgb
from data.pictures import enough_images, open_pictures
from data.records import write_identities

Item = tuple[str, bytes]  # `<identity>/<image>`, and the encoded picture


@dataclass(frozen=True)
class Arguments:
    """Convert pictures of people.

    Args:
        source: a folder, zip, tar or `.rec`; or the folder that holds `train.rec`.
        target: the same by its suffix, a folder without one; must not exist.
        damaged: pictures that may be left out.
        min_images: leave out identities with fewer pictures.
    """

    source: Annotated[Path, tyro.conf.Positional]
    target: Annotated[Path, tyro.conf.Positional]
    damaged: int = 0
    min_images: int = 1


def main(arguments: Arguments) -> None:
    """Write, read again, compare."""
    check_numbers(arguments)
    source, target = arguments.source, arguments.target
    for path in written_to(target):
        if path.exists() or path.is_symlink():
            raise FileExistsError(f"{path} exists: name another target, or remove it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder: make it first")
    write = WRITERS.get(target.suffix)
    if write is None:
        raise ValueError(f"{target} must end in .rec, .zip or .tar, or have no suffix: a folder")
    pictures = enough_images(open_pictures(source), arguments.min_images)
    reader = Reader(pictures, arguments.damaged)
    try:
        write(target, reader)
        check(target, reader.written)
    except BaseException:
        remove(target)
        raise
    lost = f", {len(reader.lost)} damaged left out" if reader.lost else ""
    print(f"{target}: {reader.written}{lost}; read again, equal")


class Summary:
    """What a set of pictures holds, in its order: how many, and a hash of bytes and owners."""

    def __init__(self) -> None:
        self.pictures = self.people = 0
        self._last: int | None = None
        self._hash = hashlib.sha256()

    def add(self, label: int, data: bytes) -> None:
        """Take note of a picture; those of an identity come in a row."""
        self.people += label != self._last
        self.pictures, self._last = self.pictures + 1, label
        self._hash.update(f"{self.people} {len(data)} ".encode() + data)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and self._hash.digest() == other._hash.digest()

    __hash__ = None

    def __str__(self) -> str:
        return f"{self.pictures} pictures of {self.people} identities"


class Reader(Iterable[Item]):
    """Hand out the pictures of a set, leave out damaged ones, and remember what was handed out.

    Args:
        pictures: the set.
        budget: how many may be damaged.
    """

    def __init__(self, pictures: IdentityPictures, budget: int) -> None:
        self.pictures, self.budget = pictures, budget
        self.written = Summary()
        self.lost: list[str] = []

    def __iter__(self) -> Iterator[Item]:
        pictures = self.pictures
        # A .rec is sorted by identity; so is every folder, and flat ones are brought into order.
        for index in tqdm(pictures.labels.argsort(kind="stable"), desc="writing", unit="picture"):
            try:
                data = pictures.read(index)
                load_rgb(data, pictures.where(index))
            except DamagedImage as error:
                self.lost.append(str(error))
                print(f"left out: {error}", file=sys.stderr)
                if len(self.lost) > self.budget:
                    raise ValueError(
                        f"{len(self.lost)} damaged pictures, and --damaged allows {self.budget}"
                    ) from None
                continue
            self.written.add(int(pictures.labels[index]), data)
            yield pictures.name(index), data


def write_folder(target: Path, items: Iterable[Item]) -> None:
    """Write `<identity>/<image>` into a new folder."""
    for name, data in items:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write_zip(target: Path, items: Iterable[Item]) -> None:
    """Write a zip; encoded pictures are only stored, as they do not become smaller."""
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED) as archive:
        for name, data in items:
            archive.writestr(zipfile.ZipInfo(name), data)


def write_tar(target: Path, items: Iterable[Item]) -> None:
    """Write a tar that is not compressed."""
    with tarfile.open(target, "x:") as archive:
        for name, data in items:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


WRITERS: dict[str, Callable[[Path, Iterable[Item]], None]] = {
    "": write_folder,
    ".zip": write_zip,
    ".tar": write_tar,
    ".rec": write_identities,
}


def check(target: Path, written: Summary) -> None:
    """Read the target and compare its pictures and who they belong to with what was written.

    Raises:
        ValueError: they differ.
    """
    found, again = open_pictures(target), Summary()
    for index in tqdm(found.labels.argsort(kind="stable"), desc="comparing", unit="picture"):
        again.add(int(found.labels[index]), found.read(index))
    if again != written:
        raise ValueError(f"{target} holds {again}, other than written: is the disk damaged?")


def written_to(target: Path) -> tuple[Path, ...]:
    """Return all files that a target consists of."""
    beside = (target.with_suffix(".idx"), target.with_name("property"))
    return (target, *(beside if target.suffix == ".rec" else ()))


def remove(target: Path) -> None:
    """Take away what a run that failed has written."""
    for path in written_to(target):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
