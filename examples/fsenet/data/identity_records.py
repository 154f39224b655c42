"""Pictures of people in insightface's `.rec`, of both layouts.

insightface's own: record 0 holds [N + 1, N + 1 + K] and no picture, 1 to N are pictures sorted by
identity, N + 1 to N + K say which keys are an identity's. Flat ones: every record is a picture
with its label. Labels are float32, whole only up to 2**24: numbers of pictures and the borders
between identities are therefore found by looking, and not taken from labels. Where records are
damaged, the label of every picture is read instead of the identities' records.

Source: MXNet's image recordio, as deepinsight/insightface writes it.
"""

import sys
from array import array
from contextlib import suppress
from pathlib import Path

import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from data.archives import DamagedImage
from data.damage import Damage
from data.images import IdentityPictures
from data.record_layouts import read_property
from data.record_names import names_beside
from data.records import RecordFile

EXACT = 2**24  # float32 holds every whole number up to here
_OTHER = "the file was made by something else; convert its pictures from a folder"


class IdentityRecords(IdentityPictures):
    """Pictures of an insightface `.rec`, in the order of their keys.

    They are called as the list beside the file says, see `record_names.py`; without one, identities
    as the labels are, `0000012`, and pictures as their keys.

    Args:
        path: the `.rec`, or the folder that holds `train.rec`.
        identities, size, damage: see `IdentityPictures`. What counts as damaged: records that do
            not begin as such, and those that an index names beyond the end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the index or `property` is damaged, or more of the file than is allowed, there
            are no pictures, labels are no whole numbers or not those of the file's identities, or
            an identity asked for is not there.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        self._records = RecordFile(path / "train.rec" if path.is_dir() else path, self.damage)
        self._pictures, classes = _pictures(self._records, self.damage)
        keys = self._records.keys[self._pictures]
        self._listed = names_beside(self._records.path, keys, classes)
        numbers, labels = np.unique(classes, return_inverse=True)
        said = read_property(self._records.path)
        if said is not None and said[0] != len(numbers):
            print(
                f"warning: {self._records.path.with_name('property')} says {said[0]} identities, "
                f"and {self._records.path.name} holds {len(numbers)}",
                file=sys.stderr,
            )
        if self._listed is None:
            return self._records.path, [f"{number:07d}" for number in numbers.tolist()], labels
        people, order = np.unique(
            [self._listed.people[number] for number in numbers.tolist()], return_inverse=True
        )
        return self._records.path, people.tolist(), order[labels]

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture."""
        return self._records.read(self._place(index)).picture

    def name(self, index: int) -> str:
        """Return `<identity>/<image>` of one picture, or `<identity>/<key>`."""
        owner = self.identities[self.labels[index]]
        if self._listed is not None:
            return f"{owner}/{self._listed.image(self._places[index])}"
        return f"{owner}/{self._records.keys[self._place(index)]:08d}.jpg"

    def where(self, index: int) -> str:
        """Return how errors call one picture."""
        return self._records.where(self._place(index))

    def _place(self, index: int) -> int:
        return int(self._pictures[self._places[index]])


def _pictures(
    records: RecordFile, damage: Damage
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the places of all pictures, and their classes."""
    found = None
    if records.whole and len(records):
        with suppress(DamagedImage):  # what the identities' records say, the pictures say too
            found = _sorted_pictures(records)
    places, classes = found or _labelled_pictures(records, damage)
    if not len(places):
        raise ValueError(f"{records.path} holds no records of pictures")
    return places, classes


def _sorted_pictures(
    records: RecordFile,
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]] | None:
    """Return what insightface's layout holds; None of another, or without identities' records.

    Raises:
        DamagedImage: a record that would tell is damaged.
    """
    first, last = records.head(0), records.head(len(records) - 1)
    if records.scanned and first.pictured and last.flag and not last.pictured:
        # insightface writes record 0 last, when it knows what to say.
        records.offsets = np.roll(records.offsets, 1)
        first = last
    if first.pictured or not first.flag:
        return None
    if records.keys[-1] != len(records) - 1:
        raise ValueError(
            f"{records.path} has {len(records)} records, and keys up to {records.keys[-1]}: "
            "the .idx lacks some; remove it to have the .rec read through instead"
        )
    count = _first_without_picture(records) - 1
    if count == len(records) - 1:
        return None
    return np.arange(1, count + 1), _sorted_classes(records, count)


def _labelled_pictures(
    records: RecordFile, damage: Damage
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return the pictures by their own labels, without records that are damaged."""
    places, classes = array("q"), array("q")
    few = len(records) < 10**5
    for place in tqdm(
        range(len(records)), desc="labels", unit="record", mininterval=1.0, disable=few
    ):
        try:
            head = records.head(place)
        except DamagedImage as error:
            damage.add(error)
            continue
        if head.flag != 2 or head.pictured:  # else it tells of others
            places.append(place)
            classes.append(_whole(records, place, head.labels[0]))
    return np.array(places, dtype=np.int64), np.array(classes, dtype=np.int64)


def _first_without_picture(records: RecordFile) -> int:
    """Return the place after the last picture: pictures come first, then identities."""
    low, high = 1, len(records)
    while low < high:
        middle = (low + high) // 2
        if records.head(middle).pictured:
            low = middle + 1
        else:
            high = middle
    return low


def _sorted_classes(records: RecordFile, count: int) -> Int[np.ndarray, " n"]:
    """Return the class of each of `count` pictures, from what the identities' records say."""
    classes = np.empty(count, dtype=np.int64)
    begin, seen = 1, set()
    for place in range(count + 1, len(records)):
        labels = records.head(place).labels
        if len(labels) != 2 or not all(map(float.is_integer, labels)):
            raise ValueError(f"{records.where(place)} should say which keys are an identity's")
        first, after = labels
        if first >= after and after < EXACT:  # nobody's; above, it may be rounded
            continue
        if begin > count or (first < EXACT and first != begin):
            raise ValueError(
                f"{records.where(place)} gives an identity keys from {first:.0f}, where those "
                f"before it end at {begin - 1} of {count}: {_OTHER}"
            )
        end = _border(records, begin, after, count)
        number = _whole(records, begin, records.head(begin).labels[0])
        last = records.head(min(end - 1, count)).labels[0]
        if end > count + 1 or last != number:
            raise ValueError(
                f"{records.where(place)} gives identity {number} keys {begin} to {end - 1} of "
                f"{count}, of which the last has label {last:.9g}: {_OTHER}"
            )
        if number in seen:
            raise ValueError(f"{records.where(begin)} has label {number}, as pictures before it")
        seen.add(number)
        classes[begin - 1 : end - 1] = number
        begin = end
    if begin != count + 1:
        raise ValueError(
            f"{records.path} has {count} pictures, and its identities have {begin - 1}: {_OTHER}"
        )
    return classes


def _border(records: RecordFile, begin: int, end: float, count: int) -> int:
    """Return the key after an identity's last, of which float32 may have lost the last digits."""
    if end < EXACT:  # which 2**24 + 1 is rounded to
        return int(end)
    spread = int(np.spacing(np.float32(end)))
    own = records.head(begin).labels
    for key in range(max(begin + 1, int(end) - spread), min(int(end) + spread, count) + 1):
        if records.head(key).labels != own:
            return key
    return count + 1


def _whole(records: RecordFile, place: int, label: float) -> int:
    if not (label.is_integer() and 0 <= label < EXACT):
        raise ValueError(
            f"{records.where(place)} has label {label}: a class is a whole number from 0 to 2**24, "
            "above which float32 does not hold every one"
        )
    return int(label)
