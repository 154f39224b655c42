"""Both layouts of insightface's `.rec`, written: sorted by identity, or flat and in any order.

Beside either lies `property`: the number of identities, and height and width of the pictures.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data.archives import read_regular
from data.decode import load_rgb
from data.records import RecordWriter, pack


def write_identities(path: str | Path, pictures: Iterable[tuple[str, bytes]]) -> None:
    """Write pictures in insightface's layout, with `property` beside.

    Args:
        path: of the `.rec`.
        pictures: `<identity>/<image>` and the encoded picture, those of an identity in a row.

    Raises:
        ValueError: an identity comes twice.
    """
    ranges: list[list[float]] = []
    people: dict[str, int] = {}
    key, size = 1, (0, 0)
    with RecordWriter(path) as writer:
        for name, picture in pictures:
            owner = name.split("/")[0]
            label = people.setdefault(owner, len(people))
            if label == len(ranges):
                ranges.append([key, key])
            elif label != len(ranges) - 1:
                raise ValueError(f"pictures of {owner!r} come twice: sort them by identity")
            writer.write(key, pack((float(label),), picture, key))
            size = size if key > 1 else _size_of(picture)
            key += 1
            ranges[-1][1] = key
        for number, (first, end) in enumerate(ranges):
            writer.write(key + number, pack((float(first), float(end))))
        writer.write(0, pack((float(key), float(key + len(ranges)))))
    _write_property(path, len(ranges), size)


def write_flat(
    path: str | Path, pictures: Iterable[tuple[str, bytes]], identities: Sequence[str]
) -> None:
    """Write every picture as a record with its label, keys from 0, with `property` beside.

    Args:
        path: of the `.rec`.
        pictures: `<identity>/<image>` and the encoded picture, in any order.
        identities: whom labels number, in order.
    """
    people = {owner: float(label) for label, owner in enumerate(identities)}
    size = (0, 0)
    with RecordWriter(path) as writer:
        for key, (name, picture) in enumerate(pictures):
            writer.write(key, pack((people[name.split("/")[0]],), picture, key))
            size = size if key else _size_of(picture)
    _write_property(path, len(people), size)


def read_property(path: str | Path) -> tuple[int, int, int] | None:
    """Return what `property` beside a `.rec` says: identities, height and width; None without it.

    Raises:
        ValueError: it says nothing of the kind.
    """
    beside = Path(path).with_name("property")
    if not beside.is_file():
        return None
    text = read_regular(beside, 1000).decode("ascii", errors="replace").strip()
    if not re.fullmatch(r"\d{1,9},\d{1,9},\d{1,9}", text):
        raise ValueError(
            f"{beside} must hold identities,height,width; got {text[:50]!r}: mend or remove it"
        )
    people, height, width = map(int, text.split(","))
    return people, height, width


def _write_property(path: str | Path, classes: int, size: tuple[int, int]) -> None:
    """Write how many identities there are, and height and width of the first picture."""
    text = ",".join(map(str, (classes, *size)))
    Path(path).with_name("property").write_text(f"{text}\n")


def _size_of(picture: bytes) -> tuple[int, int]:
    height, width = load_rgb(picture).shape[:2]
    return height, width
