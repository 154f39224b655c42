"""WebDataset's shards: tars in which a picture and what is known of it are neighbours.

    00000012.jpg   00000012.cls   00000012.json   00000013.jpg   ...

A sample is a run of members with one key, the name up to the first dot of its last part. `.cls`
holds the number of the identity, `.json` may hold it as "label", the name of the identity as
"identity" and that of the picture as "name"; one of the three must say who it is. Shards lie on a
disk and are not compressed, so they are indexed once, from the headers, and then every picture is
read where it lies: shuffles are exact, and a run can be resumed anywhere.

Source: https://github.com/webdataset/webdataset, its format of shards.
"""

import io
import json
import tarfile
from array import array
from collections.abc import Collection, Iterable, Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from data.archives import MAX_BYTES, DamagedImage, is_plain
from data.damage import Damage
from data.file_sets import files_of, numbered
from data.images import IMAGE_SUFFIXES, IdentityPictures, is_image
from data.tars import BLOCK, CutTar, DamagedTar, Member, member_name, tar_members

_MAX_TEXT = 2**16  # bytes of a .cls or .json
_PER_SHARD = 10_000  # pictures; of 112x112 they are 100 MB
Sample = dict[str, Member]  # by suffix, `.jpg`


class IdentityShards(IdentityPictures):
    """Pictures of WebDataset shards, in the order in which they lie there.

    Identities without names are called as their numbers are, `0000012`.

    Args:
        path: a shard, a folder of them, `faces-{000000..000009}.tar` or `faces-%06d.tar`.
        identities, size, damage: see `IdentityPictures`. What counts as damaged: samples without
            a picture's owner or with two pictures, keys that come twice, a number that stands for
            two names or a name with two numbers, and the end that a shard lacks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is no tar, there are no pictures, more are damaged than allowed, or an
            identity asked for is not there.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self._shards = files_of(path, ".tar")
        index = _Index(self.damage)
        for number, shard in enumerate(self._shards):
            index.add_shard(number, shard)
        self._found = index.table(self._shards)
        if not len(self._found):
            raise ValueError(
                f"{path} holds no pictures with a label: expected KEY.jpg and KEY.cls or KEY.json"
            )
        numbers, owners = np.unique(self._found[:, _OWNER], return_inverse=True)
        names = list(index.people)
        names = [names[number] for number in numbers.tolist()]
        order = sorted(range(len(names)), key=names.__getitem__)
        return path, sorted(names), np.argsort(order)[owners]

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture.

        Raises:
            DamagedImage: it cannot be read, or is too large.
        """
        return self._read(index, _PICTURE)

    def name(self, index: int) -> str:
        """Return `<identity>/<image>` of one picture."""
        name = ""
        if self._row(index)[_TEXT]:
            name = _object(self._read(index, _TEXT)).get("name")
        if not (isinstance(name, str) and is_plain(name) and is_image(name)):
            name = self._key(index).replace("/", "-").replace("\\", "-")
        if not (is_plain(name) and is_image(name)):
            name = f"{self._places[index]:08d}.jpg"
        return f"{self.identities[self.labels[index]]}/{name}"

    def where(self, index: int) -> str:
        """Return how errors call one picture."""
        return f"{self._shard(index)}:{self._key(index)} at offset {self._row(index)[_PICTURE]}"

    def _key(self, index: int) -> str:
        return _key_at(self._shard(index), self._row(index)[_PICTURE])

    def _row(self, index: int) -> list[int]:
        return self._found[self._places[index]].tolist()

    def _shard(self, index: int) -> Path:
        return self._shards[self._row(index)[_SHARD]]

    def _read(self, index: int, what: int) -> bytes:
        row = self._row(index)
        shard, offset, size = self._shards[row[_SHARD]], row[what], row[what + 1]
        if size > MAX_BYTES:
            raise DamagedImage(f"{self.where(index)} is refused: {size} bytes are too many")
        try:
            with open(shard, "rb", buffering=0) as file:
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise DamagedImage(f"{shard} cannot be read ({error.strerror or error})") from None
        if len(data) < size:
            raise DamagedImage(f"{shard}: offset {offset}: cut short: {len(data)} of {size} bytes")
        return data


_SHARD, _OWNER, _PICTURE, _, _TEXT, _, _KEY = range(7)  # columns of the index; sizes follow


class _Index:
    """Where each picture lies, whose it is, and what its key hashes to: seven numbers a picture.

    Two of ten million keys have one hash in one set of 400,000.
    """

    def __init__(self, damage: Damage) -> None:
        self.damage = damage
        self.people: dict[str, int] = {}
        self._numbers: dict[int, str] = {}  # who has which number,
        self._names: dict[str, int] = {}  # and the other way round
        self._rows = array("q")

    def add_shard(self, number: int, shard: Path) -> None:
        """Read the headers of a shard, and the texts beside its pictures."""
        with open(shard, "rb") as file:
            for key, sample in self._samples(file, shard):
                try:
                    picture, owner, text = _describe(file, sample)
                    self._know(*owner)
                except ValueError as error:
                    self.damage.add(f"{shard}: sample {key!r} {error}")
                    continue
                person = self.people.setdefault(owner[0], len(self.people))
                row = (number, person, picture.offset, picture.size, text.offset, text.size)
                self._rows.extend((*row, hash(key)))

    def table(self, shards: list[Path]) -> Int[np.ndarray, "n 6"]:
        """Return the index, without pictures whose key another one has."""
        rows = np.array(self._rows, dtype=np.int64).reshape(-1, 7)
        _, first, place = np.unique(rows[:, _KEY], return_index=True, return_inverse=True)
        again = np.flatnonzero(first[place] != np.arange(len(rows)))
        for twice in again.tolist():
            one, other = (rows[i].tolist() for i in (first[place[twice]], twice))
            key, shard = _key_at(shards[other[0]], other[2]), shards[other[0]]
            self.damage.add(
                f"{shard}:{key} at offset {other[2]} has the key of a picture in {shards[one[0]]}"
            )
        return np.delete(rows[:, :_KEY], again, axis=0)

    def _samples(self, file: BinaryIO, shard: Path) -> Iterator[tuple[str, Sample]]:
        """Yield what lies together under one key."""
        last, sample = "", Sample()
        try:
            for member in tar_members(file):
                folder, slash, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = folder + slash + stem, f".{suffix.lower()}"
                if suffix not in (*IMAGE_SUFFIXES, ".cls", ".json") or not stem:
                    continue
                if sample and (key != last or suffix in sample):
                    yield last, sample
                    sample = {}
                last, sample[suffix] = key, member
        except CutTar as error:
            self.damage.add(f"{shard} is {error}: its last sample and what followed are lost")
            return
        except DamagedTar as error:
            raise ValueError(
                f"{shard} is no plain tar file, or a damaged one ({error}): replace it, or leave "
                "it out"
            ) from None
        if sample:
            yield last, sample

    def _know(self, owner: str, label: int | None) -> None:
        """Hold the numbers and the names of identities against each other."""
        if label is None:
            return
        name, number = self._numbers.setdefault(label, owner), self._names.setdefault(owner, label)
        if name != owner:
            raise ValueError(f"says that {label} is {owner!r}, which was {name!r} before")
        if number != label:
            raise ValueError(f"says that {owner!r} is {label}, who was {number} before")


def write_shards(
    target: Path, pictures: Iterable[tuple[str, bytes]], identities: Collection[str]
) -> None:
    """Write pictures as shards of 10,000, with `.cls` and `.json` beside each.

    Args:
        target: `faces-%06d.tar`.
        pictures: `<identity>/<image>` and the encoded picture; shuffled, for those who read
            shards from their beginning.
        identities: of all pictures, in the order of their labels.
    """
    label = {name: number for number, name in enumerate(identities)}
    items = enumerate(pictures)
    for shard in count():
        first = next(items, None)
        if first is None:
            return
        with tarfile.open(numbered(target, shard), "x:") as archive:
            for number, (name, data) in chain([first], islice(items, _PER_SHARD - 1)):
                owner, image = name.split("/")
                about = {"label": label[owner], "identity": owner, "name": image}
                members = {
                    Path(image).suffix.lower(): data,
                    ".cls": str(label[owner]).encode(),
                    ".json": json.dumps(about).encode(),
                }
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:08d}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def is_shard(path: Path) -> bool:
    """Tell whether a tar has labels beside its pictures."""
    if not path.is_file():  # opening a pipe waits
        return False
    try:
        with open(path, "rb") as file:
            for member, _ in zip(tar_members(file), range(10), strict=False):
                if member.name.endswith((".cls", ".json")):
                    return True
    except (DamagedTar, OSError):
        pass  # which whoever reads it will say
    return False


def _describe(file: BinaryIO, sample: Sample) -> tuple[Member, tuple[str, int | None], Member]:
    """Return the picture of a sample, the name and number of its owner, and its `.json`."""
    pictures = [suffix for suffix in sample if suffix in IMAGE_SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"has {len(pictures) or 'no'} pictures: expected one")
    text = sample.get(".json", Member("", 0, 0))
    about = _object(_text(file, text)) if text.size else {}
    label = about.get("label")
    if ".cls" in sample:
        digits = _text(file, sample[".cls"]).decode("ascii", errors="replace").strip()
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 18):
            raise ValueError(f"has the label {digits[:40]!r}: expected a whole number")
        if label is not None and label != int(digits):
            raise ValueError(f"has the labels {int(digits)} and {label!r:.40}")
        label = int(digits)
    if label is not None and (type(label) is not int or not 0 <= label < 10**18):
        raise ValueError(f"has the label {label!r:.40}: expected a whole number")
    owner = about.get("identity")
    if owner is None:
        if label is None:
            raise ValueError("has no label: expected .cls or .json beside it")
        owner = f"{label:07d}"
    if not isinstance(owner, str) or not is_plain(owner):
        raise ValueError(f"has the identity {owner!r:.40}: expected a name that a folder can have")
    return sample[pictures[0]], (owner, label), text


def _text(file: BinaryIO, member: Member) -> bytes:
    if member.size > _MAX_TEXT:
        raise ValueError(f"is refused: {member.size} bytes beside the picture")
    file.seek(member.offset)
    return file.read(member.size)


def _object(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("has a .json that is no object")
    return found


def _key_at(shard: Path, offset: int) -> str:
    """Return the name of the member whose bytes lie at `offset`, right behind its header."""
    with open(shard, "rb") as file:
        file.seek(offset - BLOCK)
        return member_name(file.read(BLOCK))
