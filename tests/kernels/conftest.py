"""Where the kernels run, and memory that shows what they did not write."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="cpu (under Triton's interpreter) or cuda")


def pytest_ignore_collect(collection_path, config):
    """In any other run, such as the whole suite's, nothing here could run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    # The option is not there when this file is found too late: in the whole suite's run.
    device = getattr(config.option, "device", "cpu")
    if interpreted != (device == "cpu") or not hasattr(config.option, "device"):
        return True
    return None


@pytest.fixture(scope="session")  # for Hypothesis, which sets fixtures up once for all examples
def device(request):
    return torch.device(request.config.getoption("device"))


@pytest.fixture(autouse=True)
def poison():
    """Fill what `torch.empty` returns with NaN: cells that a kernel forgets are seen."""
    # Filling is all that is wanted: on a GPU the definitions take what is not deterministic.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def far_apart(device, tmp_path):
    """Return a function of a size: so many float32, of which a CPU holds only the pages touched."""

    def allocate(size):
        if device.type == "cpu":
            return torch.from_file(str(tmp_path / "sparse"), shared=True, size=size)
        return torch.empty(size, device=device)

    yield allocate
    torch.cuda.empty_cache()  # gigabytes, which other processes may need


@pytest.fixture
def launches(monkeypatch):
    """Return a list that grows by one with every kernel that is launched."""
    from partlocal.kernels.part_maps import maps_kernel  # noqa: PLC0415

    kind, launched = type(maps_kernel), []
    launch = kind.__getitem__
    monkeypatch.setattr(
        kind, "__getitem__", lambda kernel, grid: launched.append(kernel) or launch(kernel, grid)
    )
    return launched
