"""insightface's training files, `train.rec` with `train.idx`, in pure Python.

A .rec is a row of records: `u32 magic`, `u32 part << 29 | length`, the payload, zeros up to a
multiple of four. Where a payload holds the magic number at such a multiple it is cut there, and
the number is left out; the parts are joined again here. A picture's payload is a header (`u32
flag`, `f32 label`, two `u64`), `flag` more labels in float32, and the encoded picture. The .idx
holds `key <tab> offset` lines.

Two layouts. insightface's: record 0 holds [N + 1, N + 1 + K] and no picture, 1 to N are pictures
sorted by identity, N + 1 to N + K say which keys are an identity's. Flat ones: every record is a
picture with its label. Labels are float32, whole only up to 2**24: numbers of pictures and the
borders between identities are therefore found by looking, and not taken from labels.

Source: dmlc-core's recordio and MXNet's image recordio, as deepinsight/insightface writes them.
"""

import struct
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from data.archives import MAX_BYTES, DamagedImage, OwnHandle
from data.images import IdentityPictures

MAGIC = 0xCED7230A
_MAGIC = struct.pack("<I", MAGIC)
_HEADER = struct.Struct("<IfQQ")
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
EXACT = 2**24  # float32 holds every whole number up to here


class Record(NamedTuple):
    """One record: its labels, and the encoded picture, if it holds one."""

    labels: tuple[float, ...]
    picture: bytes
    flag: int


class RecordFile:
    """Read records by key; each process opens the file for itself.

    Args:
        path: of the `.rec`. Its `.idx` lies beside it; without one the file is read through once.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the index or the file is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} does not exist: pass insightface's train.rec")
        self._open = OwnHandle(partial(open, self.path, "rb"))
        self.size = self.path.stat().st_size
        index = self.path.with_suffix(".idx")
        self.scanned = not index.exists()
        self.keys, self.offsets = self._scan() if self.scanned else _read_index(index)
        if len(self.keys) and not 0 <= self.offsets.max() < self.size:
            raise ValueError(
                f"{index} names offset {self.offsets.max()}, and {self.path} has {self.size} "
                "bytes: the two do not belong together, or one was cut short"
            )

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

    def labels(self, place: int) -> tuple[float, ...]:
        """Return the labels of a record alone, without reading its picture."""
        file = self._open()
        file.seek(int(self.offsets[place]))
        head = file.read(8 + _HEADER.size)
        if len(head) == 8 + _HEADER.size:
            magic, field, flag = struct.unpack_from("<III", head)
            if magic == MAGIC and field >> 29 == _WHOLE and flag <= 2:
                return unpack(head[8:] + file.read(4 * flag), self.where(place)).labels
        return self.read(place).labels  # in parts, with many labels, or damaged

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

    def _scan(self) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        offsets, offset = [], 0
        while offset < self.size:
            offsets.append(offset)
            _, offset = self._parts(offset, f"{self.path}: record {len(offsets)} at {offset}")
        return np.arange(len(offsets)), np.array(offsets, dtype=np.int64)


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


class IdentityRecords(IdentityPictures):
    """Pictures of an insightface `.rec`, in the order of their keys.

    Identities are called as the labels are, `0000012`.

    Args:
        path: the `.rec`, or the folder that holds `train.rec`.
        identities, size: see `IdentityPictures`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: file or index is damaged, there are no pictures, labels are no whole numbers,
            or an identity asked for is not there.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self._records = RecordFile(path / "train.rec" if path.is_dir() else path)
        self._pictures, classes = _pictures(self._records)
        numbers, labels = np.unique(classes, return_inverse=True)
        return self._records.path, [f"{number:07d}" for number in numbers.tolist()], labels

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""
        return self._records.read(self._place(index)).picture

    def name(self, index: int) -> str:
        """Return `<identity>/<key>` of one picture."""
        key = self._records.keys[self._place(index)]
        return f"{self.identities[self.labels[index]]}/{key:08d}.jpg"

    def where(self, index: int) -> str:
        """Return how errors call one picture."""
        return self._records.where(self._place(index))

    def _place(self, index: int) -> int:
        return int(self._pictures[self._places[index]])


def _pictures(records: RecordFile) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the places of all pictures, and their classes."""
    if not len(records):
        raise ValueError(f"{records.path} holds no records")
    first = records.read(0)
    if records.scanned and first.picture and not records.read(len(records) - 1).picture:
        # insightface writes record 0 last, when it knows what to say.
        records.offsets = np.roll(records.offsets, 1)
        first = records.read(0)
    flat = not first.flag or bool(first.picture)
    if not flat:
        if records.keys[-1] != len(records) - 1:
            raise ValueError(
                f"{records.path} has {len(records)} records, and keys up to {records.keys[-1]}: "
                "the .idx lacks some; remove it to have the .rec read through instead"
            )
        count = _first_without_picture(records) - 1
        if count < len(records) - 1:
            return np.arange(1, count + 1), _sorted_classes(records, count)
    places = np.arange(0 if flat else 1, len(records))
    bar = tqdm(places, desc="labels", unit="record", mininterval=1.0, disable=len(places) < 10**5)
    return places, np.array([_whole(records, place, records.labels(place)[0]) for place in bar])


def _first_without_picture(records: RecordFile) -> int:
    """Return the place after the last picture: pictures come first, then identities."""
    low, high = 1, len(records)
    while low < high:
        middle = (low + high) // 2
        if records.read(middle).picture:
            low = middle + 1
        else:
            high = middle
    return low


def _sorted_classes(records: RecordFile, count: int) -> Int[np.ndarray, " n"]:
    """Return the class of each of `count` pictures, from what the identities' records say."""
    classes = np.empty(count, dtype=np.int64)
    begin, seen = 1, set()
    for place in range(count + 1, len(records)):
        labels = records.labels(place)
        if len(labels) != 2:
            raise ValueError(f"{records.where(place)} should say which keys are an identity's")
        if labels[0] >= labels[1] and labels[1] < EXACT:  # nobody's; above, it may be rounded
            continue
        end = _border(records, begin, labels[1], count)
        number = _whole(records, begin, records.labels(begin)[0])
        if number in seen:
            raise ValueError(f"{records.where(begin)} has label {number}, as pictures before it")
        seen.add(number)
        classes[begin - 1 : end - 1] = number
        begin = end
    if begin != count + 1:
        raise ValueError(
            f"{records.path} has {count} pictures, and its identities have {begin - 1}: the file "
            "was made by something else; convert its pictures from a folder"
        )
    return classes


def _border(records: RecordFile, begin: int, end: float, count: int) -> int:
    """Return the key after an identity's last, of which float32 may have lost the last digits."""
    if end < EXACT:  # which 2**24 + 1 is rounded to
        return int(end)
    spread = int(np.spacing(np.float32(end)))
    own = records.labels(begin)
    for key in range(max(begin + 1, int(end) - spread), min(int(end) + spread, count) + 1):
        if records.labels(key) != own:
            return key
    return count + 1


def _whole(records: RecordFile, place: int, label: float) -> int:
    if not (label == int(label) and 0 <= label < EXACT):
        raise ValueError(
            f"{records.where(place)} has label {label}: a class is a whole number from 0 to 2**24, "
            "above which float32 does not hold every one"
        )
    return int(label)


def _read_index(path: Path) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return keys and offsets, sorted by key."""
    text = path.read_text(encoding="ascii", errors="replace")
    try:
        numbers = np.array(text.split(), dtype=np.int64)
        keys, offsets = numbers.reshape(-1, 2).T
    except ValueError:
        raise ValueError(
            f"{path} must hold a key and an offset a line, whole numbers: make it again, or "
            "remove it to have the .rec read through instead"
        ) from None
    order = np.argsort(keys, kind="stable")
    keys, offsets = keys[order], offsets[order]
    if twice := keys[1:][keys[1:] == keys[:-1]].tolist():
        raise ValueError(f"{path} has key {twice[0]} twice: make it again")
    return keys, offsets
