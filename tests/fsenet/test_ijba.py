"""IJB-A against loops over splits, templates and pairs, in the layout it was given out in."""

import json

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from protocols.fixtures import write_ijba
from protocols.ijba import EMPTY, FARS, FPIRS, Faces, IjbaProtocol, Split


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ijba")
    names, features = write_ijba(folder)
    np.savez(folder / "features.npz", names=np.array(names), embeddings=features)
    return folder, dict(zip(names, features.astype(float), strict=True))


def by_loops(faces, features, pooling, unit):
    """The vector of each template, None for an empty one, and whom each shows."""
    vectors, who, missing = {}, {}, 0
    for template in sorted(set(faces.templates.tolist())):
        media = {}
        for t, subject, file, medium, sighting in zip(*faces, strict=True):
            if t != template:
                continue
            who[template] = subject
            vector = features.get(file, features.get(f"{file}#{sighting}"))
            if vector is None:
                missing += 1
                continue
            vector = vector / np.linalg.norm(vector) if unit else vector
            media.setdefault(medium if pooling == "media" else 0, []).append(vector)
        total = sum(np.mean(vectors, 0) for vectors in media.values())
        vectors[template] = total / np.linalg.norm(total) if media else None
    return vectors, who, missing


def score(a, b):
    return EMPTY if a is None or b is None else a @ b


@pytest.mark.parametrize(("pooling", "unit"), [("faces", False), ("media", True)])
def test_reference(world, capsys, pooling, unit):
    folder, features = world
    arguments = Arguments(
        folder / "features.npz", "ijba", folder, pooling=pooling, unit_features=unit
    )
    evaluate.main(arguments)
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["protocol"]["list_sha256"]) == 40
    assert printed["protocol"]["template"].startswith(f"mean of its {pooling}")
    found = printed["arms"]["embeddings"]
    assert list(found["splits"]) == [str(n) for n in range(1, 11)]
    empties = 0
    for n, split in IjbaProtocol.read(folder).splits.items():
        vectors, who, lost = by_loops(split.faces, features, pooling, unit)
        genuine, impostors = [], []
        for a, b in zip(split.first.tolist(), split.second.tolist(), strict=True):
            same = who[a] == who[b]
            (genuine if same else impostors).append(score(vectors[a], vectors[b]))
        genuine, impostors = np.array(genuine), np.sort(impostors)[::-1]
        numbers = found["splits"][str(n)]
        for far in FARS:
            strict = np.mean(genuine > impostors[int(far * len(impostors))])
            place = round(far * len(impostors))
            level = impostors[place - 1] if place else impostors[0] + 1e-8
            assert numbers["tar_at_far"]["strict"][str(far)] == pytest.approx(strict)
            parity = numbers["tar_at_far"]["parity"][str(far)]
            assert parity == pytest.approx(np.mean(genuine >= level))
        gallery, enrolled, no_entry = by_loops(split.gallery, features, pooling, unit)
        probes, wanted, no_probe = by_loops(split.probes, features, pooling, unit)
        strangers, tops, hits = [], [], []
        for template, probe in probes.items():
            row = {g: score(probe, x) for g, x in gallery.items()}
            mates = [row[g] for g in row if enrolled[g] == wanted[template]]
            others = [row[g] for g in row if enrolled[g] != wanted[template]]
            if not mates:
                strangers.append(max(others))
                continue
            hits.append(sum(x >= max(mates) for x in others))
            tops.append((max(mates), max(others)))
        strangers = np.sort(strangers)[::-1]
        for k in (1, 5, 10):
            assert numbers["rank"][str(k)] == np.mean(np.array(hits) < k)
        for fpir in FPIRS:
            place = round(fpir * len(strangers))
            strict = strangers[int(fpir * len(strangers))]
            level = strangers[place - 1] if place else strangers[0] + 1e-8
            expected = np.mean([m > max(o, strict) for m, o in tops])
            assert numbers["tpir_at_fpir"]["strict"][str(fpir)] == pytest.approx(expected)
            expected = np.mean([m > o and m >= level for m, o in tops])
            assert numbers["tpir_at_fpir"]["parity"][str(fpir)] == pytest.approx(expected)
        empty = [x is None for x in (*vectors.values(), *gallery.values(), *probes.values())]
        assert numbers["empty_templates"] == sum(empty)
        assert numbers["faces_without_embedding"] == lost + no_entry + no_probe
        empties += sum(empty)
    assert empties >= 30  # the first template of each list
    rates = [x["tar_at_far"]["strict"]["0.01"] for x in found["splits"].values()]
    assert found["mean"]["tar_at_far"]["strict"]["0.01"] == pytest.approx(np.mean(rates))
    assert found["std"]["tar_at_far"]["strict"]["0.01"] == pytest.approx(np.std(rates, ddof=1))
    assert 0.1 < np.mean(rates) < 0.95


def test_empty_template():
    """By hand: a pair of an empty template is not accepted even where all impostors score -1."""

    def faces(templates, subjects):
        numbers = np.array(templates)
        files = tuple(f"{template}.jpg" for template in templates)
        return Faces(numbers, np.array(subjects), files, numbers, numbers)

    compared, gallery = faces([1, 2, 3], [1, 1, 2]), faces([2], [1])
    split = Split(compared, np.array([1, 2]), np.array([2, 3]), gallery, faces([2, 3], [1, 2]))
    rows, features = {"2.jpg": 0, "3.jpg": 1}, np.array([[1.0, 0.0], [-1.0, 0.0]])
    found = IjbaProtocol({1: split}, {}).evaluate(rows, features)["splits"]["1"]
    assert found["tar_at_far"]["strict"]["0.1"] == 0
    assert (found["empty_templates"], found["faces_without_embedding"]) == (1, 1)
    rows["1.jpg"] = 0  # no longer empty
    found = IjbaProtocol({1: split}, {}).evaluate(rows, features)["splits"]["1"]
    assert found["tar_at_far"]["strict"]["0.1"] == 1


def test_layout(world, tmp_path):
    """Titles in any order and number, as in the real lists, whose lines have 25 fields."""
    folder, _ = world
    assert (folder / "IJB-A_11_sets/split10/verify_comparisons_10.csv").is_file()
    IjbaProtocol.read(folder).write(tmp_path)
    path = tmp_path / "IJB-A_1N_sets/split1/search_probe_1.csv"
    rows = [line.split(",") for line in path.read_text().splitlines()]
    path.write_text("\n".join(",".join(["FRAME" if not n else "7", *row[::-1]])
                              for n, row in enumerate(rows)))  # fmt: skip
    for n in range(2, 11):
        for file in tmp_path.rglob(f"*_{n}.csv"):
            file.unlink()
    read, whole = IjbaProtocol.read(tmp_path).splits, IjbaProtocol.read(folder).splits
    assert list(read) == [1]
    np.testing.assert_equal(read[1].probes, whole[1].probes)


def test_errors(world, tmp_path, refused_when_changed):
    folder, _ = world
    protocol = IjbaProtocol.read(folder)
    protocol.write(tmp_path)
    cases = {
        "11_sets/split1/verify_metadata_1.csv": [
            (lambda s: s.replace("FILE", "PATH"), "begin with a line of titles, among them FILE"),
            (lambda s: s + "\n1,2,a.jpg", "must hold a face a line, whole numbers but for"),
            (lambda s: s + "\n1,x,a.jpg,1,1", "must hold a face a line, whole numbers but for"),
            (lambda s: s.splitlines()[0], "must hold a face a line, whole numbers but for"),
            (lambda s: "", "must begin with a line of titles"),
            (lambda s: s + "\n0,999,a.jpg,1,1", "has two subjects in template 0"),
        ],
        "11_sets/split1/verify_comparisons_1.csv": [
            (lambda s: s + "\n1,2,3", "must hold two templates a line"),
            (lambda s: s + "\na,b", "must hold two templates a line"),
            (
                lambda s: s + "\n0,777\n778,0",
                "names 2 templates without a face, the lists do not belong together: 777, 778",
            ),
        ],
    }
    for file, changes in cases.items():
        path = tmp_path / f"IJB-A_{file}"
        refused_when_changed(path, changes, lambda: IjbaProtocol.read(tmp_path))
    (tmp_path / "IJB-A_1N_sets/split3/search_probe_3.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no search_probe_3\.csv"):
        IjbaProtocol.read(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no verify_metadata_1\.csv"):
        IjbaProtocol.read(tmp_path / "IJB-A_1N_sets")
    np.savez(tmp_path / "other.npz", names=np.array(["x"]), embeddings=np.ones((1, 3)))
    message = "holds no embedding of a face of the lists: they are .*; names there are such as 'x'$"
    with pytest.raises(ValueError, match=message):
        evaluate.main(Arguments(tmp_path / "other.npz", "ijba", folder))
    numbers = np.array([1, 2])
    faces = Faces(numbers, numbers, ("img/1.jpg",) * 2, numbers * 0, numbers + 4)
    two = IjbaProtocol({1: Split(faces, *np.array([[1], [2]]), faces, faces)}, {})
    message = "img/1.jpg shows several people: name their embeddings img/1.jpg#6 and img/1.jpg#5"
    with pytest.raises(ValueError, match=message):
        two.evaluate({"img/1.jpg": 0, "img/1.jpg#5": 1}, np.eye(2))
    alone = Faces(numbers, numbers, ("a.jpg", "b.jpg"), numbers, numbers)
    one = IjbaProtocol({1: Split(alone, *np.array([[1], [2]]), alone, alone)}, {})
    rows = {"a.jpg": 0, "b.jpg": 1, "a.jpg#1": 2, "b.jpg#2": 1}
    two = "1 faces have two embeddings, keep one of each:"
    with pytest.raises(ValueError, match=f"^features: {two} a.jpg and a.jpg#1$"):
        one.evaluate(rows, np.eye(3))
    one.write(tmp_path / "one")
    names = ["a.jpg", "b.jpg#2", "b#2.jpg"]  # FILE#SIGHTING_ID, and what its picture is called
    np.savez(tmp_path / "one.npz", names=np.array(names), embeddings=np.eye(3))
    with pytest.raises(ValueError, match=rf"one\.npz: {two} b\.jpg#2 and b#2$"):
        evaluate.main(Arguments(tmp_path / "one.npz", "ijba", tmp_path / "one"))
