"""What every test run needs to know before it collects."""

from importlib.util import find_spec

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the one example that warps pictures where kornia is not installed."""
    if find_spec("kornia") is None:
        for item in items:
            if item.name == "partlocal.alignment.align_faces":
                item.add_marker(pytest.mark.skip(reason="kornia is not there"))
