"""Which files stand for one set of pictures: a file, all of a folder, or a numbered row of them."""

import re
from collections.abc import Iterable
from pathlib import Path

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_PERCENT = re.compile(r"%0?(\d*)d")
_MOST = 10**6


def is_numbered(path: Path) -> bool:
    """Tell whether a name has a place for a number: `a-{000..009}.tar` or `a-%06d.tar`."""
    return bool(_BRACES.search(path.name) or _PERCENT.search(path.name))


def numbered(path: Path, number: int) -> Path:
    """Return the file of a number.

    >>> numbered(Path("faces-%06d.tar"), 12).name
    'faces-000012.tar'
    """
    width = _PERCENT.search(path.name)
    assert width is not None
    digits = f"{number:0{width[1] or 1}d}"
    return path.with_name(path.name[: width.start()] + digits + path.name[width.end() :])


def suffixes_in(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """Return with which of these suffixes there are files that are not hidden."""
    return [
        suffix
        for suffix in suffixes
        if any(not file.name.startswith(".") for file in folder.glob(f"*{suffix}"))
    ]


def files_of(path: Path, suffix: str) -> list[Path]:
    """Return the files that a path stands for, in the order of their names.

    Args:
        path: a file; a folder, for all of its files with `suffix`; `a-{000..009}.tar`, for the ten
            of these numbers; or `a-%06d.tar`, for whichever numbers there are.
        suffix: such as `.tar`.

    Raises:
        FileNotFoundError: there are none, or one is not there.
        ValueError: the numbers in braces run backwards, or are too many.
    """
    if _BRACES.search(path.name):
        files = _braces(path)
    elif place := _PERCENT.search(path.name):
        before, after = path.name[: place.start()], path.name[place.end() :]
        fits = re.compile(re.escape(before) + r"\d+" + re.escape(after))
        folder = path.parent
        there = folder.iterdir() if folder.is_dir() else ()
        files = sorted(file for file in there if fits.fullmatch(file.name))
    elif path.is_dir():
        files = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist")
    if not files:
        raise FileNotFoundError(f"{path} holds no {suffix} files")
    return files


def _braces(path: Path) -> list[Path]:
    place = _BRACES.search(path.name)
    assert place is not None
    first, last = int(place[1]), int(place[2])
    if not first <= last < first + _MOST:
        raise ValueError(f"{path}: {place[0]} must run from a number to a larger one")
    names = (
        f"{path.name[: place.start()]}{number:0{len(place[1])}d}{path.name[place.end() :]}"
        for number in range(first, last + 1)
    )
    return [path.with_name(name) for name in names]
