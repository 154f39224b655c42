"""What surrounds a face: background, clothes and neck, hair, glasses, hats, hands and blocks.

Everything here is nuisance: drawn anew for each picture, sized on the template and not on the
person. Glasses with clear lenses are labelled as what they sit on, as Helen does; dark lenses,
hats, hands, masks, scarves and blocks hide the face and become background (0).
"""

from __future__ import annotations

import math

import numpy as np

from .face_canvas import Canvas, clip, coverage, over
from .face_geometry import FIVE_POINTS, FaceShape
from .face_params import Identity, Nuisance
from .face_render import BACKGROUND, HAIR, SKIN, head_distance
from .face_skin import skin_colour
from .face_texture import noise, strands


def _random_colour(rng: np.random.Generator) -> np.ndarray:
    grey = rng.random() ** 1.3
    colour = grey + (rng.random(3) - 0.5) * (0.1, 0.25, 0.4, 1.0)[int(rng.integers(0, 4))]
    return (np.clip(colour, 0.0, 1.0) ** 2).astype(np.float32)


def paint_background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Gradient, texture and clutter over the whole canvas."""
    s, size = canvas.axis, canvas.size
    first, second = _random_colour(rng), _random_colour(rng)
    plain = rng.random() < 0.3
    if plain:
        second = first * float(rng.uniform(0.6, 1.2))
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (s * math.cos(angle) + (s * math.sin(angle))[:, None]) / size
    ramp = clip((ramp + 1.5) * rng.uniform(0.2, 0.5), 0, 1)
    if not plain:
        ramp = clip(ramp + 0.4 * rng.random() * noise(rng, size, 12), 0, 1)
    canvas.colour[:] = first[:, None, None] + ramp * (second - first)[:, None, None]
    if plain:
        return
    for _ in range(int(rng.integers(0, 7))):
        x, y = rng.uniform(0, size, 2).tolist()
        w, h = (rng.uniform(0.03, 0.4, 2) * size).tolist()
        box = canvas.window(x - w, y - h, x + w, y + h)
        dx, dy = np.abs(s[box[1]] - x) / w, (np.abs(s[box[0]] - y) / h)[:, None]
        if rng.random() < 0.5:
            cover = coverage((1 - np.sqrt(dx * dx + dy * dy)) * min(w, h) * rng.uniform(0.1, 1))
        else:
            cover = np.full((dy.size, dx.size), rng.uniform(0.4, 1), np.float32)
        canvas.paint(box, cover, _random_colour(rng), None)
    if rng.random() < 0.5:
        period = rng.uniform(3, 20)
        wave = np.sin((s * math.cos(angle) + (s * math.sin(angle))[:, None]) * (2 * np.pi / period))
        canvas.colour *= 1 + rng.uniform(0, 0.4) * wave
    canvas.colour *= np.maximum(1 + rng.uniform(0, 0.3) * noise(rng, size, 2), 0)


def paint_body(
    p: Identity, n: Nuisance, shape: FaceShape, canvas: Canvas, rng: np.random.Generator
) -> None:
    """Neck in the person's skin, in the shadow of the chin, and clothes."""
    k, s = shape.scale, canvas.axis
    x0, y0 = shape.marks["neck"]
    chin = shape.outline[0][-1, 1]
    top = int(min(max(chin - 40 * k, 0), canvas.size))
    box = (slice(top, canvas.size), slice(0, canvas.size))
    y = s[box[0], None]
    width = (n.neck + 0.012 * (clip(y - y0, 0, 99) / k) ** 2) * k
    inside = width - np.abs(s - x0)
    across = (s - x0) / (n.neck * k)
    side = clip(0.75 + 0.5 * across * n.light[0], 0.25, 1.3) * (1 - 0.25 * clip(across, -1, 1) ** 2)
    under = 0.36 + 0.45 * clip((y - chin - 2 * k) / (24 * k), 0, 1)
    tone = skin_colour(p) * (n.ambient * n.fill_gains + (1 - n.ambient) * n.light_gains)
    canvas.paint(box, coverage(inside), tone[:, None, None] * (side * under), SKIN)
    shoulder = y0 + rng.uniform(-4, 26) * k
    fall = rng.uniform(0.15, 0.6)
    dip = rng.uniform(0, 30) * k * np.exp(-(((s - x0) / (rng.uniform(8, 22) * k)) ** 2))
    line = shoulder + fall * np.maximum(np.abs(s - x0) - n.neck * k, 0) + dip
    cloth = _random_colour(rng)[:, None, None] * (
        0.9 + 0.25 * noise(rng, canvas.size, float(rng.choice([2, 4, 12])))[box]
    )
    if rng.random() < 0.4:
        cloth = cloth * (1 + 0.5 * np.sin((s + 0.2 * y) * rng.uniform(0.3, 2)))
    canvas.paint(box, coverage(y - line), cloth.clip(0), BACKGROUND)


class Hair:
    """Outline, colour and hairline of one picture's hair; painted behind, then before the face."""

    def __init__(
        self, n: Nuisance, shape: FaceShape, canvas: Canvas, rng: np.random.Generator
    ) -> None:
        s, size = canvas.axis, canvas.size
        k = shape.scale * rng.uniform(0.94, 1.22)  # else hair tells the size of the head
        hx, hy = shape.marks["head"]
        rough = noise(rng, size, 2)
        x, y = (s - hx) / k, ((s - hy) / k)[:, None]
        wide = 1 + n.hair_volume[1] + n.hair_flare * clip(y / 60, 0, 1.5)
        up = y / (56 * (1 + n.hair_volume[0]))
        u = x / (39.5 * wide)
        radius = np.sqrt(u * u + np.minimum(up, 0) ** 2)
        jag = rough * (0.3 + 2.5 * n.hair_curl)
        reach = (1 - radius) * 38 + jag  # above the ears a half ellipse, below it parallel sides
        end = n.hair_side + 12 + 2.5 * rough + rng.uniform(-6, 6) * np.sign(x)
        self.outer = np.minimum(reach, end - y) * k
        # Hairline over the forehead; beside it hair ends at the locks or above the ears.
        line = (over(s, shape.hairline) - hy) / k
        line += n.hair_jag * bank_row(rng, size)
        left, right = shape.hairline[0, 0], shape.hairline[-1, 0]
        front = np.minimum(line[None] - y, reach)
        beside = (s < left + 1.5 * k) | (s > right - 1.5 * k)
        front = np.where(beside, np.minimum(n.hair_side + 12 + rough - y, reach), front)
        lock = np.where(x < 0, -x - n.hair_lock[0], x - n.hair_lock[1])
        lock = lock + 0.10 * clip(y + 12, -20, 40) + 0.8 * rough
        side = np.minimum(np.minimum(lock, end - y), np.minimum(reach, y + 45))
        self.front = np.maximum(front, side) * k
        cx, cy = shape.marks["crown"]
        dx, dy = s - cx, (s - cy)[:, None]
        far = np.sqrt(dx * dx + dy * dy)
        angle = np.arctan2(dx, np.maximum(dy, 1e-3) + 0 * dx)
        bend = 6 * n.hair_curl * noise(rng, size, 4)
        texture = strands(angle * 60 + bend, far / k + 2 * bend, rng)
        shine = np.exp(-(((far / k - 22 - 10 * rng.random() - 2 * texture) / 7) ** 2))
        lit = n.ambient + (1 - n.ambient) * clip(
            0.75 + 0.5 * (u * n.light[0] + clip(up, -1, 0.3) * n.light[1]), 0.15, 1.4
        )
        value = lit * clip(
            1 + (0.14 + 0.22 * n.hair_shine) * texture + 0.25 * rough * n.hair_curl, 0.2, 3
        )
        gains = (n.ambient * n.fill_gains + (1 - n.ambient) * n.light_gains)[:, None, None]
        self.colour = n.hair_colour[:, None, None] * value
        self.colour += (n.hair_shine * (0.3 * n.hair_colour + 0.035))[:, None, None] * shine * lit
        self.colour *= gains
        self.box = (slice(0, size), slice(0, size))

    def paint_behind(self, canvas: Canvas) -> None:
        """The part behind neck and face, darker as it lies in shadow."""
        canvas.paint(self.box, coverage(self.outer), self.colour * 0.7, HAIR)

    def paint_front(self, canvas: Canvas) -> None:
        """The part before the face, with its shadow on the forehead."""
        shadow = clip(self.front / 4 + 1.0, 0, 1)
        canvas.colour *= 1 - 0.3 * shadow * (canvas.labels > 0)
        canvas.paint(self.box, coverage(self.front), self.colour, HAIR)


def bank_row(rng: np.random.Generator, size: int) -> np.ndarray:
    """Noise along one row, for fringes."""
    return noise(rng, size, 2)[0]


def paint_glasses(n: Nuisance, canvas: Canvas, rng: np.random.Generator) -> None:
    """A frame round each eye, a bridge, arms; lenses clear with a reflection, or dark."""
    k = canvas.size / 112  # not the person's scale or eye distance: frames must not name them
    half_w, half_h, thick, square = n.frame
    middle = FIVE_POINTS[:2].mean(0) + n.jitter[0] + [0, rng.uniform(-1, 2.5)]
    apart = rng.uniform(16.5, 19.0)
    centres = (middle + np.array([[-apart, 0.0], [apart, 0.0]]) + 0.5) * k - 0.5
    centres = centres.astype(np.float32)
    power = 2 + 4 * square
    s = canvas.axis
    gains = n.ambient * n.fill_gains + (1 - n.ambient) * n.light_gains
    colour = n.frame_colour * gains
    tint = rng.random(3).astype(np.float32) * 0.03
    glare = rng.uniform(0, 0.5) if rng.random() < 0.5 else 0.0
    dark = rng.uniform(0.8, 1.0)
    gap = abs(centres[1, 0] - centres[0, 0])
    w = min(half_w * k, 0.5 * gap - 1.5 * k)
    h = half_h * k
    middle = centres.mean(0)
    reach = 36 * k
    arm = canvas.window(middle[0] - reach, middle[1] - h, middle[0] + reach, middle[1] + 2 * k)
    y_arm = middle[1] - 0.35 * h
    ax, ay = np.abs(s[arm[1]] - middle[0]), s[arm[0], None] - y_arm
    line = coverage(thick * 0.8 * k - np.abs(ay))
    line = line * ((ax > 0.5 * gap + w) | (ax < 0.5 * gap - w))
    canvas.paint(arm, line, colour, None)
    canvas.glasses[arm] |= line > 0.5
    for x, y in centres:
        box = canvas.window(x - w - 2 * k, y - h - 2 * k, x + w + 2 * k, y + h + 2 * k)
        dx, dy = np.abs(s[box[1]] - x) / w, (np.abs(s[box[0]] - y) / h)[:, None]
        r = (dx**power + dy**power) ** (1 / power)
        lens = coverage((1 - r) * min(w, h))
        if n.dark_lenses:
            canvas.paint(box, lens * dark, tint, BACKGROUND)
        if glare:
            slant = (s[box[1]] - x) / w + ((s[box[0]] - y) / h)[:, None] - 0.3
            canvas.colour[:, box[0], box[1]] += lens * clip(1 - np.abs(slant) / 0.4, 0, 1) * glare
        frame = coverage((thick - np.abs(1 - r) * min(w, h) / k) * k)
        canvas.paint(box, frame, colour, BACKGROUND if n.dark_lenses else None)
        canvas.glasses[box] |= (frame > 0.5) | (n.dark_lenses & (lens > 0.5))


def paint_hat(shape: FaceShape, canvas: Canvas, rng: np.random.Generator) -> None:
    """A cap, cap with a brim, or cloth over the top of the head."""
    k, s = shape.scale, canvas.axis
    hx, hy = shape.marks["head"]
    x = (s - hx) / k
    edge = hy - (rng.uniform(8, 26) - rng.uniform(-0.004, 0.01) * x * x) * k
    cover = np.minimum(edge - s[:, None], (rng.uniform(38, 52) - np.abs(x)) * k)
    wave = noise(rng, canvas.size, float(rng.choice([2, 4, 12])))
    cloth = _random_colour(rng)[:, None, None] * (0.8 + 0.2 * wave + 0.3 * np.cos(x / 30))
    band = np.exp(-(((edge - s[:, None]) / (2 * k)) ** 2))
    cloth = cloth * (1 - rng.uniform(-0.5, 0.5) * band)
    canvas.colour *= 1 - 0.35 * clip(cover / (5 * k) + 1, 0, 1) * (canvas.labels > 0)
    canvas.paint((slice(None), slice(None)), coverage(cover), cloth.clip(0), BACKGROUND)


def paint_occluder(
    n: Nuisance, shape: FaceShape, canvas: Canvas, light: np.ndarray, rng: np.random.Generator
) -> None:
    """A hand, mask, scarf or block before the face."""
    k, s, size = shape.scale, canvas.axis, canvas.size
    everywhere = (slice(0, size), slice(0, size))
    colour = _random_colour(rng)
    cloth = colour[:, None, None] * (0.85 + 0.15 * noise(rng, size, 2))
    if n.occluder == "hand":
        tone = skin_colour(float(rng.random()))[:, None, None] * light.mean((1, 2), keepdims=True)
        angle = rng.uniform(-0.9, 0.9) + (np.pi if rng.random() < 0.25 else 0)
        x0, y0 = rng.uniform(20, 92) * size / 112, rng.uniform(70, 115) * size / 112
        across = (s - x0) * math.cos(angle) + ((s - y0) * math.sin(angle))[:, None]
        along = -(s - x0) * math.sin(angle) + ((s - y0) * math.cos(angle))[:, None]
        width = rng.uniform(5.0, 8.0) * k
        for i in range(4):
            tip = (-20 - (5, 9, 8, 1)[i]) * k
            dx = across - (i - 1.5) * width
            beyond = np.minimum(along - tip - width * 0.5, 0)
            d = 0.5 * width - np.sqrt(dx * dx + beyond * beyond)
            round_ = 0.55 + 0.5 * clip(d / (0.5 * width), 0, 1)
            canvas.paint(everywhere, coverage(np.minimum(d, 4 * k - along)), tone * round_, 0)
        palm = 2.1 * width - np.sqrt(across**2 + np.maximum(-along, 0) ** 2)
        canvas.paint(everywhere, coverage(np.minimum(palm, along + 4 * k)), tone * 0.95, 0)
        return
    if n.occluder == "mask":
        top = shape.points5[2, 1] - rng.uniform(2, 14) * k
        x = (s - shape.points5[2, 0]) / k
        cover = np.minimum(head_distance(shape, canvas), s[:, None] - top - 0.012 * k * x * x)
    elif n.occluder == "scarf":
        line = rng.uniform(72, 105) * size / 112 + 3 * k * noise(rng, size, 12)[0]
        cover = s[:, None] - line
    else:
        w, h = (rng.uniform(6, 26, 2) * size / 112).tolist()
        x, y = (rng.uniform(12, 100, 2) * size / 112).tolist()
        dx, dy = np.abs(s - x), np.abs(s - y)[:, None]
        if rng.random() < 0.5:
            cover = np.minimum(w - dx, h - dy)
        else:
            cover = (1 - np.sqrt((dx / w) ** 2 + (dy / h) ** 2)) * min(w, h)
    canvas.paint(everywhere, coverage(cover), cloth * (0.5 + 0.5 * light.mean(0)), BACKGROUND)
