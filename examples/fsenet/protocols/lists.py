"""The list files of a protocol: found wherever they lie in a folder or archive, and hashed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data.archives import Source, read_regular

LARGEST = 2**30  # bytes of a list; the pairs of IJB-C have 0.25 GB


def listing(names: Sequence[object], most: int = 1000) -> str:
    """Return all names, or as many as anybody could look through.

    >>> listing(["a", "b"]), listing(["a", "b", "c"], most=1)
    ('a, b', 'a and 2 more')
    """
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def read_list(path: Path) -> bytes:
    """Return a list that is a file by itself.

    Raises:
        ValueError: it is no regular file, or larger than `LARGEST`.
    """
    return read_regular(path, LARGEST)


class ListFiles:
    """Read lists by their names, and remember their hashes, which a result is printed with.

    Args:
        path: a folder, zip or tar. A list may be asked for by its name alone, or with some of the
            folders that it lies in; of several that fit the one that lies least deep is taken, and
            two that lie equally deep are refused.

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
        return bool(self._find(file))

    def place(self, file: str) -> str:
        """Return where a list lies.

        Raises:
            FileNotFoundError: nowhere.
            ValueError: in several places.
        """
        places = self._find(file)
        if not places:
            raise FileNotFoundError(f"{self.source.path} holds no {file}")
        if len(places) > 1:
            raise ValueError(
                f"{self.source.path} holds {file} {len(places)} times, pass the folder that holds "
                f"one of them: {listing(places)}"
            )
        return places[0]

    def _find(self, file: str) -> list[str]:
        """Return the places, of those that fit, that lie least deep."""
        fit = [place for place in self._places.get(file.rpartition("/")[2], ())
               if f"/{place}".endswith(f"/{file}")]  # fmt: skip
        return [place for place in fit if place.count("/") == fit[0].count("/")]

    def read(self, file: str) -> bytes:
        """Return one list.

        Raises:
            FileNotFoundError: there is none.
            ValueError: there are several.
            DamagedImage: it is damaged, or larger than `LARGEST`.
        """
        place = self.place(file)
        data = self.source.read(place, LARGEST)
        self.hashes[place] = hashlib.sha256(data).hexdigest()
        return data

    def text(self, file: str) -> str:
        """Return one list as UTF-8 text; what is no UTF-8 is replaced."""
        return self.read(file).decode("utf-8", errors="replace")
