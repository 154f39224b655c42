"""Pictures that a list names, from the one folder that holds them beside the lists."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.archives import Source
from data.images import SourcePictures, is_image, without_suffix

ALIGNED = "aligned"  # the folder of faces on the template, where a set brings none


class ListedPictures(SourcePictures):
    """Some pictures of one folder, wherever that lies in a folder, zip or tar, in a list's order.

    Args:
        path: see `Source`.
        folder: name of the one that holds them.
        called: the path below it of each picture that is wanted, and how it is called; what is not
            there is found with another suffix, or passed over. None takes all by their own paths.
        size: see `IdentityPictures`.

    Attributes:
        missing: what was wanted and is not there.

    Raises:
        FileNotFoundError: `path` does not exist, or holds no such folder, or no picture wanted.
        ValueError: there are two such folders, or two pictures fit one name, or one fits two.
    """

    def __init__(
        self,
        path: str | Path,
        folder: str,
        called: Mapping[str, str] | None = None,
        size: int | None = None,
    ) -> None:
        self.folder, self._called = folder, called
        super().__init__(path, size=size)

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self.source = Source(path)
        self._prefix = one_folder(self.source, self.folder) or f"{self.folder}/"
        begin = len(self._prefix)
        files = [
            name[begin:]
            for name in self.source.names
            if name.startswith(self._prefix) and is_image(name)
        ]
        found = self._find(files)
        if not found:
            raise FileNotFoundError(
                f"{path}: none of the pictures that the lists name lies in {self._prefix}"
            )
        self._names, self._files = list(found), list(found.values())
        return self.source.path, [""], np.zeros(len(found), dtype=np.int64)

    def _find(self, files: list[str]) -> dict[str, str]:
        """Return the file of each name, and keep what is missing."""
        if self._called is None:
            self.missing: tuple[str, ...] = ()
            return dict(zip(files, files, strict=True))
        stems: dict[str, list[str]] = {}
        for file in files:
            stems.setdefault(without_suffix(file), []).append(file)
        found, missing, taken = {}, [], dict[str, str]()
        for wanted, name in self._called.items():
            fit = stems.get(without_suffix(wanted), [])
            fit = [wanted] if wanted in fit else fit
            if len(fit) > 1:
                raise ValueError(f"{self.source.path} holds {fit[0]} and {fit[1]} for {wanted}")
            if fit and taken.setdefault(fit[0], wanted) != wanted:
                raise ValueError(
                    f"{self.source.path} holds {fit[0]} alone for {taken[fit[0]]} and {wanted}"
                )
            if fit:
                found[name] = fit[0]
            else:
                missing.append(wanted)
        self.missing = tuple(missing)
        return found

    def _file(self, index: int) -> str:
        return self._prefix + self._files[self._places[index]]


def one_folder(source: Source, folder: str) -> str | None:
    """Return where the folder of this name lies, or None.

    Raises:
        ValueError: there are two.
    """
    places = _folders(source.names, folder)
    if len(places) > 1:
        raise ValueError(
            f"{source.path} holds {len(places)} folders {folder}, {places[0]} and {places[1]}: "
            "pass what holds one of them"
        )
    return places[0] if places else None


def holds_folder(path: str | Path, folder: str) -> bool:
    """Tell whether a folder, or an archive at any depth, holds such a folder."""
    path = Path(path)
    if path.is_dir():  # which may hold millions of files, deep in it
        return any(x.is_dir() for depth in ("", "*/", "*/*/") for x in path.glob(depth + folder))
    return path.suffix != ".txt" and bool(_folders(Source(path).names, folder))


def _folders(names: Iterable[str], folder: str) -> list[str]:
    """Return all folders of a name that files lie in, sorted."""
    parts = (f"/{name}".partition(f"/{folder}/") for name in names)
    return sorted({f"{before}/{folder}/"[1:] for before, here, _ in parts if here})
