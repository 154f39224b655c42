"""Skin under light: albedo with blush, beard, freckles and pores; shading from bumps.

Light comes from one normal per pixel: an ellipsoid plus Gaussian bumps (nose, brows, cheeks,
lips, chin), summed by two matrix products. Colours are linear light until the camera.
"""

from __future__ import annotations

import math

import numpy as np

from .face_canvas import Canvas, clip, coverage
from .face_geometry import FaceShape
from .face_params import Identity, Nuisance
from .face_texture import noise, palette

_SKIN = palette(
    [245, 213, 193], [229, 184, 156], [205, 154, 120], [168, 117, 84], [132, 90, 66], [96, 65, 51]
)


def shade(
    p: Identity, n: Nuisance, shape: FaceShape, canvas: Canvas
) -> tuple[np.ndarray, np.ndarray]:
    """Diffuse light on the skin [3, s, s] and its gloss [s, s]."""
    s, m, k = canvas.axis, shape.marks, shape.scale
    w = p.relief
    smile = max(n.smile, 0.0)
    lips = shape.lips
    top, low = lips[0][10], lips[3][10]
    ridge, wing, eye = shape.ridge, m["wings"], m["sockets"]
    lx, ly, lz = n.light
    fold = 1.2 * (0.4 + p.folds + 0.8 * smile)
    tip = ridge[3]
    nose = p.nose_depth / 16
    # x, y, height, spread in x, spread in y, darkness of the hollow
    rows = [
        (*ridge[0], 0.8 * nose, p.nose_bridge * 0.8, 5, 0),
        (*ridge[1], 2.4 * nose, p.nose_bridge * 0.85 + 0.4, 5, 0),
        (*ridge[2], 3.2 * nose, p.nose_bridge * 0.8 + 0.8, 5, 0),
        (*tip, 4.2 * nose, p.nose_tip * 0.85, 3.6, 0),
        (*wing[0], 2.0 * nose, 2.6, 2.8, 0),
        (*wing[1], 2.0 * nose, 2.6, 2.8, 0),
        (wing[0][0] - 2.6 * k, wing[0][1], -0.6, 1.5, 3, 0.16),
        (wing[1][0] + 2.6 * k, wing[1][1], -0.6, 1.5, 3, 0.16),
        (*m["brows"][0], 1.5 * w, 8.5, 3.2, 0),
        (*m["brows"][1], 1.5 * w, 8.5, 3.2, 0),
        (*eye[0], -2.4 * w, 6.5, 4.5, 0.22 * w),
        (*eye[1], -2.4 * w, 6.5, 4.5, 0.22 * w),
        (eye[0][0] - 2 * k, eye[0][1] + 1.5 * k, 2.0, 5.5, 3.6, 0),
        (eye[1][0] + 2 * k, eye[1][1] + 1.5 * k, 2.0, 5.5, 3.6, 0),
        (eye[0][0] - 1 * k, eye[0][1] + 9 * k, 0.5 * p.eye_bags, 6, 2.2, 0.17 * p.eye_bags),
        (eye[1][0] + 1 * k, eye[1][1] + 9 * k, 0.5 * p.eye_bags, 6, 2.2, 0.17 * p.eye_bags),
        (*m["cheeks"][0], 3.2 * w + 2 * smile, 9, 8, 0),
        (*m["cheeks"][1], 3.2 * w + 2 * smile, 9, 8, 0),
        (*m["folds"][0], -0.5 * fold, 2.0, 5, 0.10 * fold),
        (*m["folds"][1], -0.5 * fold, 2.0, 5, 0.10 * fold),
        (tip[0], 0.5 * (tip[1] + top[1]), 1.5, 10, 6, 0),
        (
            tip[0] - 7 * lx * k,
            tip[1] + (5.5 + 3 * max(-ly, 0)) * k,
            0,
            p.nose_width * 0.7,
            2.6,
            0.3,
        ),
        (tip[0] - 8 * lx * k, tip[1] - 5 * k, 0, 3.5, 8, 0.35 * min(abs(lx), 0.8) * nose),
        (low[0], low[1] + 2.5 * k, -1.0 * w, p.mouth_width * 0.55, 2.0, 0.20),
        (*m["chin"], 2.6 * w, 7.5, 6.0, 0),
        (*lips[0][0], -0.3, 1.8, 2.0, 0.14),
        (*lips[0][-1], -0.3, 1.8, 2.0, 0.14),
        (*m["forehead"], 2.2, 16, 12, 0),
        (top[0], top[1] + 1.2 * k, 0.7, p.mouth_width * 0.6, 1.6, 0),
        (low[0], low[1] - 2.0 * k, 1.0, p.mouth_width * 0.5, 1.9, 0),
    ]
    b = np.array(rows, np.float32).T
    sx, sy = b[3] * k, b[4] * k
    dx = (s[None] - b[0][:, None]) / sx[:, None]
    dy = (s[None] - b[1][:, None]) / sy[:, None]
    gx, gy = np.exp(-0.5 * dx * dx), np.exp(-0.5 * dy * dy)
    head = m["head"]
    rx, ry = 50.0 * k, 78.0 * k
    nx = gy.T @ (gx * dx * (b[2] * k / sx)[:, None])
    nx += (s - head[0]) / rx
    ny = (gy * dy * (b[2] * k / sy)[:, None]).T @ gx
    ny += ((s - head[1] - 8 * k) / ry)[:, None]
    dark = (gy * b[5][:, None]).T @ gx
    inverse = 1 / np.sqrt(nx * nx + ny * ny + 0.72)
    lambert = (nx * lx + ny * ly + 0.85 * lz) * inverse
    gloss = lambert * lambert
    gloss *= gloss
    gloss *= gloss * (lambert > 0)
    np.maximum(lambert, 0, out=lambert)
    lambert *= (1 - n.ambient) / max(0.75 * lz + 0.25, 0.4)
    rest = np.exp(-1.4 * dark) * (1 - 0.12 * clip(ny, -1, 1))
    if n.cast[0]:
        c, d = math.cos(n.cast[2]), math.sin(n.cast[2])
        edge = (s - s.mean()) * c + ((s - s.mean()) * d)[:, None]
        lambert *= 1 - n.cast[0] / (
            1 + np.exp(clip((n.cast[1] * k - edge) / (1.5 * k), -30.0, 30.0))
        )
    light = n.light_gains[:, None, None] * lambert
    light += (n.ambient * n.fill_gains)[:, None, None]
    light *= rest
    return light, gloss


def skin_colour(person: Identity | float) -> np.ndarray:
    """Mean colour [3] of a person's skin, or of a tone in [0, 1]."""
    if isinstance(person, Identity):
        warmth = np.exp(0.10 * person.skin_warmth * np.array([0.5, 0, -1], np.float32))
        return _SKIN(person.skin_tone) * warmth
    return _SKIN(person)


def skin_albedo(
    p: Identity, n: Nuisance, shape: FaceShape, canvas: Canvas, rng: np.random.Generator
) -> np.ndarray:
    """Colour of the bare skin [3, s, s] with blush, beard, freckles and pores."""
    size, m, k = canvas.size, shape.marks, shape.scale
    s = canvas.axis
    tone = skin_colour(p)
    skin = np.empty((3, size, size), np.float32)
    skin[:] = tone[:, None, None]
    grain = noise(rng, size, 4) * 0.04 + noise(rng, size, 1) * 0.02
    skin *= 1 + grain
    points = np.stack([*m["cheeks"], shape.ridge[3]])
    gx = np.exp(-0.5 * ((s - points[:, :1]) / (8 * k)) ** 2)
    gy = np.exp(-0.5 * ((s - points[:, 1:]) / (7 * k)) ** 2)
    blush = (gy.T @ gx).astype(np.float32) * (0.05 + 0.22 * p.cheek_red)
    skin[1] *= 1 - 0.55 * blush
    skin[2] *= 1 - 0.5 * blush
    if p.freckles > 0:
        spots = np.maximum(noise(rng, size, 2) - 1.2, 0) * np.minimum(4 * blush + 0.1, 1)
        skin *= 1 - np.minimum(p.freckles * spots, 0.6)
    if n.stubble:
        chin = shape.lips[0][10]
        below = clip((s - chin[1] + 9 * k) / (5 * k), 0, 1)[:, None]
        away = np.abs(s - chin[0]) / (32 * k)
        mask = below * clip(1.2 - 0.3 * away, 0, 1)
        up_cheek = clip((s[:, None] - chin[1] + 12 * k - 14 * k * (away > 0.4)) / (9 * k), 0, 1)
        mask = mask * up_cheek * n.stubble
        hair = n.hair_colour * 0.8 + 0.2 * tone * 0.3
        mask = clip(mask * (0.85 + 0.15 * noise(rng, size, 1)), 0, 1)
        skin += mask * (hair[:, None, None] - skin)
    sizes = (p.mole_left_size, p.mole_right_size, p.mole_middle_size)
    for (x, y), mole in zip(m["moles"], sizes, strict=True):
        if mole > 0:
            r = mole * k
            box = canvas.window(x - r - 2, y - r - 2, x + r + 2, y + r + 2)
            d = np.hypot(s[box[1]] - x, s[box[0], None] - y)
            skin[:, box[0], box[1]] *= 1 - 0.65 * coverage(r - d)
    return skin
