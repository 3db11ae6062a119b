"""The toy world: captioned scenes drawn with signed distances, each in three styles.

A scene is one big coloured object before one background, with one motion. The same scene renders as
`natural` (what the tiny base knows), `anime` or `blueprint` (what a LoRA is to learn), at any size.

World units: y up in [-1, 1] over the frame height, x to the right in the same unit. Edges are soft on purpose:
the tiny VAE compresses 48 times and must still reconstruct them.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Rgb = tuple[int, int, int]

STYLES = ("natural", "anime", "blueprint")
OBJECTS = ("house", "castle", "tower", "tree", "car", "boat", "balloon", "rocket")
COLOURS: dict[str, Rgb] = {
    "red": (205, 40, 45),
    "yellow": (240, 205, 50),
    "blue": (45, 80, 215),
    "white": (238, 238, 238),
    "purple": (140, 55, 170),
    "green": (15, 130, 75),
}
ORANGE: Rgb = (250, 130, 20)
BACKGROUNDS = ("meadow", "desert", "sea", "night")
MOTIONS = ("still", "left", "right", "rise", "zoom")
FLYING = ("balloon", "rocket")

BACKGROUND_PHRASES = {
    "meadow": ("on a meadow", "in a grassy meadow"),
    "desert": ("in the desert", "in a sandy desert"),
    "sea": ("by the sea", "at the open sea"),
    "night": ("at night", "under the moon at night"),
}
MOTION_PHRASES = {
    "still": ("standing still", "not moving"),
    "left": ("moving to the left", "drifting left"),
    "right": ("moving to the right", "drifting right"),
    "rise": ("rising", "rising up slowly"),
    "zoom": ("the camera zooms in", "slow zoom in"),
    "swing": ("swinging", "swinging to and fro"),
}

NEW_MOTION, NEW_OBJECT, NEW_COLOUR = "swing", "zogling", "orange"
"""No scene of `draw_scene` has them, so the base has never seen them: what a LoRA of motion or of a subject learns."""

# Sky top, sky bottom, far layer, ground, sun or moon: for the natural look and for anime.
NATURAL_PALETTE: dict[str, tuple[Rgb, Rgb, Rgb, Rgb, Rgb]] = {
    "meadow": ((105, 165, 220), (190, 218, 235), (125, 170, 115), (135, 185, 85), (250, 240, 190)),
    "desert": ((225, 185, 130), (245, 222, 175), (205, 150, 95), (222, 178, 112), (255, 245, 205)),
    "sea": ((165, 205, 220), (222, 236, 238), (85, 150, 180), (45, 115, 160), (250, 245, 225)),
    "night": ((28, 32, 78), (72, 72, 125), (42, 48, 82), (30, 36, 58), (235, 235, 205)),
}
ANIME_PALETTE: dict[str, tuple[Rgb, Rgb, Rgb, Rgb, Rgb]] = {
    "meadow": ((60, 175, 255), (130, 215, 255), (60, 190, 95), (120, 225, 70), (255, 245, 120)),
    "desert": ((255, 150, 70), (255, 195, 105), (235, 115, 50), (255, 180, 60), (255, 245, 140)),
    "sea": ((90, 215, 255), (170, 240, 255), (30, 150, 235), (10, 95, 225), (255, 250, 150)),
    "night": ((60, 25, 130), (100, 45, 170), (60, 30, 120), (40, 15, 95), (255, 245, 140)),
}
ANIME_OUTLINE: Rgb = (35, 20, 50)
BLUEPRINT_GROUND: Rgb = (26, 56, 118)
BLUEPRINT_LINE: Rgb = (178, 204, 236)

WOOD: Rgb = (120, 80, 55)
DARK: Rgb = (60, 55, 65)
ROOF: Rgb = (130, 75, 65)
PANE: Rgb = (250, 225, 150)
GLASS: Rgb = (190, 220, 235)
FLAME: Rgb = (250, 150, 40)

SWING, FRAMES_OF_A_SWING = 0.3, 8
DRIFT_PER_FRAME = 0.055
RISE_PER_FRAME = 0.04
ZOOM_PER_FRAME = 0.03
EDGE = 0.04  # width of a soft edge in world units: 1.3 px at height 64
LINE = 0.034  # half width of an outline: about 2 px wide at height 64


@dataclass(frozen=True)
class Scene:
    """One scene. Equal seeds give equal scenes; every field can also be set by hand."""

    object: str
    colour: str
    background: str
    motion: str
    x: float  # centre of the object, world units
    scale: float  # 1 = about 40 px tall at height 64
    horizon: float  # y of the ground's edge, world units
    phase: float  # shifts the far hills, radians
    seed: int


@dataclass(frozen=True)
class Layer:
    """One painted shape: a distance field (negative inside) in world units, and its colours."""

    distance_FHW: Array
    natural: Rgb
    anime: Rgb
    light_FHW: Array | None = None  # -1 (shade) to 1 (light) across the shape; None: flat
    outlined: bool = True


def draw_scene(seed: int) -> Scene:
    """Draws a scene from `seed`; neighbouring seeds are independent."""
    rng = np.random.default_rng([seed, 7])
    return Scene(
        object=OBJECTS[rng.integers(len(OBJECTS))],
        colour=tuple(COLOURS)[rng.integers(len(COLOURS))],
        background=BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        motion=MOTIONS[rng.integers(len(MOTIONS))],
        x=float(rng.uniform(-0.3, 0.3)),
        scale=float(rng.uniform(0.92, 1.1)),
        horizon=float(rng.uniform(-0.4, -0.25)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        seed=seed,
    )


def caption(scene: Scene, variant: int = 0) -> str:
    """The caption of a scene. `variant` 0 to 3 chooses among paraphrases; 0 is the plain form."""
    where = BACKGROUND_PHRASES[scene.background][variant % 2]
    motion = MOTION_PHRASES[scene.motion][variant // 2 % 2]
    return f"a {scene.colour} {scene.object} {where}, {motion}"


def render(scene: Scene, style: str, height: int = 64, width: int = 96, num_frames: int = 9) -> Array:
    """Renders `scene` as frames_FCHW, uint8. Motion has constant speed a frame, centred on the middle frame."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}; choose one of {STYLES}")
    x_F1W, y_FH1, offset_F = _coordinates(scene, height, width, num_frames)
    layers = [*_background_layers(scene, x_F1W, y_FH1), *_object_layers(scene, x_F1W, y_FH1, offset_F)]
    image_CFHW = _paint(_sky(scene, style, y_FH1), style, layers, (len(offset_F), height, width))
    frames_FCHW = np.clip(image_CFHW.transpose(1, 0, 2, 3) * 255 + 0.5, 0, 255).astype(np.uint8)
    return _all_frames(frames_FCHW, num_frames)


def mask(scene: Scene, height: int = 64, width: int = 96, num_frames: int = 9, margin: float = 0.1) -> Array:
    """Where `render` draws the object and its shadow, and `margin` world units around: frames_FCHW, 255 there, else 0.
    """
    layers = _object_layers(scene, *_coordinates(scene, height, width, num_frames))
    inside_FHW = np.min([layer.distance_FHW for layer in layers], axis=0) < margin
    frames_FCHW = np.repeat(inside_FHW[:, None].astype(np.uint8) * 255, 3, axis=1)
    return _all_frames(frames_FCHW, num_frames)


def _coordinates(scene: Scene, height: int, width: int, num_frames: int) -> tuple[Array, Array, Array]:
    """x_F1W and y_FH1 of the pixels, and offset_F of the frames from the middle one; one frame for all of a still."""
    offset_F = np.arange(num_frames, dtype=np.float32) - (num_frames - 1) / 2
    if scene.motion == "still":
        offset_F = np.zeros(1, np.float32)
    y_1H1 = (1 - (2 * np.arange(height, dtype=np.float32) + 1) / height).reshape(1, -1, 1)
    x_11W = ((2 * np.arange(width, dtype=np.float32) + 1 - width) / height).reshape(1, 1, -1)
    unit = np.ones((len(offset_F), 1, 1), np.float32)
    if scene.motion == "zoom":
        unit = np.exp(-ZOOM_PER_FRAME * offset_F).reshape(-1, 1, 1)
    return x_11W * unit, y_1H1 * unit, offset_F


def _all_frames(frames_FCHW: Array, num_frames: int) -> Array:
    """The one frame of a still scene as often as asked; drawn frames as they are."""
    if len(frames_FCHW) == num_frames:
        return np.ascontiguousarray(frames_FCHW)
    return np.repeat(frames_FCHW, num_frames, 0)


def _paint(sky_CFHW: Array, style: str, layers: list[Layer], shape: tuple[int, int, int]) -> Array:
    """Paints the layers over the sky from back to front; image_CFHW float32 in [0, 1] of `shape` (F, H, W)."""
    soft = max(EDGE, 2 / shape[1])
    image_CFHW = np.empty((3, *shape), np.float32)
    image_CFHW[:] = sky_CFHW
    for layer in layers:
        inside = _coverage(layer.distance_FHW, soft)
        if style == "natural":
            fill = _rgb(layer.natural)
            if layer.light_FHW is not None:
                fill = np.clip(fill * (1 + 0.2 * layer.light_FHW), 0, 1)
        elif style == "anime":
            fill = _rgb(layer.anime)
            if layer.light_FHW is not None:
                fill = fill * (1 - 0.28 * _coverage(layer.light_FHW + 0.25, 0.12))
        else:
            fill = _rgb(BLUEPRINT_GROUND) if layer.light_FHW is None else _rgb(BLUEPRINT_GROUND) + 0.04
        image_CFHW += inside * (fill - image_CFHW)
        if style != "natural" and layer.outlined:
            line = _coverage(np.abs(layer.distance_FHW) - LINE, soft)
            image_CFHW += line * (_rgb(ANIME_OUTLINE if style == "anime" else BLUEPRINT_LINE) - image_CFHW)
    return image_CFHW


def _sky(scene: Scene, style: str, y_FH1: Array) -> Array:
    if style == "blueprint":
        return _rgb(BLUEPRINT_GROUND)
    top, bottom = (NATURAL_PALETTE if style == "natural" else ANIME_PALETTE)[scene.background][:2]
    height = np.clip((y_FH1 - scene.horizon) / (1 - scene.horizon), 0, 1)[None]
    if style == "anime":
        height = _coverage(0.45 - height, 0.06)  # two flat bands
    return _rgb(bottom) + height * (_rgb(top) - _rgb(bottom))


def _background_layers(scene: Scene, x: Array, y: Array) -> list[Layer]:
    natural, anime = NATURAL_PALETTE[scene.background], ANIME_PALETTE[scene.background]
    sun_x = 1.0 if scene.x < 0 else -1.0
    radius = {"meadow": 0.2, "desert": 0.26, "sea": 0.2, "night": 0.24}[scene.background]
    sun = _circle(x - sun_x, y - 0.55, radius)
    ground = y - scene.horizon + 0.1 + np.zeros_like(x)
    layers = [Layer(sun, natural[4], anime[4])]
    if scene.background == "sea":
        layers.append(Layer(y - scene.horizon - 0.05 + np.zeros_like(x), natural[2], anime[2], outlined=False))
        ground = ground + 0.03 * np.sin(3 * x + scene.phase)
    else:
        waves = {"meadow": 1.6, "desert": 2.4, "night": 2.0}[scene.background]
        hill = (0.16 if scene.background == "desert" else 0.11) * np.sin(waves * x + scene.phase)
        layers.append(Layer((y - scene.horizon - 0.1 - hill) * 0.95, natural[2], anime[2], outlined=False))
    layers.append(Layer(ground, natural[3], anime[3]))
    return layers


def _object_layers(scene: Scene, x: Array, y: Array, offset_F: Array) -> list[Layer]:
    """The object's layers, placed and moved. Local u is -0.5..0.5 or so, local v 0 (bottom) to 1 (top)."""
    size = 1.25 * scene.scale
    shift_x, shift_y = np.zeros_like(offset_F), np.zeros_like(offset_F)
    if scene.motion in ("left", "right"):
        shift_x = offset_F * (DRIFT_PER_FRAME if scene.motion == "right" else -DRIFT_PER_FRAME)
    if scene.motion == NEW_MOTION:
        shift_x = SWING * np.sin(2 * np.pi * offset_F / FRAMES_OF_A_SWING)
    if scene.motion == "rise":
        shift_y = offset_F * RISE_PER_FRAME
    foot = -0.5 if scene.object in FLYING else -0.68
    u = (x - scene.x - shift_x.reshape(-1, 1, 1)) / size
    v = (y - foot - shift_y.reshape(-1, 1, 1)) / size
    colour = COLOURS.get(scene.colour, ORANGE)
    layers = []
    if scene.object not in FLYING and scene.motion != "rise":
        shadow_colour = tuple(int(0.72 * c) for c in NATURAL_PALETTE[scene.background][3])
        shadow_anime = tuple(int(0.72 * c) for c in ANIME_PALETTE[scene.background][3])
        layers.append(Layer(_ellipse(u, v, 0.62, 0.09) * size, shadow_colour, shadow_anime, outlined=False))
    light = np.clip(0.35 - 1.5 * u + 0.5 * (v - 0.5), -1, 1) + np.zeros_like(v)
    for distance, part_colour, is_big in _PARTS[scene.object](u, v, colour):
        layers.append(
            Layer(distance * size, part_colour, _saturate(part_colour), light if is_big else None, outlined=is_big)
        )
    return layers


Part = tuple[Array, Rgb, bool]  # distance field in local units, colour, whether it is a big (shaded, outlined) part


def _house(u: Array, v: Array, colour: Rgb) -> list[Part]:
    return [
        (_box(u, v - 0.29, 0.44, 0.29), colour, True),
        (_triangle(u, v - 0.54, 0.62, 0.44), ROOF, True),
        (_box(u + 0.18, v - 0.17, 0.1, 0.17), DARK, False),
        (_box(u - 0.18, v - 0.3, 0.11, 0.1), PANE, False),
    ]


def _castle(u: Array, v: Array, colour: Rgb) -> list[Part]:
    mirrored = np.abs(u)
    wall = np.minimum(_box(u, v - 0.26, 0.42, 0.26), _box(mirrored - 0.13, v - 0.55, 0.07, 0.08))
    towers = np.minimum(_box(mirrored - 0.48, v - 0.4, 0.15, 0.4), 9.0)
    return [
        (wall, colour, True),
        (towers, colour, True),
        (_triangle(mirrored - 0.48, v - 0.74, 0.23, 0.32), ROOF, True),
        (np.minimum(_circle(u, v - 0.2, 0.12), _box(u, v - 0.1, 0.12, 0.1)), DARK, False),
    ]


def _tower(u: Array, v: Array, colour: Rgb) -> list[Part]:
    return [
        (_box(u, v - 0.42, 0.2 - 0.08 * (v - 0.42), 0.42), colour, True),
        (np.minimum(_box(u, v - 0.84, 0.3, 0.09), _box(np.abs(u) - 0.23, v - 0.97, 0.07, 0.09)), colour, True),
        (_box(u, v - 0.56, 0.07, 0.11), DARK, False),
        (_box(u, v - 0.11, 0.09, 0.12), DARK, False),
    ]


def _tree(u: Array, v: Array, colour: Rgb) -> list[Part]:
    crown = np.minimum(_circle(np.abs(u) - 0.22, v - 0.53, 0.24), _circle(u, v - 0.74, 0.28))
    return [(_box(u, v - 0.2, 0.08, 0.22), WOOD, True), (crown, colour, True)]


def _car(u: Array, v: Array, colour: Rgb) -> list[Part]:
    wheels = _circle(np.abs(u) - 0.36, v - 0.13, 0.14)
    cabin = _box(u + 0.02, v - 0.46, 0.32 - 0.45 * (v - 0.46), 0.15)
    return [
        (np.minimum(_box(u, v - 0.25, 0.64, 0.13), cabin), colour, True),
        (_box(u + 0.02, v - 0.47, 0.23 - 0.45 * (v - 0.47), 0.085), GLASS, False),
        (wheels, DARK, True),
    ]


def _boat(u: Array, v: Array, colour: Rgb) -> list[Part]:
    sail = np.maximum(np.maximum(0.3 - v, -(u + 0.06)), (u + 0.06) * 0.83 + (v - 1.0) * 0.56)
    jib = np.maximum(np.maximum(0.3 - v, u + 0.12), -(u + 0.12) * 0.83 + (v - 0.8) * 0.56)
    return [
        (np.minimum(sail, jib), colour, True),
        (_box(u, v - 0.13, 0.46 + 0.7 * (v - 0.13), 0.11), WOOD, True),
    ]


def _balloon(u: Array, v: Array, colour: Rgb) -> list[Part]:
    taper = _box(u, v - 0.32, 0.12 + 0.9 * (v - 0.25), 0.1)
    return [
        (_box(u, v - 0.09, 0.13, 0.09), WOOD, True),
        (np.minimum(_circle(u, v - 0.66, 0.36), taper), colour, True),
    ]


def _rocket(u: Array, v: Array, colour: Rgb) -> list[Part]:
    fins = _triangle(u, v - 0.14, 0.4, 0.46)
    return [
        (_triangle(u, 0.16 - v, 0.13, 0.2), FLAME, False),
        (fins, DARK, True),
        (_ellipse(u, v - 0.6, 0.2, 0.46), colour, True),
        (_circle(u, v - 0.68, 0.09), GLASS, False),
    ]


def _zogling(u: Array, v: Array, colour: Rgb) -> list[Part]:
    ears = _triangle(np.abs(u) - 0.24, v - 0.62, 0.12, 0.38)
    return [
        (ears, DARK, True),
        (_box(np.abs(u) - 0.2, v - 0.1, 0.08, 0.1), DARK, True),
        (_ellipse(u, v - 0.42, 0.46, 0.32), colour, True),
        (_circle(u, v - 0.48, 0.17), (238, 238, 238), False),
        (_circle(u + 0.04, v - 0.48, 0.08), DARK, False),
    ]


_PARTS = {
    "house": _house,
    "castle": _castle,
    "tower": _tower,
    "tree": _tree,
    "car": _car,
    "boat": _boat,
    "balloon": _balloon,
    "rocket": _rocket,
    NEW_OBJECT: _zogling,
}


def _circle(u: Array, v: Array, radius: float) -> Array:
    return np.sqrt(u * u + v * v) - radius


def _ellipse(u: Array, v: Array, half_width: float, half_height: float) -> Array:
    """Close to the true distance near the edge: the implicit function over its gradient."""
    a, b = u / half_width, v / half_height
    level = np.sqrt(a * a + b * b)
    slope = np.sqrt((a / half_width) ** 2 + (b / half_height) ** 2) / np.maximum(level, 1e-3)
    return (level - 1) / np.maximum(slope, 1 / max(half_width, half_height))


def _box(u: Array, v: Array, half_width: float | Array, half_height: float) -> Array:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _triangle(u: Array, v: Array, half_width: float, height: float) -> Array:
    """An upright isosceles triangle standing on v = 0."""
    length = (half_width**2 + height**2) ** 0.5
    return np.maximum(-v, (np.abs(u) * height + (v - height) * half_width) / length)


def _coverage(distance: Array, soft: float) -> Array:
    """1 inside, 0 outside, a smoothstep over `soft` on either side."""
    t = np.clip(0.5 - distance / (2 * soft), 0, 1)
    return t * t * (3 - 2 * t)


def _rgb(colour: Rgb) -> Array:
    return (np.array(colour, np.float32) / 255).reshape(3, 1, 1, 1)


def _saturate(colour: Rgb) -> Rgb:
    """A more saturated, brighter colour for the anime palette."""
    rgb = np.array(colour, np.float32)
    vivid = rgb.mean() + 1.35 * (rgb - rgb.mean()) + 12
    red, green, blue = (int(c) for c in np.clip(vivid, 0, 255))
    return red, green, blue
