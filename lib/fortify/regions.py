"""Which pixels are lung, body or frame; images without some of them; attacks that may change only some.

For two questions: does a model read the lungs or the scanner, and what does one read that is shown the lungs
alone? The masks come from thresholds and shapes, no model: they are good enough to blank a region or to crop
to it, not to measure a lung. Images are uint8 (N, H, W), 8-bit grey: colour images are refused with a
ValueError, for a threshold between air and tissue has no meaning there.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from fortify.images import fit_square

_AIR_PERCENTILE = 25  # of the pixels below the threshold, most of which are the air around the patient
MIN_LUNG_SHARE = 0.03  # of the image; a real slice has 4 to 40 %, the least at the apex
_MIN_LOBE_SHARE = 0.005  # of the image; smaller air inside the body is trachea, bowel or noise
_CLOSING_SHARE = 0.045  # of the side, a radius: vessels and nodules up to 20 px wide at 224 px count as lung
_GAP_SHARE = 0.01  # of the side, a radius: a chest wall with a gap of up to twice that is still closed
_CROP_MARGIN = 0.06  # of the longer side of the lungs' box, left on each side: pleura and chest wall
_TABLE_SHARE = 0.02  # of the side, a radius: a table and its sheets are thinner than twice that


def tissue_threshold(image: np.ndarray) -> int:
    """The intensity between air and tissue of one image uint8 (H, W), by Otsu's method (1979).

    It maximises the variance between the two classes, for window and level differ between scanners. Pixels
    of intensity 0 are left out where there are others: they are padding around the scan.
    """
    counts = np.bincount(image.ravel(), minlength=256).astype(float)
    counts[0] = 0 if counts[1:].any() else counts[0]
    below, first = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    inside = (below > 0) & (above > 0)
    if not inside.any():
        return int(image.max())  # one intensity: air
    between = np.zeros(256)
    between[inside] = (first[-1] * below - first * below[-1])[inside] ** 2 / (below * above)[inside]
    return int(between.argmax())


def body_mask(images: np.ndarray) -> np.ndarray:
    """The body without the table, lungs included, as bool (N, H, W)."""
    return np.array([_body(image) for image in _checked(images)]).reshape(images.shape)


def lung_mask(images: np.ndarray) -> np.ndarray:
    """Both lungs with their vessels and nodules, as bool (N, H, W); without any air inside the body, empty.

    Air inside the body that does not reach the image's edge, in pieces of at least 0.5 % of the image, each
    closed over 4.5 % of the side. A large mass at the chest wall or the mediastinum
    stays outside; :func:`body_mask` holds it.
    """
    return np.array([_lungs(image) for image in _checked(images)]).reshape(images.shape)


def implausible(mask: np.ndarray) -> np.ndarray:
    """Which masks (N, H, W) hold less than ``MIN_LUNG_SHARE`` of the image: bool (N,). Report them."""
    return mask.mean((1, 2)) < MIN_LUNG_SHARE


def crop_to_lungs(images: np.ndarray, *, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The square around the lungs of each image, and where none were found: uint8 (N, size, size), bool (N,).

    It is the bounding box of :func:`lung_mask`, made square, with 6 % of its side around it. Where the lungs
    are :func:`implausible` it is that of :func:`body_mask`, and the whole image where that is empty too. What
    lies beyond the image is black, as where one that is not square is padded. Lungs fill about half of a
    slice's side: give images of twice ``size``, so that crops are hardly enlarged.
    """
    masks = lung_mask(images)
    missing = implausible(masks)
    masks[missing] = body_mask(images[missing])
    crops = np.empty((len(images), size, size), dtype=np.uint8)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        shown = Image.fromarray(image)
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            longest = max(np.ptp(rows), np.ptp(columns)) + 1
            side = longest + 2 * round(_CROP_MARGIN * longest)
            top, left = ((place[0] + place[-1] + 1 - side) // 2 for place in (rows, columns))
            shown = shown.crop((left, top, left + side, top + side))
        crops[i] = np.asarray(fit_square(shown, size=size, aspect="pad"))
    return crops, missing


def frame_mask(shape: tuple[int, int], width: int) -> np.ndarray:
    """The ``width`` outermost pixels of an image of ``shape`` (H, W), as bool (H, W)."""
    if not 0 < 2 * width < min(shape):
        raise ValueError(f"a frame of {width} pixels leaves nothing or everything of an image of {shape}")
    mask = np.ones(shape, dtype=bool)
    mask[width:-width, width:-width] = False
    return mask


def blank(images: np.ndarray, mask: np.ndarray, *, value: int | None = None) -> np.ndarray:
    """A copy of ``images`` with the pixels of ``mask`` (N, H, W) or (H, W) in one intensity an image.

    ``value`` is that intensity, 0 to 255, for all images; None, the (lower) median of the pixels of each that
    are kept. It occurs in the image, so it makes no new darkest or brightest value, and it tells nothing of
    what it hides, as the median of the region itself would. Raises ValueError where none is kept.
    """
    mask = np.broadcast_to(mask, _checked(images).shape)
    blanked = images.copy()
    for image, hidden in zip(blanked, mask, strict=True):
        if value is None and hidden.all():
            raise ValueError(
                "a mask covers a whole image: nothing is kept to take an intensity from; pass a value"
            )
        image[hidden] = np.percentile(image[~hidden], 50, method="lower") if value is None else value
    return blanked


def _body(image):
    side = min(image.shape)
    threshold = tissue_threshold(image)
    # Half-way from the air around to the threshold: skin and fat, blurred into the air, close the outline.
    tissue = image > (threshold + np.percentile(image[image <= threshold], _AIR_PERCENTILE)) / 2
    # Filled before it is opened: at 32 px the chest wall is one pixel wide and would be opened away.
    filled = ndimage.binary_fill_holes(_disk_close(tissue, max(1, round(_GAP_SHARE * side))))
    # The table is a thin shell below a gap: the opening cuts it off, the largest piece is the patient.
    return _largest(_disk_open(filled, max(2, round(_TABLE_SHARE * side))))


def _lungs(image):
    side = min(image.shape)
    tissue = image > tissue_threshold(image)
    air = ndimage.binary_opening(_body(image) & ~tissue)
    labelled, count = ndimage.label(air)
    lungs = np.zeros_like(air)
    edge = set(np.unique(np.concatenate([labelled[0], labelled[-1], labelled[:, 0], labelled[:, -1]])))
    sizes = np.bincount(labelled.ravel(), minlength=count + 1)
    for number in range(1, count + 1):
        if number not in edge and sizes[number] >= _MIN_LOBE_SHARE * image.size:
            # One lobe at a time, so that the closing does not bridge the mediastinum.
            closed = _disk_close(labelled == number, max(1, round(_CLOSING_SHARE * side)))
            lungs |= ndimage.binary_fill_holes(closed)
    return lungs


def _disk_close(mask, radius):
    """Closing with a disk, by distances: far faster than a large structuring element."""
    padded = np.pad(mask, radius + 1)
    if not mask.any():
        return mask
    grown = ndimage.distance_transform_edt(~padded) <= radius
    closed = ndimage.distance_transform_edt(grown) > radius
    return closed[radius + 1 : -radius - 1, radius + 1 : -radius - 1] | mask


def _disk_open(mask, radius):
    # Beyond the edge the tissue goes on: a body that the image cuts must not be eroded there.
    padded = np.pad(mask, radius + 1, mode="edge")
    if padded.all():
        return mask
    shrunk = ndimage.distance_transform_edt(padded) > radius
    opened = ndimage.distance_transform_edt(~shrunk) <= radius if shrunk.any() else shrunk
    return opened[radius + 1 : -radius - 1, radius + 1 : -radius - 1] & mask


def _largest(mask):
    labelled, found = ndimage.label(mask)
    return labelled == 1 + np.bincount(labelled[mask], minlength=2)[1:].argmax() if found else mask


def _checked(images):
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"masks are made of grey images, uint8 (N, H, W), not {images.dtype} {images.shape}: load them "
            "without colour=True"
        )
    return images
