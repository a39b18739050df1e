"""Tables the renderer draws from: lit, textured patches of the shapes, and the backgrounds.

Everything here is made once, in numpy. A shape is a list of closed outlines in units of its radius,
y down; its signed distance field gives the anti-aliased edge, the relief that is lit, the dark rim
and the shadow.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .scenes import BACKGROUNDS, COLOURS, PICTURE_SIZE, RADII, SHAPES, SIZES, TEXTURES

PATCH_SIZE = 72
EDGE_MARGIN = 4.0
SHADOW_OFFSET = (2.5, 4.0)
CORNER_RADIUS = 0.09
LIGHT = np.array([-0.45, -0.62, 0.64])

COLOUR_VALUES = {
    "red": (0.86, 0.13, 0.13),
    "orange": (0.98, 0.53, 0.08),
    "yellow": (0.98, 0.87, 0.16),
    "green": (0.10, 0.56, 0.20),
    "cyan": (0.13, 0.80, 0.82),
    "blue": (0.13, 0.28, 0.86),
    "purple": (0.47, 0.16, 0.66),
    "pink": (0.99, 0.56, 0.74),
    "white": (0.96, 0.96, 0.95),
}
INK_VALUES = {
    "red": (1.00, 0.80, 0.76),
    "orange": (1.00, 0.91, 0.72),
    "yellow": (0.66, 0.50, 0.04),
    "green": (0.72, 0.93, 0.70),
    "cyan": (0.86, 0.98, 0.97),
    "blue": (0.74, 0.82, 1.00),
    "purple": (0.88, 0.74, 0.98),
    "pink": (0.80, 0.27, 0.50),
    "white": (0.46, 0.49, 0.56),
}


def arc(centre: tuple[float, float], radius: float, start: float, stop: float) -> np.ndarray:
    """(64, 2) points of an arc, angles in degrees clockwise from the right (y is down)."""
    angle = np.radians(np.linspace(start, stop, 64))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius + np.array(centre)


def star_outline(points: int, outer: float, inner: float) -> np.ndarray:
    """A star that stands on two points."""
    angle = np.pi * np.arange(2 * points) / points - np.pi / 2
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius + 0.06], axis=1)


def heart_outline() -> np.ndarray:
    """Two lobes that meet in a notch above and a point below."""
    lobe = arc((0.46, -0.32), 0.50, -163, 42)
    return np.concatenate([lobe, [[0.0, 0.92]], lobe[::-1] * [-1, 1]])


def crescent_outline() -> np.ndarray:
    """A disc less a smaller disc at its upper right."""
    outer = arc((0.0, 0.0), 0.96, 25, 295)
    chord = outer[-1] - outer[0]
    middle = (outer[0] + outer[-1]) / 2
    normal = np.array([-chord[1], chord[0]]) / np.linalg.norm(chord)
    centre = middle - 0.06 * normal
    first, last = (np.degrees(np.arctan2(*(end - centre)[::-1])) for end in (outer[-1], outer[0]))
    radius = float(np.linalg.norm(outer[0] - centre))
    inner = arc(tuple(centre), radius, first % 360, last % 360)
    return np.concatenate([outer, inner[1:-1]])


def drop_outline() -> np.ndarray:
    """A disc whose tangents meet in a point above."""
    centre, radius, tip = (0.0, 0.30), 0.66, -1.02
    angle = float(np.degrees(np.arcsin(radius / (centre[1] - tip))))
    return np.concatenate([arc(centre, radius, -angle, 180 + angle), [[0.0, tip]]])


def outlines(shape: str) -> list[np.ndarray]:
    """The closed outlines of a shape, in units of its radius."""
    if shape == "circle":
        return [arc((0, 0), 0.92, 0, 360)[:-1]]
    if shape == "ring":
        return [arc((0, 0), 0.98, 0, 360)[:-1], arc((0, 0), 0.44, 0, 360)[:-1]]
    if shape == "star":
        return [star_outline(5, 1.14, 0.55)]
    if shape == "heart":
        return [heart_outline()]
    if shape == "crescent":
        return [crescent_outline()]
    if shape == "drop":
        return [drop_outline()]
    corners = {
        "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        "triangle": [(0.0, -0.92), (1.02, 0.80), (-1.02, 0.80)],
        "cross": [(-0.3, -0.96), (0.3, -0.96), (0.3, -0.3), (0.96, -0.3), (0.96, 0.3), (0.3, 0.3)]
        + [(0.3, 0.96), (-0.3, 0.96), (-0.3, 0.3), (-0.96, 0.3), (-0.96, -0.3), (-0.3, -0.3)],
        "arrow": [(1.0, 0.0), (0.1, 0.88), (0.1, 0.34), (-0.98, 0.34)]
        + [(-0.98, -0.34), (0.1, -0.34), (0.1, -0.88)],
    }
    return [np.array(corners[shape], dtype=np.float64)]


def signed_distance(points: np.ndarray, loops: list[np.ndarray]) -> np.ndarray:
    """Distance from (..., 2) points to closed polygons, negative inside (even-odd rule)."""
    squared = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], dtype=bool)
    for loop in loops:
        for start, stop in zip(loop, np.roll(loop, -1, axis=0), strict=True):
            edge, offset = stop - start, points - start
            along = np.clip(offset @ edge / max(float(edge @ edge), 1e-12), 0, 1)
            nearest = offset - along[..., None] * edge
            squared = np.minimum(squared, np.sum(nearest**2, axis=-1))
            if start[1] != stop[1]:
                crosses = (start[1] > points[..., 1]) != (stop[1] > points[..., 1])
                at = start[0] + (points[..., 1] - start[1]) * edge[0] / edge[1]
                inside ^= crosses & (points[..., 0] < at)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of a 2-D array with edge padding, ``sigma`` in pixels."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    padded = np.pad(image, reach, mode="edge")
    rows = np.apply_along_axis(np.convolve, 1, padded, kernel, mode="valid")
    return np.apply_along_axis(np.convolve, 0, rows, kernel, mode="valid")


def relief_light(distance: np.ndarray, radius: float) -> np.ndarray:
    """Light on a pillow over the shape: below 0 towards black, above 0 towards white."""
    bevel = 0.62 * radius
    depth = np.clip(-distance / bevel, 0, 1)
    height = blur(0.62 * bevel * (1 - (1 - depth) ** 2), 0.085 * radius)
    slope_y, slope_x = np.gradient(height)
    normal = np.stack([-slope_x, -slope_y, np.ones_like(height)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = LIGHT / np.linalg.norm(LIGHT)
    half = light + [0, 0, 1]
    diffuse = normal @ light - light[2]
    gloss = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 28
    rim = np.exp(np.minimum(distance, 0) / 1.3)
    return 0.52 * diffuse + 0.30 * (gloss - 0.09) - 0.34 * rim


def texture_ink(texture: str, points: np.ndarray, size: str) -> np.ndarray:
    """How much of the texture's ink covers each (..., 2) point in pixels, 0 to 1."""
    x, y = points[..., 0], points[..., 1]
    if texture == "plain":
        return np.zeros_like(x)
    if texture == "striped":
        period = {"small": 7.0, "large": 8.8}[size]
        wave = np.cos(2 * np.pi * (x + y) / np.sqrt(2) / period)
        return 0.5 + 0.5 * np.tanh(2.2 * wave) / np.tanh(2.2)
    period, dot = {"small": (6.8, 1.9), "large": (8.8, 2.6)}[size]
    row = np.round(y / period)
    shifted = x - 0.5 * period * (row % 2)
    across = shifted - period * np.round(shifted / period)
    distance = np.hypot(across, y - period * row)
    return 0.5 - 0.5 * np.tanh(1.6 * (distance - dot))


@lru_cache(maxsize=1)
def sprite_table() -> np.ndarray:
    """(60, 4, 72, 72) float32: edge, light, ink, shadow of every (shape, size, texture).

    ``edge`` is the distance inwards plus EDGE_MARGIN, clipped to [0, 2 * EDGE_MARGIN], so that it
    is 0 outside of the patch as well. Sample j lies j - 35.5 pixels from the object's centre.
    """
    axis = np.arange(PATCH_SIZE) - (PATCH_SIZE - 1) / 2
    points = np.stack(np.meshgrid(axis, axis), axis=-1)
    table = []
    for shape in SHAPES:
        scaled = [outline * (1 - CORNER_RADIUS) for outline in outlines(shape)]
        for size, radius in zip(SIZES, RADII, strict=True):
            loops = [outline * radius for outline in scaled]
            distance = signed_distance(points, loops) - CORNER_RADIUS * radius
            edge = np.clip(EDGE_MARGIN - distance, 0, 2 * EDGE_MARGIN)
            moved = signed_distance(points - SHADOW_OFFSET, loops) - CORNER_RADIUS * radius
            shadow = blur(np.clip(0.5 - moved, 0, 1), 2.4)
            light = relief_light(distance, radius)
            for texture in TEXTURES:
                ink = texture_ink(texture, points, size)
                table.append(np.stack([edge, light, ink, shadow]))
    return np.array(table, dtype=np.float32)


def colour_table() -> np.ndarray:
    """(9, 3) the colour of the objects, sRGB in [0, 1]."""
    return np.array([COLOUR_VALUES[name] for name in COLOURS], dtype=np.float32)


def ink_table() -> np.ndarray:
    """(9, 3) the colour of the stripes and dots on each object colour, sRGB in [0, 1]."""
    return np.array([INK_VALUES[name] for name in COLOURS], dtype=np.float32)


def mix(low: tuple[float, ...], high: tuple[float, ...], weight: np.ndarray) -> np.ndarray:
    """(h, w, 3) a blend of two colours by an (h, w) weight."""
    return np.array(low) + (np.array(high) - np.array(low)) * weight[..., None]


def background(name: str) -> np.ndarray:
    """(128, 128, 3) one background, sRGB in [0, 1]."""
    axis = (np.arange(PICTURE_SIZE) + 0.5) / PICTURE_SIZE
    x, y = np.meshgrid(axis, axis)
    if name == "grey":
        return mix((0.77, 0.77, 0.78), (0.55, 0.55, 0.57), np.hypot(x - 0.4, y - 0.35) ** 1.5)
    if name == "sky":
        clouds = [(0.20, 0.17, 0.15), (0.34, 0.20, 0.11), (0.82, 0.44, 0.14), (0.16, 0.78, 0.17)]
        cover = sum(
            np.exp(-(((x - a) / s) ** 2) - ((y - b) / (0.38 * s)) ** 2) for a, b, s in clouds
        )
        blue = mix((0.42, 0.66, 0.93), (0.80, 0.91, 0.98), y)
        return blue + (1 - blue) * np.clip(0.55 * cover, 0, 0.6)[..., None]
    if name == "night":
        return night(x, y)
    if name == "sand":
        ripple = np.sin(2 * np.pi * (6.5 * y + 0.35 * np.sin(2 * np.pi * (1.1 * x + 0.2 * y))))
        return mix((0.80, 0.68, 0.48), (0.90, 0.80, 0.61), 0.5 + 0.32 * ripple + 0.25 * (x - y))
    if name == "meadow":
        first = 0.38 + 0.05 * np.sin(2 * np.pi * (0.9 * x + 0.1))
        second = 0.70 + 0.06 * np.sin(2 * np.pi * (0.7 * x + 0.55))
        near = 0.5 + 0.5 * np.tanh(26 * (y - first))
        nearest = 0.5 + 0.5 * np.tanh(26 * (y - second))
        return mix((0.78, 0.88, 0.62), (0.58, 0.75, 0.42), 0.55 * near + 0.45 * nearest)
    checks = np.sin(2 * np.pi * 4 * x) * np.sin(2 * np.pi * 4 * y)
    return mix((0.77, 0.74, 0.69), (0.89, 0.86, 0.81), 0.5 + 0.5 * np.tanh(3 * checks))


def night(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A dark gradient with a few soft stars."""
    base = mix((0.05, 0.07, 0.19), (0.19, 0.16, 0.34), y)
    spots = np.random.default_rng(7).uniform(0.03, 0.97, (22, 2))
    glow = sum(np.exp(-((x - a) ** 2 + (y - b) ** 2) / 0.016**2) for a, b in spots)
    return base + 0.38 * glow[..., None] * np.array([1.0, 0.96, 0.85])


@lru_cache(maxsize=1)
def background_table() -> np.ndarray:
    """(6, 128, 128, 3) float32: every background, sRGB in [0, 1]."""
    return np.array([background(name) for name in BACKGROUNDS], dtype=np.float32)
