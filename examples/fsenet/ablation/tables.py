"""Tables 5 to 14 of the paper as data: which rows, from which arm, and what the paper claims."""

from dataclasses import dataclass

from ablation.arms import FSENET, Arm
from partlocal import HELEN
from partlocal.labels import FSENET_NINE
from partlocal.local import LocalOptions


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        name: as it is printed, and as paper_tables.json calls the paper's row.
        arm: the network.
        vector: what of its descriptor is scored: `both`, `global half`, `local half`, or a control
            (`mean maps`, ...).
        weight: of the local half in `both`; None takes the run's.
    """

    name: str
    arm: Arm = FSENET
    vector: str = "both"
    weight: float | None = None


@dataclass(frozen=True)
class Table:
    """One table.

    Args:
        title: what it varies.
        rows: in order.
        claims: pairs of rows of which the paper finds the first better.
        controls: pairs that the paper does not compare, and that say where a gain comes from.
    """

    title: str
    rows: tuple[Row, ...]
    claims: tuple[tuple[str, str], ...] = ()
    controls: tuple[tuple[str, str], ...] = ()


def chosen(best: str, rows: tuple[Row, ...]) -> tuple[tuple[str, str], ...]:
    """Return the claim that one row, which FSENet keeps, is better than each other one."""
    return tuple((best, row.name) for row in rows if row.name != best)


_CONTROLS = (
    Row("control: mean maps", vector="mean maps"),
    Row("control: another person's maps", vector="another person's maps"),
    Row("control: uniform maps", vector="uniform maps"),
)

_SCALE = (
    Row("a quarter of the people", Arm(people="quarter")),
    Row("half of the people", Arm(people="half")),
    Row("people with enough pictures", Arm(people="enough")),
    Row("all people", Arm(people="all")),
)

_SUPERVISION = (
    Row("softmax", Arm(supervision="softmax")),
    Row("A-softmax", Arm(supervision="a-softmax")),
    Row("CosFace", Arm(supervision="cosface", margin=0.35)),
    Row("ArcFace, m = 0.5", Arm(margin=0.5)),
    Row("ArcFace, m = 1", Arm(margin=1.0)),
    Row("ArcFace, m = 1.5", Arm(margin=1.5)),
)

_WEIGHTS = (
    Row("parsing features", Arm(kind="parsing"), "global half"),
    Row("local part", vector="local half"),
    Row("global", Arm(kind="global"), "global half"),
    *(Row(f"global + local, 1:{weight:g}", weight=weight) for weight in (1.0, 0.8, 0.6, 0.4)),
)

_GUIDED = (
    Row("global", Arm(kind="global"), "global half"),
    Row("landmarks between the features", Arm(kind="landmarks"), "global half"),
    # a parser as small as the network of landmarks, and trained alike
    Row("part maps between the features", Arm(kind="guided", parser=(1, 4)), "global half"),
    Row("FSENet"),
)

_PARSERS = tuple(
    Row(f"{stacks} stacks, bottleneck {size}x{size}", Arm(parser=(stacks, size)))
    for stacks, size in ((1, 4), (2, 4), (3, 4), (2, 2), (2, 8))
)

_PARTS = (
    Row("all 11 parts", Arm(parts=HELEN.labels)),
    Row("nine parts", Arm(parts=FSENET_NINE)),
    Row("six parts"),
)

_MAPS = (Row("56x56", Arm(map_size=56)), Row("28x28"), Row("14x14", Arm(map_size=14)))

_POOLING = (
    *(
        Row(
            f"{mode}, {'norm' if normalize else 'no norm'}",
            Arm(local=LocalOptions(pool=mode, normalize=normalize)),
        )
        for mode in ("sum", "mean", "max")
        for normalize in (True, False)
    ),
    Row("sum, norm, without correlation", Arm(local=LocalOptions(correlation=False))),
)

TABLES = {
    5: Table("training scale", _SCALE, chosen("people with enough pictures", _SCALE)),
    6: Table("supervision", _SUPERVISION, chosen("ArcFace, m = 1.5", _SUPERVISION)),
    7: Table(
        "global against global + local",
        (
            Row("global", Arm(kind="global"), "global half"),
            Row("control: as many numbers", Arm(kind="wide"), "global half"),
            Row("joint: global half", vector="global half"),
            Row("joint: local half", vector="local half"),
            Row("global + local"),
            *_CONTROLS,
        ),
        (("global + local", "global"),),
        (
            ("global + local", "control: as many numbers"),
            ("global + local", "joint: global half"),
            ("global + local", "joint: local half"),
            *(("global + local", row.name) for row in _CONTROLS),
            ("joint: global half", "global"),
        ),
    ),
    8: Table("halves and their weights", _WEIGHTS, chosen("global + local, 1:0.6", _WEIGHTS)),
    9: Table("landmarks against parsing", _GUIDED, chosen("FSENet", _GUIDED)),
    10: Table(
        "hourglasses and bottlenecks", _PARSERS, chosen("2 stacks, bottleneck 4x4", _PARSERS)
    ),
    11: Table("number of parts", _PARTS, chosen("six parts", _PARTS)),
    12: Table("size of the feature map", _MAPS, chosen("28x28", _MAPS)),
    13: Table("pooling and correlation", _POOLING, chosen("sum, norm", _POOLING)),
}
