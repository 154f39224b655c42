"""The camera: exposure, contrast, blur, low resolution, noise, compression, 8 bits."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image

from .face_params import Nuisance, NuisanceRanges


def _blur(size: int, sigma: float) -> np.ndarray:
    return _blur_matrix(size, max(round(sigma * 8), 1))


@lru_cache(maxsize=64)
def _blur_matrix(size: int, eighths: int) -> np.ndarray:
    """Gaussian blur along one axis as a matrix [size, size]: two products blur a picture."""
    d = np.arange(size)
    weights = np.exp(-0.5 * ((d[:, None] - d) / (eighths / 8)) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def develop(
    linear: np.ndarray, n: Nuisance, ranges: NuisanceRanges, rng: np.random.Generator
) -> np.ndarray:
    """Turn linear light [3, s, s] into an RGB picture [s, s, 3] of 8 bits."""
    size = linear.shape[1]
    picture = np.sqrt(np.maximum(linear * n.exposure, 0))
    # A shoulder instead of hard clipping, then contrast about middle grey.
    picture = picture * 1.12 / np.sqrt(1 + 0.3 * picture * picture)
    picture -= 0.45
    picture *= n.contrast
    picture += 0.45
    if n.saturation != 1.0:
        grey = picture.mean(0)
        picture -= grey
        picture *= n.saturation
        picture += grey
    if rng.random() < ranges.blur:
        sigma = 0.35 + 1.4 * rng.random() ** 1.5
        stretch = 0.35 if rng.random() < 0.2 else 1.0  # motion blurs one direction
        picture = _blur(size, sigma * size / 112) @ picture
        picture = picture @ _blur(size, sigma * stretch * size / 112).T
    if rng.random() < ranges.noise:
        sigma = 0.05 * rng.random() ** 2
        grain = rng.standard_normal((size, size), np.float32)
        picture += sigma * grain
        picture[0] += 0.5 * sigma * np.roll(grain, 17, 0)
        picture[2] += 0.5 * sigma * np.roll(grain, 31, 1)
    picture *= 255
    np.clip(picture, 0, 255, out=picture)
    bytes_ = np.ascontiguousarray(np.rint(picture).astype(np.uint8).transpose(1, 2, 0))
    low, jpeg = rng.random() < ranges.low_resolution, rng.random() < ranges.jpeg
    if low or jpeg:
        image = Image.fromarray(bytes_)
        if low:
            side = int(size * rng.uniform(0.25, 0.7))
            image = image.resize((side, side), Image.Resampling.BOX)
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        if jpeg:
            stream = io.BytesIO()
            image.save(stream, "JPEG", quality=int(rng.integers(25, 92)))
            image = Image.open(stream)
        bytes_ = np.asarray(image).copy()
    return bytes_
