"""insightface's verification sets: a pickle of 2 n encoded pictures and n answers.

A pickle is a program: whoever loads one runs what its author wrote. Nothing is run here. The
unpickler knows lists, bytes, numbers and NumPy arrays of numbers, refuses every other name, and
sets the state of arrays alone.
LFW, CFP-FP, AgeDB-30, CALFW and CPLFW come in this form; pictures 2 i and 2 i + 1 are pair i, and
the ten folds are contiguous.

Source: deepinsight/insightface, `recognition/arcface_torch/eval/verification.py`.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from data.archives import MAX_BYTES, read_regular
from jaxtyping import Bool

from protocols.pairs import FOLDS, Pairs, cut_in_folds

MOST_BYTES = 4 * 2**30  # of a .bin, all of which is read; LFW's has 60 MB


class VerificationBin(NamedTuple):
    """The pictures of pairs, still encoded, and whether both show one person."""

    pictures: tuple[bytes, ...]
    same: Bool[np.ndarray, " p"]
    sha256: str

    def pairs(self) -> Pairs:
        """Return the pairs in ten contiguous folds; who the people are is not known."""
        count = len(self.same)
        first = 2 * np.arange(count)
        return Pairs(first, first + 1, self.same, cut_in_folds(count), None)


def read_bin(path: str | Path) -> VerificationBin:
    """Read a `.bin` without running what it says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such pickle, asks for anything but plain data, is too large, or its
            numbers of pictures and answers do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass one of insightface's .bin files")
    data = read_regular(path, MOST_BYTES)
    try:
        found = _Plain(data).load()
    except _Refused as error:
        raise ValueError(
            f"{path} is refused: it asks for {error}, and a verification set holds pictures and "
            "answers alone. Do not load it with pickle"
        ) from None
    except MemoryError:
        raise ValueError(f"{path} is refused: it asks for more memory than there is") from None
    except Exception:  # damaged pickles raise whatever their numbers lead to
        raise ValueError(
            f"{path} is no verification set, or a damaged one, and cannot be read to its end: pass "
            "one of insightface's .bin files, or download it again"
        ) from None
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise ValueError(f"{path} must hold pictures and answers; got {type(found).__name__}")
    try:
        _check_lengths(found, len(data))
        pictures, same = _pictures(found[0], len(data)), _answers(found[1])
        fits = same.ndim == 1 and np.isin(same, (0, 1)).all() and len(pictures) == 2 * len(same)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds something else than pictures ({error})") from None
    if not fits or len(same) < FOLDS:
        raise ValueError(
            f"{path} must hold two pictures an answer, which is True or False, of {FOLDS} pairs at "
            f"least; got {len(pictures)} pictures and answers {list(same.shape)}"
        )
    return VerificationBin(pictures, same == 1, hashlib.sha256(data).hexdigest())


def write_bin(path: str | Path, pictures: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a `.bin` as insightface does."""
    with Path(path).open("xb") as file:
        pickle.dump((list(pictures), list(map(bool, same))), file, pickle.HIGHEST_PROTOCOL)


class _Refused(Exception):
    """The name of something that is no plain data."""


class _Plain(pickle._Unpickler):
    """Build lists, bytes, numbers and arrays of numbers, and nothing else.

    The one in Python: that in C makes room for as many objects as a file says it will number,
    2**32 if a few bytes say so.

    Args:
        data: the file.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._room = len(data)  # for bytes that are made of text, which may stand there once

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Return one of the few names that plain data needs."""
        if module.startswith(("numpy.core.", "numpy._core.")):  # before and since NumPy 2
            module = "numpy"
        known = {
            ("numpy", "_reconstruct"): _empty_array,
            ("numpy", "scalar"): _scalar,
            ("numpy", "_frombuffer"): _array,
            ("numpy", "ndarray"): _ArrayType,
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): self._latin,
        }
        if (module, name) not in known:
            raise _Refused(f"{module}.{name}")
        return known[module, name]

    def load_build(self) -> None:
        """Give an array its numbers; whatever else would get attributes is refused."""
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is np.ndarray:
            made.__setstate__(state)
        elif not isinstance(made, np.dtype):  # whose state says no more than its name does
            raise _Refused(f"a change of {type(made).__name__}")

    dispatch: ClassVar = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}

    def _latin(self, text: str, encoding: str) -> bytes:  # how Python 3 writes bytes for Python 2
        if encoding not in ("latin1", b"latin1"):
            raise _Refused(f"the codec {encoding!r}")
        self._room -= len(text)
        if self._room < 0:
            raise _Refused("more bytes than it has")
        return text.encode("latin1")


class _ArrayType:
    """Stands where a pickle says `ndarray`, which would make arrays of any size when called."""

    def __new__(cls, *_: object) -> "_ArrayType":
        raise _Refused("a call of numpy.ndarray")


def _empty_array(kind: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray:
    # NumPy always writes an empty one, and sets its numbers afterwards: a large one is a trap.
    if kind is not _ArrayType or tuple(shape) != (0,):
        raise _Refused("an array that is not empty")
    return np.ndarray((0,), np.int8)


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype).reshape(shape, order="F" if order == "F" else "C")


def _dtype(name: str | bytes, *_: object) -> np.dtype:
    found = np.dtype(name.decode() if isinstance(name, bytes) else name)
    if found.kind not in "biuf":
        raise _Refused(f"an array of {found}")
    return found


def _scalar(dtype: np.dtype, data: bytes) -> Any:
    return np.frombuffer(data, dtype)[0]


def _check_lengths(found: Sequence[object], most: int) -> None:
    """Refuse more of either than the file has bytes, such as the empty rows of an array."""
    for one in found:
        if not isinstance(one, list | tuple | np.ndarray):
            raise TypeError(f"a list is {type(one).__name__}")
        if len(one) > most:
            raise ValueError(f"{len(one)} of them in {most} bytes")


def _answers(found: Sequence[object]) -> np.ndarray:
    # Lists in lists that name each other could stand for more numbers than there is memory.
    if not all(isinstance(x, bool | int | float | np.generic) for x in found):
        raise TypeError("an answer is no number")
    return np.asarray(found, dtype=np.float64)


def _pictures(found: Sequence[object], most: int) -> tuple[bytes, ...]:
    """Return the bytes of each; one that stands there again takes no more memory."""
    kept = list(found)  # rows of an array live, and have a number of their own, no longer than this
    made: dict[int, bytes] = {}
    for picture in kept:
        if id(picture) not in made:
            most -= getattr(picture, "nbytes", 0)  # before they are copied
            if most < 0:
                raise ValueError("their arrays come to more bytes than the file has")
            made[id(picture)] = _encoded(picture)
    return tuple(made[id(picture)] for picture in kept)


def _encoded(picture: object) -> bytes:
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8:
            raise TypeError(f"a picture is an array of {picture.dtype}, not of encoded bytes")
        if picture.nbytes > MAX_BYTES:  # before they are copied: a view may repeat a few of them
            raise TypeError(f"a picture has {picture.nbytes} bytes")
        return picture.tobytes()
    if not isinstance(picture, bytes) or len(picture) > MAX_BYTES:
        raise TypeError(f"a picture is {type(picture).__name__}, not bytes, or too large")
    return picture
