"""The world the built-in model knows: coloured shapes on coloured backgrounds, and the ways people ask for them.

A `Scene` is what is in a picture, `render` draws it, `describe` says it in words. Everything is a pure function of its
arguments and the `random.Random` it is given. Some combinations are held out: they are never drawn nor described while
training, so that pictures of them show composition and not memory.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

PICTURE_PX = 64
SUPERSAMPLING = 4

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 40),
    "green": (35, 155, 60),
    "blue": (35, 75, 215),
    "purple": (130, 40, 165),
    "pink": (255, 145, 190),
    "brown": (120, 70, 30),
    "black": (15, 15, 15),
    "white": (248, 248, 248),
    "gray": (128, 128, 128),
}
COLOR_NAMES = tuple(COLORS)
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "cross",
    "ring",
    "moon",
    "house",
    "tree",
    "skull",
)
FORBIDDEN_SHAPE = "skull"
"""What the safety checker of this world fires on."""

PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
SIZE_WORDS = {"big": ("big", "large", "huge"), "small": ("small", "little", "tiny")}
RADIUS_PX = {"small": (9.0, 11.0), "": (14.0, 18.0), "big": (22.0, 26.0)}
PLACES = {"left": (17, 32), "right": (47, 32), "top": (32, 17), "bottom": (32, 47)}
PLACE_WORDS = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = {
    "above": ("above",),
    "below": ("below",),
    "left of": ("to the left of", "to the left of", "left of"),
    "right of": ("to the right of", "to the right of", "right of"),
    "and": ("and",),
}


# ---- drawing one shape -------------------------------------------------------------------------------------------

Rgb = tuple[int, int, int]
Point = tuple[float, float]


def _star_points() -> list[Point]:
    points = []
    for i in range(10):
        angle, reach = -math.pi / 2 + i * math.pi / 5, 1.08 if i % 2 == 0 else 0.45
        points.append((reach * math.cos(angle), reach * math.sin(angle) + 0.08))
    return points


def _heart_points() -> list[Point]:
    points = []
    for i in range(40):
        t = 2 * math.pi * i / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -(y + 2.5) / 15))
    return points


class _Pen:
    """Draws in units of the shape's radius around its centre."""

    def __init__(self, draw: ImageDraw.ImageDraw, cx: float, cy: float, r: float) -> None:
        self._draw, self._cx, self._cy, self._r = draw, cx, cy, r

    def polygon(self, points: list[Point], fill: Rgb) -> None:
        self._draw.polygon([(self._cx + x * self._r, self._cy + y * self._r) for x, y in points], fill=fill)

    def ellipse(self, x: float, y: float, radius: float, fill: Rgb, radius_y: float | None = None) -> None:
        self._draw.ellipse(self._box(x - radius, y - (radius_y or radius), x + radius, y + (radius_y or radius)), fill)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb) -> None:
        self._draw.rectangle(self._box(x0, y0, x1, y1), fill)

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        cx, cy, r = self._cx, self._cy, self._r
        return (cx + x0 * r, cy + y0 * r, cx + x1 * r, cy + y1 * r)


def _ring(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.ellipse(0, 0, 1, color)
    pen.ellipse(0, 0, 0.52, hole)


def _moon(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.ellipse(0, 0, 1, color)
    pen.ellipse(0.52, -0.12, 0.86, hole)


def _cross(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.rectangle(-0.34, -1, 0.34, 1, color)
    pen.rectangle(-1, -0.34, 1, 0.34, color)


def _house(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.polygon([(0, -1), (1.1, -0.1), (-1.1, -0.1)], color)
    pen.rectangle(-0.8, -0.12, 0.8, 0.95, color)
    pen.rectangle(-0.22, 0.3, 0.22, 0.95, hole)


def _tree(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.polygon([(0, -1.1), (0.62, -0.2), (-0.62, -0.2)], color)
    pen.polygon([(0, -0.6), (0.85, 0.5), (-0.85, 0.5)], color)
    pen.rectangle(-0.17, 0.45, 0.17, 1.05, color)


def _skull(pen: _Pen, color: Rgb, hole: Rgb) -> None:
    pen.ellipse(0, -0.225, 0.95, color, radius_y=0.775)
    pen.rectangle(-0.55, 0.25, 0.55, 1.0, color)
    for side in (-1, 1):
        pen.ellipse(side * 0.42, -0.2, 0.27, hole)
    pen.polygon([(0, 0.12), (0.14, 0.4), (-0.14, 0.4)], hole)
    for gap in (-0.27, 0.0, 0.27):
        pen.rectangle(gap - 0.05, 0.62, gap + 0.05, 1.0, hole)


_DRAWINGS: dict[str, Callable[[_Pen, Rgb, Rgb], None]] = {
    "circle": lambda pen, color, hole: pen.ellipse(0, 0, 1, color),
    "square": lambda pen, color, hole: pen.rectangle(-0.88, -0.88, 0.88, 0.88, color),
    "triangle": lambda pen, color, hole: pen.polygon([(0, -1), (1.05, 0.85), (-1.05, 0.85)], color),
    "star": lambda pen, color, hole: pen.polygon(_star_points(), color),
    "heart": lambda pen, color, hole: pen.polygon(_heart_points(), color),
    "diamond": lambda pen, color, hole: pen.polygon([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)], color),
    "cross": _cross,
    "ring": _ring,
    "moon": _moon,
    "house": _house,
    "tree": _tree,
    "skull": _skull,
}


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, color: Rgb, hole: Rgb) -> None:
    """Draw one shape of radius `r` around (cx, cy); its openings are painted in `hole`."""
    _DRAWINGS[shape](_Pen(draw, cx, cy, r), color, hole)


# ---- scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Thing:
    color: str
    shape: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """`layout` is "empty", "one", a key of `PLACES`, "two", "three", or a key of `RELATIONS`."""

    background: str
    things: tuple[Thing, ...]
    layout: str


def _hold_out() -> tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str, str]]]:
    rng = random.Random(1234)
    colors = list(COLOR_NAMES)
    rng.shuffle(colors)
    pairs = frozenset((colors[i % len(colors)], shape) for i, shape in enumerate(SHAPES))
    triples = frozenset(
        (color, shape, background)
        for color in COLOR_NAMES
        for shape in SHAPES
        for background in COLOR_NAMES
        if color != background and (color, shape) not in pairs and rng.random() < 0.10
    )
    return pairs, triples


HELD_OUT_PAIRS, HELD_OUT_TRIPLES = _hold_out()
"""(colour, shape), and (colour, shape, background), that training never meets."""


def is_seen(color: str, shape: str, background: str) -> bool:
    """Whether training may meet this combination."""
    return (color, shape) not in HELD_OUT_PAIRS and (color, shape, background) not in HELD_OUT_TRIPLES


def _pick(rng: random.Random, background: str) -> tuple[str, str]:
    while True:
        color, shape = rng.choice(COLOR_NAMES), rng.choice(SHAPES)
        if color != background and is_seen(color, shape, background):
            return color, shape


def _around(rng: random.Random, center: tuple[float, float], reach: float = 1.5) -> tuple[float, float]:
    return center[0] + rng.uniform(-reach, reach), center[1] + rng.uniform(-reach, reach)


def _one(rng: random.Random, background: str) -> Scene:
    color, shape = _pick(rng, background)
    size = rng.choices(("", "small", "big"), (0.55, 0.15, 0.30))[0]
    layout = rng.choice(tuple(PLACES)) if size != "big" and rng.random() < 0.3 else "one"
    x, y = _around(rng, PLACES.get(layout, (32, 32)), 1.5 if size == "big" else 2.0)
    return Scene(background, (Thing(color, shape, size, x, y, rng.uniform(*RADIUS_PX[size])),), layout)


def _several(rng: random.Random, background: str) -> Scene:
    color, shape = _pick(rng, background)
    centers: tuple[tuple[float, float], ...]
    if rng.random() < 0.6:
        layout, centers, radii = "two", ((17, 32), (47, 32)), (11.0, 14.0)
    elif rng.random() < 0.5:
        layout, centers, radii = "three", ((12, 32), (32, 32), (52, 32)), (8.0, 9.5)
    else:
        layout, centers, radii = "three", ((32, 16), (16, 47), (48, 47)), (10.0, 13.0)
    radius = rng.uniform(*radii)
    things = tuple(Thing(color, shape, "", *_around(rng, center), radius) for center in centers)
    return Scene(background, things, layout)


def _related(rng: random.Random, background: str) -> Scene:
    relation = rng.choice(tuple(RELATIONS))
    spots = [(32, 16), (32, 48)] if relation in ("above", "below") else [(17, 32), (47, 32)]
    if relation in ("below", "right of"):
        spots.reverse()
    things = []
    for spot in spots:
        color, shape = _pick(rng, background)
        size = rng.choices(("", "small"), (0.75, 0.25))[0]
        radius = rng.uniform(12, 14.5) if size == "" else rng.uniform(8, 9.5)
        things.append(Thing(color, shape, size, *_around(rng, spot), radius))
    return Scene(background, tuple(things), relation)


def sample_scene(rng: random.Random) -> Scene:
    """Draw one scene of the training world; held-out combinations never come up."""
    background = rng.choice(COLOR_NAMES) if rng.random() < 0.8 else rng.choice(("white", "black"))
    kind = rng.random()
    if kind < 0.48:
        return _one(rng, background)
    if kind < 0.70:
        return _several(rng, background)
    if kind < 0.98:
        return _related(rng, background)
    return Scene(background, (), "empty")


def _jitter(rng: random.Random, color: Rgb, reach: int = 8) -> Rgb:
    red, green, blue = (max(0, min(255, value + rng.randint(-reach, reach))) for value in color)
    return red, green, blue


def render(scene: Scene, rng: random.Random, size_px: int = PICTURE_PX) -> Image.Image:
    """Draw the scene as an RGB picture, size_px × size_px, colours varied by a few levels."""
    scale = SUPERSAMPLING * size_px / PICTURE_PX
    background = _jitter(rng, COLORS[scene.background])
    picture = Image.new("RGB", (int(PICTURE_PX * scale),) * 2, background)
    draw = ImageDraw.Draw(picture)
    colors: dict[str, Rgb] = {}
    for thing in scene.things:
        color = colors.setdefault(thing.color, _jitter(rng, COLORS[thing.color]))
        draw_shape(draw, thing.shape, thing.x * scale, thing.y * scale, thing.radius * scale, color, background)
    return picture.resize((size_px, size_px), Image.Resampling.BOX)


def render_array(scene: Scene, rng: random.Random) -> np.ndarray:
    """`render` as a uint8 array, 64 × 64 × 3."""
    return np.asarray(render(scene, rng))


# ---- words -------------------------------------------------------------------------------------------------------

_OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of", "a painting of", "an icon of", "a simple")
_CLOSINGS = ("flat design", "clean", "simple", "highly detailed", "minimal", "4k", "digital art", "vector art")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"

LAYOUTS = ("unsaid", "empty", "one", "left", "right", "top", "bottom", "two", "three", "row", "column")
ATTRIBUTES = {
    "background": 1 + len(COLOR_NAMES),
    "first_color": 1 + len(COLOR_NAMES),
    "first_shape": 1 + len(SHAPES),
    "first_size": 3,
    "second_color": 1 + len(COLOR_NAMES),
    "second_shape": 1 + len(SHAPES),
    "layout": len(LAYOUTS),
    "order": 3,
}
"""What a caption can say, and how many values each has; value 0 always means "not said"."""


@dataclass(frozen=True, slots=True)
class Caption:
    text: str
    said: dict[str, int]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _color_word(rng: random.Random, color: str) -> str:
    return "grey" if color == "gray" and rng.random() < 0.3 else color


def _noun_phrase(rng: random.Random, thing: Thing, said: dict[str, int], which: str) -> str:
    words = []
    if thing.size and rng.random() < 0.85:
        words.append(rng.choice(SIZE_WORDS[thing.size]))
        if which == "first":
            said["first_size"] = 1 if thing.size == "big" else 2
    if rng.random() < 0.95:
        words.append(_color_word(rng, thing.color))
        said[f"{which}_color"] = 1 + COLOR_NAMES.index(thing.color)
    words.append(thing.shape)
    said[f"{which}_shape"] = 1 + SHAPES.index(thing.shape)
    return " ".join([_article(words[0]), *words] if rng.random() < 0.85 else words)


def _subject(rng: random.Random, scene: Scene, said: dict[str, int]) -> str:
    first = scene.things[0]
    if scene.layout in RELATIONS:
        left = _noun_phrase(rng, first, said, "first")
        right = _noun_phrase(rng, scene.things[1], said, "second")
        said["layout"] = LAYOUTS.index("column" if scene.layout in ("above", "below") else "row")
        said["order"] = 2 if scene.layout in ("below", "right of") else 1
        return f"{left} {rng.choice(RELATIONS[scene.layout])} {right}"
    if scene.layout in ("two", "three"):
        number = scene.layout if rng.random() < 0.9 else str(len(scene.things))
        said["layout"] = LAYOUTS.index(scene.layout)
        said["first_shape"] = 1 + SHAPES.index(first.shape)
        color = ""
        if rng.random() < 0.95:
            color = _color_word(rng, first.color) + " "
            said["first_color"] = 1 + COLOR_NAMES.index(first.color)
        return f"{number} {color}{PLURALS[first.shape]}"
    text = _noun_phrase(rng, first, said, "first")
    if scene.layout in PLACES and rng.random() < 0.85:
        said["layout"] = LAYOUTS.index(scene.layout)
        return f"{text} {PLACE_WORDS[scene.layout]}"
    said["layout"] = LAYOUTS.index("one")
    return text


def describe(scene: Scene, rng: random.Random) -> Caption:
    """Say the scene as somebody might, with now and then a detail left out or a word too many."""
    said = dict.fromkeys(ATTRIBUTES, 0)
    background = _color_word(rng, scene.background)
    article = _article(background)
    if scene.layout == "empty":
        text = rng.choice((f"{article} {background} background", f"{background} background", f"plain {background}"))
        said["background"], said["layout"] = 1 + COLOR_NAMES.index(scene.background), LAYOUTS.index("empty")
    else:
        text = _subject(rng, scene, said)
        if rng.random() < 0.8:
            common = f" on {article} {background} background"
            rare = (f" on {background}", f", {background} background", f" with {article} {background} background")
            text += rng.choice((common,) * 4 + rare)
            said["background"] = 1 + COLOR_NAMES.index(scene.background)
    if rng.random() < 0.06:
        text = f"{rng.choice(_OPENINGS)} {text}"
    if rng.random() < 0.04:
        text = f"{text}, {rng.choice(_CLOSINGS)}"
    if rng.random() < 0.04:  # a word from outside this world, to be ignored
        words = text.split(" ")
        words.insert(rng.randint(0, len(words)), "".join(rng.choice(_LETTERS) for _ in range(rng.randint(3, 8))))
        text = " ".join(words)
    return Caption(text, said)


def captions(seed: int, count: int) -> Iterator[Caption]:
    """A stream of captions, each of a new scene."""
    rng = random.Random(seed)
    for _ in range(count):
        yield describe(sample_scene(rng), rng)
