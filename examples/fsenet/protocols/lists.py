"""The list files of a protocol: found wherever they lie in a folder or archive, and hashed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data.archives import Source

LARGEST = 2**30  # bytes of a list; the pairs of IJB-C have 0.25 GB


def listing(names: Sequence[object], most: int = 1000) -> str:
    """Return all names, or as many as anybody could look through.

    >>> listing(["a", "b"]), listing(["a", "b", "c"], most=1)
    ('a, b', 'a and 2 more')
    """
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class ListFiles:
    """Read lists by their names, and remember their hashes, which a result is printed with.

    Args:
        path: a folder, zip or tar. A list may be asked for by its name alone, or with some of the
            folders that it lies in; of several that fit the one that lies least deep is taken.

    Raises:
        FileNotFoundError, ValueError: see `Source`.
    """

    def __init__(self, path: str | Path) -> None:
        self.source = Source(path)
        self.hashes: dict[str, str] = {}
        self._places: dict[str, list[str]] = {}
        for name in sorted(self.source.names, key=lambda name: name.count("/")):
            self._places.setdefault(name.rpartition("/")[2], []).append(name)

    def __contains__(self, file: str) -> bool:
        return self._find(file) is not None

    def place(self, file: str) -> str:
        """Return where a list lies.

        Raises:
            FileNotFoundError: nowhere.
        """
        place = self._find(file)
        if place is None:
            raise FileNotFoundError(f"{self.source.path} holds no {file}")
        return place

    def _find(self, file: str) -> str | None:
        places = self._places.get(file.rpartition("/")[2], ())
        return next((place for place in places if f"/{place}".endswith(f"/{file}")), None)

    def read(self, file: str) -> bytes:
        """Return one list.

        Raises:
            FileNotFoundError: there is none.
            DamagedImage: it is damaged, or larger than `LARGEST`.
        """
        place = self.place(file)
        data = self.source.read(place, LARGEST)
        self.hashes[place] = hashlib.sha256(data).hexdigest()
        return data

    def text(self, file: str) -> str:
        """Return one list as UTF-8 text; what is no UTF-8 is replaced."""
        return self.read(file).decode("utf-8", errors="replace")
