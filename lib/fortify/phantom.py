"""Procedural axial chest-CT slices with known patients: the data set that needs no download.

A virtual patient is a small 3-D anatomy (outline, lungs, heart, vessels, ribs) in which a short stack of
slices is cut, so neighbouring slices are near-duplicates of each other, as they are in a clinical scan.
Lengths are in units of half the image width, densities in Hounsfield units (HU); x points right, y down.
Anatomy, window and distractors are drawn before the lesion and from the same distribution in every class:
nothing but the lesion tells a class.
"""

import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

if TYPE_CHECKING:
    from fortify.data import Slices

CLASS_NAMES = ("benign", "malignant", "normal")
_PATIENTS = (15, 40, 55)  # of each class among the 110 cases of IQ-OTH/NCCD
_AIR, _FAT, _MUSCLE, _BONE = -1000.0, -90.0, 45.0, 420.0
_SPACING = 0.04  # between slices: about 8 mm in a chest that fills the image


class Phantoms(NamedTuple):
    """``images`` uint8 (N, size, size); ``labels``, ``patients`` int64 (N,); ``names`` are unique."""

    images: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    names: tuple[str, ...]
    class_names: tuple[str, ...]


def make(*, patients: int = 110, slices_per_patient: int = 6, size: int = 64, seed: int = 0) -> Phantoms:
    """Draw ``patients * slices_per_patient`` slices of ``size`` x ``size`` pixels as :class:`Phantoms`.

    Classes hold 15 : 40 : 55 of 110 patients and at least three each. Slices are sorted by class, patient and
    z, and numbered in that order within a class, as the files of the real data set are. Same arguments, same
    bytes; a patient's anatomy depends on ``seed`` and its number alone. Raises ValueError below the minimum.
    """
    if patients < 9 or slices_per_patient < 1 or size < 24:
        raise ValueError(
            f"patients={patients}, slices_per_patient={slices_per_patient}, size={size}: phantoms need "
            "at least 9 patients (three a class), 1 slice per patient and 24 pixels."
        )
    label_of = _labels(patients)
    of_class = np.bincount(label_of)
    images = np.concatenate(
        [_stack(seed, number, label, slices_per_patient, size) for number, label in enumerate(label_of)]
    )
    names = tuple(
        f"{kind.capitalize()} cases/{kind.capitalize()} case ({number}).png"
        for kind, count in zip(CLASS_NAMES, of_class, strict=True)
        for number in range(1, count * slices_per_patient + 1)
    )
    return Phantoms(
        images=images,
        labels=np.repeat(label_of, slices_per_patient).astype(np.int64),
        patients=np.repeat(np.arange(patients, dtype=np.int64), slices_per_patient),
        names=names,
        class_names=CLASS_NAMES,
    )


def phantom_slices(
    *, patients: int = 110, slices_per_patient: int = 6, size: int = 64, seed: int = 0
) -> "Slices":
    """The same as a :class:`fortify.data.Slices`; its ``sha256`` covers pixels, labels and patients."""
    from fortify.data import Slices  # here, so that this room can be used without any other

    drawn = make(patients=patients, slices_per_patient=slices_per_patient, size=size, seed=seed)
    digest = hashlib.sha256()
    for array in (drawn.images, drawn.labels, drawn.patients):
        digest.update(str((array.shape, array.dtype.str)).encode() + array.tobytes())
    return Slices(
        images=drawn.images,
        labels=drawn.labels,
        names=drawn.names,
        class_names=drawn.class_names,
        source=f"procedural phantoms, {len(drawn.labels)} slices of {patients} virtual patients at {size} px",
        sha256=digest.hexdigest(),
        groups=np.arange(len(drawn.labels)),  # they stand in for data whose patients have to be found
        patients=drawn.patients,
    )


def lesion_masks(
    *, patients: int = 110, slices_per_patient: int = 6, size: int = 64, seed: int = 0
) -> np.ndarray:
    """Where the lesion is on each slice that :func:`make` draws of the same arguments: bool (N, size, size).

    A pixel is of the lesion where that changes the density by more than 200 HU, before blur and noise. None
    is on normal slices.
    """
    masks = []
    for number, label in enumerate(_labels(patients)):
        _, anatomy, _, lesion, heights = _drawn(seed, number, label, slices_per_patient)
        for z in heights:
            with_it, without = (_render(anatomy, lesion, z, size), _render(anatomy, None, z, size))
            masks.append(np.abs(with_it - without) > 200)
    return np.array(masks)


def _labels(patients):
    """The class of each patient, sorted."""
    of_class = [max(3, round(patients * share / sum(_PATIENTS))) for share in _PATIENTS[:2]]
    return np.repeat(np.arange(3), [*of_class, patients - sum(of_class)])


def _drawn(seed, number, label, count):
    """What is drawn of one patient: (generator, anatomy, scanner, lesion or None, heights of its slices)."""
    rng = np.random.default_rng([seed, number])
    heights = _SPACING * (np.arange(count) - (count - 1) / 2)
    anatomy = _anatomy(rng)
    scanner = {
        "low": rng.normal(-1250, 60),
        "width": 1650 * np.exp(rng.normal(0, 0.08)),
        "noise": rng.uniform(10, 40),  # HU
        "blur": rng.uniform(0.35, 0.6),  # pixels
    }
    return rng, anatomy, scanner, _lesion(rng, anatomy, label, heights[-1]), heights


def _stack(seed, number, label, count, size):
    """One patient's slices, uint8 (count, size, size)."""
    rng, anatomy, scanner, lesion, heights = _drawn(seed, number, label, count)
    slices = []
    for z in heights:
        hu = _render(anatomy, lesion, z, size)
        hu = gaussian_filter(hu, scanner["blur"])
        hu += scanner["noise"] * gaussian_filter(rng.standard_normal(hu.shape), 0.4) / 0.7
        slices.append(np.clip(np.rint((hu - scanner["low"]) / scanner["width"] * 255), 0, 255))
    return np.array(slices, dtype=np.uint8)


def _anatomy(rng):
    """Everything but the lesion, as a dict of lengths, shapes and 3-D segments (from, to, radius, HU)."""
    zoom = rng.uniform(1.0, 1.13)
    body = np.array([0.86, 0.62]) * zoom * rng.uniform(0.96, 1.04, 2)
    fat = rng.uniform(0.03, 0.09)
    cage = body - fat - 0.07 * zoom
    lungs = []
    breath = rng.uniform(
        0.84, 1.1
    )  # inflation varies more than a tumour takes up, or the grey levels would tell
    for side in (-1, 1):
        half = np.array([0.31, 0.44]) * zoom * breath * rng.uniform(0.94, 1.06, 2)
        centre = np.array([side * (cage[0] - half[0] - 0.01), -0.01 + rng.normal(0, 0.015)])
        lungs.append((centre, half, side * rng.uniform(0.05, 0.22), _wobble(rng, 0.04)))
    shape = {
        "centre": rng.normal(0, [0.04, 0.03]) + [0, -0.07],
        "drift": rng.normal(0, 0.06, 2),  # of the centre with z
        "level": rng.uniform(0, 1),  # 0 at the top of the lungs, 1 at the diaphragm
        "body": body,
        "cage": cage,
        "fat": fat,
        "zoom": zoom,
        "outline": _wobble(rng, 0.02),
        "lungs": lungs,
        "lung_hu": rng.normal(-840, 30),
        "gravity": rng.uniform(20, 120),  # HU from front to back
        "heart": _wobble(rng, 0.06),
        "blood_hu": rng.uniform(40, 180),
        "ribs": rng.uniform(0, 1, 2),
        "table": (rng.uniform(0.70, 0.80), rng.uniform(1.1, 1.9), rng.uniform(0.05, 0.09)),
    }
    # The diaphragm bulges into a lung: soft tissue as large as a tumour, in any class.
    dome = rng.uniform() < 0.08
    shape["dome"] = (rng.integers(2), rng.uniform(0.10, 0.2), rng.normal(0, 0.4)) if dome else None
    segments = []
    for centre, half, _, _ in lungs:
        side = np.sign(centre[0])
        hilum = np.array([centre[0] - side * half[0] * 0.75, 0.03, rng.normal(0, 0.05)])
        for angle in np.arange(4) * 0.75 - 1.15 + rng.normal(0, 0.2, 4):
            direction = np.array([side * np.cos(angle), np.sin(angle) * 1.3, rng.normal(0, 0.25)])
            _grow(rng, segments, hilum, direction, 0.17 * zoom, 0.020 * zoom, 3)
        segments += _distractors(rng, centre, half)
    shape["segments"] = segments
    return shape


def _grow(rng, segments, start, direction, length, radius, depth):
    """Append a vessel and its branches."""
    direction = direction / np.linalg.norm(direction)
    end = start + direction * length
    segments.append((start, end, radius, 20.0))
    if depth:
        for sign in (-1, 1):
            turn = (
                direction
                + rng.normal(0, 0.25, 3)
                + sign * rng.uniform(0.2, 0.6) * np.array([-direction[1], direction[0], rng.normal(0, 0.6)])
            )
            _grow(rng, segments, end, turn, length * rng.uniform(0.65, 0.95), radius * 0.76, depth - 1)


def _distractors(rng, centre, half):
    """What is bright in a lung and no lesion: calcified dots, scars from the pleura, vessels along z."""
    found = []
    for kind, rate in (("dot", 0.6), ("scar", 0.3), ("along", 0.6)):
        for _ in range(rng.poisson(rate)):
            angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.8))
            at = np.append(
                centre + half * reach * np.array([np.cos(angle), np.sin(angle)]), rng.normal(0, 0.03)
            )
            if kind == "dot":
                found.append((at, at + [0, 0, 0.02], rng.uniform(0.015, 0.028), 300.0))
            elif kind == "along":
                tilt = np.append(rng.normal(0, 0.1, 2), 1.0) * 0.3
                found.append((at - tilt, at + tilt, rng.uniform(0.016, 0.028), 30.0))
            else:
                rim = np.append(centre + half * np.array([np.cos(angle), np.sin(angle)]), at[2])
                inner = rim + np.append(rng.normal(0, 0.3, 2) - [np.cos(angle), np.sin(angle)], 0) * 0.16
                rise = np.array([0, 0, rng.uniform(0.03, 0.1)])
                found.append((rim - rise, inner + rise, rng.uniform(0.02, 0.04), -100.0))
    return found


def _lesion(rng, anatomy, label, top):
    """A benign or malignant nodule inside a lung that every slice of the stack cuts; None for normal."""
    if CLASS_NAMES[label] == "normal":
        return None
    benign = CLASS_NAMES[label] == "benign"
    radius = rng.uniform(0.115, 0.145) if benign else rng.uniform(0.18, 0.25)
    canvas = _Canvas(64, np.zeros(2), 0.0)
    lung, _ = _lungs(canvas, anatomy)
    for _ in range(50):  # until heart, diaphragm and chest wall hide at most a fifth
        centre, half, _, _ = anatomy["lungs"][rng.integers(2)]
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 0.45))
        at = centre + half * reach * np.array([np.cos(angle), np.sin(angle)])
        if lung[np.hypot(canvas.x - at[0], canvas.y - at[1]) < radius].mean() > 0.8:
            break
    spicules = (
        np.zeros((0, 3)) if benign else rng.uniform([0, 0.5, -1], [0.45, 1.1, 1], (rng.integers(7, 12), 3))
    )
    return {
        "at": at,
        "radius": radius,
        "height": max(1.3 * radius, 1.5 * top),  # so that the last slice still cuts it at 3/4 of its radius
        "outline": _wobble(rng, 0.03 if benign else 0.16),
        "spicules": spicules,
        "hu": rng.uniform(-60, 60),
    }


def _wobble(rng, size):
    """Harmonics 2 to 5 of an outline: amplitudes, phases and the drift of the phases with z."""
    return (
        size * rng.standard_normal(4) / [1, 1.3, 1.7, 2.2],
        rng.uniform(0, 2 * np.pi, 4),
        rng.normal(0, 2, 4),
    )


def _lungs(canvas, anatomy):
    """Cover of both lungs and of the heart between them, where the canvas cuts them."""
    zoom, level = anatomy["zoom"], np.clip(anatomy["level"] + canvas.z, 0, 1)
    lung = np.zeros_like(canvas.hu)
    for centre, half, tilt, wobble in anatomy["lungs"]:
        grown = half * (0.86 + 0.14 * np.sin(np.pi * (0.25 + 0.5 * level)))
        lung = np.maximum(lung, canvas.blob(centre, grown, tilt=tilt, wobble=wobble))
    heart_at = np.array([0.07, -0.07]) * zoom
    heart = np.array([0.14 + 0.13 * level, 0.15 + 0.11 * level]) * zoom
    heart = canvas.blob(heart_at, heart, tilt=0.5, wobble=anatomy["heart"])
    lung *= 1 - np.maximum(heart, canvas.blob((0.0, 0.04), np.array([0.11, 0.34]) * zoom))
    if anatomy["dome"] is not None:
        which, radius, angle = anatomy["dome"]
        centre, half, _, _ = anatomy["lungs"][which]
        at = centre + half * 0.45 * np.array([np.sin(angle), np.cos(angle)])
        lung *= 1 - canvas.blob(at, radius * np.array([1.15, 0.9]) * (1 + 1.5 * canvas.z))
    return lung, heart


def _render(anatomy, lesion, z, size):
    """The density of the slice at height ``z``, float64 HU (size, size), before noise."""
    canvas = _Canvas(size, anatomy["centre"] + anatomy["drift"] * z, z)
    zoom, cage, level = anatomy["zoom"], anatomy["cage"], np.clip(anatomy["level"] + z, 0, 1)
    canvas.table(*anatomy["table"])
    body = canvas.blob((0, 0), anatomy["body"], wobble=anatomy["outline"])
    canvas.paint(body, _FAT)
    muscle = canvas.blob((0, 0), anatomy["body"] - anatomy["fat"], wobble=anatomy["outline"])
    canvas.paint(muscle, _MUSCLE)

    lung, heart = _lungs(canvas, anatomy)
    canvas.paint(lung, anatomy["lung_hu"] + anatomy["gravity"] * canvas.y)

    for start, end, radius, hu in anatomy["segments"]:
        canvas.segment(start, end, radius, hu, inside=lung)
    if lesion is not None:
        canvas.lesion(lesion, inside=lung)

    canvas.paint(heart, anatomy["blood_hu"])
    canvas.paint(canvas.blob((0.09 * zoom, 0.19), (0.065 * zoom, 0.065 * zoom)), anatomy["blood_hu"])
    canvas.paint(canvas.blob((0.0, 0.36 * zoom), np.array([0.12, 0.10]) * zoom), _BONE)
    canvas.segment((0, 0.46 * zoom, z), (0, 0.55 * zoom, z), 0.03, _BONE)
    canvas.paint(canvas.blob((0, 0.47 * zoom), (0.035, 0.03)), 20.0)
    canvas.segment((-0.06, -cage[1], z), (0.06, -cage[1], z), 0.028, _BONE)
    for side, phase in zip((-1, 1), anatomy["ribs"], strict=True):
        for angle in np.arange(7) * 0.42 - 1.35 + 0.42 * ((phase + 4 * z) % 1):
            ends = [
                (side * np.cos(a) * (cage[0] + 0.03), np.sin(a) * (cage[1] + 0.01), z)
                for a in (angle, angle + 0.2)
            ]
            canvas.segment(*ends, 0.024, _BONE)
    split = 0.14 * np.clip((level - 0.35) / 0.3, 0, 1) * zoom  # the trachea divides into two bronchi
    for side in (-1, 1):
        canvas.paint(canvas.blob((side * split, 0.03), np.array([0.045, 0.05]) * zoom), _AIR)
    return canvas.hu


class _Canvas:
    """A slice being painted; shapes are in the patient's coordinates and have antialiased edges."""

    def __init__(self, size, centre, z):
        self.pixel = 2 / size
        axis = (np.arange(size) + 0.5) * self.pixel - 1
        self.size, self.centre, self.z = size, centre, z
        self.x, self.y = np.meshgrid(axis - centre[0], axis - centre[1])
        self.hu = np.full((size, size), _AIR)

    def paint(self, cover, hu):
        self.hu += cover * (hu - self.hu)

    def blob(self, centre, half, *, tilt=0.0, wobble=None):
        """Cover in [0, 1] of an ellipse with a wavy outline."""
        half = np.asarray(half)
        part = self._window(np.subtract(centre, 1.5 * half.max()), np.add(centre, 1.5 * half.max()))
        x, y = self.x[part] - centre[0], self.y[part] - centre[1]
        u = (np.cos(tilt) * x + np.sin(tilt) * y) / half[0]
        v = (np.cos(tilt) * y - np.sin(tilt) * x) / half[1]
        rho = np.maximum(np.hypot(u, v), 1e-9)
        slope = np.hypot(u / half[0], v / half[1]) / rho + 1e-9
        if wobble is not None:
            theta = np.arctan2(v, u)
            for k, (amplitude, phase, drift) in enumerate(zip(*wobble, strict=True), start=2):
                rho = rho - amplitude * np.cos(k * theta + phase + drift * self.z)
        cover = np.zeros_like(self.hu)
        cover[part] = np.clip(0.5 - (rho - 1) / slope / self.pixel, 0, 1)
        return cover

    def _window(self, low, high):
        """The pixels between two corners (x, y), as a pair of slices."""
        low, high = ((np.asarray(c) + self.centre + 1) / self.pixel for c in (low, high))
        (c0, r0), (c1, r1) = (
            np.maximum(np.floor(low), 0).astype(int),
            np.maximum(np.ceil(high), 0).astype(int),
        )
        return np.s_[r0:r1, c0:c1]

    def segment(self, start, end, radius, hu, *, inside=None):
        """Paint where this slice cuts a rounded 3-D segment (start and end are x, y, z)."""
        start, end = np.asarray(start, float), np.asarray(end, float)
        reach = radius + self.pixel
        if not min(start[2], end[2]) - reach < self.z < max(start[2], end[2]) + reach:
            return
        part = self._window(np.minimum(start, end)[:2] - reach, np.maximum(start, end)[:2] + reach)
        dx, dy, dz = self.x[part] - start[0], self.y[part] - start[1], self.z - start[2]
        ax, ay, az = end - start
        t = np.clip((dx * ax + dy * ay + dz * az) / max(ax * ax + ay * ay + az * az, 1e-12), 0, 1)
        distance = np.sqrt((dx - t * ax) ** 2 + (dy - t * ay) ** 2 + (dz - t * az) ** 2)
        cover = np.clip(0.5 - (distance - radius) / self.pixel, 0, 1)
        # A vessel thinner than a pixel must not vanish, it must fade.
        cover = np.minimum(cover, min(1.0, 2 * radius / self.pixel))
        if inside is not None:
            cover = cover * inside[part]
        self.hu[part] += cover * (hu - self.hu[part])

    def lesion(self, lesion, *, inside):
        """Paint a nodule and its spicules."""
        at, radius = lesion["at"], lesion["radius"] * np.sqrt(max(0.0, 1 - (self.z / lesion["height"]) ** 2))
        for turn, (shift, length, lean) in enumerate(lesion["spicules"]):
            angle = (turn + shift) * 2 * np.pi / len(lesion["spicules"]) + 0.5 * self.z
            ray = np.array([np.cos(angle), np.sin(angle)])
            tip = at + radius * ((1 + length) * ray + 0.3 * lean * np.array([-ray[1], ray[0]]))
            self.segment((*at, self.z), (*tip, self.z), 0.016, lesion["hu"], inside=inside)
        self.paint(inside * self.blob(at, (radius, radius), wobble=lesion["outline"]), lesion["hu"])

    def table(self, top, curvature, thickness):
        """Paint the two shells of the table under the patient; they do not follow the patient's position."""
        for depth, hu in ((0.0, 150.0), (thickness, 0.0)):
            x, y = self.x + self.centre[0], self.y + self.centre[1]
            line = np.abs(y - (top + depth) + 0.12 * curvature * x**2)
            self.paint(np.clip(0.9 - line / self.pixel, 0, 1), hu)
