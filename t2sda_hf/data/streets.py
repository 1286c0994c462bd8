"""The embedded default: small street-scene domains, drawn on the spot, with a real gap between them.

*source* is a computer game: flat saturated colours, hard edges, even light, box buildings, lollipop trees, one row of
parked cars, a camera high above the middle of the road. *target* is a photograph by another car: the low sun of a dusty
evening, haze, textures, blur, vignette and sensor noise, but also gabled houses with gaps between them, shaggy
trees, vans instead of saloons, walking people, cars parked on both sides, and a lower camera with a longer lens. What
carries over is what carries over between real cities: each class keeps its place and its outline in the street.

Two more are for runs with several sources or targets. *simulator* is another computer-made source: the streets of the
target in flat colours, before any camera. *night* is another target: its photographs, hours after the sun has set.

Nothing is downloaded and nothing is stored: a scene is a pure function of (seed, domain, split, index). Sizes and
places are metres in a pinhole camera, so one scene looks the same at every resolution.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw, ImageFilter

Domain = Literal["source", "target", "simulator", "night"]
Colour = tuple[float, float, float]
Point = tuple[float, float]

# Cityscapes train ids of the classes that are drawn, in the order of the ids.
_TRAIN_IDS = {
    "road": 0,
    "sidewalk": 1,
    "building": 2,
    "pole": 5,
    "traffic sign": 7,
    "vegetation": 8,
    "sky": 10,
    "person": 11,
    "car": 13,
    "bus": 15,
}
STREETS_CLASSES: tuple[str, ...] = tuple(_TRAIN_IDS)

SCENES = 2  # to be counted up whenever the scenes are drawn otherwise
_DEFAULT_NUM_IMAGES = {"train": 256, "validation": 64}
_SMALLEST_SIDE = 32  # below this, people and signs are smaller than a pixel
_FAR = 120.0  # metres; where the street ends
_NEAR = 1.0  # metres; nothing nearer is ever in the frame

_BLACK: Colour = (25, 25, 30)
_SKIN: Colour = (225, 175, 140)


class _Canvas:
    """A pinhole camera over a street; everything drawn is a numbered stroke.

    The picture holds stroke numbers, and colour, class and distance are looked up by number afterwards. So image and
    label cannot disagree at any pixel. World coordinates are metres: `x` right of the camera, `y` above the ground,
    `z` ahead.
    """

    def __init__(
        self, height: int, width: int, *, horizon: float, centre: float, focal: float, camera_height: float
    ) -> None:
        """`horizon` and `focal` are fractions of the height, `centre` of the width, `camera_height` is in metres."""
        self.height, self.width = height, width
        self.horizon, self.centre = horizon * height, centre * width
        self.focal, self.camera_height = focal * height, camera_height
        self._numbers = Image.new("I", (width, height), 0)
        self._draw = ImageDraw.Draw(self._numbers)
        self._colours: list[Colour] = []
        self._classes: list[int] = []
        self._distances: list[float] = []

    def project(self, x: float, y: float, z: float) -> Point:
        """Pixel position of a point of the world."""
        scale = self.focal / z
        return self.centre + x * scale, self.horizon + (self.camera_height - y) * scale

    def polygon(self, name: str, colour: Colour, corners: Sequence[tuple[float, float, float]]) -> None:
        """A filled polygon through points of the world, at the mean distance of its corners."""
        number = self._stroke(name, colour, sum(z for _, _, z in corners) / len(corners))
        self._draw.polygon([self.project(*corner) for corner in corners], fill=number)

    def upright(self, name: str, colour: Colour, z: float, corners: Sequence[Point]) -> None:
        """A filled polygon that faces the camera at distance `z`; corners are (x, y)."""
        self.polygon(name, colour, [(x, y, z) for x, y in corners])

    def box(self, name: str, colour: Colour, z: float, left: float, bottom: float, right: float, top: float) -> None:
        """An upright rectangle at distance `z`."""
        x0, y0 = self.project(left, top, z)
        x1, y1 = self.project(right, bottom, z)
        self._draw.rectangle((x0, y0, x1, y1), fill=self._stroke(name, colour, z))

    def ellipse(self, name: str, colour: Colour, z: float, x: float, y: float, rx: float, ry: float) -> None:
        """An upright ellipse about (x, y) at distance `z`."""
        x0, y0 = self.project(x - rx, y + ry, z)
        x1, y1 = self.project(x + rx, y - ry, z)
        self._draw.ellipse((x0, y0, x1, y1), fill=self._stroke(name, colour, z))

    def backdrop(self, sky: Colour, ground: Colour) -> None:
        """Sky above the horizon, sidewalk below."""
        self._draw.rectangle((0, 0, self.width, self.horizon), fill=self._stroke("sky", sky, math.inf))
        self._draw.rectangle((0, self.horizon, self.width, self.height), fill=self._stroke("sidewalk", ground, 0.0))

    def strip(self, name: str, colour: Colour, x0: float, x1: float, near: float = _NEAR, far: float = 400.0) -> None:
        """A flat strip on the ground along the street. Its distance differs from row to row, noted as 0."""
        number = self._stroke(name, colour, 0.0)
        corners = [(x0, 0.0, near), (x1, 0.0, near), (x1, 0.0, far), (x0, 0.0, far)]
        self._draw.polygon([self.project(*corner) for corner in corners], fill=number)

    def develop(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Colours (H, W, 3) float32 in [0, 255], train ids (H, W) uint8, distances (H, W) float32 in metres."""
        numbers = np.asarray(self._numbers)
        colours = np.array(self._colours, dtype=np.float32)[numbers]
        labels = np.array(self._classes, dtype=np.uint8)[numbers]
        rows = np.arange(self.height, dtype=np.float32) + 0.5 - self.horizon
        ground = self.focal * self.camera_height / np.maximum(rows, 0.25)
        distances = np.array(self._distances, dtype=np.float32)[numbers]
        return colours, labels, np.where(distances == 0, ground[:, None], distances)

    def _stroke(self, name: str, colour: Colour, distance: float) -> int:
        self._colours.append(colour)
        self._classes.append(_TRAIN_IDS[name])
        self._distances.append(distance)
        return len(self._classes) - 1


class _Things:
    """What stands on the street, painted from far to near."""

    def __init__(self) -> None:
        self._things: list[tuple[float, Callable[[], None]]] = []

    def add(self, z: float, paint: Callable[[], None]) -> None:
        self._things.append((z, paint))

    def paint(self) -> None:
        for _, paint in sorted(self._things, key=lambda thing: -thing[0]):
            paint()


def _shade(colour: Colour, factor: float) -> Colour:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor


def _vary(colour: Colour, rng: np.random.Generator, spread: float) -> Colour:
    """The colour, moved by up to `spread` in each channel."""
    red, green, blue = (rng.uniform(-spread, spread, 3) + colour).tolist()
    return red, green, blue


def _pick(colours: Sequence[Colour], rng: np.random.Generator) -> Colour:
    return colours[int(rng.integers(len(colours)))]


# --- source: the computer game ---------------------------------------------------------------------------------------

_GAME_WALLS: tuple[Colour, ...] = ((200, 90, 70), (225, 190, 130), (150, 110, 160), (190, 140, 90))
_GAME_PAINT: tuple[Colour, ...] = ((220, 30, 40), (30, 70, 210), (240, 240, 240), (40, 40, 60), (20, 170, 180))
_GAME_CLOTHES: tuple[Colour, ...] = ((230, 60, 160), (250, 150, 30), (60, 60, 220), (160, 30, 40))
_GAME_SIGNS: tuple[Colour, ...] = ((235, 30, 30), (20, 70, 220), (250, 210, 20))


def _draw_source(height: int, width: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(
        height,
        width,
        horizon=rng.uniform(0.40, 0.46),
        centre=rng.uniform(0.44, 0.56),
        focal=1.5,
        camera_height=2.2,
    )
    road, walk = rng.uniform(3.6, 4.2), rng.uniform(2.4, 3.0)
    wall = road + walk
    canvas.backdrop(sky=_vary((95, 175, 240), rng, 20), ground=_vary((190, 175, 175), rng, 20))
    canvas.strip("road", _vary((85, 85, 95), rng, 18), -road, road)
    for stripe in range(3, 60, 6):
        canvas.strip("road", (240, 240, 240), -0.1, 0.1, stripe, stripe + 3)

    things = _Things()
    for side in (-1, 1):
        z = 2.0
        while z < _FAR:
            _block(canvas, things, rng, side * wall, z, z + 12)
            z += 12
        for z in np.arange(rng.uniform(8, 14), 60, 12):
            _lollipop_tree(canvas, things, rng, side * (wall - 0.8), z)
        for z in np.arange(rng.uniform(7, 17), 30, 12):
            _lamp_post(canvas, things, rng, side * (road + 0.4), z, side)
    for z in np.arange(rng.uniform(7, 11), 45, 8):
        _saloon(canvas, things, rng, road - 1.1, z)
    for z in rng.uniform(9, 28, rng.integers(0, 3)):
        _saloon(canvas, things, rng, -road / 2 * rng.choice((-1, 1)), z)
    for z in rng.uniform(5, 12, rng.integers(2, 5)):
        _standing_person(canvas, things, rng, rng.choice((-1, 1)) * rng.uniform(road + 0.3, wall - 0.5), z)
    if rng.random() < 0.3:
        _coach(canvas, things, rng, -road / 2, rng.uniform(11, 18))
    things.paint()
    return canvas


def _block(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, near: float, far: float) -> None:
    """A box building: street front with ribbon windows, and the wall towards the camera."""
    top, colour = float(rng.choice((6.5, 9.5, 12.5))), _vary(_pick(_GAME_WALLS, rng), rng, 12)
    back = x + math.copysign(10, x)

    def paint() -> None:
        canvas.polygon("building", colour, [(x, 0, near), (x, top, near), (x, top, far), (x, 0, far)])
        canvas.box("building", _shade(colour, 0.75), near, min(x, back), 0, max(x, back), top)
        for floor in np.arange(1.0, top - 2, 3.0):
            a, b = near + 1, far - 1
            corners = [(x, floor, a), (x, floor + 1.5, a), (x, floor + 1.5, b), (x, floor, b)]
            canvas.polygon("building", (60, 80, 110), corners)

    things.add(far, paint)


def _lollipop_tree(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    radius, colour = rng.uniform(1.4, 1.9), _vary((40, 170, 60), rng, 15)

    def paint() -> None:
        canvas.box("vegetation", (120, 75, 40), z, x - 0.2, 0, x + 0.2, 2.5)
        canvas.ellipse("vegetation", colour, z, x, 2.3 + radius, radius, radius)

    things.add(z, paint)


def _lamp_post(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float, side: int) -> None:
    """A light grey mast with an arm over the road; two of three carry a sign."""
    sign, shape = _pick(_GAME_SIGNS, rng), rng.integers(3)

    def paint() -> None:
        canvas.box("pole", (165, 165, 175), z, x - 0.2, 0, x + 0.2, 6)
        canvas.box("pole", (165, 165, 175), z, min(x, x - side * 1.5), 5.8, max(x, x - side * 1.5), 6)
        if shape == 0:
            canvas.ellipse("traffic sign", sign, z, x, 3.1, 0.8, 0.8)
        elif shape == 1:
            canvas.upright("traffic sign", sign, z, [(x - 0.9, 2.4), (x + 0.9, 2.4), (x, 4.0)])

    things.add(z, paint)


def _saloon(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A low three-box car seen from behind, with the flank that faces the camera's axis."""
    paint_colour = _vary(_pick(_GAME_PAINT, rng), rng, 10)

    def paint() -> None:
        flank = x - math.copysign(0.9, x)
        side = _shade(paint_colour, 0.7)
        canvas.polygon("car", side, [(flank, 0.2, z), (flank, 0.95, z), (flank, 0.95, z + 4), (flank, 0.2, z + 4)])
        cabin = [(-0.8, 0.9), (-0.6, 1.5), (0.6, 1.5), (0.8, 0.9)]
        canvas.upright("car", _shade(paint_colour, 0.85), z + 1, [(x + dx, y) for dx, y in cabin])
        glass = [(-0.65, 0.95), (-0.5, 1.4), (0.5, 1.4), (0.65, 0.95)]
        canvas.upright("car", (50, 60, 80), z + 1, [(x + dx, y) for dx, y in glass])
        boot = [(x - 0.9, 0.95, z), (x + 0.9, 0.95, z), (x + 0.8, 0.95, z + 1), (x - 0.8, 0.95, z + 1)]
        canvas.polygon("car", _shade(paint_colour, 1.1), boot)
        canvas.box("car", _BLACK, z, x - 0.85, 0, x - 0.55, 0.3)
        canvas.box("car", _BLACK, z, x + 0.55, 0, x + 0.85, 0.3)
        canvas.box("car", paint_colour, z, x - 0.9, 0.2, x + 0.9, 0.95)
        canvas.box("car", (255, 60, 60), z, x - 0.85, 0.6, x - 0.55, 0.8)
        canvas.box("car", (255, 60, 60), z, x + 0.55, 0.6, x + 0.85, 0.8)

    things.add(z, paint)


def _standing_person(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    coat, trousers = _pick(_GAME_CLOTHES, rng), _pick(_GAME_CLOTHES, rng)

    def paint() -> None:
        canvas.box("person", trousers, z, x - 0.22, 0, x - 0.03, 0.85)
        canvas.box("person", trousers, z, x + 0.03, 0, x + 0.22, 0.85)
        canvas.box("person", coat, z, x - 0.3, 0.8, x + 0.3, 1.5)
        canvas.ellipse("person", _SKIN, z, x, 1.68, 0.17, 0.2)

    things.add(z, paint)


def _coach(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A yellow single-decker, square as a brick."""
    colour = _vary((250, 190, 20), rng, 10)

    def paint() -> None:
        flank = x - math.copysign(1.25, x)
        corners = [(flank, 0.3, z), (flank, 3.1, z), (flank, 3.1, z + 10), (flank, 0.3, z + 10)]
        canvas.polygon("bus", _shade(colour, 0.7), corners)
        canvas.box("bus", _BLACK, z, x - 1.2, 0, x + 1.2, 0.4)
        canvas.box("bus", colour, z, x - 1.25, 0.3, x + 1.25, 3.1)
        canvas.box("bus", (60, 80, 110), z, x - 1.05, 1.6, x + 1.05, 2.7)

    things.add(z, paint)


# --- target: the photograph ------------------------------------------------------------------------------------------

_PLASTER: tuple[Colour, ...] = ((165, 152, 135), (150, 100, 85), (172, 160, 142), (125, 118, 112), (165, 132, 98))
_ROOFS: tuple[Colour, ...] = ((110, 65, 55), (75, 70, 75), (95, 80, 70))
_LACQUER: tuple[Colour, ...] = (
    (140, 140, 146),
    (62, 64, 72),
    (205, 205, 203),
    (150, 35, 38),
    (45, 70, 130),
    (50, 105, 110),
)
_COATS: tuple[Colour, ...] = ((55, 48, 60), (140, 80, 50), (60, 75, 130), (150, 45, 50), (150, 70, 110))
_PLATES: tuple[Colour, ...] = ((185, 45, 42), (45, 75, 150), (200, 175, 60), (215, 212, 208))


def _draw_target(height: int, width: int, rng: np.random.Generator) -> _Canvas:
    canvas = _Canvas(
        height,
        width,
        horizon=rng.uniform(0.44, 0.54),
        centre=rng.uniform(0.36, 0.60),
        focal=rng.uniform(1.6, 1.9),
        camera_height=1.8,
    )
    left, right = -rng.uniform(3.5, 6.0), rng.uniform(2.8, 4.5)  # the camera drives on the right
    walk = rng.uniform(1.8, 3.6)
    canvas.backdrop(sky=_vary((200, 214, 232), rng, 12), ground=_vary((176, 165, 158), rng, 12))
    canvas.strip("road", _vary((92, 90, 90), rng, 10), left, right)
    for z in np.arange(rng.uniform(2, 6), 50, 8):  # repairs and worn paint
        x = rng.uniform(left, right - 1.5)
        canvas.strip("road", _vary((84, 82, 82), rng, 14), x, x + rng.uniform(0.6, 1.5), z, z + rng.uniform(1, 6))
        canvas.strip("road", (140, 138, 132), (left + right) / 2 - 0.07, (left + right) / 2 + 0.07, z, z + 4)

    things = _Things()
    for side, kerb in ((-1, left), (1, right)):
        wall = kerb + side * walk
        z = rng.uniform(1.0, 5.0)
        while z < _FAR:
            depth = rng.uniform(8, 16)
            _gabled_house(canvas, things, rng, wall + side * rng.uniform(0, 1.5), z, z + depth)
            z += depth + rng.choice((0.0, 4.0, 7.0))
        for z in np.arange(rng.uniform(6, 18), 80, rng.uniform(7, 14)):
            _shaggy_tree(canvas, things, rng, wall + side * rng.uniform(-0.8, 1.0), z)
        for z in np.arange(rng.uniform(6, 14), 32, rng.uniform(9, 16)):
            _mast(canvas, things, rng, kerb + side * rng.uniform(0.3, 0.9), z)
        parked = rng.uniform(0.2, 0.8)
        for z in np.arange(rng.uniform(7, 12), 45, 7):
            if rng.random() < parked:
                _van(canvas, things, rng, kerb - side * rng.uniform(0.9, 1.2), z)
        for z in rng.uniform(5, 12, rng.integers(0, 4)):
            _walking_person(canvas, things, rng, kerb + side * rng.uniform(0.2, walk), z)
    for z in rng.uniform(10, 32, rng.integers(0, 3)):
        _van(canvas, things, rng, left / 2 if rng.random() < 0.6 else right / 3, z)
    if rng.random() < 0.3:
        _city_bus(canvas, things, rng, left / 2, rng.uniform(11, 20))
    things.paint()
    return canvas


def _gabled_house(
    canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, near: float, far: float
) -> None:
    """A house with single windows and a pitched roof whose gable looks at the street."""
    eaves, rise = rng.uniform(4.5, 9.5), rng.uniform(1.5, 4.0)
    wall, roof = _vary(_pick(_PLASTER, rng), rng, 15), _vary(_pick(_ROOFS, rng), rng, 10)
    glass = _vary((70, 72, 78), rng, 15)
    middle, back = (near + far) / 2, x + math.copysign(9, x)

    def paint() -> None:
        gable = [(x, 0, near), (x, eaves, near), (x, eaves + rise, middle), (x, eaves, far), (x, 0, far)]
        canvas.polygon("building", wall, gable)
        canvas.box("building", _shade(wall, 0.85), near, min(x, back), 0, max(x, back), eaves)
        slope = [(x, eaves, near), (back, eaves, near), (back, eaves + rise, middle), (x, eaves + rise, middle)]
        canvas.polygon("building", roof, slope)
        if near < 40:
            for floor in np.arange(1.0, eaves - 1.8, 2.9):
                for a in np.arange(near + 1.2, far - 1.5, 3.2):
                    b = a + 1.1
                    corners = [(x, floor, a), (x, floor + 1.5, a), (x, floor + 1.5, b), (x, floor, b)]
                    canvas.polygon("building", glass, corners)

    things.add(far, paint)


def _shaggy_tree(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A crown of many leafy clumps, wider than high, or (one in three) a bush without a trunk."""
    bush = rng.random() < 0.33
    centre, spread_x, spread_y = (0.8, 1.2, 0.5) if bush else (rng.uniform(3.6, 4.8), rng.uniform(1.5, 2.2), 1.2)
    green = _vary((70, 128, 62), rng, 14)
    clumps = rng.uniform(-1, 1, (8, 2)) * (spread_x, spread_y) + (x, centre)
    sizes, lights = rng.uniform(0.45, 1.0, 8), rng.uniform(0.75, 1.2, 8)

    def paint() -> None:
        if not bush:
            canvas.upright(
                "vegetation", (75, 62, 52), z, [(x - 0.25, 0), (x - 0.12, 3.4), (x + 0.12, 3.4), (x + 0.25, 0)]
            )
        for (clump_x, clump_y), size, light in zip(clumps.tolist(), sizes, lights, strict=True):
            radius = size * spread_x * 0.6
            canvas.ellipse("vegetation", _shade(green, light), z, clump_x, clump_y, radius, radius * 0.8)

    things.add(z, paint)


def _mast(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A thinner, darker and slightly leaning pole; half of them carry a sign."""
    top, lean = rng.uniform(3.4, 7.5), rng.uniform(-0.15, 0.15)
    colour, plate = _vary((155, 154, 152), rng, 20), _vary(_pick(_PLATES, rng), rng, 12)
    shape = rng.integers(5)

    def paint() -> None:
        canvas.upright(
            "pole", colour, z, [(x - 0.22, 0), (x - 0.18 + lean, top), (x + 0.18 + lean, top), (x + 0.22, 0)]
        )
        if shape == 0:
            canvas.ellipse("traffic sign", plate, z, x + lean / 2, 2.8, 0.75, 0.75)
        elif shape == 1:
            canvas.box("traffic sign", plate, z, x - 0.65, 2.1, x + 0.7, 3.5)
        elif shape == 2:
            canvas.upright("traffic sign", plate, z, [(x - 0.9, 3.6), (x + 0.9, 3.6), (x, 2.0)])

    things.add(z, paint)


def _van(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A tall one-box car: anything from a hatchback to a van, with its shadow on the road."""
    top, half, length = rng.uniform(1.45, 2.0), rng.uniform(0.85, 1.0), rng.uniform(3.6, 5.2)
    colour = _vary(_pick(_LACQUER, rng), rng, 12)
    oncoming = x < 0
    lights: Colour = (235, 225, 190) if oncoming else (150, 45, 40)

    def paint() -> None:
        flank, end = x - math.copysign(half, x), z + length
        canvas.strip("road", (50, 49, 50), x - half, x + half, z - 0.5, z)
        outline = [
            (flank, 0.15, z),
            (flank, 0.9, z),
            (flank, top, z + 0.6),
            (flank, top, end - 0.9),
            (flank, 0.15, end),
        ]
        canvas.polygon("car", _shade(colour, 0.8), outline)
        canvas.box("car", _BLACK, z, x - half + 0.05, 0, x + half - 0.05, 0.35)
        body = [(-half, 0.2), (-half, 1.0), (-half + 0.2, top), (half - 0.2, top), (half, 1.0), (half, 0.2)]
        canvas.upright("car", colour, z, [(x + dx, y) for dx, y in body])
        glass = [(-half + 0.15, 1.0), (-half + 0.3, top - 0.12), (half - 0.3, top - 0.12), (half - 0.15, 1.0)]
        canvas.upright("car", (62, 66, 72), z, [(x + dx, y) for dx, y in glass])
        canvas.box("car", lights, z, x - half + 0.05, 0.65, x - half + 0.3, 0.85)
        canvas.box("car", lights, z, x + half - 0.3, 0.65, x + half - 0.05, 0.85)

    things.add(z, paint)


def _walking_person(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """Legs apart, leaning forward, in a long coat; every other one carries a bag."""
    stride, lean, size = rng.uniform(0.15, 0.4), rng.uniform(-0.15, 0.15), rng.uniform(0.85, 1.08)
    coat, trousers = _vary(_pick(_COATS, rng), rng, 12), _vary(_pick(_COATS, rng), rng, 8)
    bag = rng.random() < 0.5

    def paint() -> None:
        for foot in (-stride, stride):
            leg = [(-0.1, 0.9), (0.1, 0.9), (foot + 0.1, 0), (foot - 0.1, 0)]
            canvas.upright("person", trousers, z, [(x + dx * size, y * size) for dx, y in leg])
        torso = [(-0.27, 0.65), (-0.24 + lean, 1.48), (0.24 + lean, 1.48), (0.27, 0.65)]
        canvas.upright("person", coat, z, [(x + dx * size, y * size) for dx, y in torso])
        if bag:
            canvas.box("person", _shade(coat, 0.6), z, x + 0.2 * size, 0.6 * size, x + 0.48 * size, 1.0 * size)
        canvas.ellipse("person", _shade(_SKIN, 0.8), z, x + 1.3 * lean * size, 1.64 * size, 0.14 * size, 0.18 * size)

    things.add(z, paint)


def _city_bus(canvas: _Canvas, things: _Things, rng: np.random.Generator, x: float, z: float) -> None:
    """A tall bus with a sloping front and two-tone livery."""
    colour, top = _vary((210, 155, 40), rng, 18), rng.uniform(3.0, 3.6)

    def paint() -> None:
        flank, end = x - math.copysign(1.2, x), z + 12
        canvas.strip("road", (50, 49, 50), x - 1.2, x + 1.2, z - 0.6, z)
        canvas.polygon(
            "bus", _shade(colour, 0.8), [(flank, 0.2, z), (flank, top, z), (flank, top, end), (flank, 0.2, end)]
        )
        glass = [(flank, 1.4, z + 0.5), (flank, 2.5, z + 0.5), (flank, 2.5, end), (flank, 1.4, end)]
        canvas.polygon("bus", (62, 66, 72), glass)
        body = [(-1.2, 0.15), (-1.25, 1.2), (-1.1, top), (1.1, top), (1.25, 1.2), (1.2, 0.15)]
        canvas.upright("bus", colour, z, [(x + dx, y) for dx, y in body])
        canvas.box("bus", (62, 66, 72), z, x - 1.05, 1.2, x + 1.05, 2.6)
        canvas.box("bus", (190, 185, 175), z, x - 1.2, 0.3, x + 1.2, 0.9)

    things.add(z, paint)


def _photograph(canvas: _Canvas, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What lies between the street and the file: surfaces, air, light, lens and sensor. Labels pass untouched."""
    colours, labels, distances = canvas.develop()
    height, width = labels.shape

    # Surfaces: coarse stains and fine grain, as strong as the material of the class asks for.
    roughness = np.full(256, 5, dtype=np.float32)
    roughness[[_TRAIN_IDS["vegetation"], _TRAIN_IDS["building"], _TRAIN_IDS["sidewalk"]]] = (20, 12, 9)
    roughness[[_TRAIN_IDS["road"], _TRAIN_IDS["sky"]]] = (7, 5)
    texture = 0.7 * _clouds(rng, 24, height, width) + 0.5 * _clouds(rng, 72, height, width)
    colours += (roughness[labels] * texture)[..., None]

    # Air: everything fades towards one grey with distance. The sky is hazy near the horizon only.
    haze = 1 - np.exp(-distances / rng.uniform(60, 140))
    rows = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / canvas.horizon
    haze = np.where(np.isinf(distances), np.clip(rows, 0, 1) ** 2 * 0.7, haze * 0.8)
    colours += haze[..., None] * (np.array(_vary((188, 178, 170), rng, 8), dtype=np.float32) - colours)

    # Light: a low sun from one side through dusty air. All colours lean to orange, the shadows are lifted.
    across = np.linspace(-1, 1, width, dtype=np.float32) * rng.uniform(-0.18, 0.18)
    down = np.linspace(0.06, -0.12, height, dtype=np.float32)[:, None]
    radius = np.hypot(np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)).astype(np.float32)
    light = (1.02 + across + down) * (1 - 0.16 * radius**2)
    cast = np.array([1.1, 0.9, 0.68], dtype=np.float32) * rng.uniform(0.85, 1.15)
    colours = 255 * (np.clip(colours * light[..., None] * cast, 0, 255) / 255) ** 1.3
    colours = np.clip(colours + np.array([24, 14, 8], dtype=np.float32), 0, 255)

    # Lens and sensor.
    photo = Image.fromarray(colours.astype(np.uint8)).filter(
        ImageFilter.GaussianBlur(rng.uniform(0.4, 0.7) * height / 96)
    )
    noise = rng.standard_normal((height, width, 3), dtype=np.float32) * rng.uniform(3, 6)
    return np.clip(np.asarray(photo) + noise, 0, 255).astype(np.uint8), labels


def _at_night(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The photograph (H, W, 3) uint8 in blue light, with deep shadows, and a sensor that is set to see in it."""
    light = np.array([0.42, 0.55, 0.82], dtype=np.float32) * rng.uniform(0.8, 1.1)
    dark = 255 * (photo / np.float32(255)) ** 1.5 * light
    noise = rng.standard_normal(photo.shape, dtype=np.float32) * rng.uniform(6, 10)
    return np.clip(dark + noise, 0, 255).astype(np.uint8)


def _clouds(rng: np.random.Generator, cells: int, height: int, width: int) -> np.ndarray:
    """Smooth noise (H, W) of about unit deviation with `cells` bumps from top to bottom and twice as many across."""
    grid = Image.fromarray(rng.standard_normal((cells, 2 * cells), dtype=np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BILINEAR))


# --- the public side -------------------------------------------------------------------------------------------------


def draw_scene(domain: Domain, rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one street scene.

    Args:
        domain: "source" or "simulator" (computer-made), "target" or "night" (photographed).
        rng: The only source of randomness; equal states give equal scenes. What stands where does not depend on the
            size, so the same state drawn larger is the same street in more detail.
        height: Pixels, at least 32.
        width: Pixels, at least 32. Twice the height is what the scenes are composed for.

    Returns:
        The RGB image (H, W, 3) uint8 and its label (H, W) uint8 of Cityscapes train ids. Both come from the same
        strokes: the label has no anti-aliasing and no ignored pixels, and it is exact at every pixel.

    Raises:
        ValueError: For an unknown domain or a size that is too small.
    """
    _check_domain(domain)
    if min(height, width) < _SMALLEST_SIDE:
        raise ValueError(
            f"A street scene needs at least {_SMALLEST_SIDE} pixels in height and width, got {height}x{width}. "
            f"Ask for a larger size, such as 96x192."
        )
    canvas = (_draw_source if domain == "source" else _draw_target)(height, width, rng)
    if domain in ("source", "simulator"):
        colours, labels, _ = canvas.develop()
        return np.clip(colours, 0, 255).astype(np.uint8), labels
    photo, labels = _photograph(canvas, rng)
    return (photo if domain == "target" else _at_night(photo, rng)), labels


def streets(
    domain: Domain,
    split: str,
    num_images: int | None = None,
    seed: int = 0,
    height: int = 96,
    width: int = 192,
) -> Dataset:
    """A labelled set of street scenes, built in memory.

    Scene i is a function of (seed, domain, split, i) alone: asking for more images keeps the first ones, and the splits
    never share a scene. Same arguments, same bytes.

    Args:
        domain: "source", "target", "simulator" or "night".
        split: "train" or "validation".
        num_images: How many scenes; None for 256 (train) or 64 (validation).
        seed: Not negative. Another seed gives other streets of the same cities.
        height: Pixels, at least 32.
        width: Pixels, at least 32.

    Returns:
        A dataset with the columns `image` (RGB, PNG), `label` (mode L, PNG, Cityscapes train ids) and `file_name`.

    Raises:
        ValueError: For an unknown domain or split, a negative seed, no images, or a size that is too small.
    """
    _check_domain(domain)
    if split not in _DEFAULT_NUM_IMAGES:
        raise ValueError(f"Unknown split {split!r}. The streets have the splits {', '.join(_DEFAULT_NUM_IMAGES)}.")
    if num_images is None:
        num_images = _DEFAULT_NUM_IMAGES[split]
    if num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}. Leave it out for the default number.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}. Any whole number from 0 on will do.")

    columns: dict[str, list] = {"image": [], "label": [], "file_name": []}
    stream = [seed, get_args(Domain).index(domain), list(_DEFAULT_NUM_IMAGES).index(split)]
    for index in range(num_images):
        image, label = draw_scene(domain, np.random.default_rng([*stream, index]), height, width)
        columns["image"].append({"bytes": _png(image), "path": None})
        columns["label"].append({"bytes": _png(label), "path": None})
        columns["file_name"].append(f"{domain}_{split}_{index:05d}.png")
    features = Features({"image": ImageFeature(), "label": ImageFeature(mode="L"), "file_name": Value("string")})
    return Dataset.from_dict(columns, features=features)


def _check_domain(domain: str) -> None:
    if domain not in get_args(Domain):
        raise ValueError(f"Unknown domain {domain!r}. The streets have the domains {', '.join(get_args(Domain))}.")


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
