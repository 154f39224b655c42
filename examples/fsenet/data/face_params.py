"""What makes a procedural face: who it is (`Identity`) and how it was seen (`Nuisance`).

The two are drawn from separate random streams. An identity depends on (seed, identity) alone, so
it cannot depend on the sample; a nuisance depends on the hash of (seed, identity, sample) and
never reads an `Identity`, so hair, glasses, light and background carry no information on who it
is. Lengths are pixels of the 112x112 recognition template, where the eyes are 35 apart; the origin
is the midpoint between the eyes, x to the viewer's right, y down, z towards the viewer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np


def _between(low: float, high: float) -> float:
    return field(metadata={"range": (low, high)})


@dataclass(frozen=True)
class Identity:
    """Geometry and colours of one person, each uniform over a range wider than people's."""

    eye_spacing: float = _between(15.3, 19.9)  # half the distance between the eyes
    eye_width: float = _between(6.2, 9.2)  # half
    eye_upper: float = _between(2.2, 4.6)  # lid above the line through the corners
    eye_lower: float = _between(1.0, 2.6)
    eye_peak: float = _between(-0.4, 0.4)  # where the upper lid is highest, outer to inner
    eye_tilt: float = _between(-9.0, 11.0)  # degrees, outer corner up
    eye_fold: float = _between(1.2, 4.2)  # lid crease above the lid
    iris_radius: float = _between(2.9, 3.7)
    iris_tone: float = _between(0.0, 1.0)  # dark brown, brown, hazel, green, blue, grey
    brow_height: float = _between(8.0, 14.0)
    brow_thickness: float = _between(0.9, 3.3)  # half
    brow_length: float = _between(8.5, 14.0)  # half
    brow_shift: float = _between(-2.2, 2.0)
    brow_arch: float = _between(0.0, 3.6)
    brow_angle: float = _between(-11.0, 13.0)  # degrees, outer end up
    brow_taper: float = _between(0.1, 0.8)
    brow_alpha: float = _between(0.6, 1.0)
    brow_tone: float = _between(0.0, 1.0)
    nose_length: float = _between(17.0, 26.0)  # eyes to tip
    nose_bridge: float = _between(2.6, 5.0)  # half width
    nose_width: float = _between(6.8, 12.2)  # half, over the wings
    nose_tip: float = _between(2.8, 5.4)
    nose_drop: float = _between(-2.2, 3.0)  # tip below the wings' base
    nose_depth: float = _between(11.0, 21.0)
    nose_nostril: float = _between(0.3, 1.0)
    nose_hump: float = _between(-1.5, 3.0)
    philtrum: float = _between(10.5, 19.5)  # nose tip to mouth line
    mouth_width: float = _between(10.2, 17.4)  # half
    lip_upper: float = _between(1.5, 5.4)
    lip_lower: float = _between(2.3, 6.8)
    lip_bow: float = _between(0.0, 0.5)
    lip_curve: float = _between(-2.2, 2.2)  # corners up
    lip_red: float = _between(0.0, 1.0)
    temple: float = _between(34.0, 38.5)  # half widths of the outline
    cheek: float = _between(33.5, 43.0)
    jaw: float = _between(0.66, 0.94)  # of the cheek, at the mouth
    chin_width: float = _between(6.0, 17.0)
    chin_drop: float = _between(17.0, 29.0)  # mouth line to chin
    ear_size: float = _between(8.0, 14.0)
    ear_out: float = _between(0.5, 5.0)
    skin_tone: float = _between(0.0, 1.0)  # fair to dark
    skin_warmth: float = _between(-1.0, 1.0)
    cheek_red: float = _between(0.0, 1.0)
    freckles: float = _between(-1.5, 0.8)  # none below zero
    folds: float = _between(0.0, 1.0)  # lines from nose to mouth
    eye_bags: float = _between(0.0, 1.0)
    relief: float = _between(0.7, 1.4)  # how strongly bones show
    # Moles: on one cheek, the other cheek, the chin or forehead; none where the size is below 0.
    mole_left_x: float = _between(-30.0, -8.0)
    mole_left_y: float = _between(8.0, 42.0)
    mole_left_size: float = _between(-1.2, 1.7)
    mole_right_x: float = _between(8.0, 30.0)
    mole_right_y: float = _between(8.0, 42.0)
    mole_right_size: float = _between(-1.2, 1.7)
    mole_middle_x: float = _between(-12.0, 12.0)
    mole_middle_y: float = _between(-24.0, -15.0)
    mole_middle_size: float = _between(-1.5, 1.7)


@dataclass(frozen=True)
class NuisanceRanges:
    """How much one person's pictures differ: the knobs of the task's difficulty.

    Deviations are those of normal draws, cut at 2.2; probabilities are per picture.
    """

    yaw: float = 9.0  # degrees; enough to move parts by pixels, few hidden
    pitch: float = 4.0
    roll: float = 6.0  # only its side effects survive alignment
    jitter: float = 0.6  # pixels of noise per alignment point: what detectors have
    expression: float = 0.6  # scales mouth opening, smile, lids, brows
    light: float = 0.6  # 0 even, 1 up to strongly one-sided: swamps grey pixels
    light_colour: float = 0.2  # deviation of log gains: swamps skin tone and lip colour
    exposure: float = 0.22  # deviation of the log of the whole picture
    make_up: float = 0.25  # probability of other lips and lids
    stubble: float = 0.2  # probability of a beard or its shadow (labelled skin)
    bald: float = 0.06
    glasses: float = 0.2
    dark_lenses: float = 0.15  # of those
    hat: float = 0.04
    occluder: float = 0.06  # hand, mask, scarf, block
    grey: float = 0.03  # probabilities of the camera's faults
    blur: float = 0.3
    noise: float = 0.35
    low_resolution: float = 0.08
    jpeg: float = 0.4


# For parsers: rarer poses, harsher light and cameras, so that real photographs lie within reach.
WILD = NuisanceRanges(
    yaw=15.0,
    pitch=7.0,
    roll=8.0,
    jitter=1.2,
    expression=1.0,
    light=1.0,
    light_colour=0.22,
    exposure=0.33,
    make_up=0.35,
    stubble=0.3,
    glasses=0.25,
    dark_lenses=0.2,
    hat=0.07,
    occluder=0.14,
    grey=0.07,
    blur=0.5,
    noise=0.6,
    low_resolution=0.2,
    jpeg=0.5,
)


@dataclass(frozen=True)
class Nuisance:
    """One picture's circumstances; drawn by `draw_nuisance`."""

    yaw: float
    pitch: float
    roll: float
    distance: float
    jitter: np.ndarray  # [5, 2]
    mouth_open: float
    smile: float
    pucker: float
    eyes_open: tuple[float, float]
    brow_raise: float
    furrow: float
    gaze: tuple[float, float]
    light: tuple[float, float, float]  # unit direction towards the light
    ambient: float
    light_gains: np.ndarray  # [3]
    fill_gains: np.ndarray  # [3]
    exposure: float
    contrast: float
    saturation: float
    gloss: float
    cast: tuple[float, float, float]  # strength, offset, angle of a cast shadow
    bald: bool
    hair_colour: np.ndarray  # [3], linear
    hair_height: float  # hairline above the eyes
    hair_part: float
    hair_slope: tuple[float, float]  # hairline falls left and right of the parting
    hair_round: float
    hair_jag: float
    hair_side: float  # where the hair beside the face ends
    hair_lock: tuple[float, float]  # inner edge of long hair, left and right
    hair_volume: tuple[float, float]  # top, sides
    hair_flare: float
    hair_curl: float
    hair_shine: float
    neck: float
    glasses: bool
    dark_lenses: bool
    frame: tuple[float, float, float, float]  # half width, half height, thickness, squareness
    frame_colour: np.ndarray
    hat: bool
    occluder: str
    stubble: float
    make_up: float
    make_up_colour: np.ndarray
    textures: int  # seed of the stream that paints background and textures


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def draw_identity(seed: int, identity: int) -> Identity:
    """Draw person number `identity` of the world `seed`."""
    fields = dataclasses.fields(Identity)
    uniform = _generator(seed, 1, identity).random(len(fields))
    values = {}
    for item, u in zip(fields, uniform, strict=True):
        low, high = item.metadata["range"]
        values[item.name] = float(low + (high - low) * u)
    return Identity(**values)


# sRGB hair colours: black, dark brown, brown, light brown, blond, red, grey, white.
_HAIR = np.array(
    [
        [22, 18, 17],
        [45, 31, 24],
        [78, 52, 36],
        [120, 84, 55],
        [190, 155, 105],
        [130, 62, 34],
        [125, 122, 120],
        [205, 203, 200],
    ],
    np.float32,
)
_HAIR_SHARE = np.cumsum([0.2, 0.22, 0.18, 0.12, 0.11, 0.05, 0.08])


def draw_nuisance(
    seed: int, identity: int, sample: int, ranges: NuisanceRanges | None = None
) -> Nuisance:
    """Draw the circumstances of picture `sample`; never looks at the person's `Identity`."""
    r = ranges or NuisanceRanges()
    g = _generator(seed, 2, identity, sample)

    def normal(scale: float) -> float:
        return min(max(g.standard_normal(), -2.2), 2.2) * scale

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * g.random()

    def happens(probability: float) -> bool:
        return bool(g.random() < probability)

    def colour(low: float = 0.0, high: float = 1.0) -> np.ndarray:
        return (low + (high - low) * g.random(3).astype(np.float32)) ** 2

    e = r.expression
    opening = max(0.0, normal(0.6)) * 7.0 * e if happens(0.6) else 0.0
    smile = uniform(-0.25, 1.0) * e if happens(0.6) else 0.0
    lids = uniform(0.75, 1.15) if happens(0.8) else uniform(0.1, 0.75)
    lids = 1.0 + (lids - 1.0) * e
    azimuth = normal(0.75 * r.light)
    elevation = uniform(-0.2, 0.95) * r.light
    light = (
        float(np.sin(azimuth) * np.cos(elevation)),
        float(-np.sin(elevation)),
        float(np.cos(azimuth) * np.cos(elevation)),
    )
    warm = normal(r.light_colour) + 0.08  # indoor light is warm
    tint = normal(r.light_colour * 0.35)
    gains = np.exp(np.array([warm, tint, -warm], np.float32))
    fill = np.exp(np.array([normal(0.2), 0.0, normal(0.2)], np.float32))
    mix = g.random(2)
    kinds = np.searchsorted(_HAIR_SHARE, g.random(2))
    hair = (_HAIR[kinds[0]] * (1 - 0.4 * mix[0]) + _HAIR[kinds[1]] * 0.4 * mix[0]) / 255
    if happens(0.05):
        hair = g.random(3).astype(np.float32)
    hair = (hair * uniform(0.75, 1.2)) ** 2
    long_hair = happens(0.42)
    fringe = happens(0.25)
    side = uniform(30.0, 110.0) if long_hair else uniform(-14.0, 16.0)
    locks = (uniform(21.0, 44.0), uniform(21.0, 44.0)) if long_hair else (99.0, 99.0)
    pick = g.random()
    occluder = "none"
    if pick < r.occluder:
        occluder = ("hand", "mask", "scarf", "block", "block")[int(g.integers(0, 5))]
    return Nuisance(
        yaw=normal(r.yaw),
        pitch=normal(r.pitch),
        roll=normal(r.roll),
        distance=uniform(280.0, 900.0),
        jitter=np.clip(g.standard_normal((5, 2)), -2.2, 2.2) * r.jitter,
        mouth_open=opening,
        smile=smile,
        pucker=uniform(0.0, 0.25) * e if happens(0.2) else 0.0,
        eyes_open=(
            min(max(lids + normal(0.05), 0.05), 1.3),
            min(max(lids + normal(0.05), 0.05), 1.3),
        ),
        brow_raise=normal(1.3 * e),
        furrow=normal(1.0 * e),
        gaze=(normal(1.3), normal(0.5)),
        light=light,
        ambient=uniform(0.2, 0.75) if r.light else 1.0,
        light_gains=gains,
        fill_gains=fill,
        exposure=float(np.exp(normal(r.exposure))),
        contrast=uniform(0.8, 1.35),
        saturation=0.0 if happens(r.grey) else uniform(0.6, 1.25),
        gloss=uniform(0.0, 0.35) ** 1.5,
        cast=(uniform(0.2, 0.6) if happens(0.2 * r.light) else 0.0, normal(30.0), normal(1.6)),
        bald=happens(r.bald),
        hair_colour=hair.astype(np.float32),
        hair_height=uniform(15.0, 26.0) if fringe else uniform(22.0, 44.0),
        hair_part=normal(14.0),
        hair_slope=(uniform(-0.35, 0.75), uniform(-0.35, 0.75)),
        hair_round=uniform(0.0, 0.012),
        hair_jag=uniform(0.0, 4.0) if fringe else uniform(0.0, 2.0),
        hair_side=side,
        hair_lock=locks,
        hair_volume=(uniform(0.0, 0.3), uniform(0.0, 0.3) if long_hair else uniform(0.0, 0.16)),
        hair_flare=uniform(-0.1, 0.35),
        hair_curl=uniform(0.0, 1.0) ** 2,
        hair_shine=uniform(0.0, 1.0),
        neck=uniform(18.0, 29.0),
        glasses=happens(r.glasses),
        dark_lenses=happens(r.dark_lenses),
        frame=(
            uniform(10.5, 15.5),
            uniform(6.5, 12.5),
            0.25 + 1.1 * uniform(0.0, 1.0) ** 2,
            g.random(),
        ),
        frame_colour=colour(0.0, 0.5) if happens(0.8) else colour(0.3, 1.0),
        hat=happens(r.hat),
        occluder=occluder,
        stubble=uniform(0.1, 0.8) if happens(r.stubble) else 0.0,
        make_up=uniform(0.2, 0.9) if happens(r.make_up) else 0.0,
        make_up_colour=colour(0.1, 0.8),
        textures=int(g.integers(0, 2**31)),
    )
