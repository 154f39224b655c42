"""The pictures of the published sets of pairs, from a folder or archive, or from a `.bin`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from protocols.lfw import LfwProtocol
from protocols.lists import ListFiles, listing
from protocols.pair_lists import PairList, read_pairs

from data.damage import Damage
from data.faces import SIZE, TestSet, bin_test_set, lfw_test_set
from data.images import decode_all, without_suffix
from data.loose import LoosePictures

Published = Literal["lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw", "bin"]
IN_TWO_PARTS = "LFW as a folder or zip with its lists"
SOURCES = {
    "lfw": f"{IN_TWO_PARTS}, or of lfw_ann.txt, or a .bin of insightface",
    "cfp_ff": "CFP's folder with Protocol/ in it, or a .bin of insightface",
    "cfp_fp": "CFP's folder with Protocol/ in it, or a .bin of insightface",
    "agedb_30": "the folder of agedb_30_ann.txt, or a .bin; its own lists are files of MATLAB",
    "calfw": "CALFW's folder with pairs_CALFW.txt, or a .bin of insightface",
    "cplfw": "CPLFW's folder with pairs_CPLFW.txt, or a .bin of insightface",
    "bin": "a .bin of insightface",
}


def published_test_set(path: Path, name: Published, lfw_folds: Sequence[int]) -> TestSet:
    """Return the pairs of a published set and the pictures that they need, not yet decoded.

    Args:
        path: what `SOURCES` says; pictures are faces on the template, and square.
        name: of the set.
        lfw_folds: of LFW with its own lists.
        decode: the pictures, and not their names alone.

    Raises:
        FileNotFoundError: a list is not there.
        ValueError: a list is damaged, or pictures of the pairs are missing.
    """
    if path.suffix.lower() == ".bin" or name == "bin":
        if path.is_dir():
            raise ValueError(f"--protocol {name} needs --faces: {SOURCES[name]}")
        found = bin_test_set(path)
        return replace(found, flags={**found.flags, "name": name})
    if name == "lfw" and in_two_parts(path):
        return lfw_test_set(path, LfwProtocol.read(path), lfw_folds)
    listed = read_pairs(path, name)
    pictures = LoosePictures(path, size=SIZE, damage=Damage(None))
    chosen = pictures.take(_find(path, pictures.paths, listed, name))
    flags = {"name": name, "folds": 10, "pairs": len(listed.pairs.same)}
    flags |= {"list_sha256": listed.hashes}
    return TestSet(lambda: decode_all(chosen)[1], chosen.paths, listed.pairs, flags)


def in_two_parts(path: Path) -> bool:
    """Tell LFW with its own lists, of which some folds may train, from a set of pairs alone."""
    return path.suffix.lower() != ".bin" and "lfw_ann.txt" not in ListFiles(path)


def _find(path: Path, names: Sequence[str], listed: PairList, protocol: str) -> np.ndarray:
    """Return the place of each picture of the pairs; folders before and suffixes do not matter."""
    depth = listed.pictures[0].count("/") + 1
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(_key(name, depth), []).append(row)
    found, missing = [], []
    for name in listed.pictures:
        places = rows.get(_key(name, depth), [])
        if len(places) > 1:  # CALFW brings its pictures as they were, and aligned
            marks = ("aligned", f"{protocol}_112x112/")
            places = [x for x in places if any(m in names[x].lower() for m in marks)] or places
        if len(places) > 1:
            raise ValueError(
                f"{path} holds {len(places)} pictures {name}, as {names[places[0]]} and "
                f"{names[places[1]]}: keep the aligned ones"
            )
        found.append(places[0] if places else -1)
        if not places:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(listed.pictures)} pictures that the pairs "
            f"name: {listing(missing)}"
        )
    return np.array(found)


def _key(name: str, depth: int) -> str:
    return without_suffix("/".join(name.split("/")[-depth:]))
