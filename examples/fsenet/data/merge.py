"""Several sets of pictures as one, its people by name, or as a list of identities says.

A line of the list is `identity <tab> name`: who is called so becomes `name`, or is left out where
that is `-`. `2/identity` speaks of the second source alone. Sources whose identities are all
numbers say nothing about each other's: unless the list names them, those are `1-0000012` and
`2-0000012`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.archives import is_plain, read_regular
from data.images import IdentityPictures, Pieces

_OUT = "-"
_LARGEST_LIST = 2**28  # bytes; a million identities have 20 MB
_PIECE = 1000  # pictures that lie together in a source that could read each alone


class MergedPictures(IdentityPictures):
    """The pictures of all sources, in their order.

    Args:
        sources: two or more, or one whose identities a list renames; they share one `Damage`.
        names: what `read_identity_list` returns.

    Raises:
        ValueError: all identities are left out, or a number of one source is a name in another.
    """

    def __init__(
        self, sources: Sequence[IdentityPictures], names: Mapping[str, str] | None = None
    ) -> None:
        self._sources, self._names = sources, names or {}
        path = Path(" and ".join(str(source.path) for source in sources))
        super().__init__(path, size=sources[0].size, damage=sources[0].damage)

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        called = [self._call(number) for number in range(len(self._sources))]
        people = sorted({name for names in called for name in names if name != _OUT})
        if not people:
            raise ValueError(f"{path}: the list leaves out every identity")
        place = {name: number for number, name in enumerate(people)} | {_OUT: -1}
        labels = [
            np.array([place[name] for name in names])[source.labels]
            for names, source in zip(called, self._sources, strict=True)
        ]
        joined = np.concatenate(labels)
        self._begins = np.cumsum([0, *map(len, labels)])
        self._found = np.flatnonzero(joined >= 0)
        self._say(called)
        return path, people, joined[self._found]

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""
        source, own = self._find(index)
        return source.read(own)

    def name(self, index: int) -> str:
        """Return `<identity>/<image>`; two sources may call two pictures of one person alike."""
        source, own = self._find(index)
        return f"{self.identities[self.labels[index]]}/{source.name(own).split('/')[1]}"

    def where(self, index: int) -> str:
        """Return where one picture lies, as errors call it."""
        source, own = self._find(index)
        return source.where(own)

    @property
    def pieces(self) -> Pieces | None:
        """The sources' pieces; None where each picture of each can be read alone."""
        found = [source.pieces for source in self._sources]
        if not any(found):
            return None
        numbers, last = [], 0
        for source, pieces in zip(self._sources, found, strict=True):
            own = pieces.number if pieces else np.arange(len(source)) // _PIECE
            numbers.append(own + last)
            last = numbers[-1].max() + 1
        together = min(pieces.together for pieces in found if pieces)
        return Pieces(np.concatenate(numbers)[self._found[self._places]], together)

    def _find(self, index: int) -> tuple[IdentityPictures, int]:
        place = int(self._found[self._places[index]])
        number = int(np.searchsorted(self._begins, place, side="right")) - 1
        return self._sources[number], place - int(self._begins[number])

    def _call(self, number: int) -> list[str]:
        """Return what the identities of a source are called here."""
        own = self._sources[number].identities
        numbered = len(self._sources) > 1 and all(name.isdecimal() for name in own)
        names = [f"{number + 1}-{name}" if numbered else name for name in own]
        others = (s.identities for i, s in enumerate(self._sources) if i != number)
        if numbered and (taken := {*names} & {name for other in others for name in other}):
            raise ValueError(
                f"{self._sources[number].path} has numbers, of which {min(taken)!r} is somebody's "
                "name in another source: name them in a list of identities"
            )
        return [
            self._names.get(f"{number + 1}/{one}", self._names.get(one, name))
            for one, name in zip(own, names, strict=True)
        ]

    def _say(self, called: list[list[str]]) -> None:
        """Print what became of the sources."""
        for number, (source, names) in enumerate(zip(self._sources, called, strict=True), 1):
            out = names.count(_OUT)
            new = len(set(names) - {_OUT, *(n for others in called[: number - 1] for n in others)})
            print(f"source {number}: {source}, {new} new, {out} left out", file=sys.stderr)
        known = {
            name
            for number, source in enumerate(self._sources, 1)
            for one in source.identities
            for name in (one, f"{number}/{one}")
        }
        if unknown := sorted(set(self._names) - known):
            said = ", ".join(unknown[:10]) + (", ..." if unknown[10:] else "")
            print(f"{len(unknown)} identities of the list are not there: {said}", file=sys.stderr)


def read_identity_list(path: Path) -> dict[str, str]:
    """Return who becomes whom, see above.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no regular file, or larger than 2**28 bytes; a line is not
            `identity <tab> name` in UTF-8, or says another thing than one before.
    """
    names: dict[str, str] = {}
    for number, data in enumerate(read_regular(path, _LARGEST_LIST).splitlines()):
        try:
            line = data.decode("utf-8")
        except UnicodeDecodeError:  # to replace what is none would make one name of two
            raise ValueError(
                f"{path}, line {number + 1}: expected UTF-8; got {data!r:.80}: save it as that"
            ) from None
        if not line.strip():
            continue
        one, _, name = line.partition("\t")
        if not (name == _OUT or is_plain(name)):
            raise ValueError(
                f"{path}, line {number + 1}: expected identity <tab> name, or - to leave it out; "
                f"got {line!r:.80}"
            )
        if names.setdefault(one, name) != name:
            raise ValueError(f"{path}, line {number + 1}: {one!r} was {names[one]!r} before")
    return names
