"""What LFW's lists say, and what the names of its pictures say where a list is not there."""

import re
from collections.abc import Iterable, Sequence
from operator import itemgetter

from data.archives import Source
from data.images import is_image, without_suffix

from protocols.lists import listing

_NUMBER = re.compile("[0-9]{4}")


def parse_pairs(
    lines: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...], list[bool], list[int]]:
    """Return both pictures of each pair of `pairs.txt`, whether they show one person, and its fold.

    Raises:
        ValueError: a line is not as it should be, or they are not as many as the first one says.
    """

    def bad(number: int, expected: str) -> ValueError:
        return ValueError(f"pairs.txt, line {number}: expected {expected}; got {line!r}")

    line = lines[0] if lines else ""
    header = line.split()
    if len(header) != 2 or not all(word.isdigit() for word in header):
        raise bad(1, "'folds pairs' (two numbers, as '10 300')")
    folds, each = (int(word) for word in header)
    rows = [(n, text) for n, text in enumerate(lines[1:], start=2) if text.strip()]
    if len(rows) != folds * each * 2:
        raise ValueError(
            f"pairs.txt announces {folds} x 2 x {each} pairs and holds {len(rows)}: cut short?"
        )
    first, second, same, fold = [], [], [], []
    for index, (number, text) in enumerate(rows):
        line = text
        words = text.split("\t") if "\t" in text else text.split()
        genuine = index % (2 * each) < each
        if len(words) != (3 if genuine else 4):
            raise bad(number, "'name i j'" if genuine else "'name i name j'")
        a, i, b, j = (words[0], words[1], words[0], words[2]) if genuine else words
        if not (i.strip().isdigit() and j.strip().isdigit()):
            raise bad(number, "whole numbers of pictures")
        first.append(f"{a}/{a}_{int(i):04d}.jpg")
        second.append(f"{b}/{b}_{int(j):04d}.jpg")
        same.append(genuine)
        fold.append(index // (2 * each))
    return tuple(first), tuple(second), same, fold


def format_pairs(
    first: Sequence[str], second: Sequence[str], same: Iterable[bool], fold: Iterable[int]
) -> str:
    """Return the text of a `pairs.txt`: fold by fold, genuine pairs before the others.

    Args:
        first: picture of each pair, as `Name/Name_0001.jpg`.
        second: the other picture.
        same: whether both show one person.
        fold: of each pair; every fold has as many pairs of each kind.
    """
    rows = sorted(
        zip(fold, (not x for x in same), first, second, strict=True), key=itemgetter(0, 1)
    )
    folds = len({row[0] for row in rows})
    lines = [f"{folds}\t{len(rows) // folds // 2}"]
    for _, others, *pictures in rows:
        (a, i), (b, j) = ((owner_of(x), int(stem_of(x).rpartition("_")[2])) for x in pictures)
        lines.append(f"{a}\t{i}\t{b}\t{j}" if others else f"{a}\t{i}\t{j}")
    return "\n".join(lines) + "\n"


def parse_identities(lines: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Return fold and number of pictures of each person in `identity_folds.txt`.

    Raises:
        ValueError: a line is not as it should be.
    """
    folds, images = {}, {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        words = line.split()
        if len(words) != 3 or not words[1].lstrip("-").isdigit() or not words[2].isdigit():
            raise ValueError(
                f"identity_folds.txt, line {number}: expected 'name fold images'; got {line!r}"
            )
        folds[words[0]], images[words[0]] = int(words[1]), int(words[2])
    return folds, images


def count_pictures(source: Source, named: Iterable[str]) -> dict[str, int]:
    """Return how many pictures there are of each person, from their names.

    Args:
        source: where they lie.
        named: pictures that must be there, as `Name/Name_0001.jpg`.

    Raises:
        FileNotFoundError: there are none.
        ValueError: some of `named` are not there, or somebody's numbers leave some out; the message
            has all of them.
    """
    numbers: dict[str, set[int]] = {}
    for name in filter(is_image, source.names):
        person, _, number = stem_of(name).rpartition("_")
        if name.split("/")[-2:-1] == [person] and _NUMBER.fullmatch(number):
            numbers.setdefault(person, set()).add(int(number))
    if not numbers:
        raise FileNotFoundError(
            f"{source.path} holds neither identity_folds.txt at its top nor pictures called "
            "Name/Name_0001.jpg: it is not LFW's"
        )
    present = {f"{who}_{n:04d}" for who, found in numbers.items() for n in found}
    wanted = {f"{who}_{n:04d}" for who, found in numbers.items() for n in range(1, max(found) + 1)}
    if missing := sorted((wanted | set(map(stem_of, named))) - present):
        people = len({name.rpartition("_")[0] for name in missing})
        raise ValueError(
            f"{source.path} lacks {len(missing)} pictures of {people} people, "
            f"named in pairs.txt or skipped in numbering: {listing(missing)}"
        )
    return {person: len(found) for person, found in numbers.items()}


def owner_of(path: str) -> str:
    """Return who is on `Name/Name_0001.jpg`."""
    return path.partition("/")[0]


def stem_of(name: str) -> str:
    """Return `Name_0001`, whatever folders and suffix it is called with."""
    return without_suffix(name.rpartition("/")[2])
