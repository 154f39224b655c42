"""The list files of a protocol: found wherever they lie in a folder or archive, and hashed."""

import hashlib
from pathlib import Path

from data.archives import Source

LARGEST = 2**30  # bytes of a list; the pairs of IJB-C have 0.25 GB


class ListFiles:
    """Read lists by their names, and remember their hashes, which a result is printed with.

    Args:
        path: a folder, zip or tar. Of two files of one name that which lies less deep is taken.

    Raises:
        FileNotFoundError, ValueError: see `Source`.
    """

    def __init__(self, path: str | Path) -> None:
        self.source = Source(path)
        self.hashes: dict[str, str] = {}
        deepest_first = sorted(self.source.names, key=lambda name: -name.count("/"))
        self._places = {name.rpartition("/")[2]: name for name in deepest_first}

    def __contains__(self, file: str) -> bool:
        return file in self._places

    def place(self, file: str) -> str:
        """Return where a list lies.

        Raises:
            FileNotFoundError: nowhere.
        """
        if file not in self._places:  # not `in self`, which may mean another name
            raise FileNotFoundError(f"{self.source.path} holds no {file}")
        return self._places[file]

    def read(self, file: str) -> bytes:
        """Return one list.

        Raises:
            FileNotFoundError: there is none.
            DamagedImage: it is damaged, or larger than `LARGEST`.
        """
        place = self.place(file)
        data = self.source.read(place, LARGEST)
        self.hashes[place.rpartition("/")[2]] = hashlib.sha256(data).hexdigest()
        return data

    def text(self, file: str) -> str:
        """Return one list as UTF-8 text; what is no UTF-8 is replaced."""
        return self.read(file).decode("utf-8", errors="replace")
