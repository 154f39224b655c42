"""The faces of IJB-B and IJB-C: loosely cropped pictures, cut to the template by five points.

The pictures lie in `loose_crop/`, called as in `ijbc_name_5pts_score.txt`. The cut is that of
insightface's evaluation: pixel centres have whole coordinates, and what lies outside is black.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from data.archives import DamagedImage
from data.damage import Damage
from data.decode import load_rgb
from data.images import SourcePictures
from data.listed import holds_folder, one_folder
from jaxtyping import Int, UInt8

from partlocal.alignment import align_faces
from protocols.ijb import IjbLists, Name
from protocols.lists import listing

CROPS = "loose_crop"


class LooseCrops(SourcePictures):
    """The faces of the lists in their order, cut to `size`.

    Args:
        path: a folder, zip or tar that holds the list and the pictures.
        identities: None; who they are is in other lists.
        size: height and width of a cut.
        damage: none is met on opening.
        protocol: whose list; None takes the one that is there.

    Raises:
        FileNotFoundError: there is no list, or a picture of it is missing.
        ValueError: the list is damaged, or there are two, or several folders `loose_crop`.
    """

    def __init__(
        self,
        path: str | Path,
        identities: Collection[str] | None = None,
        size: int | None = None,
        damage: Damage | None = None,
        protocol: Name | None = None,
    ) -> None:
        self.protocol = protocol
        super().__init__(path, identities, size, damage)

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        lists = IjbLists(path, self.protocol) if self.protocol else IjbLists.find(path)
        self.source = lists.source
        self._names, self._points, _ = lists.points()
        (self.points_sha256,) = lists.hashes.values()
        self._prefix = one_folder(self.source, CROPS) or f"{CROPS}/"
        known = set(self.source.names)
        if missing := [name for name in self._names if self._prefix + name not in known]:
            raise FileNotFoundError(
                f"{path}: {len(missing)} of {len(self._names)} faces have no picture in "
                f"{self._prefix}: {listing(missing)}"
            )
        return self.source.path, [""], np.zeros(len(self._names), dtype=np.int64)

    def load(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return one face, cut.

        Raises:
            DamagedImage: the picture cannot be decoded, or its points fix no cut.
        """
        picture = torch.from_numpy(load_rgb(self.read(index), self.where(index)).copy())
        points = torch.from_numpy(self._points[self._places[index]].copy())[None]
        try:
            cut = align_faces(
                picture.permute(2, 0, 1)[None], points, self.size or 112, pixel_centers="integer"
            )
        except ValueError as error:
            raise DamagedImage(f"{self.where(index)} cannot be cut: {error}") from None
        return cut[0].permute(1, 2, 0).numpy()


def holds_crops(path: str | Path) -> bool:
    """Tell whether a folder or archive holds IJB's loose crops."""
    return holds_folder(path, CROPS)
