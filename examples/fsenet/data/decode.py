"""Encoded pictures to pixels. They come from strangers: sizes are checked before decoding."""

import io
import struct
import warnings
import zlib

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from data.archives import DamagedImage

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF")  # of all that Pillow reads, EPS starts Ghostscript
MAX_PIXELS = 64 * 10**6  # 192 MB once decoded
_DAMAGES = (  # what Pillow's decoders raise on bytes that are not as they should be
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RuntimeError, EOFError, zlib.error, struct.error),
)


def load_rgb(data: bytes, name: str = "picture") -> UInt8[np.ndarray, "h w 3"]:
    """Decode one picture to RGB; of a grey PNG with 16 bits, the brightest stays the brightest.

    >>> buffer = io.BytesIO()
    >>> Image.new("L", (4, 2), 7).save(buffer, "PNG")
    >>> load_rgb(buffer.getvalue()).shape
    (2, 4, 3)

    Args:
        data: the file's bytes, in one of `FORMATS`.
        name: how errors call the picture.

    Raises:
        DamagedImage: the bytes are of no such format, truncated, more than `MAX_PIXELS` pixels, or
            grey ones whose white no standard fixes.
    """
    return np.asarray(_decode(data, name))


def _decode(data: bytes, name: str) -> Image.Image:
    """Decode to RGB."""
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
            return _eight_bits(image, name).convert("RGB")
    except DamagedImage:
        raise
    except Image.DecompressionBombError:
        raise DamagedImage(f"{name} is refused: more than {MAX_PIXELS} pixels") from None
    except Image.UnidentifiedImageError:
        raise DamagedImage(
            f"{name} is no picture of {', '.join(FORMATS)}, or a damaged one: replace or remove it"
        ) from None
    except _DAMAGES as error:
        raise DamagedImage(f"{name} is damaged ({error}): replace or remove it") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Return a grey picture of more bits in eight, which Pillow would cut off at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if image.format != "PNG":  # where it has 16 bits of which all are used; TIFF holds any numbers
        raise DamagedImage(
            f"{name} is a {image.format} of mode {image.mode}, whose white is not known: "
            "convert it to 8 bits"
        )
    grey = np.rint(np.asarray(image, dtype=np.float64) / 257).astype(np.uint8)  # 65535 / 255
    return Image.fromarray(grey)
