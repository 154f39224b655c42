"""Parquet and Arrow files from strangers, read in groups of rows with pyarrow.

Both formats hold values alone: no code is run, and no type of an extension is taken. A Parquet file
is read by row groups, whose size is checked before they are unpacked; an Arrow file, which
`save_to_disk` writes, is mapped into memory and its groups checked when they are first seen.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

MAX_GROUP = 2**30  # bytes of a column of a row group once it is unpacked
MAX_ROWS = 2**22  # of a row group: a label takes no byte where all are the same


class TableFile:
    """Columns of one file.

    Args:
        path: of a `.parquet` or `.arrow` file.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with damaged_file(path):
            self._open()

    def _open(self) -> None:
        import pyarrow as pa  # noqa: PLC0415  (only some formats need it)
        from pyarrow import parquet  # noqa: PLC0415

        if int(pa.__version__.partition(".")[0]) < 15:
            raise ModuleNotFoundError  # before 14.0.1 it unpickled what files hold

        self.schema: pa.Schema
        self._parquet = self._batches = None
        if self.path.suffix == ".parquet":
            self._parquet = parquet.ParquetFile(self.path, pre_buffer=False)
            self.schema = self._parquet.schema_arrow
            about = self._parquet.metadata
            self.rows = [about.row_group(i).num_rows for i in range(about.num_row_groups)]
        else:
            self.schema, self._batches = _map_arrow(self.path)
            self.rows = [batch.num_rows for batch in self._batches]
            self._checked: set[tuple[int, str]] = set()
        _decode_names(self.schema)
        if max(self.rows, default=0) > MAX_ROWS:
            raise ValueError(f"a group of {max(self.rows)} rows: at most {MAX_ROWS} are read")

    def size(self, group: int) -> int:
        """Return how many bytes the rows of a group take, as it says, once they are unpacked."""
        if self._batches is not None:
            return self._batches[group].nbytes
        # Of a single column it is known too, but pyarrow 26 ends the process when what describes
        # the column is damaged.
        return self._parquet.metadata.row_group(group).total_byte_size

    def read(self, group: int, column: str) -> "pa.Array":
        """Return one column of a group of rows.

        Raises:
            ValueError: it is damaged or too large.
        """
        with damaged_file(self.path):
            if self._batches is not None:
                found = self._batches[group].column(column)
                if (group, column) not in self._checked:
                    found.validate(full=True)  # offsets that lead out of the file
                    self._checked.add((group, column))
                return found
            return self._unpack(group, column)

    def _unpack(self, group: int, column: str) -> "pa.Array":
        import pyarrow as pa  # noqa: PLC0415

        size = self.size(group)
        if not 0 <= size <= MAX_GROUP:
            raise ValueError(f"group {group} of {size} bytes: at most {MAX_GROUP} are read")
        # A dictionary may hold one large value that every row repeats: so many rows at a time
        # stay below the limit however they are packed.
        step = min(1000, max(1, MAX_GROUP // max(1, size)))
        pieces, unpacked, how = [], 0, {"columns": [column], "use_threads": False}
        for batch in self._parquet.iter_batches(step, [group], **how):
            pieces.append(batch.column(column))
            unpacked += pieces[-1].nbytes
            if unpacked > MAX_GROUP:
                raise ValueError(f"group {group}: more than {MAX_GROUP} bytes once unpacked")
        if sum(map(len, pieces)) != self.rows[group]:
            raise ValueError(f"group {group} has {sum(map(len, pieces))} rows, not as it says")
        found = pa.concat_arrays(pieces)
        found.validate(full=True)  # texts that are no UTF-8
        return found


def _map_arrow(path: Path) -> "tuple[pa.Schema, list[pa.RecordBatch]]":
    """Return what an Arrow file holds, without reading it: `datasets` does not compress it."""
    import pyarrow as pa  # noqa: PLC0415

    before = pa.total_allocated_bytes()
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        reader = (file.get_batch(i) for i in range(file.num_record_batches))
        schema = file.schema
    else:
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        schema = reader.schema
    batches = []
    for batch in reader:
        batches.append(batch)
        if pa.total_allocated_bytes() - before > MAX_GROUP:
            raise ValueError("it is compressed")
    return schema, batches


def _decode_names(fields: "Iterable[pa.Field]") -> None:
    """Find names that are no UTF-8 before they are asked for."""
    for field in fields:
        if field.name and hasattr(field.type, "fields"):
            _decode_names(field.type.fields)


@contextmanager
def damaged_file(path: Path) -> Iterator[None]:
    """Say in one line which file is damaged: pyarrow's errors are of many kinds and lines.

    Raises:
        ValueError: whatever pyarrow found.
    """
    try:
        yield
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{path} needs pyarrow: pip install 'pyarrow>=15'") from None
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{path} is damaged or too large ({reason:.300}): write it again, in smaller groups"
        ) from None
