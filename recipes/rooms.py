"""Random indoor rooms, ray cast into exactly the layout of the preprocessed NYUv2.

``<root>/{train,val}/{image,label,depth,normal}/{0..N-1}.npy``, height x width x channels (the label has none):

- ``image``  (H,W,3) in [0,1]: shaded, textured, with sensor noise and an uneven exposure
- ``label``  (H,W) an index into `CLASSES` stored as a float, -1 where unlabelled
- ``depth``  (H,W,1) metres along the optical axis, 0 where invalid
- ``normal`` (H,W,3) unit vectors in camera coordinates that face the camera, (0,0,0) where invalid

Camera coordinates are x right, y down, z forward. Noise is on the image only: depth, normal and label are exact, and
have holes as a structured-light sensor and a hurried annotator leave them. ``rooms.json`` holds the intrinsics.

``python -m gradsurgery.recipes.rooms --root data/rooms``: 240 views of 72 x 96 in about 8 s on one core.
"""

import colorsys
import json
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from numpy.typing import DTypeLike, NDArray
from rich.console import Console
from rich.progress import track

Array = NDArray[Any]

CLASSES = (
    "bed", "books", "ceiling", "chair", "floor", "furniture", "objects",
    "picture", "sofa", "table", "tv", "wall", "window",
)  # fmt: skip

FORMAT, VERSION = "gradsurgery rooms", 1
FIELD_OF_VIEW = np.deg2rad(60.0)  # horizontal, near the Kinect's


class Finish(NamedTuple):
    """What a family of materials draws from: colour ranges (HSV in [0,1]), textures, texture period (metres)."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]
    textures: tuple[str, ...]
    period: tuple[float, float]


# Ranges overlap on purpose: a colour alone must not give the class away.
FINISHES = {
    "wood": Finish((0.05, 0.11), (0.3, 0.7), (0.3, 0.8), ("wood",), (0.08, 0.2)),
    "paint": Finish((0.0, 1.0), (0.0, 0.35), (0.55, 0.95), ("mottled",), (0.3, 1.5)),
    "paper": Finish((0.0, 1.0), (0.05, 0.4), (0.5, 0.9), ("stripes", "checker", "mottled"), (0.15, 0.5)),
    "white": Finish((0.05, 0.17), (0.0, 0.12), (0.8, 0.97), ("mottled",), (0.5, 2.0)),
    "tiles": Finish((0.0, 1.0), (0.0, 0.4), (0.4, 0.9), ("checker",), (0.2, 0.6)),
    "cloth": Finish((0.0, 1.0), (0.1, 0.65), (0.3, 0.9), ("mottled", "stripes", "checker"), (0.04, 0.25)),
    "leather": Finish((0.0, 0.12), (0.2, 0.7), (0.12, 0.6), ("mottled",), (0.05, 0.3)),
    "plastic": Finish((0.0, 1.0), (0.0, 0.9), (0.1, 0.9), ("mottled",), (0.2, 0.5)),
    "dark": Finish((0.0, 1.0), (0.0, 0.3), (0.08, 0.3), ("mottled",), (0.2, 0.5)),
    "leaves": Finish((0.2, 0.4), (0.4, 0.8), (0.25, 0.6), ("mottled",), (0.03, 0.08)),
    "spines": Finish((0.0, 1.0), (0.0, 0.3), (0.6, 0.95), ("spines",), (0.025, 0.05)),
    "canvas": Finish((0.0, 1.0), (0.0, 0.5), (0.5, 0.95), ("blotches",), (0.1, 0.5)),
    "outdoors": Finish((0.53, 0.65), (0.05, 0.4), (0.8, 1.0), ("horizon",), (0.2, 0.5)),
}


class Part(NamedTuple):
    """A box of a piece of furniture, in fractions of the piece's width, depth (0 at its back) and height."""

    label: str
    slot: int
    lo: tuple[float, float, float]
    hi: tuple[float, float, float]
    chance: float = 1.0


class Model(NamedTuple):
    """A kind of furniture: size ranges in metres, the finishes each material slot may take, and its parts."""

    width: tuple[float, float]
    depth: tuple[float, float]
    height: tuple[float, float]
    slots: tuple[tuple[str, ...], ...]
    parts: tuple[Part, ...]
    against_wall: bool = True
    clutter: bool = False


def _legs(label: str, top: float, thick: float) -> tuple[Part, ...]:
    ends = ((0.0, thick), (1 - thick, 1.0))
    return tuple(Part(label, 1, (x[0], y[0], 0), (x[1], y[1], top)) for x in ends for y in ends)


def _seat(label: str) -> tuple[Part, ...]:
    return (
        Part(label, 0, (0, 0, 0), (1, 1, 0.42)),
        Part(label, 0, (0, 0, 0.42), (1, 0.25, 1)),
        Part(label, 0, (0, 0.25, 0.42), (0.1, 1, 0.68)),
        Part(label, 0, (0.9, 0.25, 0.42), (1, 1, 0.68)),
        Part(label, 1, (0.11, 0.25, 0.42), (0.495, 0.97, 0.55)),
        Part(label, 1, (0.505, 0.25, 0.42), (0.89, 0.97, 0.55)),
    )


_BED = (
    Part("bed", 1, (0, 0, 0), (1, 0.03, 1)),
    Part("bed", 1, (0, 0.03, 0.06), (1, 1, 0.28)),
    Part("bed", 2, (0.02, 0.03, 0.28), (0.98, 0.98, 0.52)),
    Part("bed", 0, (0, 0.32, 0.24), (1, 0.99, 0.56)),
    Part("bed", 2, (0.08, 0.05, 0.52), (0.46, 0.24, 0.68)),
    Part("bed", 2, (0.54, 0.05, 0.52), (0.92, 0.24, 0.68), 0.8),
    Part("objects", 3, (0.3, 0.6, 0.56), (0.6, 0.8, 0.72), 0.3),
)
_CHAIR = (*_legs("chair", 0.46, 0.1), Part("chair", 0, (0, 0, 0.46), (1, 1, 0.52)))
_TABLE = (*_legs("table", 0.94, 0.08), Part("table", 0, (0, 0, 0.94), (1, 1, 1)))
_CABINET = (
    Part("furniture", 0, (0, 0, 0), (1, 0.95, 1)),
    Part("furniture", 1, (0.03, 0.95, 0.06), (0.49, 1, 0.95)),
    Part("furniture", 1, (0.51, 0.95, 0.06), (0.97, 1, 0.95)),
)
_BOOKCASE = (
    Part("furniture", 0, (0, 0, 0), (1, 0.06, 1)),
    Part("furniture", 0, (0, 0, 0), (0.03, 1, 1)),
    Part("furniture", 0, (0.97, 0, 0), (1, 1, 1)),
    *(Part("furniture", 0, (0, 0, z), (1, 1, z + 0.02)) for z in (0, 0.245, 0.49, 0.735, 0.98)),
    *(Part("books", 1, (0.04, 0.1, z + 0.02), (0.96, 0.8, z + 0.2), 0.85) for z in (0, 0.245, 0.49, 0.735)),
)
_PLANT = (
    Part("objects", 0, (0.25, 0.25, 0), (0.75, 0.75, 0.3)),
    Part("objects", 1, (0.1, 0.15, 0.3), (0.9, 0.85, 0.75)),
    Part("objects", 1, (0.25, 0.2, 0.75), (0.8, 0.7, 1)),
)
_LAMP = (
    Part("objects", 1, (0.2, 0.2, 0), (0.8, 0.8, 0.02)),
    Part("objects", 1, (0.46, 0.46, 0.02), (0.54, 0.54, 0.8)),
    Part("objects", 0, (0, 0, 0.8), (1, 1, 1)),
)

_CASE = (("wood", "paint", "white", "dark"), ("wood", "paint", "white"))
_TOP = (("wood", "white", "dark", "plastic"), ("wood", "dark", "plastic"))
_SOFT = (("cloth", "leather", "dark"), ("cloth", "leather"))

MODELS = {
    "bed": Model((1.0, 1.9), (1.9, 2.1), (0.75, 1.05), (*_SOFT, ("white", "cloth"), ("plastic",)), _BED),
    "sofa": Model((1.5, 2.3), (0.8, 1.0), (0.75, 0.95), _SOFT, _seat("sofa")),
    "armchair": Model((0.75, 0.95), (0.75, 0.9), (0.75, 0.95), _SOFT, _seat("chair")),
    "chair": Model(
        (0.42, 0.52), (0.42, 0.52), (0.8, 1.0), (("wood", "cloth", "plastic", "dark"), ("wood", "dark", "plastic")),
        (*_CHAIR, Part("chair", 0, (0, 0, 0.52), (1, 0.1, 1))), against_wall=False,
    ),
    "table": Model((1.0, 1.7), (0.75, 0.95), (0.7, 0.78), _TOP, _TABLE, against_wall=False, clutter=True),
    "low table": Model((0.7, 1.2), (0.5, 0.7), (0.38, 0.5), _TOP, _TABLE, against_wall=False, clutter=True),
    "desk": Model((1.0, 1.6), (0.6, 0.75), (0.7, 0.76), _TOP, _TABLE, clutter=True),
    "cabinet": Model((0.6, 1.5), (0.4, 0.55), (0.55, 1.05), _CASE, _CABINET, clutter=True),
    "wardrobe": Model((0.9, 1.7), (0.5, 0.6), (1.6, 2.1), _CASE, _CABINET),
    "tv stand": Model(
        (1.0, 1.6), (0.4, 0.5), (0.4, 0.6), (*_CASE, ("dark", "canvas")),
        (*_CABINET, Part("tv", 2, (0.1, 0.4, 1.02), (0.95, 0.52, 2.3), 0.9)),
    ),
    "bookcase": Model((0.7, 1.4), (0.26, 0.36), (1.2, 2.05), (_CASE[0], ("spines",)), _BOOKCASE),
    "plant": Model((0.4, 0.6), (0.4, 0.6), (0.7, 1.3), (("plastic", "white"), ("leaves",)), _PLANT),
    "lamp": Model((0.3, 0.45), (0.3, 0.45), (1.3, 1.7), (("white", "cloth"), ("dark", "wood")), _LAMP),
    "crate": Model(
        (0.25, 0.6), (0.25, 0.5), (0.25, 0.55), (("plastic", "wood", "cloth", "leather"),),
        (Part("objects", 0, (0, 0, 0), (1, 1, 1)),), against_wall=False,
    ),
    "pile of books": Model(
        (0.2, 0.4), (0.2, 0.35), (0.15, 0.5), (("spines",),),
        (Part("books", 0, (0, 0, 0), (1, 1, 1)),), against_wall=False,
    ),
}  # fmt: skip

# The first name of a theme always stands in the room; the rest are drawn with repetition.
THEMES = (
    ("bed", "wardrobe", "cabinet", "chair", "lamp", "crate", "bookcase", "tv stand"),
    ("bed", "desk", "chair", "bookcase", "pile of books", "plant"),
    ("sofa", "armchair", "low table", "tv stand", "bookcase", "lamp", "plant", "sofa"),
    ("desk", "chair", "chair", "bookcase", "cabinet", "crate", "pile of books", "table"),
    ("table", "chair", "chair", "chair", "cabinet", "plant", "sofa", "tv stand"),
)


class Material(NamedTuple):
    """A texture that mixes two linear-light colours (2,3); ``glow`` is what the surface emits of its own."""

    texture: str
    period: float
    colours: Array
    glow: float = 0.0


class Box(NamedTuple):
    """An axis-aligned box in its piece's own frame: corners (3,) in metres, z up from the floor."""

    lo: Array
    hi: Array
    label: int
    material: Material


_CUBE = np.indices((2, 2, 2)).reshape(3, 8).T == 1


class Piece(NamedTuple):
    """Boxes that share a place on the floor (2,) and a turn about the vertical (radians)."""

    foot: Array
    yaw: float
    boxes: list[Box]

    def corners(self, box: Box) -> Array:
        """The eight corners (8,3) of one of its boxes in room coordinates, metres."""
        local = np.where(_CUBE, box.hi, box.lo)
        c, s = np.cos(self.yaw), np.sin(self.yaw)
        return local @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) + (*self.foot, 0)


class Panel(NamedTuple):
    """A rectangle on wall 0..3 (x=0, x=end, y=0, y=end): corners (2,) along the wall and in height, metres."""

    wall: int
    lo: Array
    hi: Array
    label: int
    material: Material


class Lamp(NamedTuple):
    """A point light: position (3,) in metres, linear-light colour times power (3,)."""

    position: Array
    power: Array


class Scene(NamedTuple):
    """A room with one corner at the origin and z up: size (3,), camera position (3,) and axes in its columns (3,3)."""

    size: Array
    eye: Array
    rotation: Array
    pieces: list[Piece]
    shell: list[Material]
    panels: list[Panel]
    lamps: list[Lamp]


class Hits(NamedTuple):
    """What each pixel's ray meets first; vectors lead with their axis, in room coordinates."""

    depth: Array
    surface: Array
    axis: Array
    point: Array
    normal: Array
    texture: Array


class Room(NamedTuple):
    """One view in float64: image (H,W,3), label (H,W), depth (H,W,1), normal (H,W,3), as the module describes them."""

    image: Array
    label: Array
    depth: Array
    normal: Array


def intrinsics(height: int, width: int) -> dict[str, float]:
    """Pinhole intrinsics in pixels. Pixel centres are at whole numbers: column u looks along x/z = (u - cx) / fx."""
    focal = width / 2 / np.tan(FIELD_OF_VIEW / 2)
    return {"fx": float(focal), "fy": float(focal), "cx": (width - 1) / 2, "cy": (height - 1) / 2}


def draw_material(rng: np.random.Generator, *finishes: str, glow: float = 0.0) -> Material:
    """One material from any of the named `FINISHES`."""
    finish = FINISHES[finishes[rng.integers(len(finishes))]]
    hue, saturation, value, period = (
        rng.uniform(*r) for r in (finish.hue, finish.saturation, finish.value, finish.period)
    )
    texture = finish.textures[rng.integers(len(finish.textures))]
    darker = rng.uniform(
        *{"mottled": (0.78, 0.95), "spines": (0.05, 0.3), "blotches": (0.05, 0.5)}.get(texture, (0.45, 0.9))
    )
    second = (hue + rng.normal(0, 0.06)) % 1, saturation * rng.uniform(0.5, 1), value * darker
    colours = np.array([colorsys.hsv_to_rgb(hue, saturation, value), colorsys.hsv_to_rgb(*second)])
    return Material(texture, period, colours**2.2, glow)


def _clutter(rng: np.random.Generator, size: Array) -> Iterator[Box]:
    """Things that stand on top of a piece of this size (3,), one at most in each third of its width."""
    for third in range(3):
        if rng.random() < 0.5:
            continue
        label, finishes, low, high = (
            ("books", ("spines",), (0.12, 0.12, 0.05), (0.26, 0.2, 0.25)),
            ("objects", ("plastic", "cloth", "wood", "leaves", "white"), (0.08, 0.08, 0.1), (0.22, 0.2, 0.4)),
        )[rng.integers(2)]
        extent = rng.uniform(low, high)
        start = np.array([(third + rng.uniform(0.1, 0.3)) / 3, rng.uniform(0.15, 0.5), 1]) * size
        start[:2] -= size[:2] / 2
        end = np.minimum(start + extent, [*(size[:2] / 2), np.inf])
        yield Box(start, end, CLASSES.index(label), draw_material(rng, *finishes))


def _build(rng: np.random.Generator, model: Model) -> list[Box]:
    """A piece's boxes, its footprint centred on the origin."""
    size = np.array([rng.uniform(*r) for r in (model.width, model.depth, model.height)])
    materials = [draw_material(rng, *finishes) for finishes in model.slots]
    boxes = []
    for part in model.parts:
        if rng.random() > part.chance:
            continue
        lo, hi = np.array(part.lo, float), np.array(part.hi, float)
        if part.chance < 1:
            hi[[0, 2]] = lo[[0, 2]] + (hi - lo)[[0, 2]] * rng.uniform([0.6, 0.75], 1)
        middle = np.array([0.5, 0.5, 0])
        boxes.append(Box((lo - middle) * size, (hi - middle) * size, CLASSES.index(part.label), materials[part.slot]))
    return [*boxes, *_clutter(rng, size)] if model.clutter else boxes


def _pose(rng: np.random.Generator, model: Model, hull: Box, size: Array) -> tuple[Array, float]:
    """A place on the floor (2,) and a yaw: anywhere, or with the back along one of the walls."""
    if not model.against_wall:
        return rng.uniform(0, size[:2]), rng.uniform(-np.pi, np.pi)
    wall = int(rng.integers(4))
    across, along = (0, 1) if wall < 2 else (1, 0)
    gap = -hull.lo[1] + rng.uniform(0.03, 0.1)
    foot = np.empty(2)
    foot[across] = size[across] - gap if wall % 2 else gap
    foot[along] = rng.uniform(0, size[along])
    yaw = (-np.pi / 2, np.pi / 2, 0.0, np.pi)[wall] + rng.uniform(-0.03, 0.03)
    return foot, yaw


def _fits(corners: Array, size: Array, eye: Array, taken: list[tuple[Array, Array]]) -> bool:
    """Whether corners (N,3) are inside the room, clear of what is there, and leave the camera room to see."""
    lo, hi = corners.min(0), corners.max(0)
    if (lo[:2] < 0.01).any() or (hi > size - 0.01).any():
        return False
    clearance = 1.2 if hi[2] > eye[2] - 0.2 else 0.5
    if np.linalg.norm(np.maximum(np.maximum(lo - eye, eye - hi)[:2], 0)) < clearance:
        return False
    return not any((lo[:2] < b).all() and (a < hi[:2]).all() for a, b in taken)


def _furnish(rng: np.random.Generator, size: Array, eye: Array) -> list[Piece]:
    """Three to eight pieces of furniture of one theme; fewer than were drawn where the room is full."""
    theme, wanted = THEMES[rng.integers(len(THEMES))], 3 + rng.binomial(5, 0.7)
    pieces: list[Piece] = []
    taken: list[tuple[Array, Array]] = []
    for attempt in range(60):
        if len(pieces) == wanted:
            break
        model = MODELS[theme[0 if not pieces and attempt < 10 else rng.integers(len(theme))]]
        boxes = _build(rng, model)
        hull = boxes[0]._replace(lo=np.min([b.lo for b in boxes], 0), hi=np.max([b.hi for b in boxes], 0))
        for _ in range(8):
            piece = Piece(*_pose(rng, model, hull, size), boxes)
            corners = piece.corners(hull)
            if _fits(corners, size, eye, taken):
                pieces.append(piece)
                taken.append((corners.min(0)[:2], corners.max(0)[:2]))
                break
    return pieces


def _frame(wall: int, lo: Array, hi: Array, border: float, label: str, rim: Material, inside: Material) -> list[Panel]:
    number = CLASSES.index(label)
    return [Panel(wall, lo, hi, number, rim), Panel(wall, lo + border, hi - border, number, inside)]


def _window(rng: np.random.Generator, wall: int, middle: float) -> list[Panel]:
    """A frame with two to six panes of daylight, or of night."""
    half, lo, hi = rng.uniform(0.4, 0.7), rng.uniform(0.6, 1.0), rng.uniform(1.8, 2.15)
    rim, label = draw_material(rng, "white", "wood", "dark"), CLASSES.index("window")
    outside = draw_material(rng, "outdoors", glow=rng.uniform(0.02, 1.5))
    columns, rows = rng.integers(1, 4), rng.integers(1, 3)
    corner, extent = np.array([middle - half, lo]), np.array([2 * half, hi - lo])
    pane = extent / (columns, rows)
    starts = [corner + pane * (i, j) for i in range(columns) for j in range(rows)]
    panes = [Panel(wall, at + 0.03, at + pane - 0.03, label, outside) for at in starts]
    return [Panel(wall, corner - 0.03, corner + extent + 0.03, label, rim), *panes]


def _hang(rng: np.random.Generator, size: Array) -> list[Panel]:
    """Windows, pictures and televisions, side by side along each of the four walls."""
    panels: list[Panel] = []
    for wall in range(4):
        length = size[1] if wall < 2 else size[0]
        places = int(length / 1.65)
        for place in range(places):
            middle, kind = (place + 0.5) * length / places + rng.uniform(-0.1, 0.1), rng.random()
            if kind < 0.3:
                panels += _window(rng, wall, middle)
            elif kind < 0.75:
                tv = kind > 0.63
                half = np.array([0.5, 0.28]) * rng.uniform(0.9, 1.3) if tv else rng.uniform(0.18, [0.6, 0.4])
                centre = np.array([middle, rng.uniform(1.2, 1.7)])
                rim = draw_material(rng, "dark") if tv else draw_material(rng, "wood", "dark", "white")
                inside = draw_material(rng, "canvas", "dark") if tv else draw_material(rng, "canvas", "paper")
                glow = rng.uniform(0, 0.6) if tv else 0.0
                label, border = ("tv", 0.025) if tv else ("picture", rng.uniform(0.02, 0.06))
                panels += _frame(wall, centre - half, centre + half, border, label, rim, inside._replace(glow=glow))
    return panels


def _light(rng: np.random.Generator, size: Array, panels: list[Panel]) -> list[Lamp]:
    """A lamp under the ceiling, and the brightest window or a second lamp."""
    lamps = []
    for _ in range(rng.integers(1, 3)):
        position = np.append(rng.uniform(0.25, 0.75, 2), 1) * size - (0, 0, rng.uniform(0.1, 0.25))
        lamps.append(Lamp(position, rng.uniform(2.5, 5) * np.array([1, rng.uniform(0.8, 1), rng.uniform(0.55, 1)])))
    windows = [p for p in panels if p.label == CLASSES.index("window") and p.material.glow > 0.4]
    if windows:
        panel = max(windows, key=lambda p: p.material.glow)
        along, height = (panel.lo + panel.hi) / 2
        inset = 0.15 if panel.wall % 2 == 0 else size[panel.wall // 2] - 0.15
        position = np.array([inset, along, height] if panel.wall < 2 else [along, inset, height])
        lamps = [lamps[0], Lamp(position, 2 * panel.material.glow * np.array([0.85, 0.95, 1]))]
    return lamps


def _look(rng: np.random.Generator, eye: Array, size: Array) -> Array:
    """Camera axes (3,3), right, down and forward in the columns: towards mid-room, pitched and rolled a little."""
    towards = size[:2] * rng.uniform(0.25, 0.75, 2) - eye[:2]
    yaw, pitch, roll = np.arctan2(towards[1], towards[0]), np.deg2rad(rng.normal(-7, 6)), np.deg2rad(rng.normal(0, 2.5))
    forward = np.array([np.cos(yaw) * np.cos(pitch), np.sin(yaw) * np.cos(pitch), np.sin(pitch)])
    right = np.array([np.sin(yaw), -np.cos(yaw), 0])
    down = np.cross(forward, right)
    c, s = np.cos(roll), np.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, forward], -1)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A room with its furniture, pictures, lamps and camera; nothing in it depends on the picture's size."""
    size = rng.uniform([2.8, 2.8, 2.3], [6.0, 6.0, 3.0])
    # Mostly near a wall, where a person stands to take in a room.
    eye = np.append(0.35 + (size[:2] - 0.7) * rng.beta(0.5, 0.5, 2), rng.uniform(1.15, 1.75))
    walls = draw_material(rng, "paint", "paper", "white")
    accent = draw_material(rng, "paint", "paper", "wood") if rng.random() < 0.4 else walls
    shell = [
        walls,
        walls,
        walls,
        accent,
        draw_material(rng, "wood", "tiles", "cloth"),
        draw_material(rng, "white", "paint"),
    ]
    pieces = _furnish(rng, size, eye)
    panels = _hang(rng, size)
    return Scene(size, eye, _look(rng, eye, size), pieces, shell, panels, _light(rng, size, panels))


def _turn(yaw: Array | float, vector: Array) -> Array:
    """Vectors (3,...) of the room in the frame of a piece turned by ``yaw``."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.stack([c * vector[0] + s * vector[1], c * vector[1] - s * vector[0], vector[2]])


def _inverse(direction: Array) -> Array:
    """1 / direction, finite where a ray runs along an axis plane."""
    return 1 / np.where(np.abs(direction) < 1e-12, 1e-12, direction)


def _slabs(origin: Array, inverse: Array, lo: Array, hi: Array) -> tuple[Array, Array]:
    """Ray parameters (3,...) at which rays of this inverse direction enter and leave a box's three pairs of planes."""
    shape = (3,) + (1,) * (inverse.ndim - 1)
    a, b = (lo.reshape(shape) - origin) * inverse, (hi.reshape(shape) - origin) * inverse
    return np.minimum(a, b), np.maximum(a, b)


def _extent(corners: Array, scene: Scene, height: int, width: int) -> tuple[slice, slice]:
    """The rows and columns that the convex hull of corners (8,3) can cover; empty when it is behind the camera."""
    x, y, z = ((corners - scene.eye) @ scene.rotation).T
    if z.max() < 0.01:
        return slice(0), slice(0)
    if z.min() < 0.01:
        return slice(None), slice(None)
    k = intrinsics(height, width)
    u, v = k["fx"] * x / z + k["cx"], k["fy"] * y / z + k["cy"]
    first, last = np.floor([v.min(), u.min()]).astype(int), np.ceil([v.max(), u.max()]).astype(int) + 1
    (top, left), (bottom, right) = np.maximum(first, 0), np.maximum(last, 0)
    return slice(top, bottom), slice(left, right)


def trace(scene: Scene, height: int, width: int) -> Hits:
    """The first surface along each pixel's ray.

    Surfaces are numbered: the room's six (x=0, x=end, y=0, y=end, floor, ceiling), the panels, the boxes.
    """
    k = intrinsics(height, width)
    v, u = np.mgrid[:height, :width]
    ray = np.stack([(u - k["cx"]) / k["fx"], (v - k["cy"]) / k["fy"], np.ones((height, width))])
    # A ray has unit z in camera coordinates, so its parameter is the depth along the optical axis.
    direction = np.tensordot(scene.rotation, ray, 1)
    leave = _slabs(scene.eye.reshape(3, 1, 1), _inverse(direction), np.zeros(3), scene.size)[1]
    axis, depth = leave.argmin(0), leave.min(0)
    surface = 2 * axis + (np.take_along_axis(direction, axis[None], 0)[0] > 0)
    number = 6 + len(scene.panels)
    for piece in scene.pieces:
        origin = _turn(piece.yaw, scene.eye - np.append(piece.foot, 0)).reshape(3, 1, 1)
        for box in piece.boxes:
            here = _extent(piece.corners(box), scene, height, width)
            inverse = _inverse(_turn(piece.yaw, direction[(slice(None), *here)]))
            enter, leave = _slabs(origin, inverse, box.lo, box.hi)
            near = enter.max(0)
            seen = (near < leave.min(0)) & (near > 0) & (near < depth[here])
            np.copyto(depth[here], near, where=seen)
            np.copyto(axis[here], enter.argmax(0), where=seen)
            np.copyto(surface[here], number, where=seen)
            number += 1
    return _locate(scene, direction, depth, surface, axis)


def _locate(scene: Scene, direction: Array, depth: Array, surface: Array, axis: Array) -> Hits:
    """Points, normals and texture coordinates (2,H,W) in metres of what the rays met, and the panels on the walls."""
    owners = [(0.0, 0.0, 0.0)] * (6 + len(scene.panels)) + [(*p.foot, p.yaw) for p in scene.pieces for _ in p.boxes]
    x, y, yaw = np.array(owners).T[:, surface]
    point = scene.eye.reshape(3, 1, 1) + depth * direction
    local = _turn(yaw, point - np.stack([x, y, np.zeros_like(x)]))
    along = np.take_along_axis(_turn(yaw, direction), axis[None], 0)[0]
    normal = _turn(-yaw, np.where(np.arange(3).reshape(3, 1, 1) == axis, -np.sign(along), 0.0))
    texture = np.stack([np.where(axis == 0, local[1], local[0]), np.where(axis == 2, local[1], local[2])])
    on_wall = surface.copy()
    for number, panel in enumerate(scene.panels, 6):
        lo, hi = panel.lo.reshape(2, 1, 1), panel.hi.reshape(2, 1, 1)
        surface[(on_wall == panel.wall) & (texture > lo).all(0) & (texture < hi).all(0)] = number
    return Hits(depth, surface, axis, point, normal, texture)


def _hash(i: Array, j: Array, seed: Array | int) -> Array:
    """A random number in [0,1) for every cell of an integer lattice; whole numbers stay within int64."""
    mixed = (i * 374761393 + j * 668265263 + (seed + 1) * 2246822519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1274126177) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) / 2**32


def _noise(u: Array, v: Array, seed: Array | int) -> Array:
    """Value noise in [0,1) with unit period: lattice values blended by a smoothstep."""
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    a, b = u - i, v - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = _hash(i, j, seed) * (1 - a) + _hash(i + 1, j, seed) * a
    high = _hash(i, j + 1, seed) * (1 - a) + _hash(i + 1, j + 1, seed) * a
    return low * (1 - b) + high * b


def _mix(texture: str, u: Array, v: Array, seed: Array) -> Array:
    """How much of a material's second colour, (N,) or by channel (3,N) in [0,1]; u, v (N,) in texture periods."""
    channel = np.arange(3)[:, None]
    i, j = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    if texture == "mottled":
        return 0.6 * _noise(u, v, seed) + 0.4 * _noise(3.1 * u, 3.1 * v, seed)
    if texture == "checker":
        return 0.8 * ((i + j) % 2) + 0.2 * _hash(i, j, seed)
    if texture == "stripes":
        return 0.5 + 0.5 * np.sin(2 * np.pi * u)
    if texture == "wood":
        return 0.4 * _hash(j, np.floor(u / 12 + 0.37 * j).astype(np.int64), seed) + 0.6 * _noise(u / 2, 7 * v, seed)
    if texture == "spines":
        return _hash(i, np.zeros_like(i), seed + 7 * channel)
    if texture == "blotches":
        return _noise(u, v, seed + 7 * channel)
    return np.clip(3 * (_noise(u, v, seed) - 0.5) + 6 * (1.2 - 0.2 * v), 0, 1)  # horizon: hills below the sky


def _albedo(materials: list[Material], hits: Hits, pixel: Array) -> Array:
    """Linear-light colours (3,H,W) of the surfaces; ``pixel`` (H,W) is a pixel's extent on them in metres."""
    period = np.array([m.period for m in materials])[hits.surface]
    first, second = np.array([m.colours for m in materials]).transpose(1, 2, 0)[..., hits.surface]
    kinds = np.array([m.texture for m in materials])
    seed, (u, v) = 3 * hits.surface + hits.axis, hits.texture / period
    mix = np.empty_like(first)
    for texture in np.unique(kinds[np.unique(hits.surface)]):
        here = (kinds == texture)[hits.surface]
        mix[:, here] = _mix(str(texture), u[here], v[here], seed[here])
    # Detail finer than a pixel fades into its mean, as an optic averages it, and not into moire.
    mix = 0.5 + (mix - 0.5) * np.clip(period / (2 * pixel), 0, 1)
    return first + (second - first) * mix


def _shadowed(scene: Scene, point: Array, towards: Array) -> Array:
    """Whether a box stands between points and a light: points and the way to the light (3,N) -> (N,)."""
    blocked = np.zeros(point.shape[1], dtype=bool)
    for piece in scene.pieces:
        origin = _turn(piece.yaw, point - np.append(piece.foot, 0)[:, None])
        inverse = _inverse(_turn(piece.yaw, towards))
        for box in piece.boxes:
            enter, leave = _slabs(origin, inverse, box.lo, box.hi)
            near, far = np.maximum(enter.max(0), 0), np.minimum(leave.min(0), 1)
            blocked |= far - near > 1e-4  # a surface does not shade itself
    return blocked


def _crevices(scene: Scene, hits: Hits) -> Array:
    """How much ambient light reaches each point, (H,W) in (0,1]: less near the room's edges and the floor."""
    open_ = np.ones_like(hits.depth)
    for axis in range(3):
        for distance in (hits.point[axis], scene.size[axis] - hits.point[axis]):
            dark = 0.45 * np.exp(-np.abs(distance) / 0.25)
            open_ *= np.where(np.abs(hits.normal[axis]) > 0.5, 1, 1 - dark)
    return open_


def shade(scene: Scene, hits: Hits) -> Array:
    """Linear light (3,H,W) that leaves the surfaces towards the camera: Lambertian, with shadows and ambient light."""
    materials = scene.shell + [p.material for p in scene.panels]
    materials += [box.material for piece in scene.pieces for box in piece.boxes]
    seen = hits.point - scene.eye.reshape(3, 1, 1)
    grazing = np.abs((hits.normal * seen).sum(0)) / np.linalg.norm(seen, axis=0)
    focal = intrinsics(*hits.depth.shape)["fx"]
    albedo = _albedo(materials, hits, hits.depth / focal / np.sqrt(np.maximum(grazing, 0.05)))
    ambient = 0.05 * np.sum([lamp.power for lamp in scene.lamps], axis=0)
    light = ambient[:, None, None] * _crevices(scene, hits)
    for lamp in scene.lamps:
        towards = lamp.position.reshape(3, 1, 1) - hits.point
        square = (towards**2).sum(0)
        facing = (hits.normal * towards).sum(0) / np.sqrt(square)
        lit = facing > 0
        lit[lit] = ~_shadowed(scene, hits.point[:, lit], towards[:, lit])
        light += lamp.power[:, None, None] * np.where(lit, facing / (0.7 + square), 0)
    glow = np.array([m.glow for m in materials])[hits.surface]
    return albedo * (light + glow)


def _expose(rng: np.random.Generator, linear: Array) -> Array:
    """Light (3,H,W) -> image (H,W,3) in [0,1]: exposure, film curve, display gamma, a soft lens and sensor noise."""
    gain = 0.28 * np.exp(rng.normal(0, 0.25)) / linear.mean()
    image = (1 - np.exp(-gain * linear)) ** (1 / 2.2)
    for axis in (1, 2):
        padded = np.pad(image, [(int(a == axis), int(a == axis)) for a in range(3)], mode="edge")
        before, after = np.delete(padded, [-1, -2], axis), np.delete(padded, [0, 1], axis)
        image = 0.7 * image + 0.15 * (before + after)
    image += rng.normal(0, 1, image.shape) * np.sqrt(0.006**2 + 0.018**2 * image)
    return np.clip(image, 0, 1).transpose(1, 2, 0)


def _patches(rng: np.random.Generator, shape: tuple[int, ...], cells: float, share: float) -> Array:
    """A random blotchy mask that covers ``share`` of the picture, with about ``cells`` blotches across its width."""
    v, u = np.mgrid[: shape[0], : shape[1]] * (cells / shape[1])
    seed = int(rng.integers(1 << 20))
    field = 0.7 * _noise(u, v, seed) + 0.3 * _noise(2.7 * u, 2.7 * v, seed)
    return field > np.quantile(field, 1 - share)


def _jump(values: Array) -> Array:
    """The greatest amount by which a pixel's value exceeds its four neighbours', (H,W)."""
    padded = np.pad(values, 1, mode="edge")
    neighbours = padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]
    return values - np.minimum.reduce(neighbours)


def _behind(depth: Array) -> Array:
    """How far each pixel lies behind a nearer neighbour, (H,W), about a fraction of its depth.

    Inverse depth is affine on any plane, so its second difference is zero however steep the plane.
    """
    inverse = np.pad(1 / depth, 1, mode="edge")
    across, down = inverse[1:-1, :-2] + inverse[1:-1, 2:], inverse[:-2, 1:-1] + inverse[2:, 1:-1]
    return np.maximum(across, down) * depth - 2


def _sense(rng: np.random.Generator, hits: Hits, label: Array, facing: Array) -> tuple[Array, Array, Array]:
    """Where depth, normal and label are missing, (H,W) each.

    A structured-light sensor loses the far side of a depth edge, glass and screens, and patches; normals are also lost
    beside creases; annotators leave thin seams between regions and the odd thing unlabelled.
    """
    shape = hits.depth.shape
    edge = (_behind(hits.depth) > 0.06) & _patches(rng, shape, 12, 0.6)
    glass = np.isin(label, [CLASSES.index("window"), CLASSES.index("tv")]) & _patches(rng, shape, 10, 0.3)
    no_depth = edge | glass | _patches(rng, shape, 8, rng.uniform(0.005, 0.05))
    crease = (_jump(facing) > 0.2) & _patches(rng, shape, 15, 0.3)
    no_normal = no_depth | crease | _patches(rng, shape, 14, 0.01)
    no_label = (_jump(label) > 0) & _patches(rng, shape, 14, 0.5) | _patches(rng, shape, 7, rng.uniform(0.005, 0.05))
    return no_depth, no_normal, no_label


def render_room(rng: np.random.Generator, height: int, width: int) -> Room:
    """One view of one random room.

    >>> render_room(np.random.default_rng(0), 72, 96).depth.shape
    (72, 96, 1)
    """
    scene = draw_scene(rng)
    hits = trace(scene, height, width)
    image = _expose(rng, shade(scene, hits))
    wall, floor, ceiling = (CLASSES.index(name) for name in ("wall", "floor", "ceiling"))
    boxes = [box.label for piece in scene.pieces for box in piece.boxes]
    label = np.array([wall] * 4 + [floor, ceiling] + [p.label for p in scene.panels] + boxes)[hits.surface]
    normal = np.tensordot(scene.rotation.T, hits.normal, 1)
    no_depth, no_normal, no_label = _sense(rng, hits, label, normal[2])
    depth = np.where(no_depth, 0.0, hits.depth)[..., None]
    normal = np.where(no_normal, 0.0, normal).transpose(1, 2, 0)
    return Room(image, np.where(no_label, -1.0, label), depth, normal)


def _manifest(train: int, val: int, height: int, width: int, seed: int, dtype: DTypeLike) -> dict[str, Any]:
    arguments = {"train": train, "val": val, "height": height, "width": width, "seed": seed}
    lowest = {"train": 0, "val": 0, "height": 2, "width": 2, "seed": 0}
    for name, value in arguments.items():
        if value < lowest[name]:
            raise ValueError(f"{name}={value}: it must be at least {lowest[name]}")
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise ValueError(f"dtype={np.dtype(dtype)}: write float32, or float64 as the real data is")
    return {
        "format": FORMAT,
        "version": VERSION,
        "arguments": {**arguments, "dtype": np.dtype(dtype).name},
        "intrinsics": intrinsics(height, width),
        "convention": "pixels; centres at whole numbers: x/z = (u - cx) / fx, y/z = (v - cy) / fy; "
        "x right, y down, z forward; depth is z in metres",
        "classes": list(CLASSES),
    }


def _is_rendered(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether ``root`` already holds what the manifest describes; raises if it holds anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "rooms.json").read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FileExistsError(f"{root} exists and is not a folder of rendered rooms: give a path that is free")
    if found == manifest:
        return True
    old, new = ({"version": m["version"], **m["arguments"]} for m in (found, manifest))
    differ = ", ".join(f"{k}={old.get(k)} there, {v} asked for" for k, v in new.items() if old.get(k) != v)
    raise FileExistsError(f"{root} holds other rooms ({differ}): give another path, or delete that folder yourself")


def _render_into(folder: Path, manifest: dict[str, Any]) -> None:
    size = manifest["arguments"]
    console = Console(stderr=True)
    jobs = [(split, i) for split in ("train", "val") for i in range(size[split])]
    for split in ("train", "val"):
        for kind in Room._fields:
            (folder / split / kind).mkdir(parents=True)
    for split, i in track(jobs, f"rooms -> {folder.parent}", console=console, disable=not console.is_terminal):
        rng = np.random.default_rng(np.random.SeedSequence(size["seed"], spawn_key=(int(split == "val"), i)))
        room = render_room(rng, size["height"], size["width"])
        for kind, array in room._asdict().items():
            np.save(folder / split / kind / f"{i}.npy", np.ascontiguousarray(array, dtype=size["dtype"]))
    (folder / "rooms.json").write_text(json.dumps(manifest, indent=2) + "\n")


def render_rooms(
    root: Path, *, train: int, val: int, height: int, width: int, seed: int = 0, dtype: DTypeLike = np.float32
) -> Path:
    """Render ``train`` + ``val`` views under ``root``, or find them there already; returns ``root``.

    The folder appears whole or not at all. View i depends on (seed, split, i) and its size alone.

    Args:
        root: a path that is free, empty, or holds the same rooms.
        train, val: how many views of each split, 0 or more.
        height, width: pixels.
        dtype: float32, or float64 as in the real data.

    Raises:
        FileExistsError: ``root`` holds rooms of other arguments, or something else altogether. Nothing is touched.
        ValueError: a count, a size, the seed or the dtype is out of range.
    """
    root, manifest = Path(root), _manifest(train, val, height, width, seed, dtype)
    if _is_rendered(root, manifest):
        return root
    folder = root.absolute().parent / f".{root.absolute().name}.{uuid.uuid4().hex}"
    try:
        _render_into(folder, manifest)
        try:
            folder.replace(root)
        except OSError:
            # Another process may have been faster: its rooms are as good as ours, if they are the same.
            if not _is_rendered(root, manifest):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return root


@dataclass
class Args:
    """Render random rooms in the layout of the preprocessed NYUv2."""

    root: Path
    """Folder to make."""
    train: int = 160
    """Training views."""
    val: int = 80
    """Validation views."""
    height: int = 72
    """Pixels; the real data has 288."""
    width: int = 96
    """Pixels; the real data has 384."""
    seed: int = 0
    """Seed of everything random."""


def main() -> None:
    """The command line."""
    args = tyro.cli(Args)
    Console().print(f"rooms: {render_rooms(**vars(args))}")


if __name__ == "__main__":
    main()
