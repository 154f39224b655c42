"""Files by name, from a folder or inside an archive left packed.

Archives come from strangers: no member is written anywhere, names that would leave the archive
are refused, and sizes are checked before anything is unpacked.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from data.tars import CutTar, DamagedTar, Member, tar_members, without_dots

MAX_BYTES = 64 * 2**20  # a member or file: no face picture is larger
_MAX_DEPTH = 8


class DamagedImage(ValueError):
    """One picture cannot be read or decoded; a loader may count and skip it."""


class OwnHandle:
    """What each process opens for itself: inherited through fork, two would share one position.

    Args:
        opener: which can be sent to another process.
    """

    def __init__(self, opener: Callable[[], Any]) -> None:
        self._opener, self._held, self._pid = opener, None, -1

    def __call__(self) -> Any:
        """Return the open file."""
        if self._held is None or self._pid != os.getpid():
            self._held, self._pid = self._opener(), os.getpid()
        return self._held

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}


class Source:
    """Read files by name from a folder, a zip or a tar; each process opens it for itself.

    Args:
        path: a folder, a `.zip`, or a `.tar` that is not compressed, which has no way to a single
            file. Links in a tar are passed over.
        damaged: called with what is the matter each time that an archive holds a name once more,
            of which the last file is read, as when unpacked; and where a tar is cut short, of
            which the files before the cut are read. None refuses such an archive.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: it is none of them or damaged, a name in it is there twice or leads out, or a
            folder in it cannot be listed or lies too deep.
    """

    def __init__(self, path: str | Path, damaged: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._members: dict[str, tuple[int, int]] = {}  # of a tar: offset and size
        self._stored: dict[str, str] = {}  # of a zip: as it spells a name, where otherwise
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist: pass a folder, a .zip or a .tar")
        self._packed = not self.path.is_dir()
        if self._packed and not self.path.is_file():
            raise ValueError(f"{self.path} is no regular file: pass a folder, a .zip or a .tar")
        self._tar = self._packed and self.path.suffix == ".tar"
        opener = partial(open, mode="rb") if self._tar else zipfile.ZipFile
        self._archive = OwnHandle(partial(opener, self.path))
        if self._tar:
            members = _members(self.path, damaged)
            names = [name for name, _, _ in members]
            self._members = {name: (offset, size) for name, offset, size in members}
        elif self._packed:
            stored = [name for name in self._zip().namelist() if not name.endswith("/")]
            names = [without_dots(name) for name in stored]
            spelt = dict(zip(names, stored, strict=True))  # the last of each
            self._stored = {name: own for name, own in spelt.items() if name != own}
        else:
            names = list(_walk(self.path))
        for name in names if self._packed else ():
            if leads_out(name):
                raise ValueError(
                    f"{self.path} holds the unsafe name {name!r}, which leads out of the "
                    "archive: do not use it, or pack it again with relative names"
                )
        self.names = tuple(sorted(set(names)))
        for name in _again(names) if len(self.names) < len(names) else ():
            said = f"{self.path} holds {name!r} more than once"
            if damaged is None:
                raise ValueError(f"{said}: pack it again with one of them")
            damaged(f"{said}, and the last alone is read")

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """Return the bytes of one file.

        Raises:
            DamagedImage: the file is missing, damaged, encrypted, or larger than `limit` bytes.
        """
        where = f"{self.path}:{name}" if self._packed else str(self.path / name)
        try:
            size = self._size(name)
            if size > limit:
                raise DamagedImage(f"{where} is refused: {size} bytes are more than {limit}")
            data = self._bytes(name, size + 1)  # Python makes room for all that it may read
            if len(data) > size:  # a file has grown, or does not know its size
                data = self._bytes(name, limit + 1)
        except (KeyError, FileNotFoundError):
            raise DamagedImage(f"{where} does not exist") from None
        except DamagedImage:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, struct.error, ValueError) as error:
            raise DamagedImage(f"{where} is damaged in the archive ({error})") from None
        except (RuntimeError, NotImplementedError) as error:
            raise DamagedImage(f"{where} cannot be unpacked ({error})") from None
        except OSError as error:
            raise DamagedImage(f"{where} cannot be read ({error.strerror or error})") from None
        if len(data) > limit:
            raise DamagedImage(f"{where} is refused: it holds more than {limit} bytes")
        if len(data) < size:
            raise DamagedImage(f"{where} is cut short: {len(data)} of {size} bytes")
        return data

    def text(self, name: str) -> str:
        """Return one file as UTF-8 text; what is no UTF-8 is replaced."""
        return self.read(name).decode("utf-8", errors="replace")

    def _size(self, name: str) -> int:
        if self._tar:
            return self._members[name][1]
        if self._packed:
            return self._zip().getinfo(self._stored.get(name, name)).file_size
        status = os.stat(self._file(name))
        if not stat.S_ISREG(status.st_mode):  # a device never ends, and a pipe waits
            raise DamagedImage(f"{self._file(name)} is no regular file")
        return status.st_size

    def _bytes(self, name: str, most: int) -> bytes:
        if self._tar:
            archive, (offset, size) = self._archive(), self._members[name]
            archive.seek(offset)
            return archive.read(size)
        if self._packed:
            with self._zip().open(self._stored.get(name, name)) as member:
                return member.read(most)
        with open(self._file(name), "rb") as file:
            return file.read(most)

    def _file(self, name: str) -> str:
        return f"{self.path}/{name}"  # a Path would take as long as reading a small picture

    def _zip(self) -> zipfile.ZipFile:
        try:
            return self._archive()
        except NotImplementedError as error:
            raise ValueError(f"{self.path} cannot be unpacked ({error}): pack it again") from None
        except (zipfile.BadZipFile, EOFError, struct.error, ValueError):
            raise ValueError(
                f"{self.path} is no zip file, or a damaged one: pass a folder, a .zip or a .tar, "
                "or download it again"
            ) from None


def _members(path: Path, damaged: Callable[[str], None] | None) -> list[Member]:
    """Return the files of a tar, or those before its cut."""
    members: list[Member] = []
    try:
        with open(path, "rb") as file:
            members.extend(tar_members(file))
    except CutTar as error:
        if damaged is None:
            raise ValueError(f"{path} is {error}: download or pack it again") from None
        damaged(f"{path} is {error}: what lies there and what followed are lost")
    except DamagedTar as error:
        raise ValueError(
            f"{path} is no plain tar file, or a damaged one ({error}): unpack what is compressed"
        ) from None
    return members


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a file, which may neither wait nor never end.

    Raises:
        FileNotFoundError: it does not exist.
        OSError: it cannot be read.
        ValueError: it is no regular file, or larger than `most` bytes.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: pass the list or set itself") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file: pass the list or set itself")
    if status.st_size > most:
        raise ValueError(f"{path} is refused: {status.st_size} bytes are more than {most}")
    with path.open("rb") as file:
        return file.read(status.st_size)


def leads_out(name: str) -> bool:
    """Tell whether a name would be written outside of the folder that it is unpacked into.

    >>> leads_out("Ann/1.jpg"), leads_out("Ann/../../1.jpg"), leads_out("C:/1.jpg")
    (False, True, True)
    """
    parts = re.split(r"[/\\]", name)
    return ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name


def is_plain(name: str) -> bool:
    """Tell whether a name can be that of one file or folder, and one that is not hidden.

    >>> is_plain("Ann"), is_plain("Ann/1"), is_plain(".."), is_plain("")
    (True, False, False, False)
    """
    hidden = name.startswith(".") or name == "__MACOSX"
    slashes = "/" in name or "\\" in name
    # what is not printable may not even be a character that a file's name can hold
    return not (slashes or hidden or leads_out(name)) and name.isprintable() and len(name) <= 200


def _again(names: list[str]) -> list[str]:
    """Return each name as often as it comes after its first time."""
    counts = Counter(names)
    return [name for name in sorted(counts) for _ in range(counts[name] - 1)]


def _walk(root: Path) -> list[str]:
    def refuse(error: OSError) -> None:
        raise ValueError(
            f"{error.filename} cannot be listed ({error.strerror}): make it readable, or move it"
        )

    names = []
    # Linked folders are followed, as data sets are often assembled that way; the depth is bounded
    # in case they form a ring.
    for folder, inner, files in os.walk(root, onerror=refuse, followlinks=True):
        relative = Path(folder).relative_to(root)
        if inner and len(relative.parts) >= _MAX_DEPTH:
            raise ValueError(
                f"{Path(folder) / min(inner)} lies more than {_MAX_DEPTH} folders deep: move it, "
                "or remove the link that leads in a ring"
            )
        names += [(relative / name).as_posix() for name in files]
    return names
