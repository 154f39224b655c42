"""Which of the parser's labels a set's label stands for, written out by hand."""

import doctest
import json

import pytest
import torch
from data import vocabularies
from data.vocabularies import FASSEG, KINDS, Vocabulary, read_vocabulary

from partlocal.labels import CELEBAMASK_HQ, HELEN, LabelSet


def stands_for(vocabulary):
    """For each label the names of the parser's labels that it stands for."""
    rows = vocabulary.groups(HELEN)
    return {
        label: [name for name, held in zip(HELEN.labels, row, strict=True) if held]
        for label, row in zip(vocabulary.labels.labels, rows, strict=True)
    }


def arrives(vocabulary):
    """Where each label is folded to."""
    every = torch.arange(len(vocabulary.labels), dtype=torch.uint8).view(1, 1, -1)
    return vocabulary.fold(every, HELEN).flatten().tolist()


def test_fasseg():
    expected = {
        "background": ["background"],
        "skin": ["skin"],
        "hair": ["left_brow", "right_brow", "hair"],
        "eyes": ["left_eye", "right_eye"],
        "nose": ["nose"],
        "mouth": ["upper_lip", "inner_mouth", "lower_lip"],
    }
    assert stands_for(KINDS["fasseg"]) == expected
    assert torch.equal(KINDS["fasseg"].merge(HELEN), KINDS["fasseg"].groups(HELEN))
    assert arrives(KINDS["fasseg"]) == [*range(len(FASSEG))]
    assert doctest.testmod(vocabularies).failed == 0


@pytest.mark.parametrize("kind", ["celebamask-hq", "celebamask-hq-bisenet", "celebamask-hq-farl"])
def test_celebamask(kind):
    """What the parser does not know is background to it; the rest keeps its name."""
    own = KINDS[kind].labels
    unknown = {"glasses", "left_ear", "right_ear", "hat", "earring", "necklace", "neck", "clothes"}
    for label, names in stands_for(KINDS[kind]).items():
        assert names == ["background" if label in unknown else label]
    disputed = {"left_ear", "right_ear", "neck"}  # skin to some, background to others
    for label, place in zip(own.labels, arrives(KINDS[kind]), strict=True):
        assert (place == 255) == (label in disputed)
        if label not in disputed:
            assert own.labels[place] == ("background" if label in unknown else label)
    soft = torch.ones(1, 19, 1, 1, dtype=torch.uint8)
    folded = KINDS[kind].fold(soft, HELEN).flatten()
    assert folded.tolist() == [9 if n == "background" else n not in unknown for n in own.labels]
    # the three orders are one another's remaps, and these the same names
    matrix = own.remap(CELEBAMASK_HQ)
    assert [CELEBAMASK_HQ.labels[i] for i in matrix.argmax(0)] == list(own.labels)


@pytest.mark.parametrize("kind", ["helen", "lapa", "ibugmask"])
def test_eleven(kind):
    assert torch.equal(KINDS[kind].groups(HELEN), torch.eye(11))


def test_a_set_both_coarser_and_finer():
    """It has no brows: the parser's brows are its skin; its ears are the parser's background."""
    own = LabelSet("own", ("hair", "skin", "ears", "background", "eyes"))
    parts = ("nose", "upper_lip", "inner_mouth", "lower_lip", "left_brow", "right_brow")
    found = Vocabulary(own, dict.fromkeys(parts, "skin"))
    assert stands_for(found) == {
        "hair": ["hair"],
        "skin": ["skin", "left_brow", "right_brow", *parts[:4]],
        "ears": ["background"],
        "background": ["background"],
        "eyes": ["left_eye", "right_eye"],
    }
    assert arrives(found) == [0, 1, 255, 3, 4]
    for vocabulary in (found, *KINDS.values()):
        assert (vocabulary.groups(HELEN).sum(1) > 0).all()


def test_sides():
    """A set that counts the person's own sides meets the parser's, who counts the viewer's."""
    own = LabelSet("own", ("background", "left_eye", "right_eye"), side="subject")
    assert stands_for(Vocabulary(own))["left_eye"] == ["right_eye"]


def test_json(tmp_path):
    path = tmp_path / "set.json"
    data = {"name": "mine", "labels": ["background", "skin", "hair", "eyes", "nose", "mouth"]}
    path.write_text(json.dumps(data | {"into": {"left_brow": "hair", "right_brow": "hair"}}))
    assert stands_for(read_vocabulary(str(path))) == stands_for(KINDS["fasseg"])
    path.write_text(json.dumps(CELEBAMASK_HQ.to_dict()))
    assert read_vocabulary(str(path)).labels == CELEBAMASK_HQ
    path.write_text(json.dumps({"name": "x", "labels": ["left_ear", "right_ear", "background"]}))
    assert read_vocabulary(str(path)).labels.mirrored == (1, 0, 2)


def test_errors(tmp_path):
    path = tmp_path / "set.json"
    labels = ["background", "skin"]
    for text, reason in {
        "": "Expecting value",
        "[]": "'list' object",
        "{}": "'labels'",
        '{"name": "x"}': "'labels'",
        '{"name": "x", "labels": "skin"}': "labels must be a list of names",
        '{"name": "x", "labels": [1, 2]}': "labels must be a list of names",
        '{"name": "x", "labels": ["a", "a"]}': "labels of x must be different names",
        json.dumps({"name": "x", "labels": [str(i) for i in range(256)]}): "255 labels at most",
        json.dumps({"name": "x", "labels": labels, "side": "up"}): "side must be 'subject'",
        json.dumps({"name": "x", "labels": labels, "left_right": [1]}): "cannot unpack",
        json.dumps({"name": "x", "labels": labels, "groups": 3}): "not iterable",
        json.dumps({"name": "x", "labels": labels, "into": {"chin": "skin"}}): "no label 'chin'",
        json.dumps({"name": "x", "labels": labels, "into": {"nose": "chin"}}): "no label 'chin'",
        '{"name": "x", "labels": ["skin"]}': "has no place for 'background' of Helen",
        "[" * 100_000: "recursion",
        " " * (2**20 + 1): "larger than 1048576 bytes",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=reason) as caught:
            read_vocabulary(str(path))
        assert str(caught.value).startswith(f"{path} is no label set")
        assert "\n" not in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is no label set"):
        read_vocabulary(str(path))
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist: pass the JSON of"):
        read_vocabulary("none.json")
    with pytest.raises(ValueError, match=r"kind must be one of .*, or a \.json; got 'x'$"):
        read_vocabulary("x")
