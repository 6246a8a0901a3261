"""Reads a picture of the small world back: its background, and every object's colour, shape, centre and radius.

It looks at pixels only: it knows neither the prompt nor the model, and no neural network takes part. The border's
commonest colour is the background. Flat patches that differ from it are seeds, which grow over the soft edges into
regions. A region's median colour names it, and turns its pixels into coverage between 0 and 1. The shape is the one
whose drawing overlaps best with that coverage; what overlaps badly with every shape is reported as `UNCLEAR`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from .world import COLOR_NAMES, COLORS, PICTURE_PX, SHAPES, draw_shape

UNCLEAR = "unclear"
"""The shape of something that is there and looks like none of `SHAPES`."""

MIN_DIFFERENCE = 30.0
"""RGB distance from the background below which a pixel is background; the palette's colours are at least 87 apart."""
MAX_FLAT_STEP = 30.0
"""Largest difference in any channel between a seed pixel and its eight neighbours."""
SAME_COLOR = 45.0
"""Touching regions whose colours are nearer than this are one region."""
MIN_SEED_PX = 4
MIN_THING_PX = 14.0
"""Less coverage than this is a speck, which the eye passes over; the smallest thing the world draws covers about 60."""
MAX_BLEMISH_PX = 50
MAX_BLEMISH_SHARE = 0.3
"""A region this small, alone and beside a thing it touches, or too thin to have an inside, is a blemish of that thing."""
MAX_SHADE = 100.0
"""Pieces whose colours are nearer than this may be one thing in two shades, if together they make a better shape."""
MIN_OVERLAP = 0.6
SPLIT_BELOW = 0.84
"""A region that overlaps worse than this with one shape may be several things that touch."""
SPLIT_GAIN, MIN_SPLIT_OVERLAP, MIN_SPLIT_PX = 0.06, 0.72, 50
"""By how much, and how well at least, the worst of the parts must fit to be things of their own, and their least size."""

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]
_Mask = NDArray[np.bool_]
_Array = TypeVar("_Array", _Floats, _Ints, _Mask)

_PALETTE: _Floats = np.array([COLORS[name] for name in COLOR_NAMES], dtype=np.float32)
_MIN_HALVES, _MAX_HALVES = 8, 62  # radii from 4 to 31 pixels, in half pixels
_WEAR = ((0.0, 1.0), (0.7, 1.0), (1.3, 1.0), (1.3, 2.0), (2.0, 2.5), (2.0, 1.0))
"""How a shape may have suffered, from bad to worse: blurred by so many pixels, then so much more contrast, which together
round its corners off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object; `x`, `y` and `radius` in pixels, `overlap` (0 to 1) says how well the shape fits."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A picture read back; the things from left to right."""

    background: str
    things: tuple[Found, ...]


def detect(picture: Image.Image) -> Seen:
    """Say what is in the picture; a picture of another size is first scaled to the world's own."""
    if picture.size != (PICTURE_PX, PICTURE_PX):
        picture = picture.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX)
    pixels: _Floats = np.asarray(picture.convert("RGB"), dtype=np.float32)
    background = _background_color(pixels)
    background_name = COLOR_NAMES[int(_nearest(background))]
    pieces = [
        (coverage, color)
        for region, color in _regions(pixels, background)
        if COLOR_NAMES[int(_nearest(color))] != background_name  # or else a stain, or a hole
        for coverage in _pieces(_coverage(pixels, region, background, color))
    ]
    things = [
        Found(
            color=COLOR_NAMES[int(_nearest(color))],
            shape=fit.shape if fit.overlap >= MIN_OVERLAP else UNCLEAR,
            x=fit.x / 2,
            y=fit.y / 2,
            radius=fit.radius / 2,
            overlap=fit.overlap,
        )
        for coverage, color in _join_shades(pieces)
        for fit in _read_shapes(coverage)
    ]
    things.sort(key=lambda thing: (thing.x, thing.y))
    return Seen(background=background_name, things=tuple(things))


# ---- colours and regions -----------------------------------------------------------------------------------------


def _nearest(colors: _Floats) -> _Ints:
    """The palette's nearest entry to each colour (… × 3)."""
    distances: _Floats = np.square(colors[..., None, :] - _PALETTE).sum(axis=-1)
    return np.asarray(distances.argmin(axis=-1), dtype=np.int64)


def _background_color(pixels: _Floats) -> _Floats:
    """The commonest colour of the two outermost rows and columns, as the median of its pixels."""
    inner = np.ones(pixels.shape[:2], dtype=np.bool_)
    inner[2:-2, 2:-2] = False
    border = pixels[inner]
    names = _nearest(border)
    commonest = np.bincount(names).argmax()
    return np.asarray(np.median(border[names == commonest], axis=0), dtype=np.float32)


def _neighbours(array: _Array, reach: tuple[tuple[int, int], ...]) -> Iterator[_Array]:
    """The array shifted by each (dy, dx), edges repeated."""
    height, width = array.shape[:2]
    padded = np.pad(array, ((1, 1), (1, 1), *((0, 0),) * (array.ndim - 2)), mode="edge")
    for dy, dx in reach:
        yield padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


_FOUR = ((-1, 0), (1, 0), (0, -1), (0, 1))
_EIGHT = (*_FOUR, (-1, -1), (-1, 1), (1, -1), (1, 1))


def _spread(labels: _Ints, inside: _Mask) -> _Ints:
    """Grow the positive labels over the unlabelled pixels of `inside`, one ring of neighbours at a time."""
    while True:
        reached = np.max(np.stack(list(_neighbours(labels, _FOUR))), axis=0)
        grown = np.where(inside & (labels == 0), reached, labels)
        if (grown == labels).all():
            return labels
        labels = grown


def _components(mask: _Mask) -> list[_Mask]:
    """The four-connected parts of the mask."""
    height, width = mask.shape
    left = mask.tolist()
    parts = []
    for y0, x0 in np.argwhere(mask).tolist():
        if not left[y0][x0]:
            continue
        left[y0][x0] = False
        part, reached = np.zeros_like(mask), [(y0, x0)]
        for y, x in reached:  # grows while it is walked
            for dy, dx in _FOUR:
                v, u = y + dy, x + dx
                if 0 <= v < height and 0 <= u < width and left[v][u]:
                    left[v][u] = False
                    reached.append((v, u))
        rows, columns = zip(*reached, strict=True)
        part[list(rows), list(columns)] = True
        parts.append(part)
    return parts


def _regions(pixels: _Floats, background: _Floats) -> list[tuple[_Mask, _Floats]]:
    """Parts of one colour each, soft edges included, with their colours."""
    distance: _Floats = np.sqrt(np.square(pixels - background).sum(axis=-1))
    foreground: _Mask = distance > MIN_DIFFERENCE
    steps = [np.abs(shifted - pixels).max(axis=-1) for shifted in _neighbours(pixels, _EIGHT)]
    flat: _Mask = foreground & (np.max(np.stack(steps), axis=0) <= MAX_FLAT_STEP)
    names = _nearest(pixels)

    regions: list[tuple[_Mask, _Floats]] = []
    for part in _components(foreground):
        if part.sum() < MIN_THING_PX:
            continue
        seeds = [
            seed
            for name in np.unique(names[part & flat]).tolist()
            for seed in _components(part & flat & (names == name))
            if seed.sum() >= MIN_SEED_PX
        ]
        if not seeds:  # too thin to be flat anywhere: where it differs most from the background it is itself
            seeds = [part & (distance >= np.quantile(distance[part], 0.7))]
        regions.extend(_join_blemishes(_grow(pixels, part, seeds), background))
    return regions


def _join_blemishes(regions: list[tuple[_Mask, _Floats]], background: _Floats) -> list[tuple[_Mask, _Floats]]:
    """Give to a thing what is only blur between it and the background, a hole in it, or a small spot on it."""
    regions = sorted(regions, key=lambda region: -int(region[0].sum()))
    kept: list[tuple[_Mask, _Floats]] = []
    for mask, color in regions:
        owner = None
        inside = np.logical_and.reduce([mask, *_neighbours(mask, _EIGHT)])
        is_slight = mask.sum() < MAX_BLEMISH_PX or inside.sum() < MIN_SEED_PX
        around = np.logical_or.reduce(list(_neighbours(mask, _FOUR))) & ~mask
        for i, (other, other_color) in enumerate(kept):
            if not (around & other).any():
                continue
            is_small_beside = mask.sum() < MAX_BLEMISH_SHARE * other.sum()
            is_blur = (is_slight or is_small_beside) and _is_between(color, background, other_color)
            is_enclosed = (around & other).sum() > 0.9 * around.sum()
            if is_blur or (is_small_beside and (is_slight or is_enclosed)):
                owner = i
        if owner is None:
            kept.append((mask, color))
        else:
            kept[owner] = (kept[owner][0] | mask, kept[owner][1])
    return kept


def _is_between(color: _Floats, start: _Floats, end: _Floats) -> bool:
    way = end - start
    share = float((color - start) @ way) / max(float(way @ way), 1.0)
    return -0.1 < share < 0.95 and float(np.linalg.norm(start + share * way - color)) < SAME_COLOR


def _grow(pixels: _Floats, part: _Mask, seeds: list[_Mask]) -> list[tuple[_Mask, _Floats]]:
    """Share the part out among its seeds, then join the shares that have the same colour."""
    colors = [np.asarray(np.median(pixels[seed], axis=0), dtype=np.float32) for seed in seeds]
    groups: list[list[int]] = []
    for i, color in enumerate(colors):
        for group in groups:
            if np.linalg.norm(color - colors[group[0]]) < SAME_COLOR:
                group.append(i)
                break
        else:
            groups.append([i])
    labels = np.zeros(part.shape, dtype=np.int64)
    for number, group in enumerate(groups, start=1):
        for i in group:
            labels[seeds[i]] = number
    labels = _spread(labels, part)
    regions = []
    for number, group in enumerate(groups, start=1):
        seed = np.logical_or.reduce([seeds[i] for i in group])
        regions.append((labels == number, np.asarray(np.median(pixels[seed], axis=0), dtype=np.float32)))
    return regions


def _coverage(pixels: _Floats, region: _Mask, background: _Floats, color: _Floats) -> _Floats:
    """How much of each pixel of the region is `color` and not `background`, 0 to 1."""
    way = color - background
    share = ((pixels - background) * way).sum(axis=-1) / max(float(way @ way), 1.0)
    return np.where(region, share.clip(0, 1), 0).astype(np.float32)


def _pieces(coverage: _Floats) -> list[_Floats]:
    """The coverage of each connected thing alone, specks left out."""
    parts = [part for part in _components(coverage > 0.5) if coverage[part].sum() >= MIN_THING_PX]
    if not parts:
        return []
    labels = np.zeros(coverage.shape, dtype=np.int64)
    for number, part in enumerate(parts, start=1):
        labels[part] = number
    labels = _spread(labels, coverage > 0.02)
    return [np.where(labels == number, coverage, 0).astype(np.float32) for number in range(1, len(parts) + 1)]


def _join_shades(pieces: list[tuple[_Floats, _Floats]]) -> list[tuple[_Floats, _Floats]]:
    """Join touching pieces of similar colour where they are one shape together; the larger one's colour stays."""
    for i, (first, first_color) in enumerate(pieces):
        around = np.logical_or.reduce(list(_neighbours(first > 0.3, _EIGHT)))
        for j, (second, second_color) in enumerate(pieces[:i]):
            if np.linalg.norm(first_color - second_color) > MAX_SHADE or not (around & (second > 0.3)).any():
                continue
            both = (first + second).clip(0, 1)
            alone = max(_best_fit(first).overlap, _best_fit(second).overlap)
            if _best_fit(both).overlap > max(alone + SPLIT_GAIN, MIN_SPLIT_OVERLAP):
                color = first_color if first.sum() > second.sum() else second_color
                rest = [piece for k, piece in enumerate(pieces) if k not in (i, j)]
                return _join_shades([*rest, (both, color)])
    return pieces


# ---- shapes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """A shape laid over a coverage; `x`, `y`, `radius` in half pixels, `wear` an index into `_WEAR`."""

    shape: str
    x: int
    y: int
    radius: int
    wear: int
    overlap: float


@cache
def _template(shape: str, radius: int, wear: int, odd_x: bool, odd_y: bool) -> tuple[_Floats, int]:
    """The shape's coverage, radius in half pixels, and the row and column of its centre (half a pixel on where odd)."""
    (blur_px, contrast), scale = _WEAR[wear], 4
    reach = int(0.6 * radius) + 2 + int(1.5 * blur_px)
    size = 2 * reach + 1
    picture = Image.new("RGB", (size * scale, size * scale))
    x, y = reach + odd_x / 2, reach + odd_y / 2
    draw = ImageDraw.Draw(picture)
    draw_shape(draw, shape, x * scale, y * scale, radius / 2 * scale, (255, 255, 255), (0, 0, 0))
    small = picture.getchannel(0).resize((size, size), Image.Resampling.BOX)
    if wear:
        small = small.filter(ImageFilter.GaussianBlur(blur_px))
    mask = np.asarray(small, dtype=np.float32) / np.float32(255)
    return (0.5 + np.float32(contrast) * (mask - 0.5)).clip(0, 1).astype(np.float32), reach


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area in squared radii, and the centroid in radii from the centre."""
    mask, middle = _template(shape, _MAX_HALVES, 0, False, False)
    radius, area = _MAX_HALVES / 2, float(mask.sum())
    places = np.arange(len(mask)) + 0.5 - middle
    x, y = float(mask.sum(axis=0) @ places) / area, float(mask.sum(axis=1) @ places) / area
    return area / radius**2, x / radius, y / radius


def _overlap(coverage: _Floats, total: float, shape: str, x: int, y: int, radius: int, wear: int) -> float:
    """Intersection over union of the coverage and the shape, both soft."""
    mask, middle = _template(shape, radius, wear, x % 2 == 1, y % 2 == 1)
    top, left = y // 2 - middle, x // 2 - middle
    bottom, right = top + len(mask), left + len(mask)
    height, width = coverage.shape
    inside = mask[max(0, -top) : len(mask) - max(0, bottom - height), max(0, -left) : len(mask) - max(0, right - width)]
    under = coverage[max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    common = float(np.minimum(inside, under).sum())
    return common / (total + float(inside.sum()) - common)


def _first_fit(coverage: _Floats, total: float, shape: str, wear: int) -> _Fit:
    """The shape with the coverage's area and centroid."""
    area, off_x, off_y = _moments(shape)
    height, width = coverage.shape
    radius = (total / area) ** 0.5
    x = float(coverage.sum(axis=0) @ (np.arange(width) + 0.5)) / total - off_x * radius
    y = float(coverage.sum(axis=1) @ (np.arange(height) + 0.5)) / total - off_y * radius
    x2, y2 = (min(max(round(2 * value), 0), 2 * PICTURE_PX - 1) for value in (x, y))
    radius2 = min(max(round(2 * radius), _MIN_HALVES), _MAX_HALVES)
    overlap = _overlap(coverage, total, shape, x2, y2, radius2, wear)
    return _Fit(shape=shape, x=x2, y=y2, radius=radius2, wear=wear, overlap=overlap)


_STEPS = tuple(tuple(sign * (i == j) for j in range(4)) for i in range(4) for sign in (1, -1))


def _climb(coverage: _Floats, total: float, fit: _Fit) -> _Fit:
    """Move, resize and wear the shape step by step for as long as the overlap grows."""
    while True:
        best = fit
        for dx, dy, dr, dw in _STEPS:
            x, y, radius, wear = fit.x + dx, fit.y + dy, fit.radius + dr, fit.wear + dw
            if not (
                0 <= x < 2 * PICTURE_PX
                and 0 <= y < 2 * PICTURE_PX
                and _MIN_HALVES <= radius <= _MAX_HALVES
                and 0 <= wear < len(_WEAR)
            ):
                continue
            overlap = _overlap(coverage, total, fit.shape, x, y, radius, wear)
            if overlap > best.overlap:
                best = _Fit(shape=fit.shape, x=x, y=y, radius=radius, wear=wear, overlap=overlap)
        if best is fit:
            return fit
        fit = best


def _best_fit(coverage: _Floats) -> _Fit:
    total = float(coverage.sum())
    climbed: list[_Fit] = []
    for wear in (0, 3):  # a climb from one end seldom comes to the other
        first = sorted((_first_fit(coverage, total, shape, wear) for shape in SHAPES), key=lambda fit: -fit.overlap)
        climbed.extend(_climb(coverage, total, fit) for fit in first[:5])
    return max(climbed, key=lambda fit: fit.overlap)


def _read_shapes(coverage: _Floats) -> list[_Fit]:
    """One shape, or two or more where the coverage is better explained by things that touch."""
    whole = _best_fit(coverage)
    if whole.overlap >= SPLIT_BELOW:
        return [whole]
    best, best_worth = [whole], max(whole.overlap + SPLIT_GAIN, MIN_SPLIT_OVERLAP)
    for axis in (0, 1):
        for low, high in _cuts(coverage, axis):
            first = _best_fit(low)
            if first.overlap <= best_worth:
                continue
            others = _read_shapes(high)
            worth = min(fit.overlap for fit in (first, *others))
            if worth > best_worth:
                best, best_worth = [first, *others], worth
    return best


def _cuts(coverage: _Floats, axis: int) -> Iterator[tuple[_Floats, _Floats]]:
    """Cut across the thinnest places near the middle and the thirds, where both sides are large enough for a thing."""
    profile = coverage.sum(axis=axis)
    filled = np.flatnonzero(profile > 0.5)
    if len(filled) < 16:
        return
    first, length = int(filled[0]), len(filled)
    places = set()
    for middle in (length // 3, length // 2, 2 * length // 3):
        start = first + middle - length // 12
        places.add(start + int(profile[start : first + middle + length // 12 + 1].argmin()))
    for at in sorted(places):
        low, high = coverage.copy(), coverage.copy()
        if axis == 0:
            low[:, at:], high[:, :at] = 0, 0
        else:
            low[at:], high[:at] = 0, 0
        if min(float(low.sum()), float(high.sum())) >= MIN_SPLIT_PX:
            yield low, high
