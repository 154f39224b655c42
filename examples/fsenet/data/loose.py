"""Pictures whose people do not matter: a folder, zip or tar of them, at any depth."""

from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.archives import Source
from data.images import SourcePictures, is_image


class LoosePictures(SourcePictures):
    """All pictures of a folder, zip or tar, called by their paths in it.

    One folder around all others (`images/` in many archives) is left out of the names.

    Args:
        path: see `Source`.
        identities: None; there are none.
        size, damage: see `IdentityPictures`; no damage is met on opening.

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
