"""How the labels of a parsing set and those of a parser belong together.

A set may be coarser than the parser (its eyes are one label), finer (it knows hats), or both. Its
`Vocabulary` says for each of its labels which of the parser's are meant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from partlocal.labels import (
    CELEBAMASK_HQ,
    CELEBAMASK_HQ_BISENET,
    CELEBAMASK_HQ_FARL,
    HELEN,
    IBUGMASK,
    IBUGMASK_14,
    LAPA,
    LabelSet,
)

FASSEG = LabelSet("FASSEG", ("background", "skin", "hair", "eyes", "nose", "mouth"))
"""Skin has ears and neck, hair has the eyebrows; left and right are one label."""

# Skin to drawn faces and to FASSEG, background to Helen: what others say of them teaches nothing.
_DISPUTED = ("left_ear", "right_ear", "ears", "neck")
_MAX_JSON = 2**20  # bytes


@dataclass(frozen=True)
class Vocabulary:
    """A set's labels, and what a parser's names do not say about them.

    Args:
        labels: of the set.
        into: labels of the parser -> the set's label that holds them, where that is not the one
            of the same name or of their group: `{"left_brow": "hair"}`.
    """

    labels: LabelSet
    into: Mapping[str, str] = field(default_factory=dict, hash=False)

    def merge(self, parser: LabelSet) -> Float[Tensor, "g n"]:
        """Return the 0/1 matrix that takes the parser's n labels to these g.

        >>> FASSEG.labels[KINDS["fasseg"].merge(HELEN).argmax(0)[HELEN.index("left_brow")]]
        'hair'
        """
        known = {ours: theirs for ours, theirs in self.into.items() if ours in parser.labels}
        return parser.remap(self.labels, known)

    def groups(self, parser: LabelSet) -> Float[Tensor, "g n"]:
        """Return which of the parser's n labels each of these g stands for.

        A label that takes in some of the parser's stands for these; one that takes in none stands
        for what it becomes: a hat, to a parser that knows none, is background.

        >>> matrix = KINDS["celebamask-hq"].groups(HELEN)
        >>> matrix.argmax(1)[[CELEBAMASK_HQ.index(name) for name in ("nose", "hat")]]
        tensor([6, 0])
        """
        groups = self.merge(parser)
        unknown = groups.sum(1) == 0
        if unknown.any():
            groups[unknown] = self.labels.remap(parser).T[unknown]
        return groups

    def fold(
        self, target: Shaped[Tensor, "b *g h w"], parser: LabelSet
    ) -> Shaped[Tensor, "b *g h w"]:
        """Say of each pixel what a perfect parser would say, in these labels.

        A hat that the parser does not know is background, and weighs in a loss as background does.
        Ears and neck are ignored, because sets disagree whether they are skin.

        >>> hat, own = CELEBAMASK_HQ.index("hat"), KINDS["celebamask-hq"]
        >>> own.fold(torch.tensor([[[hat, 1, 255]]], dtype=torch.uint8), HELEN)
        tensor([[[  0,   1, 255]]], dtype=torch.uint8)

        Args:
            target: uint8, labels `b h w` with 255 for "ignore", or shares `b g h w`.
            parser: its labels.
        """
        arrives = self.merge(parser).argmax(0)[self.groups(parser).argmax(1)]
        if target.ndim == 4:
            return torch.zeros_like(target).index_add_(1, arrives, target)
        table = torch.full((256,), 255, dtype=torch.uint8)
        table[: len(arrives)] = arrives.to(torch.uint8)
        for name in set(_DISPUTED) & set(self.labels.labels) - set(parser.labels):
            table[self.labels.index(name)] = 255
        return table[target.long()]


KINDS = {
    "fasseg": Vocabulary(FASSEG, {"left_brow": "hair", "right_brow": "hair"}),
    "helen": Vocabulary(HELEN),
    "lapa": Vocabulary(LAPA),
    "celebamask-hq": Vocabulary(CELEBAMASK_HQ),
    "celebamask-hq-bisenet": Vocabulary(CELEBAMASK_HQ_BISENET),
    "celebamask-hq-farl": Vocabulary(CELEBAMASK_HQ_FARL),
    "ibugmask": Vocabulary(IBUGMASK),
    "ibugmask-14": Vocabulary(IBUGMASK_14),
}
"""The sets that are known by name."""


def read_vocabulary(kind: str) -> Vocabulary:
    """Return the vocabulary of a known kind, or read it from a JSON file.

    The file holds what `LabelSet` takes, `name` and `labels` at least, and optionally `into`.

    Args:
        kind: one of `KINDS`, or the path of a `.json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the kind is unknown, or the file holds no label set.
    """
    if kind in KINDS:
        return KINDS[kind]
    if not kind.endswith(".json"):
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, or a .json; got {kind!r}")
    path = Path(kind)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: pass the JSON of a label set")
    with path.open("rb") as file:
        text = file.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
        raise ValueError(f"{path} is no label set: it is larger than {_MAX_JSON} bytes")
    try:
        data = json.loads(text)
        into = {str(ours): str(theirs) for ours, theirs in dict(data.get("into") or {}).items()}
        defaults = {"left_right": None, "groups": {}, "side": "subject"}
        vocabulary = Vocabulary(_label_set({**defaults, **data}), into)
        HELEN.remap(vocabulary.labels, into)  # refuses unknown labels
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no label set ({error}): it must hold name and labels, and may hold "
            "left_right, groups, side and into"
        ) from None
    return vocabulary


def _label_set(data: Mapping[str, object]) -> LabelSet:
    labels, pairs = data["labels"], data["left_right"]
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TypeError("labels must be a list of names")
    if len(labels) > 255:
        raise ValueError("255 means ignore, so that there can be 255 labels at most")
    if pairs is None:
        groups = {name: tuple(members) for name, members in dict(data["groups"]).items()}
        return LabelSet(str(data["name"]), tuple(labels), None, groups, str(data["side"]))
    return LabelSet.from_dict(data)
