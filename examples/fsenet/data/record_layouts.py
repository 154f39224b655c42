"""Both layouts of insightface's `.rec`, written: sorted by identity, or flat and in any order.

Beside either lie `property`, the number of identities and height and width of the pictures, and, as
a `.rec` holds no names, a list of them, see `record_names.py`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from data.archives import read_regular
from data.decode import load_rgb
from data.records import RecordWriter, pack


def write_identities(path: str | Path, pictures: Iterable[tuple[str, bytes]]) -> None:
    """Write pictures in insightface's layout.

    Args:
        path: of the `.rec`.
        pictures: `<identity>/<image>` and the encoded picture, those of an identity in a row.

    Raises:
        ValueError: an identity comes twice.
    """
    ranges: list[list[float]] = []
    people: dict[str, int] = {}
    key, size = 1, (0, 0)
    with RecordWriter(path) as writer, _open_list(path) as names:
        for name, picture in pictures:
            owner = name.split("/")[0]
            label = people.setdefault(owner, len(people))
            if label == len(ranges):
                ranges.append([key, key])
            elif label != len(ranges) - 1:
                raise ValueError(f"pictures of {owner!r} come twice: sort them by identity")
            writer.write(key, pack((float(label),), picture, key))
            names.write(f"{key}\t{label}\t{name}\n")
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
    """Write every picture as a record with its label, keys from 0.

    Args:
        path: of the `.rec`.
        pictures: `<identity>/<image>` and the encoded picture, in any order.
        identities: whom labels number, in order.
    """
    people, size = {owner: label for label, owner in enumerate(identities)}, (0, 0)
    with RecordWriter(path) as writer, _open_list(path) as names:
        for key, (name, picture) in enumerate(pictures):
            label = people[name.split("/")[0]]
            writer.write(key, pack((float(label),), picture, key))
            names.write(f"{key}\t{label}\t{name}\n")
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


def _open_list(path: str | Path) -> TextIO:
    beside = Path(path).with_suffix(".lst")
    return beside.open("x", encoding="utf-8", errors="surrogateescape", newline="\n")


def _write_property(path: str | Path, classes: int, size: tuple[int, int]) -> None:
    """Write how many identities there are, and height and width of the first picture."""
    text = ",".join(map(str, (classes, *size)))
    Path(path).with_name("property").write_text(f"{text}\n")


def _size_of(picture: bytes) -> tuple[int, int]:
    height, width = load_rgb(picture).shape[:2]
    return height, width
