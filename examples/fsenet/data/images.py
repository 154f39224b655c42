"""Pictures sorted by person, `<identity>/<image>`, in a folder or inside a zip left packed.

Archives come from strangers: no member is written anywhere, names that would leave the archive
are refused, and sizes are checked before anything is unpacked or decoded.
"""

import io
import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # of all that Pillow reads, EPS starts Ghostscript
MAX_BYTES = 64 * 2**20  # a member or file: no face picture is larger
MAX_PIXELS = 64 * 10**6  # 192 MB once decoded
_MAX_DEPTH = 8


class DamagedImage(ValueError):
    """One picture cannot be read or decoded; a loader may count and skip it."""


class Source:
    """Read files by name from a folder or a zip; each process opens the zip for itself.

    Args:
        path: a folder or a `.zip`.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: it is neither, the zip is damaged, or a name in it leads out of it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist: pass a folder or a .zip")
        self._packed = not self.path.is_dir()
        if self._packed:
            names = [name for name in self._open().namelist() if not name.endswith("/")]
            for name in names:
                parts = re.split(r"[/\\]", name)
                if ".." in parts or parts[0] == "" or ":" in parts[0] or "\0" in name:
                    raise ValueError(
                        f"{self.path} holds the unsafe name {name!r}, which leads out of the "
                        "archive: do not use it, or pack it again with relative names"
                    )
        else:
            names = list(_walk(self.path))
        self.names = tuple(sorted(set(names)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def read(self, name: str, limit: int = MAX_BYTES) -> bytes:
        """Return the bytes of one file.

        Raises:
            DamagedImage: the file is missing, damaged, encrypted, or larger than `limit` bytes.
        """
        where = f"{self.path}:{name}" if self._packed else str(self.path / name)
        try:
            if self._packed:
                archive = self._open()
                size = archive.getinfo(name).file_size  # no more than this is ever unpacked
            else:
                size = (self.path / name).stat().st_size
            if size > limit:
                raise DamagedImage(f"{where} is refused: {size} bytes are more than {limit}")
            return archive.read(name) if self._packed else (self.path / name).read_bytes()
        except (KeyError, FileNotFoundError):
            raise DamagedImage(f"{where} does not exist") from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise DamagedImage(f"{where} is damaged in the archive ({error})") from None
        except (RuntimeError, NotImplementedError) as error:
            raise DamagedImage(f"{where} cannot be unpacked ({error})") from None
        except OSError as error:
            raise DamagedImage(f"{where} cannot be read ({error.strerror or error})") from None

    def text(self, name: str) -> str:
        """Return one file as UTF-8 text; what is no UTF-8 is replaced."""
        return self.read(name).decode("utf-8", errors="replace")

    def _open(self) -> zipfile.ZipFile:
        # A handle inherited through fork would share its file position with the other process.
        if self._zip is None or self._pid != os.getpid():
            try:
                self._zip, self._pid = zipfile.ZipFile(self.path), os.getpid()
            except (zipfile.BadZipFile, EOFError, struct.error):
                raise ValueError(
                    f"{self.path} is no zip file, or a damaged one: pass a folder or a .zip, or "
                    "download it again"
                ) from None
        return self._zip


def load_rgb(data: bytes, name: str = "picture") -> UInt8[np.ndarray, "h w 3"]:
    """Decode one picture to RGB.

    >>> buffer = io.BytesIO()
    >>> Image.new("L", (4, 2), 7).save(buffer, "PNG")
    >>> load_rgb(buffer.getvalue()).shape
    (2, 4, 3)

    Args:
        data: the file's bytes, in one of `FORMATS`.
        name: how errors call the picture.

    Raises:
        DamagedImage: the bytes are of no such format, truncated, or more than `MAX_PIXELS` pixels.
    """
    return np.asarray(_open_image(data, name).convert("RGB"))


class IdentityFolder(Dataset[tuple[Tensor, int]]):
    """Pictures and whose they are, from `<identity>/<image>` in a folder or zip.

    One folder around all identities (`images/` in many archives) is left out of the paths. The
    order is that of the sorted paths; labels number the identities that are kept, in their order.

    Args:
        path: a folder or `.zip`.
        identities: keep these alone; None keeps all.
        size: height and width that every picture is brought to when it is read (bilinear,
            antialiased); None leaves it as it is stored.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: there are no pictures, one does not lie in the folder of an identity, or an
            identity asked for is not there.
    """

    def __init__(
        self,
        path: str | Path,
        identities: Collection[str] | None = None,
        size: int | None = None,
    ) -> None:
        self.source, self.size = Source(path), size
        images = [name for name in self.source.names if is_image(name)]
        if not images:
            raise ValueError(
                f"{path} holds no pictures ({len(self.source.names)} files): expected "
                f"<identity>/<image> with one of {' '.join(IMAGE_SUFFIXES)}"
            )
        outer = {name.split("/")[0] for name in images}
        self._prefix = ""
        if len(outer) == 1 and all(name.count("/") == 2 for name in images):
            self._prefix = outer.pop() + "/"
        paths = [name[len(self._prefix) :] for name in images]
        for name in paths:
            if name.count("/") != 1:
                raise ValueError(f"{path} holds {name!r}, which is not <identity>/<image>: move it")
        owners = [name.split("/")[0] for name in paths]
        wanted = set(owners) if identities is None else set(identities)
        if unknown := sorted(wanted - set(owners)):
            raise ValueError(
                f"{path} holds no pictures of {unknown[0]!r}"
                + (f" and {len(unknown) - 1} other identities asked for" if unknown[1:] else "")
            )
        self.identities = tuple(sorted(wanted))
        number = {name: label for label, name in enumerate(self.identities)}
        kept = [(name, owner) for name, owner in zip(paths, owners, strict=True) if owner in number]
        self.paths = tuple(name for name, _ in kept)
        self.labels = np.array([number[owner] for _, owner in kept], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.load(index).copy()).permute(2, 0, 1), int(self.labels[index])

    def load(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Return one picture.

        Raises:
            DamagedImage: see `load_rgb`.
            ValueError: it must be resized and is not square.
        """
        name = self._prefix + self.paths[index]
        picture = load_rgb(self.source.read(name), f"{self.source.path}:{name}")
        height, width = picture.shape[:2]
        if self.size is None or height == width == self.size:
            return picture
        if height != width:  # to stretch it would change the face
            raise ValueError(
                f"{self.source.path}:{name} is {width}x{height}, not square: cut out and align "
                "the faces first (docs/how-to/alignment.md)"
            )
        resized = Image.fromarray(picture).resize((self.size,) * 2, Image.Resampling.BILINEAR)
        return np.asarray(resized)

    def __repr__(self) -> str:
        return (
            f"IdentityFolder({str(self.source.path)!r}): {len(self)} pictures of "
            f"{len(self.identities)} identities"
        )


def decode_all(folder: IdentityFolder, progress: bool = True) -> UInt8[Tensor, "n 3 h w"]:
    """Decode a small set into memory: all of LFW at 112 is 500 MB and takes 7 s of one core.

    Args:
        folder: what to decode, in its order.
        progress: show a bar.

    Returns:
        The pictures, channels last in memory.

    Raises:
        DamagedImage: one cannot be decoded.
        ValueError: sizes differ, or one cannot be brought to the folder's size.
    """
    height, width = folder.load(0).shape[:2]
    pictures = np.empty((len(folder), height, width, 3), dtype=np.uint8)
    for index in tqdm(range(len(folder)), desc="decoding", disable=not progress):
        picture = folder.load(index)
        if picture.shape != pictures.shape[1:]:
            raise ValueError(
                f"{folder.paths[index]} is {picture.shape[1]}x{picture.shape[0]} and "
                f"{folder.paths[0]} is {width}x{height}: pass size= to IdentityFolder to resize"
            )
        pictures[index] = picture
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def is_image(name: str) -> bool:
    """Tell by the suffix; files that an operating system hides beside pictures are none."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return name.lower().endswith(IMAGE_SUFFIXES) and not hidden


def _open_image(data: bytes, name: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise DamagedImage(
                    f"{name} is refused: {image.width}x{image.height} is more than "
                    f"{MAX_PIXELS} pixels"
                )
            image.load()
    except DamagedImage:
        raise
    except Image.DecompressionBombError:
        raise DamagedImage(f"{name} is refused: more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise DamagedImage(
            f"{name} is no picture of {', '.join(FORMATS)}, or a damaged one: replace or remove it"
        ) from None
    except (OSError, SyntaxError, ValueError, zlib.error, struct.error) as error:
        raise DamagedImage(f"{name} is damaged ({error}): replace or remove it") from None
    return image


def _walk(root: Path) -> list[str]:
    names = []
    # Linked folders are followed, as data sets are often assembled that way; the depth is bounded
    # in case they form a ring.
    for folder, inner, files in os.walk(root, followlinks=True):
        relative = Path(folder).relative_to(root)
        if len(relative.parts) >= _MAX_DEPTH:
            inner.clear()
        names += [(relative / name).as_posix() for name in files]
    return names
