"""Paint a placed face: ears, skin, nose, eyes, brows, lips, each with its label.

Parts are painted on the skin's albedo and lit together; the labels come from the same masks as
the colours (see face_canvas.py).
"""

from __future__ import annotations

import numpy as np

from .face_canvas import Canvas, between_columns, clip, coverage, over, slope
from .face_geometry import FaceShape
from .face_params import Identity, Nuisance
from .face_skin import shade, skin_albedo, skin_colour
from .face_texture import noise, palette

BACKGROUND, SKIN, BROWS, EYES, NOSE, UPPER, INNER, LOWER, HAIR = (
    0,
    1,
    (2, 3),
    (4, 5),
    6,
    7,
    8,
    9,
    10,
)

_IRIS = palette(
    [32, 22, 18],
    [52, 34, 24],
    [74, 46, 30],
    [104, 76, 46],
    [92, 104, 70],
    [86, 112, 138],
    [124, 134, 140],
)
_BROW = palette([26, 20, 18], [58, 40, 30], [98, 68, 46], [140, 106, 72])
_LIPS = palette([172, 104, 92], [176, 84, 82], [150, 60, 66])


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


def _brow(p: Identity, shape: FaceShape, face: Canvas, side: int, rng: np.random.Generator) -> None:
    k = shape.scale
    box, _, _, inside = between_columns(shape.brows[side][:2], face, 2 * k)
    if inside.size == 0:
        return
    cover = coverage(inside)
    texture = noise(rng, face.size, 1)[box]
    soft = clip(inside / (1.5 * k) + 0.8, 0, 1) * clip(0.85 + 0.25 * texture, 0, 1)
    hair = np.minimum(_BROW(p.brow_tone), 0.4 * skin_colour(p))  # darker than any skin
    face.paint(box, soft * p.brow_alpha, hair, None)
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
    red = 0.55 * red + 0.45 * skin_colour(p.skin_tone) * np.array([1.0, 0.62, 0.62], np.float32)
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
