"""The things that stand and move in the toy world: vehicles, people, cycles, poles, signs, lights, trees.

Vehicles are 3-D models; people, cycles, furniture and trees are flat shapes that face the camera. Each function
draws onto a Canvas (see toy_world.py) with the class of the thing as label, and takes all its variety from the
canvas's random generator. Lengths are metres; y is up from the ground, z ahead of the camera.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_handlers.toy.looks import Id, Point

if TYPE_CHECKING:  # toy_world imports this module
    from data_handlers.toy.world import Canvas

Colour = tuple[float, float, float]
Span = tuple[float, float]
ROUND = [(math.cos(a * math.pi / 8), math.sin(a * math.pi / 8)) for a in range(16)]
_CIRCLES = {n: np.stack([np.cos(a), np.sin(a)]) for n in (1, 3) for a in [np.arange(16 * n) * math.pi / (8 * n)]}


@dataclass(frozen=True)
class Pose:
    """Where a vehicle stands: the middle of its tail on the ground, and its heading (0 drives away from us)."""

    x: float
    z: float
    yaw: float = 0.0

    def at(self, right: float, up: float, ahead: float) -> Point:
        """World position of a point given in the model's own axes."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return self.x + right * c + ahead * s, up, self.z - right * s + ahead * c


def _end(cv: Canvas, pose: Pose, ahead: float, sign: int, x: Span, y: Span, label: int, material: str,
         colour: Colour | None = None) -> None:
    """A rectangle on a model's tail (sign 1) or nose (sign -1)."""
    (a, b), (y0, y1) = x, y
    cv.poly([pose.at(sign * a, y0, ahead), pose.at(sign * b, y0, ahead), pose.at(sign * b, y1, ahead),
             pose.at(sign * a, y1, ahead)], label, material, colour, cull=True)


def _flank(cv: Canvas, pose: Pose, half: float, y: Span, z: Span, label: int, material: str,
           colour: Colour | None = None) -> None:
    """A rectangle on a model's left and right side; the one that faces the camera shows."""
    for sign in (-1, 1):
        a, b = z[::sign]
        cv.poly([pose.at(sign * half, y[0], a), pose.at(sign * half, y[0], b), pose.at(sign * half, y[1], b),
                 pose.at(sign * half, y[1], a)], label, material, colour, cull=True)


def _box(cv: Canvas, pose: Pose, label: int, material: str, colour: Colour | None, half: float, y: Span,
         z: Span) -> None:
    """An upright box in the model's axes; only its visible faces are drawn."""
    _end(cv, pose, z[1], -1, (-half, half), y, label, material, colour)
    cv.poly([pose.at(-half, y[1], z[0]), pose.at(half, y[1], z[0]), pose.at(half, y[1], z[1]),
             pose.at(-half, y[1], z[1])], label, material, colour, cull=True)
    _flank(cv, pose, half, y, z, label, material, colour)
    _end(cv, pose, z[0], 1, (-half, half), y, label, material, colour)


def _wheels(cv: Canvas, pose: Pose, label: int, half: float, axles: tuple[float, ...], radius: float) -> None:
    """Wheels with dark arches on the side that faces the camera, and tyres seen under the tail and nose."""
    for sign in (-1, 1):
        for ahead in axles:
            for grow, material, out in ((1.22, "trim", 0.0), (1.0, "tyre", 0.01), (0.6, "rim", 0.015)):
                ring = [pose.at(sign * (half + out), radius + radius * grow * s, ahead + sign * radius * grow * c)
                        for c, s in (ROUND[:9] if grow > 1 else ROUND)]
                cv.poly(ring, label, material, cull=True, gain=0.85)


def _undercarriage(cv: Canvas, pose: Pose, label: int, half: float, length: float, low: float) -> None:
    """The shadow on the ground, and what is seen beneath the body: tyres and darkness."""
    cv.cast([pose.at(sx * half * 1.04, 0, sz)[::2] for sx, sz in
             ((-1, -.1), (1, -.1), (1, length + .1), (-1, length + .1))], 1.2)
    for ahead, sign in ((length - .4, -1), (.35, 1)):
        _end(cv, pose, ahead, sign, (-.9 * half, .9 * half), (low * .45, low + .1), label, "trim")
        for x in (-.92, .66):
            _end(cv, pose, ahead - sign * .1, sign, (x * half, (x + .26) * half), (0, low + .1), label, "tyre")


# Side profiles, tail to nose: (share of the length, height, share of the width, is the face up to the next glass).
_SEDAN = ((0, .3, 1, 0), (0, .74, 1, 0), (.03, .96, .97, 0), (.15, 1.0, .93, 1), (.3, 1.42, .76, 0),
          (.56, 1.44, .76, 1), (.74, .98, .93, 0), (.97, .8, .95, 0), (1, .58, 1, 0), (1, .3, 1, 0))
_HATCH = ((0, .3, 1, 0), (0, .8, 1, 0), (.03, 1.0, .95, 1), (.12, 1.46, .78, 0), (.54, 1.52, .78, 1),
          (.74, 1.02, .93, 0), (.97, .84, .95, 0), (1, .6, 1, 0), (1, .3, 1, 0))
_SUV = ((0, .38, 1, 0), (0, .95, 1, 0), (.03, 1.14, .96, 1), (.09, 1.68, .82, 0), (.58, 1.72, .82, 1),
        (.74, 1.14, .95, 0), (.97, 1.0, .96, 0), (1, .7, 1, 0), (1, .38, 1, 0))
_VAN = ((0, .35, 1, 0), (0, 1.1, 1, 1), (.02, 1.85, .94, 0), (.72, 1.95, .94, 1), (.87, 1.15, .96, 0),
        (.98, .98, .97, 0), (1, .65, 1, 0), (1, .35, 1, 0))
# Profile, length, half width, height of the belt line.
_CARS = ((_SEDAN, 4.5, 0.88, 1.0), (_HATCH, 4.0, 0.86, 1.02), (_SUV, 4.6, 0.93, 1.14), (_VAN, 5.0, 0.96, 1.15))


def car(cv: Canvas, pose: Pose) -> None:
    """A car: sedan, hatchback, off-roader or van, about 4 to 5 m long."""
    profile, length, half, belt = _CARS[int(cv.rng.random() * 3.4)]
    paint = cv.colour("paintwork", 0.12)
    spots = [(share * length, y, wide * half) for share, y, wide, _ in profile]
    low = profile[0][1]
    _undercarriage(cv, pose, Id.CAR, half, length, low)
    faces = list(zip(spots, spots[1:], [row[3] for row in profile], strict=False))
    for (z0, y0, w0), (z1, y1, w1), glass in faces if math.cos(pose.yaw) < 0 else faces[::-1]:
        for a, b, wide, stuff, tone in ((0, 1, 1, "paintwork", paint), (.12, .9, .86, "window", None))[:1 + glass]:
            ya, za, yb, zb = y0 + a * (y1 - y0), z0 + a * (z1 - z0), y0 + b * (y1 - y0), z0 + b * (z1 - z0)
            cv.poly([pose.at(-wide * w0, ya, za), pose.at(wide * w0, ya, za), pose.at(wide * w1, yb, zb),
                     pose.at(-wide * w1, yb, zb)], Id.CAR, stuff, tone, cull=True)
    for ahead, sign, lamp in ((-.01, 1, "tail"), (length + .01, -1, "head")):
        _end(cv, pose, ahead, sign, (-half, half), (low - .1, low + .1), Id.CAR, "trim")
        if sign < 0:
            _end(cv, pose, ahead, sign, (-.55 * half, .55 * half), (low + .12, low + .26), Id.CAR, "trim")
        for side in (-.96, .64):
            _end(cv, pose, ahead, sign, (side * half, (side + .32) * half), (low + .28, low + .42), Id.CAR, lamp)
        _end(cv, pose, ahead, sign, (-.26, .26), (low + .12, low + .24), Id.CAR, "plate")
    for sign in (-1, 1):
        _car_side(cv, pose, sign, spots, belt, paint)
    _wheels(cv, pose, Id.CAR, half, (0.19 * length, 0.81 * length), 0.33)


def _car_side(cv: Canvas, pose: Pose, sign: int, spots: list[Point], belt: float, paint: Colour) -> None:
    """One flank: lower body, roof posts and two side windows."""
    low = [spot for spot in spots if spot[1] <= belt + 0.15]
    high = [spot for spot in spots if spot[1] >= belt - 0.04]
    for part, gain in ((spots, 0.95), (low, 0.95), (high, 1.0)):  # the first fills the gap at the belt line
        ring = [pose.at(sign * w, y, z) for z, y, w in part]
        cv.poly(ring[::-1] if sign > 0 else ring, Id.CAR, "paintwork", paint, cull=True, gain=gain)
    top = max(y for _, y, _ in high)
    roof = [z for z, y, _ in high if y > top - 0.12]
    rear, front, middle = min(high)[0], max(high)[0], 0.5 * (min(roof) + max(roof)) + 0.1
    w0, w1 = 0.96 * max(w for _, _, w in high), 1.02 * min(w for _, _, w in high)
    y0, y1 = belt + 0.05, top - 0.08
    for a0, a1, b0, b1 in ((rear + .3, middle - .05, min(roof) + .12, middle - .05),
                           (middle + .05, front - .3, middle + .05, max(roof) - .02)):
        pane = [pose.at(sign * w0, y0, a0), pose.at(sign * w0, y0, a1), pose.at(sign * w1, y1, b1),
                pose.at(sign * w1, y1, b0)]
        cv.poly(pane if sign > 0 else pane[::-1], Id.CAR, "window", cull=True)


def bus(cv: Canvas, pose: Pose) -> None:
    """A city bus, 11.5 m long."""
    paint, length, half = cv.colour("bus", 0.1), 11.5, 1.25
    _undercarriage(cv, pose, Id.BUS, half, length, 0.4)
    _box(cv, pose, Id.BUS, "bus", paint, half, (.35, 3.05), (0, length))
    _flank(cv, pose, half + .01, (.4, .62), (.1, length - .1), Id.BUS, "trim")
    for i in range(7):
        _flank(cv, pose, half + .01, (1.35, 2.5), (.35 + 1.55 * i, 1.75 + 1.55 * i), Id.BUS, "window")
    for z in (4.2, 9.9):
        _flank(cv, pose, half + .012, (.5, 2.5), (z, z + 1.15), Id.BUS, "window")
    _wheels(cv, pose, Id.BUS, half + .015, (2.6, 8.8), 0.48)
    _end(cv, pose, -.01, 1, (-1.05, 1.05), (1.65, 2.6), Id.BUS, "window")
    _end(cv, pose, -.01, 1, (-.8, .8), (.75, 1.25), Id.BUS, "trim")
    _end(cv, pose, length + .01, -1, (-1.15, 1.15), (1.1, 2.55), Id.BUS, "window")
    _end(cv, pose, length + .01, -1, (-.8, .8), (2.66, 2.95), Id.BUS, "trim")
    _end(cv, pose, length + .02, -1, (-.5, .5), (2.72, 2.9), Id.BUS, "lit_amber")
    for x in (-1.18, .88):
        _end(cv, pose, -.01, 1, (x, x + .3), (.75, 1.2), Id.BUS, "tail")
        _end(cv, pose, length + .01, -1, (x, x + .3), (.6, .8), Id.BUS, "head")


def truck(cv: Canvas, pose: Pose) -> None:
    """A box truck, 8.5 m long: cargo box, chassis and cab."""
    paint, cargo, half = cv.colour("paintwork", 0.1), cv.colour("cargo", 0.1), 1.25
    _undercarriage(cv, pose, Id.TRUCK, half, 8.5, 0.6)
    parts = [(0.0, 6.3), (6.6, 8.5)]
    for z in parts if math.cos(pose.yaw) < 0 else parts[::-1]:
        if z[0] > 0:
            _box(cv, pose, Id.TRUCK, "paintwork", paint, 1.18, (.5, 2.75), z)
            _flank(cv, pose, 1.19, (1.55, 2.45), (7.3, 8.3), Id.TRUCK, "window")
            _end(cv, pose, 8.51, -1, (-1.05, 1.05), (1.55, 2.5), Id.TRUCK, "window")
            _end(cv, pose, 8.51, -1, (-.75, .75), (.8, 1.3), Id.TRUCK, "trim")
            for x in (-1.1, .75):
                _end(cv, pose, 8.51, -1, (x, x + .35), (.65, .85), Id.TRUCK, "head")
        else:
            _box(cv, pose, Id.TRUCK, "trim", None, 1.0, (.5, 1.0), z)
            _box(cv, pose, Id.TRUCK, "cargo", cargo, half, (1.0, 3.5), z)
            _end(cv, pose, -.01, 1, (-.03, .03), (1.05, 3.4), Id.TRUCK, "trim")
            _end(cv, pose, -.01, 1, (-1.2, 1.2), (.55, .78), Id.TRUCK, "trim")
            for x in (-1.1, .8):
                _end(cv, pose, -.02, 1, (x, x + .3), (.6, .75), Id.TRUCK, "tail")
    _wheels(cv, pose, Id.TRUCK, half - .05, (1.3, 2.4, 7.5), 0.5)


def tram(cv: Canvas, pose: Pose) -> None:
    """A tram of three cars, 26 m long (class train)."""
    paint, half = cv.colour("tram", 0.08), 1.25
    pale = (0.86 * cv.look.ambient + 0.1,) * 3
    _undercarriage(cv, pose, Id.TRAIN, half, 26.0, 0.3)
    cars = [(0.0, 8.4), (8.8, 17.2), (17.6, 26.0)]
    for z0, z1 in cars if math.cos(pose.yaw) < 0 else cars[::-1]:
        _box(cv, pose, Id.TRAIN, "trim", None, 1.0, (.4, 3.1), (z0 - .4, z1 + .4))
        _box(cv, pose, Id.TRAIN, "tram", paint, half, (.28, 3.35), (z0, z1))
        _flank(cv, pose, half + .01, (2.75, 3.35), (z0, z1), Id.TRAIN, "tram", pale)
        for i in range(4):
            _flank(cv, pose, half + .01, (1.4, 2.65), (z0 + .4 + 1.98 * i, z0 + 2.1 + 1.98 * i), Id.TRAIN, "window")
        _flank(cv, pose, half + .012, (.45, 2.65), (z0 + 3.4, z0 + 4.9), Id.TRAIN, "window")
        _box(cv, pose, Id.TRAIN, "trim", None, .7, (3.35, 3.65), (z0 + 2, z1 - 2))
    for ahead, sign, lamp in ((-.01, 1, "tail"), (26.01, -1, "head")):
        _end(cv, pose, ahead, sign, (-1.08, 1.08), (1.35, 2.7), Id.TRAIN, "window")
        _end(cv, pose, ahead, sign, (-.6, .6), (2.84, 3.2), Id.TRAIN, "trim")
        _end(cv, pose, ahead - sign * .01, sign, (-.4, .4), (2.92, 3.12), Id.TRAIN, "lit_amber")
        for x in (-1.05, .75):
            _end(cv, pose, ahead, sign, (x, x + .3), (.75, .95), Id.TRAIN, lamp)


def person(cv: Canvas, at: Point, label: int = Id.PERSON) -> None:
    """A person walking or standing, 1.5 to 1.9 m tall."""
    r = cv.rng.random(6)
    h, turn = 1.5 + 0.4 * r[0], 0.5 + 0.5 * r[1]
    step = (0.03 + 0.2 * r[2]) * (1 if r[3] < .5 else -1)
    skin, cloth, trousers = cv.colour("skin"), cv.colour("cloth", 0.2), cv.colour("trousers", 0.2)
    cv.cast([(at[0] + dx, at[2] + dz) for dx, dz in ((-.2, -.12), (.2, -.12), (.2, .12), (-.2, .12))], h, 0.8)
    x = 0.24 * turn
    cv.limb(at, (-.3 * x, .5 * h), (-step * .9, .04 * h), .16, label, "trousers", trousers, 0.85)
    cv.limb(at, (-step * .9 - .02, .02 * h), (-step * .9 + .16 * step / .2, .02 * h), .09, label, "tyre")
    cv.limb(at, (.3 * x, .5 * h), (step, .04 * h), .17, label, "trousers", trousers)
    cv.limb(at, (step - .02, .02 * h), (step + .16 * step / .2, .02 * h), .09, label, "tyre")
    cv.limb(at, (-x, .78 * h), (-x - .06 - step * .6, .48 * h), .11, label, "cloth", cloth, 0.8)
    long = .34 if r[4] < .25 else .46  # a coat or skirt reaches lower
    cv.card(at, [(-.8 * x, .83 * h), (.8 * x, .83 * h), (1.02 * x, .78 * h), (.8 * x, long * h), (-.8 * x, long * h),
                 (-1.02 * x, .78 * h)], label, "cloth", cloth)
    cv.limb(at, (x, .78 * h), (x + .05 + step * .6, .48 * h), .11, label, "cloth", cloth, 0.9)
    cv.disc((at[0] + x + .05 + step * .6, .46 * h, at[2]), .05, .06, label, "skin", skin)
    if r[5] < .3:
        cv.card((at[0] - x - .1, .3 * h, at[2]), [(-.12, 0), (.12, 0), (.1, .3), (-.1, .3)], label, "cloth")
    cv.disc((at[0], .86 * h, at[2]), .05, .08, label, "skin", skin, 0.85)
    cv.disc((at[0], .94 * h, at[2]), .095, .125, label, "hair")
    cv.disc((at[0] + .035 * (1 if step > 0 else -1), .925 * h, at[2]), .07, .1, label, "skin", skin)


def _rider(cv: Canvas, at: Point, lean: float, hip: Span, hand: Span, foot: Span) -> None:
    """A person on a cycle: legs, torso, arms and helmet, from hip to hand and foot (metres from `at`)."""
    cloth, trousers = cv.colour("cloth", 0.2), cv.colour("trousers", 0.2)
    neck = (hip[0] + .42 * lean, hip[1] + .52)
    knee = (hip[0] + .4 * lean, hip[1] - .22)
    wide = .22 + .16 * (1 - abs(lean))
    for shift in (-.1, .1):
        dx = shift * (1 - abs(lean))
        cv.limb(at, (hip[0] + dx, hip[1]), (knee[0] + 1.6 * dx, knee[1]), .17, Id.RIDER, "trousers", trousers)
        cv.limb(at, (knee[0] + 1.6 * dx, knee[1]), (foot[0] + dx, foot[1]), .13, Id.RIDER, "trousers", trousers, .85)
    cv.limb(at, hip, neck, wide, Id.RIDER, "cloth", cloth)
    for side in (-1, 1):
        dx = side * .5 * wide * (1 - .6 * abs(lean))
        cv.limb(at, (neck[0] + dx, neck[1] - .05), (hand[0] + 1.3 * dx, hand[1]), .1, Id.RIDER, "cloth", cloth, .85)
    x, y, z = at
    cv.disc((x + neck[0] + .06 * lean, y + neck[1] + .15, z), .09, .12, Id.RIDER, "skin")
    hat = "helmet" if cv.rng.random() < .7 else "hair"
    cv.disc((x + neck[0] + .05 * lean, y + neck[1] + .21, z), .115, .1, Id.RIDER, hat)


def cycle(cv: Canvas, at: Point, ridden: bool, motor: bool) -> None:
    """A bicycle or motorcycle seen at an angle, parked or with a rider."""
    label, colour = (Id.MOTORCYCLE, cv.colour("paintwork", .1)) if motor else (Id.BICYCLE, cv.colour("frame", .1))
    turn = (.22 + .3 * cv.rng.random()) if ridden and cv.rng.random() < .6 else (.6 + .4 * cv.rng.random())
    s = turn * (1 if cv.rng.random() < .5 else -1)
    x, y, z = at
    radius, reach = (.33, .68) if motor else (.35, .53)
    cv.cast([(x - reach * s - .1, z - .15), (x + reach * s + .1, z - .15), (x + reach * s + .1, z + .15),
             (x - reach * s - .1, z + .15)], 1.0, .7)
    for end in (-reach, reach):
        wide = max(radius * abs(s), .09 if motor else .05)
        cv.disc((x + end * s, y + radius, z), wide, radius, label, "tyre")
        cv.disc((x + end * s, y + radius, z), wide * .8, radius * (.6 if motor else .84), label,
                "rim" if motor else "spokes")
    if motor:
        cv.card(at, [(-.5 * s, .35), (.4 * s, .3), (.5 * s, .75), (.2 * s, .92), (-.1 * s, .78), (-.8 * s, .85),
                     (-.75 * s, .66)], label, "trim")
        cv.limb(at, (-.1 * s, .78), (.42 * s, .86), .26, label, "paintwork", colour)
        cv.limb(at, (-.75 * s, .8), (-.4 * s, .72), .2, label, "paintwork", colour, .9)
        cv.limb(at, (reach * s, radius), (.4 * s, 1.05), .09, label, "pole")
        cv.limb(at, (.4 * s - .3 * (1 - turn), 1.08), (.4 * s + .3 * (1 - turn), 1.1), .07, label, "trim")
        cv.disc((x + .55 * s, y + .92, z), .1, .1, label, "head" if cv.rng.random() < .5 else "tail")
        cv.card(at, [(-.24, .32), (.24, .32), (.2, .62), (-.2, .62)], label, "trim")
    else:
        hub, crank, head, seat = (-reach * s, radius), (-.08 * s, .3), (.36 * s, .88), (-.2 * s, .92)
        fork = (reach * s, radius)
        for a, b in ((hub, crank), (crank, head), (seat, head), (crank, seat), (hub, seat), (head, fork)):
            cv.limb(at, a, b, .05, label, "frame", colour)
        cv.limb(at, (-.32 * s - .04, .98), (-.1 * s + .04, .98), .07, label, "trim")
        cv.limb(at, (.3 * s - .26 * (1 - turn), 1.04), (.4 * s + .26 * (1 - turn), 1.04), .05, label, "trim")
    if ridden:
        lean = .75 * s / max(abs(s), .3) * turn
        _rider(cv, at, lean, (-.2 * s, .9 if motor else 1.0), (.36 * s, 1.06), (.08 * s, .35))


def _post(cv: Canvas, at: Point, height: float, width: float) -> None:
    """A round upright post: a light and a dark strip."""
    colour = cv.colour("pole", .1)
    cv.cast([(at[0] - width / 2, at[2]), (at[0] + width / 2, at[2])], height, .7)
    cv.limb(at, (0, 0), (0, height), width, Id.POLE, "pole", colour, .72)
    cv.limb(at, (-.2 * width, 0), (-.2 * width, height), .5 * width, Id.POLE, "pole", colour, 1.1)


def lamp_post(cv: Canvas, at: Point, toward: float) -> None:
    """A street lamp whose arm points `toward` the road (-1 left, 1 right)."""
    height = 5.5 + 2.5 * cv.rng.random()
    _post(cv, at, height, .2)
    cv.limb(at, (0, height), (1.5 * toward, height + .35), .11, Id.POLE, "pole")
    cv.limb(at, (1.2 * toward, height + .33), (2.0 * toward, height + .38), .17, Id.POLE, "lamp")


def sign(cv: Canvas, at: Point) -> None:
    """A traffic sign on a post: round, triangular, square or a direction board."""
    kind, height = cv.rng.random(), 2.2 + .5 * cv.rng.random()
    _post(cv, at, height + .3, .09)
    face = (at[0], height, at[2] - .03)
    if kind < .3:
        cv.disc(face, .38, .38, Id.SIGN, "red")
        cv.disc(face, .28, .28, Id.SIGN, "white")
        cv.limb(face, (-.12, 0), (.12, 0), .12, Id.SIGN, "trim")
    elif kind < .45:
        cv.disc(face, .38, .38, Id.SIGN, "white")
        cv.disc(face, .35, .35, Id.SIGN, "blue")
        cv.limb(face, (0, -.2), (0, .14), .09, Id.SIGN, "white")
        cv.card(face, [(-.16, .08), (.16, .08), (0, .26)], Id.SIGN, "white")
    elif kind < .62:
        flip = 1 if kind < .55 else -1
        cv.card(face, [(-.46, -.36 * flip), (.46, -.36 * flip), (0, .44 * flip)], Id.SIGN, "red")
        cv.card(face, [(-.29, -.26 * flip), (.29, -.26 * flip), (0, .25 * flip)], Id.SIGN, "white")
    elif kind < .8:
        cv.card(face, [(-.36, -.36), (.36, -.36), (.36, .36), (-.36, .36)], Id.SIGN, "white")
        cv.card(face, [(-.32, -.32), (.32, -.32), (.32, .32), (-.32, .32)], Id.SIGN, "blue" if kind < .72 else "yellow")
        cv.card(face, [(-.14, -.22), (.14, -.22), (.14, .2), (-.14, .2)], Id.SIGN, "white")
    else:
        board = "blue" if kind < .87 else "yellow" if kind < .94 else "green_board"
        cv.card(face, [(-.85, -.42), (.85, -.42), (.85, .42), (-.85, .42)], Id.SIGN, board)
        for dy, end in ((.18, .55), (-.16, .3)):
            cv.limb(face, (-.65, dy), (end, dy), .14, Id.SIGN, "trim" if board == "yellow" else "white")


def traffic_light(cv: Canvas, at: Point, toward: float) -> None:
    """A traffic light on a post, sometimes with a second one on an arm over the road."""
    arm, state = cv.rng.random() < .45, int(cv.rng.random() * 3)
    height = 5.4 if arm else 3.0
    _post(cv, at, height, .17)
    spots = [(at[0], 2.3)]
    if arm:
        cv.limb(at, (0, height), (3.3 * toward, height + .1), .13, Id.POLE, "pole")
        spots.append((at[0] + 3.2 * toward, height - .75))
    for x, y in spots:
        spot = (x, y, at[2] - .05)
        cv.card(spot, [(-.22, 0), (.22, 0), (.22, 1.06), (-.22, 1.06)], Id.LIGHT, "signal")
        for i, lit in enumerate(("lit_green", "lit_amber", "lit_red")):
            cv.disc((x, y + .2 + .33 * i, at[2] - .06), .13, .13, Id.LIGHT, lit if i == state else "off", gain=1.3)


def blob(cv: Canvas, at: Point, rx: float, ry: float, colour: Colour, gain: float) -> None:
    """A ragged clump of leaves, with a finer edge where it is seen large."""
    fine = 3 if rx * cv.camera.focal > 24 * at[2] else 1
    ragged = 0.8 + 0.38 * cv.rng.random(16 * fine)
    ragged = (ragged + np.repeat(ragged[:16], fine)) / 2
    edge = _CIRCLES[fine] * ragged * ((rx,), (ry,))
    cv.card(at, list(zip(*edge.tolist(), strict=True)), Id.PLANT, "leaf", colour, gain)


def tree(cv: Canvas, at: Point, height: float) -> None:
    """A tree with a broad, tall or conical crown."""
    x, _, z = at
    seen = cv.camera.focal / max(z, 1.0) / cv.camera.width  # of the frame's width, per metre
    if abs(x) * seen > 0.65 + height * seen:
        return
    kind, colour = cv.rng.random(), cv.colour("leaf", .15)
    wide = height * (.34 if kind < .65 else .2)
    bare = height * (.3 if kind < .85 else .12)
    trunk = .035 * height + .06
    for shift, width, gain in ((0, 1.3, .75), (-.2 * trunk, .7, 1.05)):
        cv.limb(at, (shift, 0), (.1 * (kind - .5) + shift, bare * 1.6), trunk * width, Id.PLANT, "bark", None, gain)
    middle, tall = bare + .5 * (height - bare), .5 * (height - bare)
    cv.cast([(x + wide * .9 * c, z + wide * .9 * s) for c, s in ROUND[::2]], .2 * height, .85)
    cv.cast([(x - .15, z), (x + .15, z)], bare, .8)
    clumps = cv.rng.uniform(-1, 1, (14 if height * seen > .35 else 10 if height * seen > .1 else 5, 3)).tolist()
    blob(cv, (x, middle, z), .8 * wide, .8 * tall, colour, .6)
    for u, v, r in sorted(clumps, key=lambda clump: clump[1]):
        room = math.sqrt(max(1 - v * v, .05)) * wide if kind < .85 else wide * .55 * (1 - v)
        size = (.38 + .1 * r) * wide * (1 if kind < .85 else .6 - .3 * v) * (1 if len(clumps) > 5 else 1.3)
        tone = tuple(channel * (1 + .1 * r * (i < 2)) for i, channel in enumerate(colour))
        blob(cv, (x + .72 * u * room, middle + .74 * v * tall, z - .1), size * 1.2, size, tone,
             .82 + .2 * v + .12 * u * cv.sun[0] * cv.look.sun)


def bush(cv: Canvas, at: Point, size: float) -> None:
    """A bush: a few clumps on the ground."""
    colour = cv.colour("leaf", .15)
    for i, (u, v) in enumerate(cv.rng.random((5, 2))):
        blob(cv, (at[0] + (u - .5) * 1.6 * size, (.3 + .1 * i) * size, at[2]), .6 * size, (.4 + .15 * v) * size, colour,
             .65 + .09 * i)


def bin_or_box(cv: Canvas, at: Point) -> None:
    """A litter bin or switch box: nothing the 19 classes name, so its label is void."""
    h, w = .9 + .5 * cv.rng.random(), .25 + .2 * cv.rng.random()
    cv.cast([(at[0] - w, at[2]), (at[0] + w, at[2])], h, .8)
    cv.card(at, [(-w, 0), (w, 0), (w, h), (-w, h)], Id.VOID, "bin", cv.colour("bin", .1))
    cv.card(at, [(-w, h), (w, h), (w * .9, h + .1), (-w * .9, h + .1)], Id.VOID, "trim")
