"""Part vocabularies: which index is which part, on whose left, and how one set maps to another.

Every public data set numbers its parts in an order of its own, and some exist in several. All
sets below share one naming scheme (`left_eye`, `inner_mouth`, ...), so that names, not numbers,
travel between them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@dataclass(frozen=True)
class LabelSet:
    """The labels of a parser in index order, with their left/right pairs and groups.

    >>> HELEN.index("nose")
    6
    >>> HELEN.select("skin", "eyes").indices
    (1, 4, 5)
    >>> HELEN.flip(torch.tensor([[2, 0, 6]]))  # mirrored, and left brow becomes right brow
    tensor([[6, 0, 3]])

    Args:
        name: what errors and reports call the set.
        labels: one name an index; a `"background"` takes what has no place in the set.
        left_right: pairs of labels that trade places in a mirror; None pairs every `left_x`
            with its `right_x`.
        groups: names for several labels at once; a group may not share its name with a label.
        side: whose left a `left_x` is: `"subject"`, or `"viewer"` (left in the picture).

    Raises:
        ValueError: names repeat, or pairs or groups name labels that the set does not hold.
    """

    name: str
    labels: tuple[str, ...]
    left_right: tuple[tuple[str, str], ...] | None = None
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    side: str = "subject"

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise ValueError(f"labels must be a sequence of names; got the string {self.labels!r}")
        labels = tuple(self.labels)
        pairs: Sequence[Sequence[str]] | None = self.left_right
        if pairs is None:
            halves = [label[5:] for label in labels if label.startswith("left_")]
            pairs = [(f"left_{x}", f"right_{x}") for x in halves if f"right_{x}" in labels]
        groups = {name: tuple(members) for name, members in self.groups.items()}
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "left_right", tuple((left, right) for left, right in pairs))
        object.__setattr__(self, "groups", groups)

        paired = [label for pair in pairs for label in pair]
        used = {*paired, *(label for members in groups.values() for label in members)}
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"labels of {self.name} must be different names; got {list(labels)}")
        if unknown := sorted(used - set(labels)):
            raise ValueError(f"left_right and groups of {self.name} name no label: {unknown}")
        if len(set(paired)) < len(paired):
            raise ValueError(f"left_right of {self.name} must hold each label once; got {pairs}")
        if clash := sorted(set(groups) & set(labels)):
            raise ValueError(f"groups of {self.name} must not be called like labels: {clash}")
        if self.side not in ("subject", "viewer"):
            raise ValueError(f"side must be 'subject' or 'viewer'; got {self.side!r}")

    def __len__(self) -> int:
        return len(self.labels)

    def index(self, label: str) -> int:
        """Return the index of one label.

        Raises:
            ValueError: the set has no such label; the message lists those it has.
        """
        if label not in self.labels:
            raise ValueError(
                f"{self.name} has no label {label!r}; its labels are {', '.join(self.labels)}"
            )
        return self.labels.index(label)

    def select(self, *names: str) -> "Parts":
        """Choose parts by label, in this order; a group's name stands for its members.

        >>> HELEN.select("nose", "mouth").names
        ('nose', 'upper_lip', 'inner_mouth', 'lower_lip')

        Raises:
            ValueError: a name is unknown, or a part would be chosen twice.
        """
        chosen = [label for name in names for label in self.groups.get(name, (name,))]
        return Parts(self, tuple(chosen))

    @property
    def mirrored(self) -> tuple[int, ...]:
        """For each index, the index that takes its place in a mirrored picture."""
        return _mirrored(self.labels, self)

    def flip(self, maps: Shaped[Tensor, "... h w"]) -> Shaped[Tensor, "... h w"]:
        """Mirror the last axis and swap left and right, so that flipping twice changes nothing.

        Args:
            maps: integers are a label map `h w` or `b h w`, whose values beyond the set (such as
                255 for "ignore") stay; floats and booleans hold one map a label, `... n h w`.

        Raises:
            ValueError: the shape is neither.
        """
        if maps.is_floating_point() or maps.dtype == torch.bool:
            return _flip_maps(maps, self.mirrored, "n", self.name)
        if maps.ndim not in (2, 3):
            raise ValueError(
                f"integer label maps must be [h, w] or [b, h, w]; got {list(maps.shape)}: "
                "pass one-hot maps as floats or booleans"
            )
        swap = torch.tensor(self.mirrored, device=maps.device)
        known = maps.long().clamp(0, len(self) - 1)
        swapped = torch.where(known == maps, swap[known].to(maps.dtype), maps)
        return swapped.flip(-1)

    def remap(
        self, other: "LabelSet", into: Mapping[str, str] | None = None
    ) -> Float[Tensor, "m n"]:
        """Return the 0/1 matrix that takes probabilities of this set to those of `other`.

        A label goes where `into` sends it, else to its own name, else to the smallest of its
        groups that `other` holds as a label, else to the background. Left and right trade places
        when the sets disagree about the side.

        >>> coarse = LabelSet("coarse", ("background", "skin", "hair", "eyes"))
        >>> matrix = HELEN.remap(coarse, into={"left_brow": "hair", "right_brow": "hair"})
        >>> matrix.argmax(0)  # the table for label maps: table[label_map]
        tensor([0, 1, 2, 2, 3, 3, 0, 0, 0, 0, 2])
        >>> probabilities = torch.rand(2, 11, 8, 8).softmax(1)
        >>> torch.einsum("mn,bnhw->bmhw", matrix, probabilities).shape
        torch.Size([2, 4, 8, 8])

        Args:
            other: the set to arrive at, with m labels.
            into: labels of this set -> labels of `other`, where the names do not say it.

        Raises:
            ValueError: `into` names unknown labels, or a label has no place in `other` and
                `other` has no background.
        """
        into = dict(into or {})
        for label in into:
            self.index(label)
        swap = self.mirrored if self.side != other.side else range(len(self))
        matrix = torch.zeros(len(other), len(self))
        for index, label in enumerate(self.labels):
            target = into.get(label) or self._place(self.labels[swap[index]], other)
            if target is None:
                raise ValueError(
                    f"{other.name} has no place for {label!r} of {self.name} and no background: "
                    f"say where it goes with into={{{label!r}: ...}}"
                )
            matrix[other.index(target), index] = 1
        return matrix

    def _place(self, label: str, other: "LabelSet") -> str | None:
        groups = sorted(self.groups.items(), key=lambda item: len(item[1]))
        names = [label, *(name for name, members in groups if label in members), "background"]
        return next((name for name in names if name in other.labels), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the set as JSON holds it."""
        return {
            "name": self.name,
            "labels": list(self.labels),
            "left_right": [list(pair) for pair in self.left_right or ()],
            "groups": {name: list(members) for name, members in self.groups.items()},
            "side": self.side,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LabelSet":
        """Rebuild what `to_dict` returned.

        >>> LabelSet.from_dict(LIP.to_dict()) == LIP
        True
        """
        return cls(
            name=data["name"],
            labels=tuple(data["labels"]),
            left_right=tuple((left, right) for left, right in data["left_right"]),
            groups={name: tuple(members) for name, members in data["groups"].items()},
            side=data["side"],
        )


@dataclass(frozen=True)
class Parts:
    """Labels chosen from a set, in the order in which their maps are stacked.

    >>> parts = HELEN.select("left_eye", "right_eye", "nose")
    >>> parts.indices, len(parts)
    ((4, 5, 6), 3)
    >>> parts.flip(torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]], [[5.0, 6.0]]]))[:, 0]
    tensor([[4., 3.],
            [2., 1.],
            [6., 5.]])

    Raises:
        ValueError: there is no name, a name is no label of the set, or repeats.
    """

    label_set: LabelSet
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names:
            raise ValueError(f"select at least one part of {self.label_set.name}")
        for name in self.names:
            self.label_set.index(name)
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"parts must be different; got more than once: {', '.join(repeated)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def indices(self) -> tuple[int, ...]:
        """The index of each part in the label set."""
        return tuple(self.label_set.index(name) for name in self.names)

    @property
    def mirrored(self) -> tuple[int, ...]:
        """For each part, the position of the part that takes its place in a mirrored picture.

        Raises:
            ValueError: a part was chosen without its left/right partner.
        """
        return _mirrored(self.names, self.label_set)

    def flip(self, maps: Shaped[Tensor, "... k h w"]) -> Shaped[Tensor, "... k h w"]:
        """Mirror maps `... k h w` and swap left and right; twice changes nothing."""
        return _flip_maps(maps, self.mirrored, "k", f"these parts of {self.label_set.name}")

    def to_dict(self) -> dict[str, Any]:
        """Return the parts as JSON holds them."""
        return {"label_set": self.label_set.to_dict(), "names": list(self.names)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Parts":
        """Rebuild what `to_dict` returned."""
        return cls(LabelSet.from_dict(data["label_set"]), tuple(data["names"]))


def _mirrored(names: Sequence[str], label_set: LabelSet) -> tuple[int, ...]:
    partner = {}
    for left, right in label_set.left_right or ():
        partner[left], partner[right] = right, left
    for name in names:
        if partner.get(name, name) not in names:
            raise ValueError(
                f"{name!r} has no mirror image among the parts: select {partner[name]!r} too"
            )
    return tuple(names.index(partner.get(name, name)) for name in names)


def _flip_maps(maps: Tensor, mirrored: Sequence[int], axis: str, owner: str) -> Tensor:
    if maps.ndim < 3 or maps.shape[-3] != len(mirrored):
        raise ValueError(
            f"maps must be [..., {axis}, h, w] with {axis} = {len(mirrored)} (as {owner}); "
            f"got {list(maps.shape)}"
        )
    return maps.index_select(-3, torch.tensor(mirrored, device=maps.device)).flip(-1)


_FACE_GROUPS = {
    "eyes": ("left_eye", "right_eye"),
    "brows": ("left_brow", "right_brow"),
    "mouth": ("upper_lip", "inner_mouth", "lower_lip"),
    # The class that Helen's "overall" F1 merges: everything inside the face outline but its skin.
    "inner": (
        *("left_brow", "right_brow", "left_eye", "right_eye"),
        *("nose", "upper_lip", "inner_mouth", "lower_lip"),
    ),
}
_CELEBA_GROUPS = {**_FACE_GROUPS, "ears": ("left_ear", "right_ear")}
_FACE_11 = (
    *("background", "skin", "left_brow", "right_brow", "left_eye", "right_eye"),
    *("nose", "upper_lip", "inner_mouth", "lower_lip", "hair"),
)

# All face sets number the side that is left in the picture first and call it left.
HELEN = LabelSet("Helen", _FACE_11, groups=_FACE_GROUPS, side="viewer")
LAPA = LabelSet("LaPa", _FACE_11, groups=_FACE_GROUPS, side="viewer")
IBUGMASK = LabelSet("iBugMask", _FACE_11, groups=_FACE_GROUPS, side="viewer")
IBUGMASK_14 = LabelSet(
    "iBugMask-14",
    (*_FACE_11, "left_ear", "right_ear", "glasses"),
    groups=_CELEBA_GROUPS,
    side="viewer",
)

# In the files of CelebAMask-HQ `l_lip` is the lower lip but `l_eye` the left eye, `ear_r` the
# earring but `r_ear` the right ear, and `mouth` what is between the lips.
CELEBAMASK_HQ = LabelSet(
    "CelebAMask-HQ",
    (
        *("background", "skin", "nose", "glasses", "left_eye", "right_eye", "left_brow"),
        *("right_brow", "left_ear", "right_ear", "inner_mouth", "upper_lip", "lower_lip"),
        *("hair", "hat", "earring", "necklace", "neck", "clothes"),
    ),
    groups=_CELEBA_GROUPS,
    side="viewer",
)
CELEBAMASK_HQ_BISENET = LabelSet(
    "CelebAMask-HQ (BiSeNet order)",
    (
        *("background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses"),
        *("left_ear", "right_ear", "earring", "nose", "inner_mouth", "upper_lip", "lower_lip"),
        *("neck", "necklace", "clothes", "hair", "hat"),
    ),
    groups=_CELEBA_GROUPS,
    side="viewer",
)
CELEBAMASK_HQ_FARL = LabelSet(
    "CelebAMask-HQ (FaRL order)",
    (
        *("background", "neck", "skin", "clothes", "left_ear", "right_ear", "left_brow"),
        *("right_brow", "left_eye", "right_eye", "nose", "inner_mouth", "lower_lip"),
        *("upper_lip", "hair", "glasses", "hat", "earring", "necklace"),
    ),
    groups=_CELEBA_GROUPS,
    side="viewer",
)

# Groups as SPReID pools them; `foreground` holds all the others. Left is the person's.
LIP = LabelSet(
    "LIP",
    (
        *("background", "hat", "hair", "glove", "glasses", "upper_clothes", "dress", "coat"),
        *("socks", "pants", "jumpsuits", "scarf", "skirt", "face", "left_arm", "right_arm"),
        *("left_leg", "right_leg", "left_shoe", "right_shoe"),
    ),
    groups={
        "head": ("hat", "hair", "glasses", "face"),
        "upper": (
            *("glove", "upper_clothes", "dress", "coat", "jumpsuits", "scarf"),
            *("left_arm", "right_arm"),
        ),
        "lower": ("pants", "skirt", "left_leg", "right_leg"),
        "shoes": ("socks", "left_shoe", "right_shoe"),
        "foreground": (
            *("hat", "hair", "glove", "glasses", "upper_clothes", "dress", "coat", "socks"),
            *("pants", "jumpsuits", "scarf", "skirt", "face", "left_arm", "right_arm"),
            *("left_leg", "right_leg", "left_shoe", "right_shoe"),
        ),
    },
    side="subject",
)

FSENET_PARTS = ("skin", "left_eye", "right_eye", "nose", "upper_lip", "lower_lip")
"""The six parts of FSENet, as names for `HELEN.select`."""

FSENET_NINE = (
    *("skin", "left_brow", "right_brow", "left_eye", "right_eye"),
    *("nose", "upper_lip", "inner_mouth", "lower_lip"),
)
"""All of Helen but background and hair: hair, the paper argues, changes within a person."""
