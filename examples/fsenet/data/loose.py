"""Pictures whose people do not matter: a folder, zip or tar of them, at any depth."""

from copy import copy
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.archives import Source
from data.images import IdentityPictures, is_image


class LoosePictures(IdentityPictures):
    """All pictures of a folder, zip or tar, called by their paths in it.

    One folder around all others (`images/` in many archives) is left out of the names.

    Args:
        path: see `Source`.
        identities: None; there are none.
        size: see `IdentityPictures`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no pictures.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self.source = Source(path)
        names = [name for name in self.source.names if is_image(name)]
        if not names:
            raise ValueError(f"{path} holds no pictures ({len(self.source.names)} files)")
        outer = {name.split("/")[0] for name in names}
        around = len(outer) == 1 and all(name.count("/") > 1 for name in names)
        self._prefix = outer.pop() + "/" if around else ""
        self._names = [name[len(self._prefix) :] for name in names]
        return self.source.path, [""], np.zeros(len(names), dtype=np.int64)

    def take(self, index: Int[np.ndarray, " m"]) -> "LoosePictures":
        """Return some of the pictures, in the order of their numbers."""
        found = copy(self)
        found._places, found.labels = self._places[index], self.labels[index]
        return found

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""
        return self.source.read(self._prefix + self.name(index))

    def name(self, index: int) -> str:
        """Return the path of one picture."""
        return self._names[self._places[index]]

    def where(self, index: int) -> str:
        """Return where one picture lies, as errors call it."""
        return f"{self.source.path}:{self._prefix}{self.name(index)}"
