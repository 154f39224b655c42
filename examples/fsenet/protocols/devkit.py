"""MegaFace's devkit: a file a feature, and the file of its results.

`Person/picture.jpg` has its feature in `Person/picture.jpg_<algorithm>.bin`: four 32-bit numbers
(n, 1, 4 and 5: a matrix of OpenCV, its bytes a number, and the code of float32), then n floats.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import whole_file
from jaxtyping import Float, Int

from protocols.lists import listing

_HEADER = struct.Struct("<4i")
_MATRIX = (1, 4, 5)
MOST = 2**20  # numbers of a feature


def read_feature(path: str | Path) -> Float[np.ndarray, " n"]:
    """Read one feature.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no such matrix, or is cut short.
    """
    with open(path, "rb") as file:
        data = file.read(_HEADER.size + 4 * MOST + 1)
    count, *matrix = _HEADER.unpack_from(data) if len(data) >= _HEADER.size else (0, 0)
    if tuple(matrix) != _MATRIX or len(data) != _HEADER.size + 4 * count:
        raise ValueError(
            f"{path} is no feature of the devkit, or is cut short: expected n, 1, 4, 5 and n "
            f"floats; got {len(data)} bytes that begin {data[: _HEADER.size].hex(' ', 4)}"
        )
    return np.frombuffer(data, "<f4", offset=_HEADER.size)


def write_feature(path: str | Path, vector: Float[np.ndarray, " n"]) -> None:
    """Write one feature, in float32."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.asarray(vector, "<f4")
    path.write_bytes(_HEADER.pack(len(numbers), *_MATRIX) + numbers.tobytes())


class FeatureFiles:
    """The features of a list, each read from its file when it is asked for.

    Args:
        folder: of them all.
        paths: of the pictures, as in the lists.
        algorithm: that made them, as their files are called.

    Raises:
        FileNotFoundError: a picture has none.
    """

    def __init__(self, folder: Path, paths: Sequence[str], algorithm: str) -> None:
        self.files = [f"{folder}/{path}_{algorithm}.bin" for path in paths]
        if missing := [name for name in self.files if not Path(name).is_file()]:
            first = next(folder.rglob("*.bin"), None)
            there = "there are none" if first is None else f"there are such as {first}"
            raise FileNotFoundError(
                f"{len(missing)} of {len(self.files)} features are missing (is "
                f"--megaface.algorithm {algorithm} right? {there}): {listing(missing)}"
            )
        self.shape = (len(self.files), len(read_feature(self.files[0])))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice | Int[np.ndarray, " r"]) -> Float[np.ndarray, "r d"]:
        some = np.arange(len(self.files))[rows]
        found = np.empty((len(some), self.shape[1]), np.float32)
        for row, number in enumerate(some):
            vector = read_feature(self.files[number])
            if len(vector) != self.shape[1]:
                raise ValueError(
                    f"{self.files[number]} has {len(vector)} numbers, and the first feature "
                    f"{self.shape[1]}: features of one algorithm are of one length"
                )
            found[row] = vector
        return found


def write_results(folder: Path, name: str, cmc: list[Any], roc: list[Any]) -> Path:
    """Write the devkit's file of results, for the scripts that draw it.

    Args:
        folder: that is there.
        name: `<algorithm>_<size>_<set>`.
        cmc: ranks from 0, and the rate at each.
        roc: false and true accept rates.
    """
    path = folder / f"cmc_facescrub_megaface_{name}.json"
    with whole_file(path) as file:
        file.write(json.dumps({"cmc": cmc, "roc": roc}).encode())
    return path
