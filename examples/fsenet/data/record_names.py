"""The names of a `.rec`'s pictures, which it does not hold: MXNet's list beside it.

`train.lst` has a line a picture, `key <tab> label <tab> path`, of which the last folder is the
identity's name. A list of other pictures, or of another form, is passed over.

Source: MXNet's `tools/im2rec.py`.
"""

import sys
from array import array
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.archives import OwnHandle, is_plain

_LONGEST = 2**16  # bytes of a line
_KEY, _LABEL, _OWNER, _OFFSET = range(4)


class RecordNames:
    """The names of some pictures; those of identities are held, a picture's is read when asked for.

    Args:
        path: of the list.
        keys: of the pictures.
        classes: whom each shows, as its record says.

    Attributes:
        people: the name of each class.

    Raises:
        ValueError: the list is not of these pictures, or does not give a class one name of its own.
    """

    def __init__(
        self, path: Path, keys: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"]
    ) -> None:
        self._open = OwnHandle(partial(open, path, "rb"))
        owners, rows = _read(path)
        rows = rows[rows[:, _KEY].argsort(kind="stable")]
        at = np.searchsorted(rows[:, _KEY], keys)
        found = rows[np.minimum(at, len(rows) - 1)]
        if (found[:, _KEY] != keys).any() or (found[:, _LABEL] != classes).any():
            raise ValueError("it has other keys or labels")
        pairs = np.unique(found[:, [_LABEL, _OWNER]], axis=0)
        if any(len(np.unique(column)) < len(pairs) for column in pairs.T):
            raise ValueError("a label has two names, or a name two labels")
        self.people = {label: owners[owner] for label, owner in pairs.tolist()}
        if unfit := [name for name in self.people.values() if not is_plain(name)]:
            raise ValueError(f"nobody can be called {unfit[0]!r}")
        self._keys, self._offsets = keys, found[:, _OFFSET]

    def image(self, place: int) -> str:
        """Return the name of a picture, or its key where no file can be called so."""
        file = self._open()
        file.seek(int(self._offsets[place]))
        name = _text(file.readline(_LONGEST).rstrip(b"\r\n").rpartition(b"/")[2])
        return name if is_plain(name) else f"{self._keys[place]:08d}.jpg"


def names_beside(
    record: Path, keys: Int[np.ndarray, " n"], classes: Int[np.ndarray, " n"]
) -> RecordNames | None:
    """Return the names in the list beside a `.rec`; None where there is none, or it does not fit.

    Args:
        record: the `.rec`.
        keys, classes: of its pictures.
    """
    path = record.with_suffix(".lst")
    if not path.is_file():
        return None
    try:
        return RecordNames(path, keys, classes)
    except ValueError as error:
        print(f"{path} is no list of {record.name}'s names: {error}; numbers stand for them",
              file=sys.stderr)  # fmt: skip
        return None


def _read(path: Path) -> tuple[list[str], Int[np.ndarray, "m 4"]]:
    """Return the owners' names, and of each line key, label, number of the owner, and offset."""
    owners: dict[bytes, int] = {}
    table, offset = array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST), b""), 1):
            try:
                key, label, *_, place = line.split(b"\t")
                owner = owners.setdefault(place.rsplit(b"/", 2)[-2], len(owners))
                table.extend((int(key), int(float(label)), owner, offset))
            except (ValueError, IndexError, OverflowError):
                raise ValueError(
                    f"line {number} should be 'key label identity/picture' with tabs between; got "
                    f"{line[:80]!r}"
                ) from None
            offset += len(line)
    if not table:
        raise ValueError("it is empty")
    return [_text(owner) for owner in owners], np.array(table).reshape(-1, 4)


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="surrogateescape")
