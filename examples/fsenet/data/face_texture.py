"""Noise and palettes for the painter: a fixed bank of tileable textures, cut at random."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

_BANK = 512


def palette(*srgb: list[int]) -> Callable[[float], np.ndarray]:
    """Colours in linear light between listed sRGB ones: position in [0, 1] -> [3]."""
    stops = (np.array(srgb, np.float32) / 255) ** 2

    def colour(position: float) -> np.ndarray:
        at = min(max(position, 0.0), 1.0) * (len(stops) - 1)
        i = min(int(at), len(stops) - 2)
        return stops[i] + np.float32(at - i) * (stops[i + 1] - stops[i])

    return colour


@lru_cache
def bank(sigma_x: float, sigma_y: float) -> np.ndarray:
    """Unit-variance Gaussian noise [512, 512], smooth over the sigmas in pixels, tileable."""
    rng = np.random.default_rng([int(8 * sigma_x), int(8 * sigma_y)])
    f = np.fft.fftfreq(_BANK)
    gain = np.exp(-2 * np.pi**2 * ((sigma_y * f[:, None]) ** 2 + (sigma_x * f[None, :]) ** 2))
    field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((_BANK, _BANK))) * gain).real
    return ((field - field.mean()) / field.std()).astype(np.float32)


def noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """A random cut [size, size] of unit-variance noise; read only."""
    field = bank(sigma, sigma)
    if size > _BANK:
        field = np.tile(field, (2 + size // _BANK,) * 2)
    y, x = rng.integers(0, max(len(field) - size, 1), 2)
    return field[y : y + size, x : x + size]


def strands(across: np.ndarray, along: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hair-like noise, fine across and long along; the coordinates are in pixels."""
    field = bank(10.0, 0.9)
    shift = rng.integers(0, _BANK, 2)
    rows = (across + shift[0]).astype(np.int32) & (_BANK - 1)
    columns = (along + shift[1]).astype(np.int32) & (_BANK - 1)
    return field[rows, columns]
