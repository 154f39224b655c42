"""The networks that the paper's tables compare: FSENet, but for what an arm names."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Literal

from partlocal.labels import FSENET_PARTS
from partlocal.local import LocalOptions

Kind = Literal["fsenet", "global", "wide", "parsing", "landmarks", "guided"]
People = Literal["enough", "all", "half", "quarter"]
Supervision = Literal["arcface", "softmax", "a-softmax", "cosface"]


@dataclass(frozen=True)
class Arm:
    """One network, trained in one way; the defaults are FSENet.

    Args:
        kind: `fsenet`; `global`, the backbone alone; `wide`, the backbone alone with a last stage
            as wide as FSENet's descriptor; `parsing`, the parser's own features; `landmarks` and
            `guided`, the backbone alone with 68 heat maps or 11 part maps between its features.
        parts: of the local branch.
        local: how maps are made and parts pooled.
        map_size: side of the feature map that is pooled.
        supervision: the loss of each head.
        margin: of ArcFace or CosFace; None takes the run's.
        people: `enough` are those with many pictures; `half` and `quarter` are shares of them;
            `all` adds others with few pictures; None takes those that the data usually trains on.
        parser: hourglasses and the size of their bottleneck, of a parser trained for this arm;
            None takes the one that partlocal ships.
    """

    kind: Kind = "fsenet"
    parts: tuple[str, ...] = FSENET_PARTS
    local: LocalOptions = field(default_factory=LocalOptions)
    map_size: int | None = None
    supervision: Supervision = "arcface"
    margin: float | None = None
    people: People | None = None
    parser: tuple[int, int] | None = None

    def slug(self) -> str:
        """Return a name for files: readable, and of this arm alone.

        >>> Arm(local=LocalOptions(pool="max")).slug()[:-9]  # and 8 digits of a hash
        'fsenet-pool-max'
        """
        differs = [
            f"{f.name}-{getattr(self.local, f.name)}".lower()
            for f in fields(LocalOptions)
            if getattr(self.local, f.name) != f.default
        ]
        text = json.dumps(asdict(self), sort_keys=True)
        return "-".join([self.kind, *differs, hashlib.sha256(text.encode()).hexdigest()[:8]])


FSENET = Arm()
