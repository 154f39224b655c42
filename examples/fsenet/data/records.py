"""insightface's training files, `train.rec` with `train.idx`, in pure Python.

A .rec is a row of records: `u32 magic`, `u32 part << 29 | length`, the payload, zeros up to a
multiple of four. Where a payload holds the magic number at such a multiple it is cut there, and
the number is left out; the parts are joined again here. A picture's payload is a header (`u32
flag`, `f32 label`, two `u64`), `flag` more labels in float32, and the encoded picture. The .idx
holds `key <tab> offset` lines.

Source: dmlc-core's recordio and MXNet's image recordio, as deepinsight/insightface writes them.
"""

import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from data.archives import MAX_BYTES, DamagedImage, OwnHandle, read_regular
from data.damage import Damage

MAGIC = 0xCED7230A
_MAGIC = struct.pack("<I", MAGIC)
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_LARGEST_INDEX = 2**30  # bytes; of 42 million pictures it has 0.9 GB
_BLOCK = 2**20  # bytes searched at a time


class Record(NamedTuple):
    """One record: its labels, and the encoded picture, if it holds one."""

    labels: tuple[float, ...]
    picture: bytes
    flag: int


class Head(NamedTuple):
    """What stands before a picture: labels, how many the header counts, whether one follows."""

    labels: tuple[float, ...]
    flag: int
    pictured: bool


class RecordFile:
    """Read records by key; each process opens the file for itself.

    Args:
        path: of the `.rec`. Its `.idx` lies beside it; without one the file is read through once.
        damage: how many records may be lost, to a cut or, without an index, to bytes between that
            are none; by default none.

    Attributes:
        whole: no record is lost.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the index is damaged, or more of the file than is allowed.
    """

    def __init__(self, path: str | Path, damage: Damage | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist: pass insightface's train.rec")
        self._open = OwnHandle(partial(open, self.path, "rb"))
        self.size = self.path.stat().st_size
        index = self.path.with_suffix(".idx")
        self.scanned = not index.exists()
        self.whole, damage = True, damage or Damage()
        if self.scanned:
            self.keys, self.offsets = self._scan(damage)
        else:
            self.keys, self.offsets = self._drop_beyond(index, damage)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, place: int) -> Record:
        """Return the record at a place of `keys`.

        Raises:
            DamagedImage: it is cut short, or is none; the message has file, key and offset.
        """
        return unpack(self.payload(place), self.where(place))

    def payload(self, place: int) -> bytes:
        """Return the bytes of a record, header included."""
        return b"".join(self._parts(int(self.offsets[place]), self.where(place))[0])

    def head(self, place: int) -> Head:
        """Return what stands before the picture of a record, without reading that.

        Raises:
            DamagedImage: see `read`.
        """
        file = self._open()
        file.seek(int(self.offsets[place]))
        start = file.read(8 + _HEADER.size)
        if len(start) == 8 + _HEADER.size:
            magic, field, flag = struct.unpack_from("<III", start)
            size = field & (2**29 - 1)
            if magic == MAGIC and field >> 29 == _WHOLE and flag <= 2 and size >= _HEADER.size:
                found = unpack(start[8:] + file.read(4 * flag), self.where(place))
                return Head(found.labels, flag, size > _HEADER.size + 4 * flag)
        found = self.read(place)  # in parts, with many labels, or damaged
        return Head(found.labels, found.flag, bool(found.picture))

    def where(self, place: int) -> str:
        """Return how errors call a record."""
        return f"{self.path}: key {self.keys[place]} at offset {self.offsets[place]}"

    def _parts(self, offset: int, where: str) -> tuple[list[bytes], int]:
        """Return the parts of the record at `offset`, with what was left out between, its end."""
        file, parts, length = self._open(), [], 0
        file.seek(offset)
        while True:
            head = file.read(8)
            magic, field = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
            part, size = field >> 29, field & (2**29 - 1)
            length += size
            if magic != MAGIC:
                raise DamagedImage(f"{where} does not begin as a record does")
            if part not in ((_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)):
                raise DamagedImage(f"{where} has its parts in another order")
            if length > MAX_BYTES:
                raise DamagedImage(f"{where} is refused: {length} bytes are more than {MAX_BYTES}")
            data = file.read(size + -size % 4)
            if len(data) < size:
                raise DamagedImage(f"{where} is cut short: {len(data)} of {size} bytes")
            parts += [_MAGIC, data[:size]] if parts else [data[:size]]
            if part in (_WHOLE, _LAST):
                return parts, file.tell()

    def _scan(self, damage: Damage) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        offsets, offset = [], 0
        while offset < self.size:
            where = f"{self.path}: record {len(offsets) + 1} at {offset}"
            try:
                _, end = self._parts(offset, where)
            except DamagedImage as error:
                self.whole = False
                damage.add(error)
                offset = self._next(offset + 4)
            else:
                offsets.append(offset)
                offset = end
        return np.arange(len(offsets)), np.array(offsets, dtype=np.int64)

    def _next(self, offset: int) -> int:
        """Return where the next record begins: no part holds the magic number where one could."""
        file = self._open()
        while offset < self.size:
            file.seek(offset)
            block = file.read(_BLOCK + 4)
            words = np.frombuffer(block[: len(block) // 4 * 4], dtype="<u4")
            begins = (words[:-1] == MAGIC) & (words[1:] >> 29 <= _FIRST)
            if begins.any():
                return offset + 4 * int(begins.argmax())
            offset += _BLOCK
        return self.size

    def _drop_beyond(
        self, index: Path, damage: Damage
    ) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        keys, offsets = _read_index(index)
        beyond = offsets >= self.size
        for key, offset in zip(keys[beyond].tolist(), offsets[beyond].tolist(), strict=True):
            self.whole = False
            damage.add(
                f"{index} has key {key} at offset {offset}, and {self.path} has {self.size} bytes: "
                "the two do not belong together, or one was cut short"
            )
        return keys[~beyond], offsets[~beyond]


def unpack(payload: bytes, where: str = "record") -> Record:
    """Return what a payload holds.

    >>> unpack(pack((7.0,), b"jpeg"))
    Record(labels=(7.0,), picture=b'jpeg', flag=0)

    Raises:
        DamagedImage: it is shorter than its header says.
    """
    if len(payload) < _HEADER.size:
        raise DamagedImage(f"{where} holds {len(payload)} bytes, less than a header")
    flag, label, _, _ = _HEADER.unpack_from(payload)
    end = _HEADER.size + 4 * flag
    if len(payload) < end:
        raise DamagedImage(f"{where} should hold {flag} labels, and has {len(payload)} bytes")
    labels = struct.unpack_from(f"<{flag}f", payload, _HEADER.size) if flag else (label,)
    return Record(labels, payload[end:], flag)


def pack(labels: tuple[float, ...], picture: bytes = b"", key: int = 0) -> bytes:
    """Return the payload of a picture with one label, or of a record with several."""
    if len(labels) == 1:
        return _HEADER.pack(0, labels[0], key, 0) + picture
    header = _HEADER.pack(len(labels), 0.0, key, 0)
    return header + struct.pack(f"<{len(labels)}f", *labels) + picture


class RecordWriter:
    """Write records and their index.

    Args:
        path: of the `.rec`; its `.idx` is written beside it.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = Path(path).open("xb")  # noqa: SIM115  (closed by `close`)
        self._index = Path(path).with_suffix(".idx").open("x")

    def write(self, key: int, payload: bytes) -> None:
        """Append a record, cut where the payload holds the magic number at a multiple of four."""
        self._index.write(f"{key}\t{self._file.tell()}\n")
        words = np.frombuffer(payload[: len(payload) // 4 * 4], dtype="<u4")
        cuts = [4 * int(i) for i in np.flatnonzero(words == MAGIC)]
        begins, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)]
        for number, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            part = _MIDDLE
            if number == 0:
                part = _FIRST if cuts else _WHOLE
            elif number == len(cuts):
                part = _LAST
            length = end - begin
            self._file.write(struct.pack("<II", MAGIC, part << 29 | length))
            self._file.write(payload[begin:end] + bytes(-length % 4))

    def close(self) -> None:
        """Write what is still held."""
        self._file.close()
        self._index.close()

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_index(path: Path) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return keys and offsets, sorted by key."""
    text = read_regular(path, _LARGEST_INDEX).decode("ascii", errors="replace")
    try:
        numbers = np.array(text.split(), dtype=np.int64)
        keys, offsets = numbers.reshape(-1, 2).T
        if (numbers < 0).any():
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(
            f"{path} must hold a key and an offset a line, whole numbers below 2**63: make it "
            "again, or remove it to have the .rec read through instead"
        ) from None
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    if twice := keys[1:][keys[1:] == keys[:-1]].tolist():
        raise ValueError(f"{path} has key {twice[0]} twice: make it again")
    return keys, offsets
