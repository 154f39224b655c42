"""Every number of every script's options is looked at before anything is made."""

import math
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
from data.augment import Augmentation
from evaluate_options import Arguments as EvaluateArguments
from limits import check_batch, check_milestones, check_numbers
from options import DEFAULT, PROFILES, Options
from train_parser import Arguments as ParserArguments


def numbers(options, above=()):
    """Yield the path of each number of nested dataclasses."""
    for field in fields(options):
        value, path = getattr(options, field.name), (*above, field.name)
        if is_dataclass(value):
            yield from numbers(value, path)
        elif isinstance(value, tuple):  # of numbers; an empty one is for texts
            yield from [path] if value else []
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path


def changed(options, path, value):
    if len(path) > 1:
        value = changed(getattr(options, path[0]), path[1:], value)
    return replace(options, **{path[0]: value})


SCRIPTS = (replace(DEFAULT, part_dim=8), ParserArguments(), EvaluateArguments(None, "lfw"))
CASES = [(options, path) for options in SCRIPTS for path in numbers(options)]


def test_example():
    for options in (*PROFILES.values(), ParserArguments(), EvaluateArguments(None, "lfw")):
        check_numbers(options)
    for field, value, message in (
        ("batch_size", 0, r"^--batch-size must be between 2 and 1000000000; got 0$"),
        ("part_dim", -3, r"^--part-dim must be between 1 and 100000; got -3$"),
        ("seed", -1, r"^--seed must be between 0 and 4294967295; got -1$"),
        ("test_identities", 19, r"^--test-identities must be between 20"),
        ("milestones", (0.5, 2.0), r"^--milestones must be between 0 and 1; got 2.0$"),
        ("augmentation", Augmentation(scale=-1.0), r"^--augmentation.scale must be between 0 and"),
    ):
        with pytest.raises(ValueError, match=message):
            check_numbers(replace(DEFAULT, **{field: value}))


@pytest.mark.parametrize(
    ("options", "path"), CASES, ids=lambda x: str(x) if type(x) is tuple else ""
)
def test_every_number(options, path):
    """A number that no limit names would be a KeyError here."""
    option = "--" + ".".join(path).replace("_", "-")
    for value in (math.nan, math.inf, -math.inf, -1, -4):
        several = (value,) if path[-1] == "milestones" else value
        with pytest.raises(ValueError, match="must be between") as caught:
            check_numbers(changed(options, path, several))
        assert str(caught.value).startswith(option + " must"), value


def test_all_options_are_seen():
    """The list of cases holds what has no number by default, too: none is left out unnoticed."""
    optional = {field.name for field in fields(Options) if "int | None" in str(field.type)}
    assert optional == {"part_dim"}
    assert len(CASES) > 50

    @dataclass
    class New:
        unheard_of: int = 1

    with pytest.raises(KeyError, match="unheard_of"):
        check_numbers(New())


def test_milestones():
    for good in ((), (0.5,), (0, 1), *(profile.milestones for profile in PROFILES.values())):
        check_milestones(good)
    for bad in ((0.9, 0.7), (0.5, 0.5), (5, 3), (3.0, 5.0), (-0.1,), (math.nan,), (0.5, math.nan)):
        given = " ".join(map(str, bad))
        message = rf"between 0 and 1, each larger than the one before, such as .+; got {given}$"
        with pytest.raises(ValueError, match=message):
            check_milestones(bad)


def test_batches(monkeypatch):
    check_batch("--batch-size", 8, 8)
    with pytest.raises(ValueError, match="--batch-size must be at most the number of pictures, 8"):
        check_batch("--batch-size", 9, 8)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_batch("--batch-size", 8)
    for size in (10, 4):
        with pytest.raises(ValueError, match=r"--x must be a multiple of the 4 processes, at leas"):
            check_batch("--x", size)
