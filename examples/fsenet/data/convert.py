"""Bring pictures of people from one format into another, without decoding them.

    python examples/fsenet/data/convert.py faces/ train.rec
    python examples/fsenet/data/convert.py ms1m-retinaface-t1/ faces.zip
    python examples/fsenet/data/convert.py lfw112.zip lfw-%06d.tar --damaged 3
    python examples/fsenet/data/convert.py train.rec flat/train.rec --flat
    python examples/fsenet/data/convert.py a.parquet b.zip all.tar --identity-list same.tsv

Reads and writes a folder, zip or tar of `<identity>/<image>`, insightface's `.rec` in both of its
layouts, WebDataset's shards (`%06d` stands for their numbers) and Hugging Face's Parquet. The bytes
of every picture stay as they are. A picture that cannot be decoded is named and left out, up to
`--damaged` of them. At the end what was written is read again and compared. A `.rec` holds no
names: they are written into a `.lst` beside it and taken from there; where none is, identities are
called by their number and pictures by their key.

Several sources become one, see merge.py. What is shuffled in a Parquet file is slow to sort: write
a `.rec` from it by way of a tar.
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

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import one_line_errors
from limits import check_numbers
from tqdm import tqdm

from data.archives import DamagedImage
from data.batches import generator, shuffled
from data.damage import Damage
from data.decode import load_rgb
from data.file_sets import files_of, is_numbered
from data.images import IdentityPictures
from data.pictures import enough_images, open_pictures, open_sources, reader_of
from data.record_layouts import write_flat, write_identities
from data.shards import write_shards
from data.tables import write_table

Item = tuple[str, bytes]  # `<identity>/<image>`, and the encoded picture


@dataclass(frozen=True)
class Arguments:
    """Convert pictures of people.

    Args:
        paths: of one or several sources, each in any of the formats; and last of the target, a
            format by its suffix, a folder without one, which must not exist.
        damaged: pictures that may be left out.
        min_images: leave out identities with fewer pictures.
        identity_list: a file of `identity <tab> name`, or `-` to leave somebody out.
        deduplicate: leave out pictures whose bytes another one of the same identity has.
        flat: write a `.rec` of pictures alone, shuffled, for what reads it from its beginning.
    """

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    damaged: int = 0
    min_images: int = 1
    identity_list: Path | None = None
    deduplicate: bool = False
    flat: bool = False


def main(arguments: Arguments) -> None:
    """Write, read again, compare."""
    check_numbers(arguments)
    *sources, target = arguments.paths or [Path()]
    if not sources:
        raise ValueError("expected a source and a target: name both")
    for source in sources:
        reader_of(source)  # which says what is missing
    for path in written_to(target):
        if path.exists() or path.is_symlink():
            if path.name == "property" and target.suffix == ".rec":
                raise FileExistsError(
                    f"{path.parent} holds a .rec already, whose {path.name} says how many people "
                    f"it has: name a folder of its own for {target.name}"
                )
            raise FileExistsError(f"{path} exists: name another target, or remove it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent} is no folder: make it first")
    numbers = "%d" if "%" in target.name else ""
    write = WRITERS.get(numbers + target.suffix)
    if write is None or (is_numbered(target) and not numbers):
        raise ValueError(
            f"{target}: expected a folder, or one of {' '.join(filter(None, WRITERS))}"
        )
    if arguments.flat:
        if target.suffix != ".rec":
            raise ValueError(f"{target}: --flat is a layout of .rec; name one, or leave it out")
        write = write_flat_records
    damage = Damage(arguments.damaged)
    pictures = open_sources(sources, damage=damage, identity_list=arguments.identity_list)
    if arguments.deduplicate:
        pictures = without_duplicates(pictures)
    pictures = enough_images(pictures, arguments.min_images)
    reader = Reader(pictures, order_for(target, pictures, arguments.flat))
    try:
        write(target, reader)
        check(target, reader.written)
    except BaseException:
        remove(target)
        raise
    lost = f", {damage.count} damaged left out" if damage.count else ""
    print(f"{target}: {reader.written}{lost}; read again, equal")


def without_duplicates(pictures: IdentityPictures) -> IdentityPictures:
    """Return the pictures without those whose bytes an earlier one of the same identity has."""
    hashes = np.empty((len(pictures), 2), dtype=np.int64)
    for index in tqdm(range(len(pictures)), desc="comparing", unit="picture"):
        try:
            data = pictures.read(index)
        except DamagedImage:  # which is counted when it is to be written
            data = f"picture {index}".encode()
        number = int.from_bytes(hashlib.sha256(data).digest()[:8], "big", signed=True)
        hashes[index] = pictures.labels[index], number
    first = np.sort(np.unique(hashes, axis=0, return_index=True)[1])
    print(
        f"--deduplicate: {len(pictures) - len(first)} of {len(pictures)} pictures left out",
        file=sys.stderr,
    )
    return pictures.take(first)


def order_for(target: Path, pictures: IdentityPictures, flat: bool) -> list[int]:
    """Return the order in which pictures are written to a target.

    A .rec is sorted by identity. Flat ones, shards and Parquet files are shuffled, for those who
    read them from their beginning. Anything else takes pictures as they come, which is fastest.
    """
    if target.suffix == ".rec" and not flat:
        return pictures.labels.argsort(kind="stable").tolist()
    if flat or is_numbered(target) or target.suffix == ".parquet":
        return shuffled(len(pictures), generator(0), pictures.pieces).tolist()
    return list(range(len(pictures)))


class Summary:
    """What a set of pictures holds: the pictures of each identity, in whichever order."""

    def __init__(self) -> None:
        self._people: dict[int, list[int]] = {}

    def add(self, label: int, data: bytes) -> None:
        """Take note of a picture."""
        digest = int.from_bytes(hashlib.sha256(data).digest(), "big")
        person = self._people.setdefault(label, [0, 0])
        person[0] += 1
        person[1] = (person[1] + digest) % 2**256

    @property
    def _people_in_order(self) -> list[list[int]]:
        """Leave out the numbers: they have gaps where nothing of somebody could be read."""
        return [self._people[label] for label in sorted(self._people)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Summary) and self._people_in_order == other._people_in_order

    __hash__ = None

    def __str__(self) -> str:
        pictures = sum(count for count, _ in self._people.values())
        return f"{pictures} pictures of {len(self._people)} identities"


class Reader(Iterable[Item]):
    """Hand out the pictures of a set, leave out damaged ones, and remember what was handed out.

    Args:
        pictures: the set.
        order: of its pictures.
    """

    def __init__(self, pictures: IdentityPictures, order: Iterable[int]) -> None:
        self.pictures, self.order = pictures, order
        self.written = Summary()

    def __iter__(self) -> Iterator[Item]:
        pictures = self.pictures
        for index in tqdm(self.order, desc="writing", unit="picture"):
            try:
                data = pictures.read(index)
                load_rgb(data, pictures.where(index))
                name = pictures.name(index)
            except DamagedImage as error:
                pictures.damage.add(error)
                continue
            self.written.add(int(pictures.labels[index]), data)
            yield name, data


def write_folder(target: Path, items: Reader) -> None:
    """Write `<identity>/<image>` into a new folder."""
    for name, data in unique_names(items):
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)


def write_zip(target: Path, items: Reader) -> None:
    """Write a zip; encoded pictures are only stored, as they do not become smaller."""
    with zipfile.ZipFile(target, "x", zipfile.ZIP_STORED) as archive:
        for name, data in unique_names(items):
            archive.writestr(zipfile.ZipInfo(name), data)


def write_tar(target: Path, items: Reader) -> None:
    """Write a tar that is not compressed."""
    with tarfile.open(target, "x:") as archive:
        for name, data in unique_names(items):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def unique_names(items: Iterable[Item]) -> Iterator[Item]:
    """Put a number before the name of a picture that another of its identity has."""
    seen: set[str] = set()
    for name, data in items:
        owner, image = name.split("/")
        number, unique = 1, name
        while unique in seen:
            number += 1
            unique = f"{owner}/{number}-{image}"
        seen.add(unique)
        yield unique, data


def write_numbered(target: Path, items: Reader) -> None:
    """Write WebDataset's shards."""
    write_shards(target, items, items.pictures.identities)


def write_parquet(target: Path, items: Reader) -> None:
    """Write a table for Hugging Face's `datasets`."""
    write_table(target, items, items.pictures.identities)


def write_records(target: Path, items: Reader) -> None:
    """Write a .rec in insightface's layout."""
    write_identities(target, unique_names(items))


def write_flat_records(target: Path, items: Reader) -> None:
    """Write a .rec of pictures alone."""
    write_flat(target, unique_names(items), items.pictures.identities)


WRITERS: dict[str, Callable[[Path, Reader], None]] = {
    "": write_folder,
    ".zip": write_zip,
    ".tar": write_tar,
    "%d.tar": write_numbered,
    ".parquet": write_parquet,
    ".rec": write_records,
}


def check(target: Path, written: Summary) -> None:
    """Read the target and compare its pictures and who they belong to with what was written.

    Raises:
        ValueError: they differ.
    """
    found, again = open_pictures(target), Summary()
    for index in tqdm(range(len(found)), desc="comparing", unit="picture"):
        again.add(int(found.labels[index]), found.read(index))
    if again != written:
        raise ValueError(f"{target} holds {again}, other than written: is the disk damaged?")


def written_to(target: Path) -> tuple[Path, ...]:
    """Return all files that a target consists of, of numbered ones those that are there."""
    if is_numbered(target):
        try:
            return tuple(files_of(target, target.suffix))
        except FileNotFoundError:
            return ()
    beside = (target.with_suffix(".idx"), target.with_suffix(".lst"), target.with_name("property"))
    return (target, *(beside if target.suffix == ".rec" else ()))


def remove(target: Path) -> None:
    """Take away what a run that failed has written."""
    for path in written_to(target):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
