"""Where each file of a tar lies, read from its headers alone.

A tar is a row of members: a header of 512 bytes, then the file, padded to a multiple of 512; two
headers of zeros end it. `tarfile` takes more than twice as long and keeps every member in memory,
which millions of pictures have no room for.

Source: POSIX.1-2017 `pax`, interchange formats, and GNU tar's long names.
"""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512
_LONGEST = 2**16  # bytes of a name or of a member's attributes
_FILES = b"0\0007"
_ATTRIBUTES = b"xgLK"


class Member(NamedTuple):
    """A file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


class DamagedTar(ValueError):
    """The bytes are no tar; members before may have been read."""


class CutTar(DamagedTar):
    """The tar ends before its end is marked."""


def tar_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of a tar; links, devices and sparse files are passed over.

    Args:
        file: open for reading; between two members it may be read elsewhere.

    Raises:
        CutTar: it is cut short; the message says at which byte.
        DamagedTar: a header is damaged, or this is no tar.
    """
    end, offset = os.fstat(file.fileno()).st_size, 0
    attributes: dict[str, str] = {}
    while True:
        file.seek(offset)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            if not offset:
                raise DamagedTar("no tar header at byte 0")
            raise CutTar(f"cut short at byte {end}")
        if not header.strip(b"\0"):
            return
        kind, size = header[156:157], _number(header[124:136], offset)
        if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], offset):
            raise DamagedTar(f"no tar header at byte {offset}")
        begin = offset + BLOCK
        if kind in _ATTRIBUTES:
            if size > _LONGEST:
                raise DamagedTar(f"attributes of {size} bytes at byte {offset}")
            data = file.read(size)
            if kind != b"g":  # of all members that follow: none that matter here
                attributes |= _pax(data, offset) if kind == b"x" else _long(kind, data)
        else:
            name = attributes.get("path") or _name(header)
            if "size" in attributes:
                size = _whole(attributes["size"], offset)
            if begin + size > end:
                raise CutTar(f"cut short at byte {end}, inside {name!r}")
            sparse = any(key.startswith("GNU.sparse") for key in attributes)
            folder = kind == b"\0" and name.endswith("/")  # as before folders had a kind
            if kind in _FILES and not sparse and not folder:
                yield Member(without_dots(name), begin, size)
            attributes = {}
        offset = begin + size + -size % BLOCK


def member_name(header: bytes) -> str:
    """Return the name in a header of 512 bytes, of a long one the beginning."""
    return without_dots(_name(header))


def without_dots(name: str) -> str:
    """Return a name without the parts that say "this folder".

    >>> without_dots("./Ann/./1.jpg"), without_dots("./../1.jpg"), without_dots("Ann./1.jpg")
    ('Ann/1.jpg', '../1.jpg', 'Ann./1.jpg')
    """
    if "./" not in name:  # of millions of names, nearly all
        return name
    return "/".join(part for part in name.split("/") if part != ".")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")


def _long(kind: bytes, data: bytes) -> dict[str, str]:
    return {"path" if kind == b"L" else "linkpath": _text(data.split(b"\0", 1)[0])}


def _pax(data: bytes, offset: int) -> dict[str, str]:
    """Read lines of `length key=value`, where the length counts the whole line."""
    found = {}
    while data.strip(b"\0"):
        digits = data.split(b" ", 1)[0]
        length = _whole(digits.decode("ascii", errors="replace"), offset)
        key, equals, value = data[len(digits) + 1 : length - 1].partition(b"=")
        if not equals or not len(digits) + 1 < length <= len(data):  # 0 would never end
            raise DamagedTar(f"damaged attributes at byte {offset}")
        found[_text(key)] = _text(value)
        data = data[length:]
    return found


def _number(field: bytes, offset: int) -> int:
    if field[0] == 0x80:  # GNU's, of more than 8 GB
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0") or b"0"
    if not digits.isdigit() or max(digits) > ord("7"):  # int() takes signs, which lead backwards
        raise DamagedTar(f"no tar header at byte {offset}")
    return int(digits, 8)


def _whole(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise DamagedTar(f"damaged attributes at byte {offset}")
    return int(text)
