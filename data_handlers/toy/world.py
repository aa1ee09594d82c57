"""The toy world: a street with everything along it, seen by a camera and drawn far to near.

World axes: x metres right of the camera, y above the ground, z ahead. The canvas is an image of row numbers: each
polygon is one row of the G-buffer (see looks.py), so the picture and the label come from the very same pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from data_handlers.toy import things
from data_handlers.toy.looks import NEAR, SUPER, TEXTURES, Camera, GBuffer, Id, Look, Point, clip_near, develop, shade
from data_handlers.toy.things import ROUND, Colour, Pose

_TRAFFIC = ((things.truck, 8.5), (things.bus, 11.5), (things.car, 4.6))  # and their lengths
FAR = 200.0  # metres: the street ends here, behind it stands a backdrop
STEPS = (NEAR, 3.0, 6.0, 10.0, 15.0, 22.0, 30.0, 40.0, 55.0, 75.0, 100.0, 130.0, 165.0, FAR)
Spot = tuple[float, float]  # x and z on the ground, or metres right of and above a point
Item = tuple[float, float, float, Callable[[], None]]  # near z, far z, x at z = 0, how to draw it


class Canvas:
    """Draws polygons of the 3-D world into an image of row numbers; finish() gives the G-buffer."""

    def __init__(self, camera: Camera, look: Look, sun: Point, rng: np.random.Generator) -> None:
        self.camera, self.look, self.sun, self.rng = camera, look, sun, rng
        self._ids, self._dark = (Image.new(mode, (camera.width, camera.height), 0) for mode in ("I", "L"))
        self._pen, self._dark_pen = ImageDraw.Draw(self._ids), ImageDraw.Draw(self._dark)
        self._rows: list[tuple[float, ...]] = [(0, 0, 1 / 700, 0, 0, 0, 0, 1, 0, 1, 0, 0, -1, Id.SKY)]
        self._facades: list[list[float]] = [[0.0] * 8]

    def colour(self, material: str, jitter: float = 0.06) -> Colour:
        """One of the material's colours, with its brightness jittered."""
        choices = self.look.materials[material].colours
        red, green, blue = choices[int(self.rng.random() * len(choices))]
        gain = (1.0 + jitter * (2 * self.rng.random() - 1)) / 255.0
        return red * gain, green * gain, blue * gain

    def poly(self, points: list[Point], label: int, material: str, colour: Colour | None = None, *, cull: bool = False,
             ground: bool = False, facade: list[float] | None = None, gain: float = 1.0, soft: bool = False) -> None:
        """Draw a flat polygon; cull: only if its corners run counter-clockwise as the camera sees it.

        ground: it takes cast shadows and follows the street's curve. facade: its window grid, columns as toy_looks.py
        has them up to SEED. soft: lit evenly instead of by its direction.
        """
        points = clip_near(points)
        if len(points) < 3:
            return
        cam, look, stuff = self.camera, self.look, self.look.materials[material]
        xy = cam.project(points)
        behind = cull and sum([a[0] * b[1] - b[0] * a[1] for a, b in zip(xy, xy[1:] + xy[:1], strict=True)]) >= 0
        if behind or max(xy)[0] < 0 or min(xy)[0] > cam.width:
            return
        (px, py, pz), q, r = points[0], points[len(points) // 3], points[2 * len(points) // 3]
        ax, ay, az, bx, by, bz = q[0] - px, q[1] - py, q[2] - pz, r[0] - px, r[1] - py, r[2] - pz
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        size = math.copysign(math.hypot(nx, ny, nz) or 1.0, -(nx * px + ny * (py - cam.above) + nz * pz))
        nx, ny, nz = nx / size, ny / size, nz / size  # the normal faces the camera
        away = min(nx * px + ny * (py - cam.above) + nz * pz, -1e-3)
        a, b = nx / (cam.focal * away), -ny / (cam.focal * away)
        flat = math.hypot(nx, nz)
        along = (1.0, 0.0) if flat < 0.3 else (nz / flat, -nx / flat)
        if facade:  # the first window starts at the wall's edge
            self._facades.append([*facade, min(along[0] * p[0] + along[1] * p[2] for p in points)])
        sun = 0.6 if soft else max(0.0, nx * self.sun[0] + ny * self.sun[1] + nz * self.sun[2])
        light = gain * (look.ambient * (1.0 if soft else 0.86 + 0.14 * ny) + look.sun * sun)
        red, green, blue = colour or self.colour(material, 0.0)
        self._rows.append((a, b, nz / away - a * cam.centre - b * cam.horizon, red * light, green * light, blue * light,
                           TEXTURES.index(stuff.texture), 256.0 / stuff.tile, stuff.contrast, *along, float(ground),
                           len(self._facades) - 1 if facade else -1, label))
        self._pen.polygon(xy, fill=len(self._rows) - 1)

    def wall(self, p: Spot, q: Spot, y: Spot, label: int, material: str, colour: Colour | None = None,
             facade: list[float] | None = None, gain: float = 1.0) -> None:
        """Draw an upright rectangle over the ground line from p to q (x, z), between two heights."""
        self.poly([(p[0], y[0], p[1]), (q[0], y[0], q[1]), (q[0], y[1], q[1]), (p[0], y[1], p[1])], label, material,
                  colour, facade=facade, gain=gain)

    def card(self, at: Point, shape: list[Spot], label: int, material: str, colour: Colour | None = None,
             gain: float = 1.0) -> None:
        """Draw a flat shape (metres right of and above `at`) that faces the camera."""
        x, y, z = at
        self.poly([(x + dx, y + dy, z) for dx, dy in shape], label, material, colour, gain=gain, soft=True)

    def disc(self, at: Point, rx: float, ry: float, label: int, material: str, colour: Colour | None = None,
             gain: float = 1.0) -> None:
        """Draw an ellipse that faces the camera."""
        self.card(at, [(rx * c, ry * s) for c, s in ROUND], label, material, colour, gain)

    def limb(self, at: Point, a: Spot, b: Spot, width: float, label: int, material: str, colour: Colour | None = None,
             gain: float = 1.0) -> None:
        """Draw a thick line from a to b (metres right of and above `at`), about a supersampled pixel wide or more."""
        scale = 0.5 * max(width, 1.4 * at[2] / self.camera.focal) / (math.dist(a, b) or 1.0)
        wx, wy = (a[1] - b[1]) * scale, (b[0] - a[0]) * scale
        self.card(at, [(a[0] + wx, a[1] + wy), (b[0] + wx, b[1] + wy), (b[0] - wx, b[1] - wy), (a[0] - wx, a[1] - wy)],
                  label, material, colour, gain)

    def cast(self, plan: list[Spot], height: float, strength: float = 1.0) -> None:
        """Cast the shadow of an upright prism with this ground plan (x, z) and height onto the ground."""
        reach = self.look.shadow_reach * height / (math.hypot(self.sun[0], self.sun[2]) or 1.0)
        moved = [(x - self.sun[0] * reach, z - self.sun[2] * reach) for x, z in plan]
        pairs = list(zip(plan, moved, strict=True))
        sides = [[a, b, d, c] for (a, c), (b, d) in zip(pairs, pairs[1:] + pairs[:1], strict=True)]
        for outline in [plan, moved, *sides]:
            near = clip_near([(x, 0.0, z) for x, z in outline])
            if len(near) > 2:
                self._dark_pen.polygon(self.camera.project(near), fill=min(255, int(255 * strength)))

    def finish(self) -> GBuffer:
        """The G-buffer of everything drawn so far."""
        dark = self._dark.filter(ImageFilter.GaussianBlur(self.look.shadow_blur * self.camera.width / 256.0))
        return GBuffer(self.camera, np.array(self._ids, np.int32), np.array(self._rows, np.float32),
                       np.array(self._facades, np.float32), np.asarray(dark, np.float32) / np.float32(255))


@dataclass(frozen=True)
class Street:
    """The street's cross section, x in metres at z = 0; pairs are left and right."""

    lanes: list[tuple[float, int]]  # middle of the lane, direction (1 away from us, -1 oncoming)
    width: float  # of a lane
    edges: Spot  # kerbs
    parking: tuple[bool, bool]
    verge: Spot  # widths of the grass strips along the kerbs
    walk: Spot  # widths of the sidewalks
    district: str  # "city", "suburb" or "park"
    tram: int  # number of the lane with tram tracks, or -1

    @classmethod
    def random(cls, rng: np.random.Generator) -> Street:
        """Any street, with the camera somewhere in one of the lanes that lead away."""
        width, shift = rng.uniform(3.1, 3.7), rng.uniform(-0.5, 0.5)
        away, oncoming = 1 + int(rng.random() < 0.5), 1 + int(rng.random() < 0.4)
        mine = int(rng.random() * away)
        lanes = [((i - mine) * width + shift, 1 if i >= 0 else -1) for i in range(-oncoming, away)]
        parking = (bool(rng.random() < 0.42), bool(rng.random() < 0.42))
        edges = (lanes[0][0] - width / 2 - 2.2 * parking[0] - 0.3, lanes[-1][0] + width / 2 + 2.2 * parking[1] + 0.3)
        district, green = (*[("city", 0.2)] * 3, *[("suburb", 0.65)] * 2, ("park", 0.8))[int(rng.random() * 6)]
        verge = [rng.uniform(1.0, 3.2) if rng.random() < green else 0.0 for _ in range(2)]
        walk = (rng.uniform(2.2, 6.0), rng.uniform(2.2, 6.0))
        tram = int(rng.random() * len(lanes)) if rng.random() < 0.25 else -1
        return cls(lanes, width, edges, parking, (verge[0], verge[1]), walk, district, tram)

    def line(self, side: int) -> float:
        """Where the sidewalk ends and the plots begin; side -1 left, 1 right."""
        return self.edges[side > 0] + side * (self.verge[side > 0] + self.walk[side > 0])


class Scene:
    """Lays out one street and draws it: the ground first, then everything on it from far to near."""

    def __init__(self, canvas: Canvas, street: Street) -> None:
        self.cv, self.street, self.rng = canvas, street, canvas.rng
        self.items: list[Item] = []

    def at(self, x: float, z: float) -> Spot:
        """World (x, z) of a place `x` metres to the side of the street's own axis."""
        return x + self.cv.camera.curve * z * z, z

    def add(self, x: float, z0: float, z1: float, draw: Callable[[], None]) -> None:
        """Put an item into the drawing order."""
        self.items.append((z0, z1, x, draw))

    def put(self, draw: Callable[..., None], x: float, z: float, *more: float | bool) -> None:
        """Stand one of the flat things of `things` at a place."""
        self.add(x, z, z, lambda: draw(self.cv, (self.at(x, z)[0], 0.0, z), *more))

    def strip(self, x0: float, x1: float, label: int, material: str, y: float = 0.0, z0: float = NEAR, z1: float = FAR,
              colour: Colour | None = None) -> None:
        """A band of ground along the street."""
        steps = [z0, *[z for z in STEPS if z0 < z < z1], z1]
        places = [self.at(x0, z) for z in steps] + [self.at(x1, z) for z in reversed(steps)]
        self.cv.poly([(x, y, z) for x, z in places], label, material, colour, ground=True)

    def ground(self) -> None:
        """Road, kerbs, sidewalks, verges, lane markings, tram tracks, patches."""
        st, rng, cv = self.street, self.rng, self.cv
        base = (Id.WALK, "pavement") if st.district == "city" else (Id.TERRAIN, "grass")
        cv.poly([(-250, 0, NEAR), (250, 0, NEAR), (250, 0, 420), (-250, 0, 420)], *base, ground=True)
        self.strip(*st.edges, Id.ROAD, "asphalt", colour=cv.colour("asphalt", 0.1))
        for _ in range(int(rng.random() * 5)):
            x, z = rng.uniform(*st.edges), rng.uniform(4, 40)
            self.strip(x, min(x + rng.uniform(0.5, 2.5), st.edges[1]), Id.ROAD, "patch", 0, z, z + rng.uniform(1, 12))
        paving = cv.colour("pavement", 0.1)
        for side, edge, verge in zip((-1, 1), st.edges, st.verge, strict=True):
            self.strip(edge, st.line(side), Id.WALK, "pavement", 0.12, colour=paving)
            if verge:
                self.strip(edge, edge + side * verge, Id.TERRAIN, "grass", 0.13)
            self.strip(edge, edge + side * 0.2, Id.WALK, "kerb", 0.12)
            for z0, z1 in pairwise(STEPS):
                cv.wall(self.at(edge, z0), self.at(edge, z1), (0, 0.12), Id.WALK, "kerb", gain=0.85)
        self._markings()
        for x, _ in st.lanes[st.tram:st.tram + 1] if st.tram >= 0 else []:
            for rail in (-0.78, -0.7, 0.7, 0.78):
                self.strip(x + rail, x + rail + 0.07, Id.ROAD, "rail")

    def _markings(self) -> None:
        st, rng = self.street, self.rng
        for (a, way_a), (b, way_b) in pairwise(st.lanes):
            middle, paint = 0.5 * (a + b), "marking" if way_a == way_b else "middle"
            if paint == "middle" and rng.random() < 0.55:  # a double line between the two directions
                self.strip(middle - 0.2, middle - 0.08, Id.ROAD, paint)
                self.strip(middle + 0.08, middle + 0.2, Id.ROAD, paint)
                continue
            for z in np.arange(NEAR - 8 * rng.random(), 110, 8.0):
                self.strip(middle - 0.07, middle + 0.07, Id.ROAD, paint, 0, max(z, NEAR), max(z + 3.5, NEAR + 0.1))
        for park, x in zip(st.parking, (st.lanes[0][0] - st.width / 2, st.lanes[-1][0] + st.width / 2), strict=True):
            if park or rng.random() < 0.5:
                self.strip(x - 0.06, x + 0.06, Id.ROAD, "marking")
        if rng.random() < 0.45:  # a zebra crossing with its stop line
            z = rng.uniform(9, 34)
            for x in np.arange(st.edges[0] + 0.5, st.edges[1] - 0.6, 1.1):
                self.strip(x, x + 0.55, Id.ROAD, "marking", 0, z, z + 3.2)
            self.strip(st.lanes[-1][0] - st.width / 2, st.edges[1], Id.ROAD, "marking", 0, z - 1.7, z - 1.2)
        if rng.random() < 0.4:  # an arrow
            x, z = st.lanes[-1][0], rng.uniform(7, 18)
            self.strip(x - 0.09, x + 0.09, Id.ROAD, "marking", 0, z, z + 3.2)
            head = (self.at(x - 0.35, z + 3.1), self.at(x + 0.35, z + 3.1), self.at(x, z + 5))
            self.cv.poly([(x, 0, z) for x, z in head], Id.ROAD, "marking", ground=True)

    def building(self, side: int, x: float, z0: float, z1: float) -> None:
        """A house whose front runs along the street from z0 to z1, `x` metres from the street's axis."""
        cv, rng, city = self.cv, self.rng, self.street.district == "city"
        floor, shop = rng.uniform(2.8, 3.5), rng.uniform(3.4, 4.2) if rng.random() < (.6 if city else .2) else .7
        top = shop + floor * int(rng.uniform(2, 7) if city else rng.uniform(1, 4)) + 0.5
        material = ("plaster", "plaster", "plaster", "brick", "concrete")[int(rng.random() * 5)]
        colour, trim = cv.colour(material, 0.12), cv.colour("ledge")
        share = (0.92 if rng.random() < 0.15 else rng.uniform(0.35, 0.6), rng.uniform(0.45, 0.62))
        (a, _), (b, _), deep, pane = self.at(x, z0), self.at(x, z1), side * rng.uniform(9, 14), rng.uniform(2.2, 3.4)
        cv.cast([(a, z0), (b, z1), (b + deep, z1), (a + deep, z0)], top)
        if rng.random() < (.3 if city else .7):  # a pitched roof with a chimney
            ridge, over = top + rng.uniform(2, 3.5), a - side * .4
            cv.poly([(a, top, z0), (a + deep, top, z0), (a + deep / 2, ridge, z0)], Id.BUILDING, material, colour)
            cv.poly([(over, top - .2, z0 - .3), (over + b - a, top - .2, z1 + .3), (b + deep / 2, ridge, z1 + .3),
                     (a + deep / 2, ridge, z0 - .3)], Id.BUILDING, "roof", cv.colour("roof", 0.1))
            cv.limb((a + deep * .4, ridge - 1, z0 + 3), (0, 0), (0, 1.8), 0.8, Id.BUILDING, "brick")
        for p, q, blind in (((a, z0), (a + deep, z0), rng.random() < .3), ((a, z0), (b, z1), False)):
            length = math.dist(p, q)
            grid = [length / max(1, round(length / pane)), floor, *share, shop, top, rng.random()]
            cv.wall(p, q, (0, top), Id.BUILDING, material, colour, None if blind else grid)
        p, q = (a - side * 0.12, z0), (b - side * 0.12, z1)
        cv.wall(p, q, (top - 0.35, top), Id.BUILDING, "ledge", trim)
        if shop > 2:
            cv.wall(p, q, (shop - .45, shop), Id.BUILDING, "ledge", cv.colour("awning", .2) if city else trim)
            if rng.random() < 0.5:
                out, look = side * 1.3, (Id.BUILDING, "awning", cv.colour("awning", 0.1))
                cv.poly([(a, 3.1, z0), (b, 3.1, z1), (b - out, 2.5, z1), (a - out, 2.5, z0)], *look)
                cv.wall((a - out, z0), (b - out, z1), (2.25, 2.5), *look)

    def barrier(self, x: float, z0: float, z1: float, label: int, height: float) -> None:
        """A wall with a coping, or a fence with rails, along the street."""
        p, q = self.at(x, z0), self.at(x, z1)
        material = "fence" if label == Id.FENCE else "concrete" if self.rng.random() < 0.3 else "stone"
        self.cv.cast([p, q], height)
        self.cv.wall(p, q, (0, height), label, material, self.cv.colour(material, 0.1))
        for y in (height - 0.02,) if label == Id.WALL else (0.12, height - 0.06):
            self.cv.wall(p, q, (y, y + 0.13), label, "ledge" if label == Id.WALL else "fence")

    def plots(self, side: int) -> None:
        """What stands behind the sidewalk from near to far: houses, walls, fences, hedges, groups of trees."""
        rng, line, district = self.rng, self.street.line(side), self.street.district
        built, z = {"city": 0.9, "suburb": 0.6, "park": 0.16}[district], -6.0 + 5 * self.rng.random()
        while z < 150:
            house, luck, z0 = rng.random() < built, rng.random(), max(z, 0)
            z1 = z + (rng.uniform(9, 22) if house else rng.uniform(10, 26))
            back = 0.0 if district == "city" or not house else rng.uniform(0, 7)
            if house:
                self.add(line + side * back, z0, z1, partial(self.building, side, line + side * back, z, z1))
            for _ in range(0 if house else int((z1 - z) / 4)):
                x, at = line + side * rng.uniform(1.5, 14), rng.uniform(max(z, 2), z1)
                self.put(things.tree, x, at, rng.uniform(5, 11))
            if luck < 0.6 and (back > 3 or not house):
                label, tall = (Id.WALL, rng.uniform(1.0, 2.6)) if luck < 0.31 else (Id.FENCE, rng.uniform(1.0, 2.0))
                self.add(line, z0, z1, partial(self.barrier, line, z, z1, label, tall))
            elif luck < 0.9 and (back > 3 or not house):
                for at in np.arange(max(z, 3), z1, 1.4 + max(z, 3) / 25):
                    self.put(things.bush, line + side * rng.uniform(.7, 1.5), at, rng.uniform(.7, 1.5))
            z = z1 + (rng.uniform(2, 9) if house and rng.random() < 0.3 else 0.0)

    def traffic(self) -> None:
        """Moving vehicles in the lanes, and parked ones along the kerbs."""
        st, rng, crowd = self.street, self.rng, self.rng.uniform(0.2, 0.9)  # crowd: how full the lanes are
        for number, (lane, way) in enumerate(st.lanes):
            z = rng.uniform(9, 26) if abs(lane) < 1.5 else rng.uniform(4, 22)
            if number == st.tram and rng.random() < 0.9:
                self._vehicle(things.tram, 26.0, lane, z + 6, way)
                z += 38
            while z < 110:
                kind, x = rng.random() / crowd, lane + rng.uniform(-0.25, 0.25)
                if kind < 0.8:
                    draw, size = _TRAFFIC[int(kind > .07) + int(kind > .13)]
                    self._vehicle(draw, size, x, z, way)
                    z += size
                elif kind < 0.95:
                    self.put(things.cycle, x + .5, z, True, kind > .87)
                z += rng.uniform(5, 16)
        for side, edge, parking in zip((-1, 1), st.edges, st.parking, strict=True):
            z = rng.uniform(2, 9)
            while parking and z < 85:
                kind = rng.random()
                if kind < 0.74:
                    self._vehicle(things.car, 4.6, edge - side * 1.15, z, side if rng.random() < .9 else -side)
                for k in range(2 if kind > 0.88 else 0):
                    self.put(things.cycle, edge - side * .9, z + 1 + 1.5 * k, False, True)
                z += rng.uniform(5.6, 7.2)

    def _vehicle(self, draw: Callable[[Canvas, Pose], None], length: float, x: float, z: float, way: int) -> None:
        slope = math.atan(2 * self.cv.camera.curve * (z + length / 2))
        pose = Pose(*self.at(x, z), slope) if way > 0 else Pose(*self.at(x, z + length), slope + math.pi)
        self.add(x, z, z + length, lambda: draw(self.cv, pose))

    def sidewalks(self) -> None:
        """People, parked cycles, lamps, signs, traffic lights, trees and bins along both sidewalks."""
        st, rng, put = self.street, self.rng, self.put
        avenue, lamp, light = rng.random() < 0.4, rng.uniform(6, 22), rng.uniform(8, 32)
        for side, kerb, verge in zip((-1, 1), st.edges, st.verge, strict=True):
            line = st.line(side)
            for _ in range(int(rng.exponential(4.0))):
                x, z = kerb + side * rng.uniform(.6, abs(line - kerb) - .4), rng.uniform(5, 48)
                for k in range(1 + int(rng.random() < 0.35)):
                    put(things.person, x + .55 * k, z + .2 * k)
            for z in np.arange(lamp + 3 * side, 100, 26.0):
                put(things.lamp_post, kerb + side * .5, z, -side)
            for _ in range(int(rng.random() * 3.2)):
                put(things.sign, kerb + side * rng.uniform(.4, .9), rng.uniform(6, 45))
            if light < 22:
                put(things.traffic_light, kerb + side * .45, light, -side)
            for z in np.arange(rng.uniform(4, 12), 110 if avenue or verge else 0, rng.uniform(8, 17)):
                put(things.tree, kerb + side * max(.9, verge * .5), z + rng.uniform(-1, 1), rng.uniform(4.5, 8.5))
            z = rng.uniform(5, 22)
            for k in range(2 + int(rng.random() * 3) if rng.random() < 0.3 else 0):
                put(things.cycle, line - side * .7, z + 1.1 * k, False, False)
            if rng.random() < 0.25:
                put(things.bin_or_box, line - side * .6, rng.uniform(6, 25))
            if rng.random() < 0.16:
                self.add(kerb, z, z + 18, partial(self.barrier, kerb + side * .3, z, z + 18, Id.FENCE, 1.0))
        for _ in range(int(rng.exponential(0.9))):
            put(things.person, rng.uniform(*st.edges), rng.uniform(12, 40))
        for _ in range(int(rng.random() * 2.4)):
            put(things.cycle, st.edges[1] - rng.uniform(.6, 1.2) - 2.2 * st.parking[1], rng.uniform(8, 28), True, False)

    def backdrop(self) -> None:
        """Far houses and trees that close the view."""
        rng, city = self.rng, self.street.district == "city"
        for x in np.arange(-190, 190, 12.0):
            wide, tall, z = rng.uniform(9, 24), rng.uniform(8, 30), rng.uniform(215, 240)
            if rng.random() < (.75 if city else .3):
                self.cv.wall((x, z), (x + wide, z), (0, tall), Id.BUILDING, "concrete", self.cv.colour("plaster", .15),
                             [3.0, 3.2, .5, .5, 1.0, tall, rng.random()])
            else:
                tone = self.cv.colour("leaf", .1)
                for _ in range(3):
                    at = (x + rng.uniform(0, wide), rng.uniform(2, 5), 232.0)
                    things.blob(self.cv, at, wide * .4, rng.uniform(4, 9), tone, rng.uniform(.7, 1.0))

    def draw(self) -> None:
        """Lay everything out and draw it."""
        left, right = partial(self.plots, -1), partial(self.plots, 1)
        for part in (self.backdrop, self.ground, left, right, self.traffic, self.sidewalks):
            part()
        for index in _far_to_near(self.items, self.cv.camera.curve):
            self.items[index][3]()


def _far_to_near(items: list[Item], curve: float) -> list[int]:
    """Painter's order: further away first; where two items stand side by side, the one further to the side first."""
    z0, z1, x = (np.array([item[k] for item in items]) for k in range(3))
    ends, behind = abs(x + curve * np.stack([z0, z1]) ** 2), z0[:, None] >= z1
    # A nearer item that is further to the side than a far one can never hide it: such pairs need no order.
    hides = behind & ~behind.T & (ends.max(axis=0)[:, None] + 0.5 > ends.min(axis=0))
    shift = curve * (0.5 * (np.maximum(z0[:, None], z0) + np.minimum(z1[:, None], z1))) ** 2
    before = np.where(behind | behind.T, hides, abs(x[:, None] + shift) > abs(x + shift))
    waits, order = before.sum(axis=0).astype(float), []
    for _ in items:  # of the items that nothing waits for (or, in a cycle, the fewest) take the farthest
        order.append(int(np.argmin(waits * 1e4 - z1)))
        waits -= before[order[-1]]
        waits[order[-1]] = np.inf
    return order


def draw_scene(rng: np.random.Generator, size: tuple[int, int], look: Look) -> tuple[np.ndarray, np.ndarray]:
    """Draw a random street, size (W,H): the picture, uint8 (H,W,3), and its trainIds, uint8 (H,W), 255 for none."""
    width, height = size[0] * SUPER, size[1] * SUPER
    camera = Camera(width, height, width * rng.uniform(0.72, 0.95), width * rng.uniform(0.42, 0.58),
                    height * rng.uniform(0.4, 0.52), rng.uniform(1.3, 2.2), rng.uniform(-6e-4, 6e-4))
    turn, rise = rng.uniform(0, 2 * math.pi), rng.uniform(0.55, 1.0)
    sun = (math.cos(turn) * math.cos(rise), math.sin(rise), math.sin(turn) * math.cos(rise))
    canvas = Canvas(camera, look, sun, rng)
    Scene(canvas, Street.random(rng)).draw()
    buffer = canvas.finish()
    picture = develop(shade(buffer, look, rng.random()), look, rng)
    return picture, buffer.labels()
