"""Paint a placed face: colours and labels from the same coverage masks.

A part is the region between two curves over the columns (eyes, brows, lips) or rows (outline,
nose, neck), so its mask is one clipped distance on its bounding box, a pixel belongs to the part
where the coverage passes one half, and soft edges never disagree with labels by more than a
pixel. Light comes from one normal per pixel: an ellipsoid plus Gaussian bumps (nose, brows,
cheeks, lips, chin), summed by two matrix products. Colours are linear light until the camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .face_geometry import FaceShape
from .face_params import Identity, Nuisance
from .face_texture import noise, palette

BACKGROUND, SKIN, BROWS, EYES, NOSE, UPPER, INNER, LOWER, HAIR = 0, 1, (2, 3), (4, 5), 6, 7, 8, 9, 10

_SKIN = palette(
    [245, 213, 193], [229, 184, 156], [205, 154, 120], [168, 117, 84], [120, 80, 58], [78, 52, 42]
)
_IRIS = palette(
    [32, 22, 18], [52, 34, 24], [74, 46, 30], [104, 76, 46], [92, 104, 70], [86, 112, 138], [124, 134, 140]
)
_BROW = palette([26, 20, 18], [58, 40, 30], [98, 68, 46], [140, 106, 72])
_LIPS = palette([172, 104, 92], [176, 84, 82], [150, 60, 66])


@dataclass
class Canvas:
    """The picture under way: linear colours, labels, and the pixel grid."""

    colour: np.ndarray  # [3, s, s]
    labels: np.ndarray  # [s, s]
    glasses: np.ndarray  # [s, s] bool, for the shortcut tests

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = np.empty((3, size, size), np.float32)
        self.labels = np.zeros((size, size), np.uint8)
        self.glasses = np.zeros((size, size), bool)
        self.axis = np.arange(size, dtype=np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns of the box, cut to the picture (perhaps empty)."""
        s = self.size
        ys = slice(int(min(max(y0, 0), s)), int(min(max(y1 + 1, 0), s)))
        xs = slice(int(min(max(x0, 0), s)), int(min(max(x1 + 1, 0), s)))
        return ys, xs

    def paint(
        self, box: tuple[slice, slice], cover: np.ndarray, colour: np.ndarray, label: int | None
    ) -> None:
        """Lay `colour` ([3] or [3, h, w]) over the box where `cover` says, and set the label."""
        if cover.size == 0:
            return
        area = self.colour[:, box[0], box[1]]
        if colour.ndim == 1:
            colour = colour[:, None, None]
        area += cover * (colour - area)
        if label is not None:
            self.labels[box][cover > 0.5] = label


def between_columns(
    curves: tuple[np.ndarray, np.ndarray], canvas: Canvas, margin: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """Window of the region under `curves[0]` and over `curves[1]`, and both as rows per column.

    Returns the window, the two rows [w] and the signed distance [h, w], positive inside.
    """
    top, low = curves
    box = canvas.window(
        min(top[0, 0], low[0, 0]) - margin,
        min(top[:, 1].min(), low[:, 1].min()) - margin,
        max(top[-1, 0], low[-1, 0]) + margin,
        max(top[:, 1].max(), low[:, 1].max()) + margin,
    )
    x, y = canvas.axis[box[1]], canvas.axis[box[0], None]
    up = over(x, top)
    down = np.maximum(over(x, low), up)
    inside = np.minimum((y - up) * slope(up), (down - y) * slope(down))
    ends = np.minimum(x - min(top[0, 0], low[0, 0]), max(top[-1, 0], low[-1, 0]) - x)
    return box, up, down, np.minimum(inside, ends + 0.5)


def over(x: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Height of a left-to-right curve at columns `x`; folds are ironed out."""
    return np.interp(x, np.maximum.accumulate(curve[:, 0]), curve[:, 1]).astype(np.float32)


def slope(values: np.ndarray) -> np.ndarray:
    """Cosine of a curve's slope: turns vertical into true distances."""
    steep = np.zeros_like(values)
    steep[1:-1] = 0.5 * (values[2:] - values[:-2])
    if values.size > 2:
        steep[0], steep[-1] = steep[1], steep[-2]
    return 1 / np.sqrt(1 + steep * steep)


def clip(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`np.clip` on a fresh array, without its overhead: it is called a hundred times a face."""
    values = np.maximum(values, low)
    return np.minimum(values, high, out=values)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Part of a pixel inside, from the signed distance of its centre."""
    return clip(distance + 0.5, 0.0, 1.0)


def head_distance(shape: FaceShape, canvas: Canvas) -> np.ndarray:
    """Signed distance to the outline of the head [s, s], positive inside."""
    y = canvas.axis
    left, right = shape.outline
    xl = np.interp(y, np.maximum.accumulate(left[:, 1]), left[:, 0]).astype(np.float32)
    xr = np.interp(y, np.maximum.accumulate(right[:, 1]), right[:, 0]).astype(np.float32)
    x = canvas.axis
    sides = np.minimum(
        (x - xl[:, None]) * slope(xl)[:, None], (xr[:, None] - x) * slope(xr)[:, None]
    )
    chin = max(left[-1, 1], right[-1, 1])
    return np.minimum(sides, (chin - y)[:, None])


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
        (tip[0] - 7 * lx * k, tip[1] + (5.5 + 3 * max(-ly, 0)) * k, 0, p.nose_width * 0.7, 2.6, 0.3),
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
        lambert *= 1 - n.cast[0] / (1 + np.exp(clip((n.cast[1] * k - edge) / (1.5 * k), -30.0, 30.0)))
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
    if p.mole_size > 0:
        x, y = m["mole"]
        r = p.mole_size * k
        box = canvas.window(x - r - 2, y - r - 2, x + r + 2, y + r + 2)
        d = np.hypot(s[box[1]] - x, s[box[0], None] - y)
        skin[:, box[0], box[1]] *= 1 - 0.65 * coverage(r - d)
    return skin


def paint_face(
    p: Identity, n: Nuisance, shape: FaceShape, canvas: Canvas, rng: np.random.Generator
) -> np.ndarray:
    """Paint ears, face and its parts; returns the light, which hair and hands share."""
    light, gloss = shade(p, n, shape, canvas)
    skin = skin_albedo(p, n, shape, canvas, rng)
    face = Canvas.__new__(Canvas)  # parts are painted on albedo, then lit together
    face.size, face.axis, face.colour = canvas.size, canvas.axis, skin
    face.labels = np.full_like(canvas.labels, SKIN)
    inside = head_distance(shape, canvas)
    _ears(p, shape, canvas, skin, light)
    _nose(p, shape, face)
    for side in (0, 1):
        _eye(p, n, shape, face, side)
        _brow(p, shape, face, side, rng)
    _mouth(p, n, shape, face)
    skin *= light
    # Grazing light at the outline: cheeks and jaw turn away.
    skin *= 0.62 + 0.38 * np.sqrt(clip(inside / (9 * shape.scale), 0.02, 1))
    skin += (gloss * (n.gloss * 1.3)) * n.light_gains[:, None, None]
    _highlights(n, shape, face)
    cover = coverage(inside)
    canvas.colour += cover * (skin - canvas.colour)
    visible = cover > 0.5
    canvas.labels[visible] = face.labels[visible]
    return light


def _ears(
    p: Identity, shape: FaceShape, canvas: Canvas, skin: np.ndarray, light: np.ndarray
) -> None:
    k = shape.scale
    for x, y in shape.ears:
        ry, rx = p.ear_size * k, (3.2 + 0.12 * p.ear_size) * k
        box = canvas.window(x - rx - 1, y - ry - 1, x + rx + 1, y + ry + 1)
        dx = (canvas.axis[box[1]] - x) / rx
        dy = (canvas.axis[box[0], None] - y) / ry
        r = np.sqrt(dx * dx + dy * dy)
        relief = 0.75 - 0.35 * np.exp(-(((r - 0.55) / 0.2) ** 2))
        area = (slice(None), *box)
        canvas.paint(box, coverage((1 - r) * rx), skin[area] * light[area] * relief, SKIN)


def _nose(p: Identity, shape: FaceShape, face: Canvas) -> None:
    left, right = shape.nose_sides
    k, tip = shape.scale, shape.ridge[3]
    r = (p.nose_tip + 0.8) * k
    x0 = min(left[:, 0].min(), tip[0] - r)
    x1 = max(right[:, 0].max(), tip[0] + r)
    y0, y1 = min(left[0, 1], right[0, 1]), max(shape.nose_base[:, 1].max(), tip[1] + 0.7 * r)
    box = face.window(x0 - 2, y0 - 2, x1 + 2, y1 + 2)
    x, y = face.axis[box[1]], face.axis[box[0]]
    xl = np.interp(y, np.maximum.accumulate(left[:, 1]), left[:, 0])
    xr = np.interp(y, np.maximum.accumulate(right[:, 1]), right[:, 0])
    # A turned nose hides its far side: the ridge takes over as its edge.
    ridge = np.interp(y, np.maximum.accumulate(shape.ridge[:, 1]), shape.ridge[:, 0])
    xl, xr = np.minimum(xl, ridge - 1.2 * k), np.maximum(xr, ridge + 1.2 * k)
    base = over(x, shape.nose_base)
    body = np.minimum(x - xl[:, None], xr[:, None] - x)
    body = np.minimum(body, np.minimum(base - y[:, None], y[:, None] - y0))
    bulb = r - np.sqrt((x - tip[0]) ** 2 + ((y - tip[1])[:, None] / 0.8) ** 2)
    cover = coverage(np.maximum(body, bulb))
    face.labels[box][cover > 0.5] = NOSE
    area = face.colour[:, box[0], box[1]]
    for x_hole, y_hole in shape.nostrils:
        rx, ry = 0.22 * p.nose_width * k, (0.5 + 0.9 * p.nose_nostril) * k
        d = np.sqrt(((x - x_hole) / rx) ** 2 + (((y - y_hole) / ry) ** 2)[:, None])
        area *= 1 - (0.35 + 0.4 * p.nose_nostril) * clip(1.5 - d, 0, 1)


def _eye(p: Identity, n: Nuisance, shape: FaceShape, face: Canvas, side: int) -> None:
    k = shape.scale
    box, up, down, inside = between_columns(shape.lids[side], face, 5 * k)
    if inside.size == 0:
        return
    x, y = face.axis[box[1]], face.axis[box[0], None]
    area = face.colour[:, box[0], box[1]]
    cx, cy = shape.irises[side]
    width = abs(shape.lids[side][0][-1, 0] - shape.lids[side][0][0, 0])
    middle = 0.5 * (shape.lids[side][0][0, 0] + shape.lids[side][0][-1, 0])
    span = clip(1.15 - ((x - middle) / (0.5 * width)) ** 2, 0, 1)
    # Lid crease, make-up, then the opening, then lashes over its edge.
    crease = np.exp(-(((y - up + p.eye_fold * k) / (0.8 * k)) ** 2)) * span
    area *= 1 - 0.32 * crease
    if n.make_up:
        lid = clip((up - y) / k + 0.5, 0, 1) * clip((y - up) / (4 * k) + 1.2, 0, 1) * span
        area += (0.5 * n.make_up * lid) * (n.make_up_colour[:, None, None] - area)
    distance = np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    radius = p.iris_radius * k
    ball = np.empty_like(area)
    ball[:] = np.array([0.55, 0.50, 0.48], np.float32)[:, None, None]
    ball *= 1 - 0.3 * clip(np.abs(x - middle) / width, 0, 0.5)
    iris = _IRIS(p.iris_tone)[:, None, None] * (0.75 + 0.5 * clip(distance / radius, 0, 1))
    iris = iris * (1 - 0.6 * clip((distance - 0.75 * radius) / (0.25 * radius), 0, 1))
    ball += coverage(radius - distance) * (iris - ball)
    ball *= 1 - 0.93 * coverage(0.42 * radius - distance)
    ball *= 1 - 0.6 * clip(1 - (y - up) / (2.6 * k), 0, 1)
    cover = coverage(inside)
    area += cover * (ball - area)
    lash = clip(1.25 - np.abs(y - up + 0.2 * k) / (1.0 * k), 0, 1) * span
    line = clip(0.9 - np.abs(y - down - 0.1) / (0.9 * k), 0, 1) * span
    area *= 1 - np.minimum(0.9 * lash + 0.4 * line, 0.95)
    # Annotators count the dark lid margin as eye: half a pixel more than the opening.
    face.labels[box][inside > -0.6 * k] = EYES[side]


def _brow(
    p: Identity, shape: FaceShape, face: Canvas, side: int, rng: np.random.Generator
) -> None:
    k = shape.scale
    box, _, _, inside = between_columns(shape.brows[side][:2], face, 2 * k)
    if inside.size == 0:
        return
    cover = coverage(inside)
    texture = noise(rng, face.size, 1)[box]
    soft = clip(inside / (1.5 * k) + 0.8, 0, 1) * clip(0.85 + 0.25 * texture, 0, 1)
    face.paint(box, soft * p.brow_alpha, _BROW(p.brow_tone), None)
    face.labels[box][cover > 0.5] = BROWS[side]


def _mouth(p: Identity, n: Nuisance, shape: FaceShape, face: Canvas) -> None:
    k = shape.scale
    top, inner_top, inner_low, low = shape.lips
    box, up, down, inside = between_columns((top, low), face, 2 * k)
    if inside.size == 0:
        return
    x, y = face.axis[box[1]], face.axis[box[0], None]
    a = clip(over(x, inner_top), up, down)
    b = clip(over(x, inner_low), a, down)
    area = face.colour[:, box[0], box[1]]
    red = _LIPS(p.lip_red)
    red = 0.55 * red + 0.45 * _SKIN(p.skin_tone) * np.array([1.0, 0.62, 0.62], np.float32)
    if n.make_up:
        paint = np.array([0.45, 0.08, 0.1], np.float32) * 0.6 + n.make_up_colour * 0.3
        red = red + 0.75 * n.make_up * (paint - red)
    lip = np.empty_like(area)
    lip[:] = red[:, None, None]
    lip *= np.where(y < 0.5 * (a + b), 0.8, 1.0 + 0.2 * np.exp(-(((y - b) / (2.5 * k) - 0.8) ** 2)))
    cover = coverage(inside)
    area += cover * (lip - area)
    gap = np.minimum(y - a, b - y)
    hole = coverage(gap - 0.2)
    depth = clip((y - a) / (6 * k), 0, 1)
    dark = np.array([0.10, 0.025, 0.025], np.float32)[:, None, None] * (0.4 + depth)
    area += hole * (dark - area)
    teeth = clip((3.6 * k - (y - a)) / (1.0 * k), 0, 1) * hole * (n.smile > 0.05)
    area += teeth * (np.array([0.62, 0.57, 0.5], np.float32)[:, None, None] - area)
    line = clip(1 - np.abs(y - 0.5 * (a + b)) / (0.8 * k), 0, 1) * (b - a < 1.2 * k) * cover
    area *= 1 - 0.55 * line
    labels = face.labels[box]
    solid = cover > 0.5
    labels[solid & (y < 0.5 * (a + b))] = UPPER
    labels[solid & (y >= 0.5 * (a + b))] = LOWER
    labels[solid & (hole > 0.5)] = INNER


def _highlights(n: Nuisance, shape: FaceShape, face: Canvas) -> None:
    """Glints of the light in the eyes, after shading: they are reflections, not colour."""
    k = shape.scale
    for side, (cx, cy) in enumerate(shape.irises):
        x0, y0 = cx + 1.2 * n.light[0] * k, cy - 0.9 * k
        box = face.window(x0 - 2 * k, y0 - 2 * k, x0 + 2 * k, y0 + 2 * k)
        glint = clip(
            1.2 - np.hypot(face.axis[box[1]] - x0, face.axis[box[0], None] - y0) / (0.8 * k), 0, 1
        )
        glint = glint * (face.labels[box] == EYES[side])
        face.colour[:, box[0], box[1]] += 0.75 * glint

