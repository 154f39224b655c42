"""The examples in the recipe's docstrings, imported as the recipe imports its files."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "examples" / "fsenet"
FILES = [path for path in sorted(RECIPE.rglob("*.py")) if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples(path):
    name = ".".join(path.relative_to(RECIPE).with_suffix("").parts)
    found = doctest.testmod(import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
