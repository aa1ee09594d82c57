"""The look of each toy domain: palettes, textures, light, and what the camera or game engine does to the picture.

The toy world (toy_world.py) is drawn into a G-buffer: an image of row numbers, where each row says which surface
a pixel shows (its plane, colour, texture and class). This module turns the G-buffer into a picture. All domains
share the world; a Look holds everything that differs between them.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter

RGB = tuple[int, int, int]
Point = tuple[float, float, float]
NEAR = 0.6  # metres: nothing closer to the camera is drawn
SUPER = 2  # supersampling: the G-buffer is this many times larger than the frame, along each side

# Columns of a G-buffer row. A, B, C: 1 / depth = A x + B y + C; RED..BLUE: lit colour in 0..1; TEX: texture number;
# PER_M: texels per metre; CON: texture contrast; UX, UZ: direction of the texture's u axis on the ground plan;
# GROUND: 1 for ground, which takes cast shadows; FACADE: number of the window grid or -1; LABEL: trainId or 255.
A, B, C, RED, GREEN, BLUE, TEX, PER_M, CON, UX, UZ, GROUND, FACADE, LABEL = range(14)
# Columns of a facade row, in metres except the shares WIN_W, WIN_H and the random SEED (all 0..1). SHOP: height of the
# ground floor; over 2 it has shop windows. OFFSET: where along the u axis the wall begins.
CELL_W, CELL_H, WIN_W, WIN_H, SHOP, TOP, SEED, OFFSET = range(8)

TEXTURES = ("flat", "asphalt", "slabs", "brick", "plaster", "leaf", "grass", "bars", "boards", "sheen", "cloud")
CLOUD = TEXTURES.index("cloud")
SIDE, LEVELS = 256, 7


class Id:
    """The 19 classes (trainIds) and void."""

    ROAD, WALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, PLANT, TERRAIN = range(10)
    SKY, PERSON, RIDER, CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = range(10, 19)
    VOID = 255


@dataclass(frozen=True)
class Material:
    """Possible colours (0..255), a texture, the size of one texture tile in metres and the texture's contrast."""

    colours: tuple[RGB, ...]
    texture: str = "flat"
    tile: float = 4.0
    contrast: float = 0.0


@dataclass(frozen=True)
class Camera:
    """Pinhole camera in supersampled pixels: size, focal length, vanishing point. above: its height in metres."""

    width: int
    height: int
    focal: float
    centre: float
    horizon: float
    above: float
    curve: float  # the street's sideways shift in metres is curve * z^2

    def project(self, points: list[Point]) -> list[tuple[float, float]]:
        """Pixel (x, y) of each point (x right of, y above the ground below, z ahead of the camera; z > 0)."""
        focal, centre, horizon, above = self.focal, self.centre, self.horizon, self.above
        return [(centre + x * (s := focal / z), horizon - (y - above) * s) for x, y, z in points]


def clip_near(points: list[Point]) -> list[Point]:
    """The part of a polygon that lies beyond the near plane."""
    if min([p[2] for p in points]) >= NEAR:
        return points
    kept: list[Point] = []
    for p, q in zip(points, points[1:] + points[:1], strict=True):
        if p[2] >= NEAR:
            kept.append(p)
        if (p[2] >= NEAR) != (q[2] >= NEAR):
            t = (NEAR - p[2]) / (q[2] - p[2])
            kept.append((p[0] + t * (q[0] - p[0]), p[1] + t * (q[1] - p[1]), NEAR))
    return kept


@dataclass(frozen=True)
class GBuffer:
    """ids (h, w) int32 row numbers (0 is sky); rows (n, 14); facades (m, 8); dark (h, w) 0..1 cast shadow."""

    camera: Camera
    ids: np.ndarray
    rows: np.ndarray
    facades: np.ndarray
    dark: np.ndarray

    def labels(self) -> np.ndarray:
        """uint8 (h / SUPER, w / SUPER): of each block's labels the most frequent, on a tie the upper left one."""
        labels = self.rows[:, LABEL].astype(np.uint8)[self.ids]
        a, b, c, d = labels[::2, ::2], labels[::2, 1::2], labels[1::2, ::2], labels[1::2, 1::2]
        alone = (a != b) & (a != c) & (a != d)
        return np.where(alone & ((b == c) | (b == d)), b, np.where(alone & (c == d), c, a))


@dataclass(frozen=True)
class Look:
    """One domain's palettes, light and camera. Colours are 0..255, light and strengths are factors near 0..1."""

    name: str
    materials: dict[str, Material] = field(repr=False)
    ambient: float
    sun: float
    shadow: float  # how dark a cast shadow is
    shadow_blur: float  # in pixels of a 256 pixel wide frame
    shadow_reach: float  # shadow length per metre of height
    occlusion: float  # darkening of upright surfaces near the ground
    haze: RGB
    haze_metres: float
    sky_top: RGB
    sky_low: RGB
    cloud: RGB
    cloud_share: float
    glass: RGB
    glass_sky: float  # how much sky the windows mirror
    saturation: float
    contrast: float
    gain: tuple[float, float, float]
    texel: int  # textures are made of square blocks of this many texels
    roughness: float  # exponent of the textures' spectrum: lower is finer
    sharpen: float
    blur: float  # in pixels of a 256 pixel wide frame
    noise: float
    vignette: float
    exposure_jitter: float
    texture_seed: int


# Colours as hexadecimal RGB. Things look the same everywhere before light and camera.
_THINGS = {
    "paintwork": "c4c6c8 2a2c32 787c82 96181c 1e3a78 e1e1de 464a50 1e503c ac966e 3c6ea0 8c9094 sheen 3 .16",
    "bus": "c43c28 deb428 e1e1dc 285a96 3c8250", "tram": "cd302c e1be3c 386ea8 468c5a", "trim": "222326",
    "tyre": "1a1a1c", "rim": "96989c 6e7074", "window": "34404c sheen 1.5 .4", "tail": "be1a18", "head": "f0eee1",
    "plate": "e8e4c8", "skin": "deb294 bc8a6a 7e563e ecc4aa", "hair": "281e18 583c24 96784a 787674",
    "helmet": "1e1e22 dcdcdc b42824 2850a0", "frame": "962224 223c82 1e2022 c8c8c8 28785a", "spokes": "70706e",
    "pole": "767a7c 5c6260 8c8c8a", "lamp": "d7d6cd", "signal": "1e2220 2c322c", "red": "c42426", "white": "ebebe8",
    "blue": "1e4ea8", "yellow": "ecbe28", "green_board": "1c6848", "off": "46423c", "lit_red": "ff3c28",
    "lit_amber": "ffbe32", "lit_green": "46ff96",
    "cloth": "96282c 283c6e 24262a cdc8be 606e46 c89632 6e3c6e 3c788c 828286 plaster 1.2 .3",
    "trousers": "283048 222226 5c5448 465470 plaster 1.2 .3", "bin": "3c4c42 58585a 784630 bars 1 .2",
    "cargo": "dcdcd8 466496 b45032 969696 d8be5a boards 5 .12",
}
# What the ground, buildings and plants are made of, in each world: gta5, synthia, cityscapes. After the colours: a
# texture, the size of its tile in metres and its contrast. The asphalt of cityscapes is as light as the walls of gta5,
# and its walls are as dark as the asphalt of gta5: a net that goes by brightness fails there.
_PLACES = {
    "asphalt": ("464448 3e3d42 4e4a4a asphalt 2.4 .34", "707c82 68767e asphalt 5 .3",
                "c2beb4 b8b4ac ccc8be asphalt 5 .14"),
    "patch": ("323135 asphalt 2 .3", "58646a asphalt 5 .2", "aaa69e asphalt 5 .14"),
    "marking": ("e8e4d6 asphalt 2 .12", "eef4f4", "f0eee4 asphalt 2 .1"),
    "middle": ("e2ae2c asphalt 2 .12", "eef4f4", "f0eee4 asphalt 2 .1"),
    "rail": ("96928c", "96a0a4", "7c7a74"),
    "pavement": ("c0b4a2 c8baa0 slabs 5 .22", "a8beba 96b2b6 slabs 8 .4", "8c8880 827e78 slabs 3.4 .2"),
    "kerb": ("d6cdbe asphalt 2 .15", "c4d0ce", "a8a49c asphalt 2 .15"),
    "grass": ("74882e 848c3a 62802a grass 3 .5", "58ac62 64b25c grass 6 .34", "4a5244 545a46 grass 5 .36"),
    "leaf": ("4e7c24 608828 3e6c28 6e8a2e leaf 2.6 .7", "3c8e5a 4a9c54 368062 leaf 4 .6",
             "32382c 3a3e30 42443a leaf 3.4 .7"),
    "bark": ("70523a grass 1.2 .5", "686454 grass 3 .4", "2e2a26 grass 1.2 .5"),
    "plaster": ("e0ba8a ecd6b2 c47454 d69e76 b09884 e2c878 plaster 9 .22",
                "b0ccc6 ceddd4 96b8c4 bcc8a8 d6ccb8 92aca6 plaster 5 .24",
                "4e4a48 5a5450 443f3e 625a52 504c50 plaster 12 .2"),
    "brick": ("b0583c be6e48 964a3a brick 3 .3", "b08c80 a0968c brick 6 .42", "46383a 503e38 brick 4 .22"),
    "concrete": ("c4b8a6 b4aca0 boards 6 .2", "bec8c8 a8babe boards 8 .3", "565452 4a4a4a boards 7 .16"),
    "roof": ("a44c32 805442 5a5456 boards 4 .35", "846868 687c86 boards 6 .35", "3a3434 44403c boards 5 .25"),
    "ledge": ("eee4d0", "e0eae6", "6a6660"),
    "awning": ("c43229 286e54 e2aa3c 325096", "5a96be be6e64 5aaa82", "4a2a2a 2e343e 5c4a3a"),
    "stone": ("ceb692 baa080 brick 4.4 .3", "a2b2ac b0b4a4 brick 7 .4", "5c5650 504c48 brick 5 .3"),
    "fence": ("5c544c 96744e 464a4c bars 2.2 .75", "788c92 5a7878 bars 3.6 .6", "3a3c3a 444038 bars 2.6 .6"),
}


def _material(text: str) -> Material:
    """From "rrggbb rrggbb [texture tile contrast]"."""
    words = text.split()
    texture = words[-3:] if len(words) > 3 and words[-3] in TEXTURES else []
    colours = words[:len(words) - len(texture)]
    rgb = tuple((int(c[:2], 16), int(c[2:4], 16), int(c[4:], 16)) for c in colours)
    return Material(rgb, texture[0], float(texture[1]), float(texture[2])) if texture else Material(rgb)


def _materials(world: int) -> dict[str, Material]:
    return {name: _material(text) for name, text in _THINGS.items()} | {
        name: _material(texts[world]) for name, texts in _PLACES.items()}


_ALL = (
    Look(name="gta5", materials=_materials(0), ambient=0.6, sun=0.6, shadow=0.5, shadow_blur=0.35, shadow_reach=0.75,
        occlusion=0.25, haze=(190, 205, 226), haze_metres=620.0, sky_top=(48, 112, 206), sky_low=(168, 204, 240),
        cloud=(255, 250, 242), cloud_share=0.36, glass=(48, 74, 108), glass_sky=0.5, saturation=1.2, contrast=1.14,
        gain=(1.04, 1.0, 0.95), texel=1, roughness=0.7, sharpen=0.5, blur=0.0, noise=0.0,
        vignette=0.22, exposure_jitter=0.07, texture_seed=11),
    Look(name="synthia", materials=_materials(1), ambient=0.86, sun=0.22, shadow=0.3, shadow_blur=0.2, shadow_reach=0.4,
        occlusion=0.1, haze=(196, 222, 226), haze_metres=420.0, sky_top=(112, 176, 214), sky_low=(206, 234, 236),
        cloud=(240, 250, 250), cloud_share=0.3, glass=(74, 108, 124), glass_sky=0.25, saturation=0.95, contrast=0.92,
        gain=(0.98, 1.05, 1.05), texel=8, roughness=1.2, sharpen=0.15, blur=0.0, noise=0.0,
        vignette=0.0, exposure_jitter=0.05, texture_seed=22),
    Look(name="cityscapes", materials=_materials(2), ambient=0.82, sun=0.26, shadow=0.45, shadow_blur=1.6,
        shadow_reach=0.06, occlusion=0.3, haze=(206, 184, 156), haze_metres=85.0, sky_top=(190, 166, 140),
        sky_low=(228, 202, 164), cloud=(240, 222, 190), cloud_share=0.25, glass=(62, 70, 72), glass_sky=0.4,
        saturation=0.75, contrast=0.95, gain=(1.08, 1.0, 0.86), texel=1, roughness=1.3, sharpen=0.0,
        blur=0.7, noise=0.022, vignette=0.1, exposure_jitter=0.25, texture_seed=33),
)
LOOKS: dict[str, Look] = {look.name: look for look in _ALL}


def _noise(rng: np.random.Generator, exponent: float) -> np.ndarray:
    """Tileable noise (SIDE, SIDE) with mean 0 and deviation 1 and a 1 / frequency^exponent amplitude spectrum."""
    freq = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :])
    freq[0, 0] = 1.0
    wave = np.fft.rfft2(rng.standard_normal((SIDE, SIDE))) / freq**exponent
    wave[0, 0] = 0.0
    plane = np.fft.irfft2(wave, s=(SIDE, SIDE))
    return plane / plane.std()


def _cells(rng: np.random.Generator, rows: int, columns: int, bond: bool, joint: float) -> np.ndarray:
    """A tile of slabs or bricks (SIDE, SIDE): one random tone per cell, dark joints, every other row shifted."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    row = (y * rows).astype(int)
    across = x * columns + (0.5 * (row % 2) if bond else 0.0)
    column = np.floor(across).astype(int) % columns
    tone = rng.uniform(-0.7, 0.7, (rows, columns))[row, column]
    edge = np.minimum(y * rows - row, (across - np.floor(across)) * rows / columns)
    return np.where(edge < joint, -1.4, tone)


def _pattern(name: str, look: Look, rng: np.random.Generator) -> np.ndarray:
    """One texture tile (SIDE, SIDE), roughly in -1..1 with mean near 0."""
    rough = look.roughness
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    if name == "asphalt":
        return 0.42 * _noise(rng, 0.35 * rough) + 0.35 * _noise(rng, 1.1 + 0.4 * rough)
    if name == "slabs":
        return 0.6 * _cells(rng, 8, 8, False, 0.07) + 0.3 * _noise(rng, 0.7 * rough)
    if name == "brick":
        return 0.65 * _cells(rng, 24, 12, True, 0.14) + 0.25 * _noise(rng, rough)
    if name == "plaster":
        return 0.5 * _noise(rng, 1.5) + 0.15 * _noise(rng, 0.4)
    if name == "leaf":
        return np.tanh(0.9 * _noise(rng, 0.75 + 0.3 * rough) + 0.3 * _noise(rng, 1.6))
    if name == "grass":
        return 0.42 * _noise(rng, 0.3 + 0.3 * rough) + 0.3 * _noise(rng, 1.7)
    if name == "bars":
        return np.where((x * 12) % 1.0 < 0.4, 0.9, -0.8) + np.where((y * 3) % 1.0 < 0.08, 0.5, 0.0)
    if name == "boards":
        return 0.35 * np.where((y * 12) % 1.0 < 0.12, -2.0, 0.3) + 0.25 * _noise(rng, 1.3)
    if name == "sheen":  # soft slanted reflections on glass and paint
        return 0.6 * np.sin(2 * np.pi * y) + 0.4 * np.sin(2 * np.pi * (x + 2 * y)) + 0.1 * _noise(rng, 1.8)
    if name == "cloud":
        return 0.55 * _noise(rng, 1.55)
    return np.zeros((SIDE, SIDE))


@lru_cache(maxsize=8)
def _textures(name: str) -> np.ndarray:
    """All texture tiles of a look, blurred for each level of detail: flat uint8, 128 is neutral.

    The order is (texture, level, v, u); level n suits a footprint of 2^n texels per pixel.
    """
    look = LOOKS[name]
    rng = np.random.default_rng([look.texture_seed, SIDE])
    stack = np.empty((len(TEXTURES), LEVELS, SIDE, SIDE), np.uint8)
    for number, texture in enumerate(TEXTURES):
        tile = _pattern(texture, look, rng)
        if look.texel > 1 and texture in ("asphalt", "leaf", "grass", "plaster"):
            blocks = SIDE // look.texel
            tile = tile.reshape(blocks, look.texel, blocks, look.texel).mean(axis=(1, 3))
            tile = 1.3 * tile.repeat(look.texel, 0).repeat(look.texel, 1)
        for level in range(LEVELS):
            blurred = gaussian_filter(tile, 0.4 * 2**level, mode="wrap") if level else tile
            stack[number, level] = np.clip(128 + 127 * blurred, 0, 255)
    return stack.ravel()


def _texture_at(name: str, texture: np.ndarray | int, level: np.ndarray | int, v: np.ndarray,
                u: np.ndarray) -> np.ndarray:
    """Texture values in -1..1 at texel coordinates v and u (any range, they wrap)."""
    level = np.clip(level, 0, LEVELS - 1).astype(np.int32)
    place = (np.asarray(texture, np.int32) * LEVELS + level) * SIDE + (v.astype(np.int32) & (SIDE - 1))
    place = place * SIDE + (u.astype(np.int32) & (SIDE - 1))
    return _textures(name).take(place).astype(np.float32) * np.float32(1 / 127) - np.float32(128 / 127)


def _windows(planes: list[np.ndarray], where: np.ndarray, facade: np.ndarray, u: np.ndarray, v: np.ndarray,
             cell_px: np.ndarray, look: Look) -> None:
    """Paint window grids onto the pixels `where` of the three colour planes (flat arrays), in place."""
    cell_u, cell_v = (u - facade[:, OFFSET]) / facade[:, CELL_W], (v - facade[:, SHOP]) / facade[:, CELL_H]
    number_u, number_v = np.floor(cell_u), np.floor(cell_v)
    off_u, off_v = np.abs(cell_u - number_u - 0.5), np.abs(cell_v - number_v - 0.52)
    shop = v < facade[:, SHOP]
    half_w = np.where(shop, 0.44, facade[:, WIN_W] * 0.5)
    off_v = np.where(shop, np.abs(v / facade[:, SHOP] - 0.46), off_v)
    half_h = np.where(shop, 0.34, facade[:, WIN_H] * 0.5)
    room = np.where(shop, facade[:, SHOP] > 2, v < facade[:, TOP] - 0.3)
    glass = (off_u < half_w) & (off_v < half_h) & room
    frame = (off_u < half_w + 0.05) & (off_v < half_h + 0.05) & room & ~glass
    lottery = np.random.default_rng(look.texture_seed).random(4096).astype(np.float32)
    key = (number_u * 37 + number_v * 101 + facade[:, SEED] * 4096).astype(np.int32) & 4095
    luck = lottery[key]
    # Small, far windows melt into one tone instead of flickering.
    weight = np.clip(cell_px * 0.35 - 0.5, 0.25, 1.0)
    shade = (off_v / np.maximum(half_h, 0.01) * 0.25 + 0.75) * (0.75 + 0.5 * luck)
    mirror = look.glass_sky * np.where(luck > 0.82, 1.6, luck * 0.8)
    frame_gain = 1.0 + 0.22 * weight * frame
    for plane, dark, sky in zip(planes, look.glass, look.sky_low, strict=True):
        pane = (dark / 255.0) * shade * (1 - mirror) + (sky / 255.0) * mirror * 0.8
        wall = plane[where] * frame_gain
        plane[where] = np.where(glass, wall + (pane - wall) * weight, wall)


def _sky(planes: list[np.ndarray], where: np.ndarray, x: np.ndarray, y: np.ndarray, camera: Camera, look: Look,
         drift: float) -> None:
    """Paint gradient and clouds onto the sky pixels `where`, in place; x, y are their pixel coordinates."""
    up = np.maximum(camera.horizon - y, 0.0) / camera.focal
    fade = np.sqrt(np.clip(up / 0.5, 0.0, 1.0))
    spread = 1.0 / (up + 0.3)
    u = ((x - camera.centre) / camera.focal * spread + 9 * drift + 3) * 34
    v = (spread * 1.6 + drift) * 34
    part_u, part_v = u - np.floor(u), v - np.floor(v)
    cloud = 0.0
    for du, dv in ((0, 0), (0, 1), (1, 0), (1, 1)):  # bilinear, because the sky magnifies the texture
        share = np.abs(1 - du - part_u) * np.abs(1 - dv - part_v)
        cloud = cloud + share * _texture_at(look.name, CLOUD, 1, v + dv, u + du)
    cover = np.clip((cloud + 2 * look.cloud_share - 0.75) * 1.7, 0, 1) * np.clip(up * 9, 0.15, 1.0)
    for plane, top, low, white in zip(planes, look.sky_top, look.sky_low, look.cloud, strict=True):
        clear = low + (top - low) * fade
        plane[where] = (clear + (white - clear) * cover * 0.9) / 255.0


def shade(buffer: GBuffer, look: Look, drift: float = 0.0) -> np.ndarray:
    """Light and texture the G-buffer: float32 (h, w, 3), about 0..1, at the supersampled size."""
    camera = buffer.camera
    height, width = buffer.ids.shape
    ids = buffer.ids.ravel()
    columns = np.ascontiguousarray(buffer.rows.T, dtype=np.float32)

    def get(column: int) -> np.ndarray:
        return columns[column].take(ids)

    x = np.tile(np.arange(width, dtype=np.float32) + 0.5, height)
    y = np.repeat(np.arange(height, dtype=np.float32) + 0.5, width)
    depth = 1.0 / np.maximum(get(A) * x + get(B) * y + get(C), np.float32(1 / 700))
    metre = depth * np.float32(1 / camera.focal)  # metres per pixel
    side = (x - np.float32(camera.centre)) * metre
    up = np.float32(camera.above) + (np.float32(camera.horizon) - y) * metre
    ground = get(GROUND)
    u = get(UX) * side + get(UZ) * depth - ground * (np.float32(camera.curve) * depth * depth)
    v = up + ground * (depth - up)
    per_m = get(PER_M)
    slant = 1.0 + ground * np.sqrt(depth * np.float32(1 / camera.above))
    level = np.log2(np.maximum(metre * per_m * slant, 1.0))
    grain = _texture_at(look.name, get(TEX), level, v * per_m, u * per_m)
    light = 1.0 + get(CON) * grain
    foot = np.clip(up * np.float32(1 / 1.6), 0.0, 1.0)
    light *= np.where(ground > 0, 1.0 - np.float32(look.shadow) * buffer.dark.ravel(),
                      1.0 - np.float32(look.occlusion) * (1.0 - foot))
    planes = [get(RED) * light, get(GREEN) * light, get(BLUE) * light]
    number = get(FACADE)
    where = np.flatnonzero(number >= 0)
    if where.size:
        facade = buffer.facades[number[where].astype(np.int32)]
        _windows(planes, where, facade, u[where], v[where], facade[:, CELL_W] / metre[where], look)
    clear = np.exp(depth * np.float32(-1 / look.haze_metres))
    for channel in range(3):
        mist = np.float32(look.haze[channel] / 255.0)
        planes[channel] = mist + (planes[channel] - mist) * clear
    where = np.flatnonzero(ids == 0)
    if where.size:
        _sky(planes, where, x[where], y[where], camera, look, drift)
    return np.stack(planes, axis=-1).reshape(height, width, 3)


def develop(picture: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """What the camera does to the light: float (h, w, 3) in, uint8 (h / SUPER, w / SUPER, 3) out."""
    small = sum(picture[i::SUPER, j::SUPER] for i in range(SUPER) for j in range(SUPER)) / np.float32(SUPER**2)
    height, width = small.shape[:2]
    small *= np.float32(1.0 + look.exposure_jitter * rng.uniform(-1, 1))
    if look.sharpen > 0:
        small += np.float32(look.sharpen) * (small - gaussian_filter(small, (1.0, 1.0, 0)))
    if look.blur > 0:
        soft = look.blur * (width / 256.0) ** 0.5
        small = gaussian_filter(small, (soft, soft, 0))
    grey = (small @ np.array([0.3, 0.59, 0.11], np.float32))[..., None]
    small = grey + (small - grey) * np.float32(look.saturation)
    small = (small - np.float32(0.5)) * np.float32(look.contrast) + np.float32(0.5)
    small *= np.array(look.gain, np.float32)
    if look.vignette > 0:
        y, x = np.ogrid[-1:1:height * 1j, -1:1:width * 1j]
        small *= (1.0 - look.vignette * (x * x + y * y) ** 1.5 / 2.83).astype(np.float32)[..., None]
    if look.noise > 0:
        # Sensor noise: mostly brightness, a little colour, stronger where the picture is dark.
        grain = rng.standard_normal((height, width, 1), np.float32) * np.float32(0.8)
        grain = grain + rng.standard_normal((height, width, 3), np.float32) * np.float32(0.5)
        small += grain * np.float32(look.noise) * (np.float32(1.3) - grey * np.float32(0.6))
    return (np.clip(small, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)

