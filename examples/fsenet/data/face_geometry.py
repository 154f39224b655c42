"""From person and circumstances to curves in the picture: expression, head pose, alignment.

Parts are curves in three dimensions, turned with the head, projected, and brought to the
recognition template by the similarity of their own five points (FIVE_POINTS), as a detector's
would be. What the painter fills and what the landmarks name are the same curves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partlocal.alignment import ARCFACE_TEMPLATE

from .face_params import Identity, Nuisance

# The five points of 112x112 recognition crops: eyes, nose tip, mouth corners, left in the picture
# first; pixel centres have whole coordinates.
FIVE_POINTS = np.array(ARCFACE_TEMPLATE)

_LID_T = np.linspace(-1, 1, 11)
_LIP_T = np.linspace(-1, 1, 21)
_BROW_T = np.linspace(-1, 1, 11)
_NOSE_V = np.array([0.0, 0.3, 0.55, 0.75, 0.88, 1.0])


def _catmull_rom(count: int, steps: int) -> np.ndarray:
    """Matrix from `count` controls to a smooth open curve through them."""
    rows = []
    for i in range(count - 1):
        ids = [max(i - 1, 0), i, i + 1, min(i + 2, count - 1)]
        for t in np.arange(steps) / steps:
            w = 0.5 * np.array(
                [
                    -t + 2 * t * t - t**3,
                    2 - 5 * t * t + 3 * t**3,
                    t + 4 * t * t - 3 * t**3,
                    t**3 - t * t,
                ]
            )
            row = np.zeros(count)
            for k, weight in zip(ids, w, strict=True):
                row[k] += weight
            rows.append(row)
    rows.append(np.eye(count)[-1])
    return np.array(rows)


_OUTLINE = _catmull_rom(10, 5)  # one side of the head, crown to chin: 46 points
_NOSE_SIDE = _catmull_rom(6, 4)  # 21 points


@dataclass
class FaceShape:
    """Curves of one picture in pixels ([n, 2], x and y), and what the painter needs beside them."""

    outline: tuple[np.ndarray, np.ndarray]  # left and right side, crown to chin
    lids: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # upper, lower
    irises: np.ndarray  # [2, 2] centres
    brows: tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    nose_sides: tuple[np.ndarray, np.ndarray]
    nose_base: np.ndarray
    nostrils: np.ndarray  # [2, 2]
    ridge: np.ndarray  # [4, 2], root to tip
    lips: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # outer up, inner up, inner low..
    marks: dict[str, np.ndarray]  # single points for shading, ears, hair
    ears: np.ndarray  # [2, 2]
    hairline: np.ndarray
    scale: float  # pixels of the picture per unit of the canonical face
    points5: np.ndarray
    points68: np.ndarray


def surface_depth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Depth of the bare face, falling off to the sides and slightly up and down."""
    return -0.010 * x * x - 6.0 * (np.abs(x) / 40) ** 6 - 0.0016 * (y - 14) ** 2


def _on_face(x: np.ndarray, y: np.ndarray, lift: np.ndarray | float = 0.0) -> np.ndarray:
    """Points [..., 3] whose z is still above the surface; `face_shape` adds it for all at once."""
    points = np.empty((*x.shape, 3))
    points[..., 0], points[..., 1], points[..., 2] = x, y, lift
    return points


def _outline(p: Identity, n: Nuisance, mouth_y: float, sway: float) -> np.ndarray:
    chin_y = mouth_y + p.chin_drop + 0.75 * n.mouth_open
    jaw = p.jaw * p.cheek
    controls = np.array(
        [
            [0.0, -68.0],
            [17.0, -64.5],
            [p.temple * 0.83, -48.0],
            [p.temple, -26.0],
            [0.5 * (p.temple + p.cheek) + 0.8, -4.0],
            [p.cheek, 16.0],
            [jaw, mouth_y + 0.25 * n.mouth_open],
            [0.5 * jaw + 0.5 * p.chin_width, mouth_y + 0.64 * (chin_y - mouth_y)],
            [p.chin_width * 0.75, chin_y - 1.6],
            [0.0, chin_y],
        ]
    )
    side = _OUTLINE @ controls
    w = np.maximum(side[:, 0], 0.0)
    depth = 24.0 * np.minimum(w / 30, 1.0) ** 1.5
    # The silhouette of a turned head is that of its elliptic cross-section, not of its ear line.
    w = np.sqrt(w * w + (0.9 * depth * sway) ** 2)
    return np.stack([w, side[:, 1], 2.0 - depth], -1)


def _eye(p: Identity, side: int, n: Nuisance) -> np.ndarray:
    """Upper and lower lid of one eye, left to right in the picture."""
    opening = max(n.eyes_open[(side + 1) // 2] - 0.22 * max(n.smile, 0.0), 0.04)
    tilt = np.deg2rad(p.eye_tilt)
    t = _LID_T * side  # outer corner at +1
    peak = t - p.eye_peak * (1 - t * t)
    up = p.eye_upper * (1 - peak * peak).clip(0) ** 0.75
    low = p.eye_lower * (1 - (t - 0.25 * (1 - t * t)) ** 2).clip(0) ** 0.8
    close = 1 - min(opening, 1.0)
    up = up * opening - close * 0.9 * low
    low = low * (1 - 0.15 * close)
    along = p.eye_width * t
    x0 = side * p.eye_spacing
    dy = np.stack([-up, low])
    x = x0 + side * (along * np.cos(tilt) + dy * np.sin(tilt))
    y = dy * np.cos(tilt) - along * np.sin(tilt)
    return _on_face(x, y, 1.5 * (1 - t * t))


def _brow(p: Identity, side: int, n: Nuisance) -> np.ndarray:
    t = _BROW_T * side
    angle = np.deg2rad(p.brow_angle + 4.0 * n.furrow)
    along = p.brow_length * t
    x = side * (p.eye_spacing + p.brow_shift + along * np.cos(angle) - 0.5 * n.furrow)
    y = -p.brow_height - n.brow_raise - along * np.sin(angle)
    y = y - p.brow_arch * (1 - (t - 0.3) ** 2) + 0.5 * p.brow_arch
    half = p.brow_thickness * (1 - p.brow_taper * 0.5 * (t + 1)) * (1 - t**6) ** 0.5
    return _on_face(np.stack([x, x, x]), np.stack([y - half, y + half, y]), 2.0)


def _mouth(p: Identity, n: Nuisance, mouth_y: float) -> np.ndarray:
    t = _LIP_T
    smile = n.smile
    half = p.mouth_width * (1 + 0.16 * smile - 0.9 * n.pucker)
    bend = p.lip_curve + 3.2 * smile
    centre = mouth_y - 0.6 * smile
    corner = -bend * t * t + 0.3 * bend
    arc = np.sqrt((1 - t * t).clip(0))
    peaks = np.exp(-(((np.abs(t) - 0.22) / 0.2) ** 2)) - 1.4 * np.exp(-((t / 0.12) ** 2))
    thin = 1 - 0.22 * max(smile, 0.0) + n.pucker
    top = p.lip_upper * thin * ((1 - t * t).clip(0) ** 0.8) * (1 + p.lip_bow * peaks * 0.6)
    bottom = p.lip_lower * thin * (1 - t * t).clip(0) ** 0.7
    gap = n.mouth_open * arc
    inner_up = centre + corner - 0.25 * gap
    inner_low = centre + corner + 0.75 * gap
    x = np.broadcast_to(half * t, (4, len(t)))
    y = np.stack([inner_up - top, inner_up, inner_low, inner_low + bottom])
    return _on_face(x, y, 5.0 * (1 - t * t) - np.array([[1.0], [2.0], [2.0], [1.0]]))


def _nose(p: Identity, n: Nuisance) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right side, base (left to right), ridge, nostrils."""
    base_y = p.nose_length + 4.0 - p.nose_drop * 0.5
    width = p.nose_width * (1 + 0.08 * max(n.smile, 0.0))
    half = np.array(
        [
            p.nose_bridge,
            1.05 * p.nose_bridge,
            0.55 * p.nose_bridge + 0.315 * width,
            0.86 * width,
            width,
            0.8 * width,
        ]
    )
    top = -3.0
    y = top + (base_y - top) * _NOSE_V
    side = _NOSE_SIDE @ np.stack([half, y, 1.0 + 6.0 * _NOSE_V], -1)
    side[:, 2] -= 0.5
    t = np.linspace(-1, 1, 9)
    base = base_y + 0.4 + p.nose_drop * (1 - np.abs(t)) - 1.2 * t**4
    sill = np.stack([0.8 * width * t, base, 3.0 + 5.0 * (1 - t * t)], -1)
    v = np.array([0.0, 1 / 3, 2 / 3, 1.0])
    ridge_z = 4.0 + (p.nose_depth - 4.0) * v + p.nose_hump * np.sin(np.pi * v)
    ridge = np.stack([0 * v, -1.0 + (p.nose_length + 1.0) * v, ridge_z], -1)
    hole_y = base_y - 0.8 + 0.4 * p.nose_drop
    holes = np.array([[-0.45 * width, hole_y, 8.0], [0.45 * width, hole_y, 8.0]])
    return side, sill, ridge, holes


def _hairline(p: Identity, n: Nuisance) -> np.ndarray:
    x = np.linspace(-36, 36, 25)
    d = x - n.hair_part
    y = -n.hair_height + np.where(d < 0, -n.hair_slope[0] * d, n.hair_slope[1] * d)
    y = y + n.hair_round * x * x + 10.0 * (np.abs(x) / 33) ** 10
    return _on_face(x, y.clip(-60, 20), 1.0)


def _rotation(n: Nuisance) -> np.ndarray:
    a, b, c = np.deg2rad([n.yaw, n.pitch, n.roll])
    yaw = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    pitch = np.array([[1, 0, 0], [0, np.cos(b), np.sin(b)], [0, -np.sin(b), np.cos(b)]])
    roll = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return roll @ pitch @ yaw


def fit_similarity(source: np.ndarray, target: np.ndarray) -> tuple[complex, complex]:
    """Least-squares similarity z -> a z + b between point lists, as complex numbers.

    >>> a, b = fit_similarity(np.array([[0, 0], [1, 0]]), np.array([[1, 1], [1, 3]]))
    >>> complex(a), complex(b)
    (2j, (1+1j))
    """
    s, d = source @ [1, 1j], target @ [1, 1j]
    s0, d0 = s.mean(), d.mean()
    a = (np.conj(s - s0) * (d - d0)).sum() / (np.abs(s - s0) ** 2).sum()
    return a, d0 - a * s0


def face_shape(p: Identity, n: Nuisance, size: int) -> FaceShape:
    """Place the parts of person `p` seen under `n` in an aligned picture of `size` pixels."""
    mouth_y = p.nose_length + p.philtrum
    sway = abs(float(np.tan(np.deg2rad(n.yaw))))
    outline = _outline(p, n, mouth_y, sway)
    side, sill, ridge, holes = _nose(p, n)
    mirror = np.array([-1.0, 1.0, 1.0])
    cheek_y, brow_y = 20.0, -p.brow_height - n.brow_raise
    chin_y = outline[-1, 1]
    marks = {
        "head": [0.0, -12.0, -20.0],
        "crown": [0.3 * n.hair_part, -60.0, -16.0],
        "forehead": [0.0, -27.0, 0.0],
        "brows": [[-p.eye_spacing, brow_y, 0.0], [p.eye_spacing, brow_y, 0.0]],
        "sockets": [[-p.eye_spacing * 0.8, -2.5, -3.0], [p.eye_spacing * 0.8, -2.5, -3.0]],
        "cheeks": [[-0.62 * p.cheek, cheek_y, -4.0], [0.62 * p.cheek, cheek_y, -4.0]],
        "wings": [
            [-0.72 * p.nose_width, holes[0, 1] - 2.5, 5.0],
            [0.72 * p.nose_width, holes[0, 1] - 2.5, 5.0],
        ],
        "chin": [0.0, chin_y - 8.0, 1.0],
        "folds": [
            [-p.mouth_width - 3.5, mouth_y - 9.0, 0.0],
            [p.mouth_width + 3.5, mouth_y - 9, 0],
        ],
        "neck": [0.0, 76.0, -26.0],
        "moles": [
            [p.mole_left_x, p.mole_left_y, -4.0],
            [p.mole_right_x, p.mole_right_y, -4.0],
            [p.mole_middle_x, p.mole_middle_y, 0.0],
        ],
    }
    iris_y = -0.35 * p.eye_upper + 0.35 * p.eye_lower + n.gaze[1]
    irises = np.array(
        [[-p.eye_spacing + n.gaze[0], iris_y, 0.0], [p.eye_spacing + n.gaze[0], iris_y, 0.0]]
    )
    ears = np.array(
        [[-p.cheek - p.ear_out + 2.0, 8.0, -34.0], [p.cheek + p.ear_out - 2.0, 8.0, -34.0]]
    )
    raised = [  # z counts from the surface of the face
        _eye(p, -1, n),
        _eye(p, 1, n),
        _brow(p, -1, n),
        _brow(p, 1, n),
        side * mirror,
        side,
        _mouth(p, n, mouth_y),
        _hairline(p, n),
    ]
    placed = [outline * mirror, outline, irises, sill, holes, ridge, ears]
    blocks = raised + placed + [np.asarray(m, float) for m in marks.values()]
    cuts = np.cumsum([0] + [b.size // 3 for b in blocks])
    flat = np.concatenate([b.reshape(-1, 3) for b in blocks])
    on = flat[: cuts[len(raised)]]
    on[:, 2] += surface_depth(on[:, 0], on[:, 1])
    flat[:, 2] += 30.0  # turn about the middle of the head
    turned = flat @ _rotation(n).T
    xy = turned[:, :2] / (1 - turned[:, 2:] / n.distance / 2)
    # The alignment's view of the face: five points, as found by a detector that errs a little.
    left, right, lips = (
        xy[cuts[i] : cuts[i + 1]].reshape(*blocks[i].shape[:-1], 2) for i in (0, 1, 6)
    )
    tip = xy[cuts[14] - 1]
    eyes = (_lid_landmarks(left).mean(0), _lid_landmarks(right).mean(0))
    five = np.stack([*eyes, tip, lips[0, 0], lips[0, -1]])
    zoom = size / 112
    target = (FIVE_POINTS + n.jitter + 0.5) * zoom - 0.5
    a, b = fit_similarity(five, target)
    z = a * (xy @ [1, 1j]) + b
    # float32 from here: one float64 scalar would turn every picture-sized array into float64.
    xy = np.stack([z.real, z.imag], -1).astype(np.float32)
    parts = [
        xy[cuts[i] : cuts[i + 1]].reshape(*blocks[i].shape[:-1], 2) for i in range(len(blocks))
    ]
    lids_left, lids_right, brow_left, brow_right, nose_left, nose_right, lips, hairline = parts[:8]
    shape = FaceShape(
        outline=(parts[8], parts[9]),
        lids=((lids_left[0], lids_left[1]), (lids_right[0], lids_right[1])),
        irises=parts[10],
        brows=((brow_left[0], brow_left[1]), (brow_right[0], brow_right[1])),
        nose_sides=(nose_left, nose_right),
        nose_base=parts[11],
        nostrils=parts[12],
        ridge=parts[13],
        lips=(lips[0], lips[1], lips[2], lips[3]),
        marks=dict(zip(marks, parts[15:], strict=True)),
        ears=parts[14],
        hairline=hairline,
        scale=float(abs(a)),
        points5=np.empty(0),
        points68=np.empty(0),
    )
    shape.points68 = _landmarks68(shape, brow_left[2], brow_right[2])
    p68 = shape.points68
    shape.points5 = np.stack(
        [p68[36:42].mean(0), p68[42:48].mean(0), p68[30], p68[48], p68[54]]
    ).astype(np.float32)
    return shape


def _lid_landmarks(lids: np.ndarray) -> np.ndarray:
    upper, lower = lids[0], lids[1]
    left, right = (upper[0] + lower[0]) / 2, (upper[-1] + lower[-1]) / 2
    return np.stack([left, upper[3], upper[7], right, lower[7], lower[3]])


def _landmarks68(s: FaceShape, brow_left: np.ndarray, brow_right: np.ndarray) -> np.ndarray:
    """The 68 points in iBUG's order, from the same curves that are painted."""
    left, right = (side[20:] for side in s.outline)  # from the height of the eyes downwards
    jaw = np.concatenate([left, right[-2::-1]])
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(jaw, axis=0).T))])
    at = np.linspace(0, length[-1], 17)
    jaw17 = np.stack([np.interp(at, length, jaw[:, i]) for i in (0, 1)], -1)
    brows = [b[[1, 3, 5, 7, 9]] for b in (brow_left, brow_right)]
    base = s.nose_base[[0, 2, 4, 6, 8]]
    top, inner_top, inner_low, low = s.lips
    mouth = [top[[0, 4, 7, 10, 13, 16, 20]], low[[16, 13, 10, 7, 4]]]
    inner_left, inner_right = ((inner_top[i] + inner_low[i]) / 2 for i in (2, 18))
    inner = [inner_left[None], inner_top[[7, 10, 13]], inner_right[None], inner_low[[13, 10, 7]]]
    eyes = [_lid_landmarks(np.stack(e)) for e in s.lids]
    return np.concatenate([jaw17, *brows, s.ridge, base, *eyes, *mouth, *inner]).astype(np.float32)
