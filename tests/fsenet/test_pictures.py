"""Which reader a path gets, where files of several formats lie in one folder."""

import pytest
from data.images import IdentityFolder
from data.pictures import reader_of
from data.shards import IdentityShards
from data.tables import IdentityTable


def touch(path, *names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


@pytest.mark.parametrize("around", ["", "images/"])
@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".arrow"])
def test_stray_files(tmp_path, suffix, around):
    """One stray file does not decide what a folder of people is, nor the other way round."""
    names = [f"{around}{name}/{i}.png" for name in ("Ann", "Bob") for i in (1, 2)]
    path = touch(tmp_path / "faces", *names)
    assert reader_of(path) is IdentityFolder
    touch(path, f"._stray{suffix}", ".git/a/1.png")  # hidden
    assert reader_of(path) is IdentityFolder
    touch(path, f"stray{suffix}")
    message = rf"faces holds \{suffix} files and folders of pictures: move one kind elsewhere, or"
    with pytest.raises(ValueError, match=message):
        reader_of(path)
    other = touch(tmp_path / "other", f"a{suffix}", "cover.jpg", "docs/a.txt", ".git/a/1.png")
    assert reader_of(other) is (IdentityShards if suffix == ".tar" else IdentityTable)
    touch(other, ".arrow-is-no-suffix", "b.parquet" if suffix == ".arrow" else "b.arrow")
    with pytest.raises(ValueError, match=r"other holds \.\w+ files and \.\w+ files: move one kind"):
        reader_of(other)
