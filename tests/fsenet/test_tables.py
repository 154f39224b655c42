"""Parquet and Arrow files: against `datasets`, and all that a stranger's may hold."""

import json
import multiprocessing
import pickle
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from data import table_files, tables
from data.archives import DamagedImage
from data.batches import BatchPlan, StepSampler, generator, load_batches, shuffled
from data.damage import Damage
from data.images import Pieces
from data.pictures import open_pictures
from data.tables import IdentityTable, write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

pa = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

PEOPLE = ("Ann", "Bob", "Cid")
PICTURES = [(f"{PEOPLE[i % 3]}/{i}.png", bytes([i, 255]) * 40) for i in range(20)]
IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 4)


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return pytest.importorskip("datasets")


def found(pictures):
    return [
        (pictures.name(i), pictures.identities[label], pictures.read(i))
        for i, label in enumerate(pictures.labels)
    ]


EXPECTED = [(name, name.split("/")[0], data) for name, data in PICTURES]


def write(path, owners, images=None, column="label", about=None):
    """Write a file with pyarrow as it comes."""
    images = images or [{"bytes": b"x", "path": None}] * len(owners)
    table = pa.table({"image": pa.array(images, IMAGE), column: owners})
    if about is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    parquet.write_table(table, path)
    return path


def test_example(tmp_path, small_groups):
    write_table(tmp_path / "a.parquet", PICTURES, PEOPLE)
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 5
    pictures = open_pictures(tmp_path / "a.parquet")
    assert isinstance(pictures, IdentityTable)
    assert found(pictures) == EXPECTED
    assert pictures.where(9) == f"{tmp_path}/a.parquet: row 9"
    assert pictures.pieces.number.tolist() == [i // 4 for i in range(20)]
    few = pictures.keep({"Cid", "Bob"})
    assert found(few) == [row for row in EXPECTED if row[1] != "Ann"]
    assert few.pieces.number.tolist() == [i // 4 for i in range(20) if i % 3]
    assert found(pickle.loads(pickle.dumps(few))) == found(few)
    queue = multiprocessing.get_context("fork").Queue()
    worker = multiprocessing.get_context("fork").Process(target=lambda: queue.put(found(few)))
    worker.start()
    assert queue.get(timeout=60) == found(few)
    worker.join()


def test_datasets_reads_ours(tmp_path, datasets, small_groups):
    write_table(tmp_path / "a.parquet", PICTURES, PEOPLE)
    table = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"), cache_dir=tmp_path / "c")
    assert table.features["label"].names == list(PEOPLE)
    assert isinstance(table.features["image"], datasets.Image)
    table = table.cast_column("image", datasets.Image(decode=False))
    assert [
        (
            table.features["label"].int2str(row["label"]) + "/" + row["image"]["path"],
            row["image"]["bytes"],
        )
        for row in table
    ] == PICTURES


@pytest.mark.parametrize("kind", ["names", "texts", "numbers"])
def test_ours_reads_datasets(tmp_path, datasets, kind):
    """As Parquet, and as `save_to_disk` leaves it in two files."""
    owner = {
        "names": datasets.ClassLabel(names=list(PEOPLE)),
        "texts": datasets.Value("string"),
        "numbers": datasets.Value("int64"),
    }[kind]
    values = [name.split("/")[0] for name, _ in PICTURES]
    if kind != "texts":
        values = [PEOPLE.index(name) for name in values]
    images = [{"bytes": data, "path": f"/home/{name}"} for name, data in PICTURES]
    table = datasets.Dataset.from_dict(
        {"image": images, "label": values, "score": [0.5] * 20},
        datasets.Features(
            {"image": datasets.Image(), "label": owner, "score": datasets.Value("float32")}
        ),
    )
    table.to_parquet(str(tmp_path / "a-00000-of-00001.parquet"), batch_size=7)
    table.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    expected = EXPECTED
    if kind == "numbers":
        numbers = [f"{value:07d}" for value in values]
        expected = [
            (f"{number}/{name.split('/')[1]}", number, data)
            for number, (name, data) in zip(numbers, PICTURES, strict=True)
        ]
    assert found(open_pictures(tmp_path / "a-00000-of-00001.parquet")) == expected
    assert found(open_pictures(tmp_path / "a-{00000..00000}-of-00001.parquet")) == expected
    saved = open_pictures(tmp_path / "saved")
    assert saved.pieces is None
    assert found(saved) == expected
    assert found(open_pictures(tmp_path / "saved/data-00001-of-00002.arrow")) == expected[10:]


def test_other_columns(tmp_path):
    """Texts in a dictionary, bytes without a path, Arrow's other layout, owners with two names."""
    people = pa.array(["Bob", "Ann", "Bob"]).dictionary_encode()
    table = pa.table({"id": [1, 2, 3], "photo": [b"1", b"2", b"3"], "identity": people})
    table = table.append_column("label", pa.array([[], [], []], pa.list_(pa.int8())))
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, 2)
    for name in ("a.parquet", "a.arrow"):
        assert found(open_pictures(tmp_path / name)) == [
            ("Bob/00000000.jpg", "Bob", b"1"),
            ("Ann/00000001.jpg", "Ann", b"2"),
            ("Bob/00000002.jpg", "Bob", b"3"),
        ]


def test_refused_columns(tmp_path):
    path = tmp_path / "a.parquet"
    cases = {
        "has the columns image, person: expected": {"image": [b""], "person": [1]},
        "has the columns a, b, label: expected one of p": {"a": [b""], "b": [b""], "label": [1]},
        "has the columns image, label: expected one": {"image": ["a.png"], "label": [1]},
        "column 'label' holds double: expected whole": {"image": [b""], "label": [0.5]},
        "column 'label' holds bool: expected whole": {"image": [b""], "label": [True]},
        "column 'label' holds binary: expected whole": {"image": [b""], "label": [b"Ann"]},
        "holds no pictures with a label": {"image": pa.array([], pa.binary()), "label": [][:0]},
    }
    for message, columns in cases.items():
        schema = None
        if message.startswith("holds no"):
            schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
        parquet.write_table(pa.table(columns, schema=schema), path)
        with pytest.raises(ValueError, match=message):
            IdentityTable(path)
    names = {"info": {"features": {"label": {"names": ["A", "A"]}}}}
    with pytest.raises(ValueError, match="the names of column 'label' are no list, or not unique"):
        IdentityTable(write(path, [0, 1], about=names))


class Evil:
    def __reduce__(self):
        return pytest.fail, ("code of a file was run",)


def test_extensions_and_pickles(tmp_path):
    """Types of extensions are no pictures or owners, and pickled bytes stay bytes."""
    evil = pickle.dumps(Evil())
    field = pa.field(
        "image",
        IMAGE,
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": evil,
        },
    )
    schema = pa.schema([field, ("label", pa.int64())], {"pandas": evil, "huggingface": evil})
    table = pa.table([[{"bytes": evil, "path": "x.jpg"}], [3]], schema=schema)
    parquet.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        pictures = IdentityTable(tmp_path / name)
        assert found(pictures) == [("0000003/x.jpg", "0000003", evil)]
        with pytest.raises(DamagedImage, match="is no picture of"):
            pictures.load(0)
    uuid = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)], pa.binary(16)))
    parquet.write_table(pa.table({"image": uuid, "label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="has the columns image, label: expected one of pictures"):
        IdentityTable(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("owners", "names"),
    [
        ([0, -1], None),
        ([0, None], None),
        ([0, 2], ["A", "B"]),
        ([0, 1], ["A", "../B"]),
        ([0, 1], ["A", 7]),
        (["A", "/etc"], None),
        (["A", ""], None),
    ],
)
def test_damaged_labels(tmp_path, capsys, owners, names):
    about = {"info": {"features": {"label": {"names": names}}}} if names else None
    path = write(tmp_path / "a.parquet", owners, about=about)
    message = f"{path}: row 1 has the label {owners[1]!r}"
    with pytest.raises(ValueError, match="; that makes 1 damaged, and 0 allowed") as error:
        IdentityTable(path)
    assert str(error.value).startswith(message)
    assert len(IdentityTable(path, damage=Damage(1))) == 1
    assert f"left out: {message}" in capsys.readouterr().err


def test_damaged_pictures(tmp_path, monkeypatch):
    images = [{"bytes": None, "path": "/etc/passwd.png"}, None, {"bytes": b"12345", "path": "a/b"}]
    pictures = IdentityTable(write(tmp_path / "a.parquet", [0, 0, 0], images))
    for row in (0, 1):
        with pytest.raises(DamagedImage, match=f"row {row} holds no bytes: files outside are not"):
            pictures.read(row)
    assert pictures.paths == ("0000000/passwd.png", "0000000/00000001.jpg", "0000000/00000002.jpg")
    monkeypatch.setattr(tables, "MAX_BYTES", 4)
    with pytest.raises(DamagedImage, match="row 2 is refused: 5 bytes are too many"):
        pictures.read(2)


def test_bombs(tmp_path, monkeypatch):
    """A dictionary repeats one value, an encoding one label; neither fills the memory."""
    monkeypatch.setattr(table_files, "MAX_GROUP", 10**6)
    before = pa.total_allocated_bytes()
    big = {"bytes": bytes(400_000), "path": None}
    path = write(tmp_path / "a.parquet", [0] * 1000, [big] * 1000)  # 400 MB of pictures
    assert path.stat().st_size < 20_000
    pictures = IdentityTable(path)
    with pytest.raises(DamagedImage, match="group 0: more than 1000000 bytes once unpacked"):
        pictures.read(0)
    write(path, [0] * 3, [{"bytes": bytes(10**6), "path": str(i)} for i in range(3)])
    monkeypatch.setattr(table_files, "MAX_GROUP", 10**5)
    with pytest.raises(ValueError, match=r"group 0 of \d+ bytes: at most 100000 are read"):
        IdentityTable(path)
    monkeypatch.setattr(table_files, "MAX_ROWS", 999)
    with pytest.raises(ValueError, match="a group of 1000 rows: at most 999 are read"):
        IdentityTable(write(path, [0] * 1000))
    assert pa.total_allocated_bytes() - before < 10**7


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_files(tmp_path, kind, small_groups):
    """Cut short anywhere, or with other bytes: an error of one line, or pictures, and no crash."""
    path = tmp_path / f"a.{kind}"
    write_table(tmp_path / "a.parquet", PICTURES, PEOPLE)
    if kind == "arrow":
        table = parquet.read_table(tmp_path / "a.parquet")
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    whole, rng, errors = path.read_bytes(), np.random.default_rng(0), []
    cases = [whole[:length] for length in range(0, len(whole) - 8, len(whole) // 60)]
    for _ in range(200):
        changed = bytearray(whole)
        for place in rng.integers(0, len(whole), 3).tolist():
            changed[place] = rng.integers(0, 256)
        cases.append(bytes(changed))
    for data in cases:
        path.write_bytes(data)
        try:
            found(IdentityTable(path, damage=Damage(20)))
        except (ValueError, DamagedImage) as error:
            errors.append(str(error))
            assert data is not whole
    assert len(errors) > 60
    assert [text for text in errors if "\n" in text or str(path) not in text] == []


def test_not_installed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [0])
    monkeypatch.setattr(pa, "__version__", "14.0.0")  # which runs what a file has pickled
    with pytest.raises(ModuleNotFoundError, match="needs pyarrow: pip install 'pyarrow>=15'"):
        open_pictures(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for task in (
        lambda: open_pictures(path),
        lambda: write_table(tmp_path / "b.parquet", PICTURES, PEOPLE),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"parquet needs pyarrow: pip install"):
            task()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(1, 4), st.integers(0, 9))
def test_shuffled_pieces(pieces, together, seed):
    """Every picture once; pieces come in windows, and leave the order of their file."""
    number = np.array(pieces) * 7
    order = shuffled(len(pieces), generator(seed), Pieces(number, together)).tolist()
    assert sorted(order) == list(range(len(pieces)))
    seen = [pieces[i] for i in order]
    open_pieces, closed = [], set()
    for piece in seen:
        assert piece not in closed
        if piece not in open_pieces:
            if len(open_pieces) == together:
                closed |= set(open_pieces)
                open_pieces = []
            open_pieces.append(piece)
    assert shuffled(len(pieces), generator(seed), Pieces(number, together)).tolist() == order


def test_each_group_is_read_once(tmp_path, small_groups, monkeypatch):
    """An epoch reads every row group once, and batches of one seed differ from those of others."""
    pictures = [(f"{PEOPLE[i % 3]}/{i}.png", bytes(1000)) for i in range(80)]
    write_table(tmp_path / "a.parquet", pictures, PEOPLE)
    monkeypatch.setattr(tables, "_KEPT", 17_000)  # four groups, and a bit for their offsets
    table, reads = IdentityTable(tmp_path / "a.parquet"), []
    read = table_files.TableFile.read
    monkeypatch.setattr(table_files.TableFile, "read", lambda *a: reads.append(a[1:]) or read(*a))
    assert table.pieces.together == 4
    steps = [*StepSampler(80, BatchPlan(8, 20, seed=0), pieces=table.pieces)]
    for batch in steps[:10]:
        for index in batch:
            table.read(index)
    assert len(set(reads)) == 20
    assert len(reads) <= 24  # where two windows meet in a batch, some are read again
    again = [*StepSampler(80, BatchPlan(8, 20, seed=0), first=13, pieces=table.pieces)]
    assert again == steps[13:]
    assert sorted(chain(*steps[10:])) == list(range(80))
    assert steps[:10] != steps[10:]
    windows = [{table.pieces.number[i] for i in chain(*steps[k : k + 2])} for k in (0, 2)]
    assert all(len(window) == 4 for window in windows)
    assert torch.tensor(steps[0]).diff().unique().numel() > 3


def test_batches_follow_pieces():
    """What a data set says of its pieces reaches the order of its batches."""
    data, plan = TensorDataset(torch.arange(40)), BatchPlan(8, 5, seed=0)
    data.pieces = Pieces(np.arange(40) // 4, 2)
    seen = [batch.tolist() for _, (batch,) in load_batches(data, plan, 0)]
    assert seen == [*StepSampler(40, plan, pieces=data.pieces)]
    assert seen != [*StepSampler(40, plan)]


@pytest.mark.parametrize("column", ["label", "image"])
def test_a_damaged_row_group(tmp_path, small_groups, column):
    """Its rows are lost, named and counted, and no others."""
    path = tmp_path / "a.parquet"
    write_table(path, PICTURES, PEOPLE)
    about = parquet.ParquetFile(path).metadata.row_group(1)
    (chunk,) = [
        about.column(i)
        for i in range(about.num_columns)
        if about.column(i).path_in_schema in (column, f"{column}.bytes")
    ]
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    pictures, rows = IdentityTable(path, damage=Damage(4)), []
    for index in range(len(pictures)):
        try:
            rows.append((pictures.identities[pictures.labels[index]], pictures.read(index)))
        except DamagedImage as error:
            pictures.damage.add(error)
    assert rows == [row[1:] for i, row in enumerate(EXPECTED) if i // 4 != 1]
    assert pictures.damage.count == 4
    if column == "label":
        with pytest.raises(ValueError, match=r"a.parquet: row 4 is lost: .*makes 1 damaged, and 0"):
            IdentityTable(path)


def test_names_are_parsed_once_a_file(tmp_path, small_groups, monkeypatch):
    for name in ("a.parquet", "b.parquet"):
        write_table(tmp_path / name, PICTURES, PEOPLE)
    parsed = []
    names = tables._class_names
    monkeypatch.setattr(tables, "_class_names", lambda f, c: parsed.append(f.path) or names(f, c))
    assert len(IdentityTable(tmp_path)) == 40
    assert parsed == [tmp_path / "a.parquet", tmp_path / "b.parquet"]
