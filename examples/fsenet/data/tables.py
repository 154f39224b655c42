"""Parquet and Arrow files as Hugging Face's `datasets` writes them, read with pyarrow alone.

A column of pictures, `struct<bytes, path>` or binary, beside a column "identity" or "label": whole
numbers, whose names may lie in the metadata (`ClassLabel`), or texts. No script of a data set is
run, and no picture that lies outside of the file is read.

Source: `datasets`' features Image and ClassLabel, and their metadata under "huggingface".
"""

import json
from array import array
from collections import OrderedDict
from collections.abc import Collection, Iterable
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

from data.archives import MAX_BYTES, DamagedImage, OwnHandle, is_plain
from data.file_sets import files_of, suffixes_in
from data.images import IdentityPictures, Pieces, is_image
from data.table_files import TableFile, damaged_file

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".arrow")
_OWNERS = ("identity", "label")
_PICTURES = "image"
_ROWS = 1000  # of a row group that is written
_KEPT = 2**27  # bytes of row groups in memory, of every process that reads


class IdentityTable(IdentityPictures):
    """Pictures of Parquet or Arrow files, in the order of their rows.

    Identities without names are called as their numbers are, `0000012`.

    Args:
        path: a `.parquet` or `.arrow` file, a folder of them, `a-{00000..00009}.parquet` or
            `a-%05d.parquet`.
        identities, size, damage: see `IdentityPictures`. What counts as damaged: rows without a
            label, or with one that is no name and has none, or that cannot be read.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: a file is damaged or has other columns, there are no pictures, more are damaged
            than allowed, or an identity asked for is not there.
    """

    def _open(self, path: Path) -> tuple[Path, list[str], Int[np.ndarray, " n"]]:
        arrow = path.suffix == ".arrow" or suffixes_in(path, [".arrow"])
        suffix = ".arrow" if arrow else ".parquet"
        self._groups = OwnHandle(partial(_Groups, files_of(path, suffix)))
        groups: _Groups = self._groups()
        people: dict[str, int] = {}
        found, owners = array("q"), array("q")
        for group, names in enumerate(groups.owners()):
            for row, (problem, name) in enumerate(names):
                if name is None:
                    self.damage.add(f"{groups.where(group, row)} {problem}")
                    continue
                found.extend((group, row))
                owners.append(people.setdefault(name, len(people)))
        if not owners:
            raise ValueError(f"{path} holds no pictures with a label")
        self._found = np.array(found).reshape(-1, 2)
        names = sorted(people)
        rank = np.argsort([people[name] for name in names])
        return path, names, rank[np.array(owners)]

    @property
    def pieces(self) -> Pieces | None:
        """The row groups, which are read as a whole; rows of an Arrow file are read alone."""
        groups: _Groups = self._groups()
        return groups.pieces(self._found[self._places, 0])

    def read(self, index: int) -> bytes:
        """Return the encoded bytes of one picture.

        Raises:
            DamagedImage: it cannot be read, or is too large.
        """
        value = self._value(index, "bytes")
        where = self.where(index)
        if not value.is_valid:
            raise DamagedImage(f"{where} holds no bytes: files outside are not read")
        if value.as_buffer().size > MAX_BYTES:
            raise DamagedImage(f"{where} is refused: {value.as_buffer().size} bytes are too many")
        return value.as_py()

    def name(self, index: int) -> str:
        """Return `<identity>/<image>` of one picture."""
        path = self._value(index, "path")
        path = None if path is None else path.as_py()
        name = path.split("/")[-1] if isinstance(path, str) else ""
        if not (is_plain(name) and is_image(name)):
            name = f"{self._places[index]:08d}.jpg"
        return f"{self.identities[self.labels[index]]}/{name}"

    def where(self, index: int) -> str:
        """Return where one picture lies, as errors call it."""
        return self._groups().where(*self._found[self._places[index]].tolist())

    def _value(self, index: int, field: str) -> Any:
        group, row = self._found[self._places[index]].tolist()
        try:
            return self._groups().picture(group, row, field)
        except ValueError as error:
            raise DamagedImage(f"{self.where(index)}: {error}") from None


class _Groups:
    """The row groups of a row of files, some of them in memory; each process has its own."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [TableFile(file) for file in files]
        self._columns = [_columns(file.path, file.schema) for file in self.files]
        self._place = [
            (i, j) for i, file in enumerate(self.files) for j, rows in enumerate(file.rows) if rows
        ]
        self._held: OrderedDict[int, pa.Array] = OrderedDict()

    def where(self, group: int, row: int) -> str:
        """Return how errors call a row, by its number in its file."""
        number, own = self._place[group]
        file = self.files[number]
        return f"{file.path}: row {sum(file.rows[:own]) + row}"

    def owners(self) -> Iterable[list[tuple[str, str | None]]]:
        """Yield, a group at a time, of each row the name of its owner, or what is wrong, and None.

        Raises:
            ValueError: the names of a `ClassLabel` are none.
        """
        for number, of_file in groupby(self._place, key=itemgetter(0)):
            file, (_, column) = self.files[number], self._columns[number]
            names = _class_names(file, column)
            for _, group in of_file:
                try:
                    values = file.read(group, column).to_pylist()
                except ValueError as error:
                    yield [(f"is lost: {error}", None)] * file.rows[group]
                else:
                    yield [(f"has the label {x!r:.40}", _owner(x, names)) for x in values]

    def picture(self, group: int, row: int, field: str) -> Any:
        """Return a field of a picture; of a column of bytes there is no "path"."""
        if group not in self._held:
            number, own = self._place[group]
            self._held[group] = self.files[number].read(own, self._columns[number][0])
            while len(self._held) > 1 and sum(x.nbytes for x in self._held.values()) > _KEPT:
                self._held.popitem(last=False)
        self._held.move_to_end(group)
        held = self._held[group]
        names = [own.name for own in held.type] if held.type.num_fields else ["bytes"]
        if field not in names:
            return None
        return held.field(field)[row] if held.type.num_fields else held[row]

    def pieces(self, groups: Int[np.ndarray, " n"]) -> Pieces | None:
        """Return which pictures are read together, and how many groups memory holds."""
        if self.files[0].path.suffix == ".arrow":
            return None
        sizes = [self.files[i].size(j) for i, j in islice(self._place, 0, 1000)]
        return Pieces(groups, max(1, int(_KEPT / max(1, np.mean(sizes)))))


def write_table(
    target: Path, pictures: Iterable[tuple[str, bytes]], identities: Collection[str]
) -> None:
    """Write a Parquet file that `datasets` opens with its features Image and ClassLabel.

    Args:
        target: the `.parquet`.
        pictures: `<identity>/<image>` and the encoded picture; shuffled, as its row groups are
            what readers shuffle.
        identities: of all pictures, in the order of their labels.
    """
    with damaged_file(target):  # which says when pyarrow is not there
        import pyarrow as pa  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    label = {"names": list(identities), "_type": "ClassLabel"}
    about = {"info": {"features": {_PICTURES: {"_type": "Image"}, "label": label}}}
    schema = pa.schema({_PICTURES: image, "label": pa.int64()}, {"huggingface": json.dumps(about)})
    number = {name: label for label, name in enumerate(identities)}
    rows = iter(pictures)
    how = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    with target.open("xb") as file, parquet.ParquetWriter(file, schema, **how) as writer:
        while group := [*islice(rows, _ROWS)]:
            images = [{"bytes": data, "path": name.split("/")[1]} for name, data in group]
            labels = [number[name.split("/")[0]] for name, _ in group]
            writer.write_table(pa.table([images, labels], schema=schema), row_group_size=_ROWS)


def _columns(path: Path, schema: "pa.Schema") -> tuple[str, str]:
    """Return which columns hold pictures and their owners."""
    import pyarrow as pa  # noqa: PLC0415

    def holds_bytes(kind: pa.DataType) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    def holds_pictures(kind: pa.DataType) -> bool:
        if not pa.types.is_struct(kind):
            return holds_bytes(kind)
        fields = {field.name: field.type for field in kind}
        return holds_bytes(fields.get("bytes", kind))

    pictures = [field.name for field in schema if holds_pictures(field.type)]
    if _PICTURES in pictures:
        pictures = [_PICTURES]
    owner = next((name for name in _OWNERS if name in schema.names), None)
    if len(pictures) != 1 or owner is None:
        raise ValueError(
            f"{path} has the columns {', '.join(schema.names)}: expected one of pictures, "
            f'"{_PICTURES}", and one of owners, {" or ".join(map(repr, _OWNERS))}'
        )
    kind = schema.field(owner).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    if not any(is_kind(value) for is_kind in kinds):
        raise ValueError(f"{path}: column {owner!r} holds {kind}: expected whole numbers or texts")
    return pictures[0], owner


def _class_names(file: TableFile, column: str) -> list[Any] | None:
    """Return the names of a `ClassLabel`, which `datasets` keeps in the metadata."""
    try:
        about = json.loads((file.schema.metadata or {})[b"huggingface"])
        names = about["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or len(set(map(str, names))) < len(names):
        raise ValueError(f"{file.path}: the names of column {column!r} are no list, or not unique")
    return names


def _owner(value: Any, names: list[Any] | None) -> str | None:
    """Return what an identity is called, or None where that is no name."""
    if isinstance(value, int):
        if value < 0 or (names is not None and value >= len(names)):
            return None
        value = f"{value:07d}" if names is None else names[value]
    return value if isinstance(value, str) and is_plain(value) else None
