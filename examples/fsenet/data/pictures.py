"""Pictures of people, in whichever of the formats that the recipe reads."""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from data.damage import Damage
from data.file_sets import is_numbered, suffixes_in
from data.identity_records import IdentityRecords
from data.images import IdentityFolder, IdentityPictures, is_image
from data.merge import MergedPictures, read_identity_list
from data.shards import IdentityShards, is_shard
from data.tables import SUFFIXES, IdentityTable


def open_pictures(
    path: str | Path,
    identities: Collection[str] | None = None,
    size: int | None = None,
    damage: Damage | None = None,
) -> IdentityPictures:
    """Open pictures of people in the format that `reader_of` finds.

    Args:
        path: see `reader_of`.
        identities: keep these alone; None keeps all.
        size: height and width that every picture is brought to when it is read.
        damage: how many pictures may be left out; by default none.

    Raises:
        FileNotFoundError, ValueError: see the format's reader.
    """
    return reader_of(path)(path, identities, size, damage)


def open_sources(
    paths: Sequence[Path],
    size: int | None = None,
    damage: Damage | None = None,
    identity_list: Path | None = None,
) -> IdentityPictures:
    """Open one source of pictures, or several as one.

    Args:
        paths: of the sources, each in any format.
        size, damage: see `open_pictures`; all sources share the number that is allowed.
        identity_list: who is who in them, see `data/merge.py`.

    Raises:
        FileNotFoundError, ValueError: see the formats' readers, and `MergedPictures`.
    """
    damage = damage or Damage()
    names = None if identity_list is None else read_identity_list(identity_list)
    sources = [open_pictures(path, size=size, damage=damage) for path in paths]
    return sources[0] if names is None and len(sources) == 1 else MergedPictures(sources, names)


def reader_of(path: str | Path) -> type[IdentityPictures]:
    """Return the reader of the format that a path holds.

    Args:
        path: a folder, zip or tar of `<identity>/<image>`; insightface's `.rec`, or the folder that
            holds `train.rec`; a WebDataset shard, a folder of them, or their numbered names;
            a Parquet or Arrow file of Hugging Face's `datasets`, a folder of them, or numbered.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: a folder holds files of two formats, or of one beside folders of pictures.
    """
    path = Path(path)
    if not (path.exists() or is_numbered(path)):
        raise FileNotFoundError(f"{path} does not exist: pass pictures of people (docs/data.md)")
    if path.suffix == ".rec":
        return IdentityRecords
    if path.suffix in SUFFIXES:
        return IdentityTable
    if path.suffix == ".tar" and (is_numbered(path) or is_shard(path)):
        return IdentityShards
    return _reader_of_folder(path) if path.is_dir() else IdentityFolder


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


def _reader_of_folder(path: Path) -> type[IdentityPictures]:
    """Return the reader of what lies in a folder; one stray file must not decide for the rest."""
    if (path / "train.rec").is_file():
        return IdentityRecords  # called so, it is no stray file
    found = suffixes_in(path, (".tar", *SUFFIXES))
    kinds = [f"{suffix} files" for suffix in found]
    if found and _holds_folders_of_pictures(path):
        kinds.append("folders of pictures")
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds {' and '.join(kinds)}: move one kind elsewhere, or name the files"
        )
    if not found:
        return IdentityFolder
    return IdentityShards if found == [".tar"] else IdentityTable


def _holds_folders_of_pictures(path: Path) -> bool:
    """Tell whether there is `<identity>/<image>`, with one folder around it or none."""
    places = (file for depth in ("*/*", "*/*/*") for file in path.glob(depth))
    return any(is_image(file.relative_to(path).as_posix()) for file in places)
