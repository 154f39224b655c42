"""Pictures of people, in whichever of the formats that the recipe reads."""

import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np

from data.images import IdentityFolder, IdentityPictures
from data.records import IdentityRecords


def open_pictures(
    path: str | Path, identities: Collection[str] | None = None, size: int | None = None
) -> IdentityPictures:
    """Open a folder, zip or tar of `<identity>/<image>`, or insightface's `train.rec`.

    Args:
        path: the folder, archive or `.rec`; or the folder that holds `train.rec`.
        identities: keep these alone; None keeps all.
        size: height and width that every picture is brought to when it is read.

    Raises:
        FileNotFoundError, ValueError: see `IdentityFolder` and `IdentityRecords`.
    """
    reader = IdentityRecords if holds_records(path) else IdentityFolder
    return reader(path, identities, size)


def holds_records(path: str | Path) -> bool:
    """Tell whether this is a `.rec`, or a folder with `train.rec`."""
    path = Path(path)
    return path.suffix == ".rec" or (path / "train.rec").is_file()


def enough_images(pictures: IdentityPictures, least: int) -> IdentityPictures:
    """Return the identities with at least so many pictures, and print which share is left out.

    Raises:
        ValueError: there are none.
    """
    count = np.bincount(pictures.labels, minlength=len(pictures.identities))
    few = count < least
    if not few.any():
        return pictures
    names = [name for name, out in zip(pictures.identities, few, strict=True) if not out]
    if not names:
        raise ValueError(f"--min-images {least}: no identity has as many; most have {count.max()}")
    print(
        f"--min-images {least}: {few.sum()} of {len(few)} identities left out, with "
        f"{count[few].sum()} of {len(pictures)} pictures",
        file=sys.stderr,
    )
    return pictures.keep(names)
