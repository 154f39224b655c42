"""Both layouts of insightface's `.rec`, written: sorted by identity, or flat and in any order.

Beside it lie `property` and, as it holds no names, a list of them, see `record_names.py`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

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
    key = 1
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
            key += 1
            ranges[-1][1] = key
        for number, (first, end) in enumerate(ranges):
            writer.write(key + number, pack((float(first), float(end))))
        writer.write(0, pack((float(key), float(key + len(ranges)))))
    _write_property(path, len(ranges))


def write_flat(
    path: str | Path, pictures: Iterable[tuple[str, bytes]], identities: Sequence[str]
) -> None:
    """Write every picture as a record with its label, keys from 0.

    Args:
        path: of the `.rec`.
        pictures: `<identity>/<image>` and the encoded picture, in any order.
        identities: whom labels number, in order.
    """
    people = {owner: label for label, owner in enumerate(identities)}
    with RecordWriter(path) as writer, _open_list(path) as names:
        for key, (name, picture) in enumerate(pictures):
            label = people[name.split("/")[0]]
            writer.write(key, pack((float(label),), picture, key))
            names.write(f"{key}\t{label}\t{name}\n")
    _write_property(path, len(people))


def _open_list(path: str | Path) -> TextIO:
    beside = Path(path).with_suffix(".lst")
    return beside.open("x", encoding="utf-8", errors="surrogateescape", newline="\n")


def _write_property(path: str | Path, classes: int) -> None:
    Path(path).with_name("property").write_text(f"{classes},112,112\n")
