"""Files that tests of the recipe share."""

import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

RECIPE = Path(__file__).parents[2] / "examples" / "fsenet"


@pytest.fixture
def lfw_like():
    """Return a function that writes a small LFW."""
    return _lfw_like


def _lfw_like(path):
    """LFW's layout: ten folds of two people with three pictures, and two people of no fold."""
    pairs, people = ["10\t2"], []
    for fold in range(10):
        a, b = (f"P{2 * fold + i:03}" for i in (0, 1))
        people += [f"{a} {fold} 3", f"{b} {fold} 3"]
        pairs += [f"{a}\t1\t2", f"{b}\t2\t3", f"{a}\t1\t{b}\t1", f"{a}\t2\t{b}\t3"]
    people += ["P020 -1 3", "P021 -1 3"]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pairs.txt", "\n".join(pairs) + "\n")
        archive.writestr("identity_folds.txt", "\n".join(people) + "\n")
        for owner in range(22):
            for number in (1, 2, 3):
                name = f"P{owner:03}/P{owner:03}_{number:04}.jpg"
                buffer = io.BytesIO()
                Image.new("RGB", (16, 16), (owner * 10, 0, 0)).save(buffer, "JPEG", quality=100)
                archive.writestr(name, buffer.getvalue())
    return path


@pytest.fixture(scope="session")
def run_code():
    """Return a function that runs Python code on a CPU, with the recipe to import from."""

    def run(code, *arguments):
        paths = os.pathsep.join([str(RECIPE), str(RECIPE.parents[1])])
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture
def refused_when_changed():
    """Return a function that changes a file in one way after the other, all to be refused."""

    def check(path, changes, read):
        whole = path.read_text()
        for change, message in changes:
            path.write_text(change(whole))
            with pytest.raises(ValueError, match=re.escape(message)):
                read()
        path.write_text(whole)

    return check
