"""One line for what a user can mend, said once on each machine."""

import errors
import pytest
from errors import one_line_errors


def ended(error):
    """What a script ends with when this is raised."""
    with pytest.raises(SystemExit) as end, one_line_errors():
        raise error
    return end.value.code


def test_one_line(tmp_path):
    assert ended(ValueError("--steps must be one")) == "error: --steps must be one"
    with pytest.raises(FileNotFoundError) as missing:
        (tmp_path / "faces.zip").open()
    path = tmp_path / "faces.zip"
    assert ended(missing.value) == f"error: {path}: No such file or directory"
    assert ended(FileNotFoundError("no faces")) == "error: no faces"
    assert ended(RuntimeError("connection closed by peer")).startswith("error: another process")
    with pytest.raises(RuntimeError, match="of our own"), one_line_errors():
        raise RuntimeError("of our own")


def test_one_process_of_a_machine_says_it(monkeypatch):
    """As long as they have not joined; the others leave it the time to do so."""
    pauses = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert ended(ValueError("x")) == "error: x"
    assert not pauses
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended(ValueError("x")) == 1
    assert pauses
    monkeypatch.setattr(errors.distributed, "is_initialized", lambda: True)
    assert ended(ValueError("x")) == "error: x"  # which may be this process's own
