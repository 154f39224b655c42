"""CALFW, CPLFW, CFP and others: pairs of pictures in ten folds, from lists beside the pictures.

CALFW's `pairs_CALFW.txt` and CPLFW's `pairs_CPLFW.txt` have two lines a pair, `picture number`; the
number is 0 for two people. They name all genuine pairs before all others: each kind is cut into ten
contiguous parts. CFP's `Protocol/Pair_list_F.txt` and `Pair_list_P.txt` number the frontal pictures
and the profiles, `1 ../Data/Images/001/frontal/01.jpg`, and `Protocol/Split/FP/01/same.txt` and
`diff.txt` name pairs of a frontal picture and a profile, `12,7`; below `FF` both are frontal.

`NAME_ann.txt` beside aligned pictures in `NAME_112x112/`, as AgeDB-30, LFW, CALFW and CPLFW are
passed on, has a pair a line, `same path path`, fold by fold as in insightface's `.bin` files.

Sources: Zheng, Deng, Hu, arXiv 1708.08197 (2017); Zheng, Deng, BUPT TR 18-01 (2018); Sengupta and
others, WACV 2016.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from protocols.lists import ListFiles
from protocols.pairs import FOLDS, Pairs, cut_in_folds

Listed = Literal["lfw", "agedb_30", "calfw", "cplfw", "cfp_ff", "cfp_fp"]
ANNOTATED = ("lfw", "agedb_30")  # which have no list here but NAME_ann.txt


class PairList(NamedTuple):
    """Pairs of pictures.

    Args:
        pictures: that occur, by as much of their paths as tells them apart.
        pairs: of their numbers; who the people are is not said.
        hashes: sha256 of each list file.
    """

    pictures: tuple[str, ...]
    pairs: Pairs
    hashes: dict[str, str]


def read_pairs(path: str | Path, name: Listed) -> PairList:
    """Read the lists in a folder, zip or tar, wherever they lie in it.

    Raises:
        FileNotFoundError: a list is not there.
        ValueError: a line is not as it should be; the message names list and line.
    """
    lists, annotated = ListFiles(path), f"{name}_ann.txt"
    if name in ANNOTATED or annotated in lists:
        return _read_annotated(lists, annotated)
    if name.startswith("cfp"):
        return _read_cfp(lists, name[-2:].upper())
    return _read_plain(lists, f"pairs_{name.upper()}.txt")


def write_pairs(folder: str | Path, name: Listed, listed: PairList) -> None:
    """Write the lists in the layout that they are read from.

    Raises:
        ValueError: CFP's pictures do not all lie in `<person>/frontal/` or `<person>/profile/`.
    """
    folder, pairs = Path(folder), listed.pairs
    if name in ANNOTATED:
        lines = [f"{int(pairs.same[i])} {listed.pictures[pairs.first[i]]} "
                 f"{listed.pictures[pairs.second[i]]}"
                 for i in np.lexsort((~pairs.same, pairs.fold))]  # fmt: skip
        (folder / f"{name}_ann.txt").write_text("\n".join(lines) + "\n")
        return
    if not name.startswith("cfp"):
        lines = []
        for kind in (True, False):
            for i in np.flatnonzero(pairs.same == kind):
                lines += [f"{listed.pictures[side[i]]} {int(kind)}"
                          for side in (pairs.first, pairs.second)]  # fmt: skip
        (folder / f"pairs_{name.upper()}.txt").write_text("\n".join(lines) + "\n")
        return
    numbers: dict[str, int] = {}
    for view in ("frontal", "profile"):
        paths = sorted(path for path in listed.pictures if path.split("/")[-2] == view)
        numbers |= {path: number for number, path in enumerate(paths, 1)}
        file = folder / f"Protocol/Pair_list_{view[0].upper()}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{numbers[p]} ../Data/Images/{p}\n" for p in paths))
    if len(numbers) < len(listed.pictures):
        raise ValueError("pictures of CFP lie in <person>/frontal/ or <person>/profile/")
    for fold in range(FOLDS):
        place = folder / f"Protocol/Split/{name[-2:].upper()}/{fold + 1:02d}"
        place.mkdir(parents=True, exist_ok=True)
        for kind, file in ((True, "same.txt"), (False, "diff.txt")):
            rows = np.flatnonzero((pairs.same == kind) & (pairs.fold == fold))
            a, b = (np.array(listed.pictures)[side[rows]] for side in (pairs.first, pairs.second))
            lines = [f"{numbers[x]},{numbers[y]}" for x, y in zip(a, b, strict=True)]
            (place / file).write_text("\n".join(lines) + "\n")


def contiguous_folds(same: Bool[np.ndarray, " p"]) -> Int[np.ndarray, " p"]:
    """Return the fold of each pair when the pairs of each kind are cut into ten parts in order.

    >>> contiguous_folds(np.arange(40) < 20).reshape(2, 20)[:, :5]
    array([[0, 0, 1, 1, 2],
           [0, 0, 1, 1, 2]])
    """
    folds = np.zeros(len(same), dtype=np.int64)
    for kind in (True, False):
        rows = np.flatnonzero(same == kind)
        folds[rows] = cut_in_folds(len(rows))
    return folds


def _read_annotated(lists: ListFiles, file: str) -> PairList:
    rows = [(n, x.split()) for n, x in enumerate(lists.text(file).splitlines(), 1) if x.strip()]
    for number, fields in rows:
        if len(fields) != 3 or fields[0] not in ("0", "1"):
            raise ValueError(
                f"{lists.source.path}: {file} line {number} should be 'same path path', same 0 or "
                f"1; got {' '.join(fields)[:80]!r}"
            )
    same = np.array([fields[0] == "1" for _, fields in rows], dtype=bool)
    if min(same.sum(), (~same).sum()) < FOLDS:
        raise ValueError(
            f"{lists.source.path}: {file} must hold {FOLDS} pairs of each kind at least; got "
            f"{len(rows)} pairs"
        )
    folds = cut_in_folds(len(rows))
    if len(np.unique(folds[same])) < FOLDS or len(np.unique(folds[~same])) < FOLDS:
        folds = contiguous_folds(same)  # all pairs of one kind come first
    names = ([fields[side] for _, fields in rows] for side in (1, 2))
    return _listed(*names, same, folds, lists.hashes)


def _read_plain(lists: ListFiles, file: str) -> PairList:
    path = lists.source.path
    lines = [(n, x.split()) for n, x in enumerate(lists.text(file).splitlines(), 1) if x.strip()]
    for number, fields in lines:
        if len(fields) != 2 or not fields[1].isdigit():
            raise ValueError(
                f"{path}: {file} line {number} should be 'picture number'; got "
                f"{' '.join(fields)[:80]!r}"
            )
    first, second = lines[::2], lines[1::2]
    for (number, a), (_, b) in zip(first, second, strict=False):
        if a[1] != b[1]:
            raise ValueError(
                f"{path}: {file} lines {number} and {number + 1} are one pair, and their numbers "
                f"differ: {a[1]} and {b[1]}"
            )
    same = np.array([fields[1] != "0" for _, fields in first], dtype=bool)
    if len(lines) % 2 or min(same.sum(), (~same).sum()) < FOLDS:
        raise ValueError(
            f"{path}: {file} must hold two lines a pair, and {FOLDS} pairs of each kind at least; "
            f"got {len(lines)} lines"
        )
    names = ([fields[0] for _, fields in side] for side in (first, second))
    return _listed(*names, same, contiguous_folds(same), lists.hashes)


def _read_cfp(lists: ListFiles, views: str) -> PairList:
    path, known = lists.source.path, {}
    for view in sorted(set(views)):
        file, pictures = f"Pair_list_{view}.txt", {}
        for number, line in enumerate(lists.text(file).splitlines(), 1):
            if not line.strip():
                continue
            index, _, place = line.strip().partition(" ")
            if not (index.isdigit() and place.strip()):
                raise ValueError(
                    f"{path}: {file} line {number} should be 'number path'; got {line[:80]!r}"
                )
            if index in pictures:
                raise ValueError(
                    f"{path}: {file} line {number} should have a number of its own; {index} is "
                    f"{pictures[index]} already"
                )
            pictures[index] = "/".join(place.strip().split("/")[-3:])  # person, view, picture
        known[view] = pictures
    first, second, same, folds = [], [], [], []
    for fold, kind in np.ndindex(FOLDS, 2):
        file = f"Split/{views}/{fold + 1:02d}/{'same.txt' if kind == 0 else 'diff.txt'}"
        for number, line in enumerate(lists.text(file).splitlines(), 1):
            if not line.strip():
                continue
            a, _, b = (part.strip() for part in line.partition(","))
            if a not in known[views[0]] or b not in known[views[1]]:
                raise ValueError(
                    f"{path}: {file} line {number} should be two numbers of Pair_list_{views[0]} "
                    f"and Pair_list_{views[1]}; got {line[:80]!r}"
                )
            first.append(known[views[0]][a])
            second.append(known[views[1]][b])
            same.append(kind == 0)
            folds.append(fold)
    return _listed(first, second, np.array(same), np.array(folds), lists.hashes)


def _listed(
    first: Sequence[str],
    second: Sequence[str],
    same: np.ndarray,
    folds: np.ndarray,
    hashes: dict[str, str],
) -> PairList:
    pictures = sorted({*first, *second})
    number = {name: n for n, name in enumerate(pictures)}
    a, b = (np.array([number[name] for name in side]) for side in (first, second))
    return PairList(tuple(pictures), Pairs(a, b, same, folds, None), hashes)
