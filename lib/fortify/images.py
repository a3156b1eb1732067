"""One image file: decoded to 8-bit grey or RGB or refused, brought to a square; and histograms of many."""

import itertools
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps

MIN_SIDE, MAX_SIDE = 32, 4096  # pixels; a thumbnail or an icon is no CT slice, and nothing larger is one
CHANNEL_TOLERANCE = 16  # grey levels by which JPEG may drive apart three channels that were equal
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF")


class DataError(ValueError):
    """The data are not what the code takes them for; the message names the files and the remedy."""


def read_image(path: Path, *, ct: bool = True, colour: bool = False) -> Image.Image:
    """Decode one image file, upright as its EXIF tag says, to a Pillow image of 8 bits a channel.

    Mode ``L`` (grey), or ``RGB`` with ``colour``. Without it colour becomes luminance, which leaves equal
    channels as they are. DataError says what is wrong with the file: empty, damaged, too large, several
    frames, not 8-bit grey or RGB, transparent, constant; with ``ct``, also too small or coloured.
    """
    if path.stat().st_size == 0:
        raise DataError("is empty (0 bytes)")
    # Pillow has a global switch that fills truncated files up with grey; someone else may have set it.
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with Image.open(path, formats=_PILLOW_FORMATS) as image:
            _check_header(image, ct=ct)
            image = ImageOps.exif_transpose(image)  # decodes all of it
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"is larger than {MAX_SIDE} px a side") from error
    except Exception as error:  # whatever a decoder stumbles over, the file is the cause
        raise DataError(f"is damaged or no image ({str(error).replace(str(path), 'file')})") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise DataError("is partly transparent")
        image = image.convert("RGB")
    if image.mode == "RGB":
        pairs = itertools.combinations(image.split(), 2)
        spread = max(ImageChops.difference(*pair).getextrema()[1] for pair in pairs)
        if ct and spread > CHANNEL_TOLERANCE:
            raise DataError(f"is coloured (channels differ by up to {spread} grey levels)")
    wanted = "RGB" if colour else "L"
    image = image if image.mode == wanted else image.convert(wanted)
    check_varied(image)
    return image


def check_size(width: int, height: int, *, ct: bool) -> None:
    """DataError for an image that is too large or, with ``ct``, too small.

    Ask before a pixel is decoded: a small file can hold a huge image.
    """
    if max(width, height) > MAX_SIDE:
        raise DataError(f"is larger than {MAX_SIDE} px a side ({width} x {height})")
    if ct and min(width, height) < MIN_SIDE:
        raise DataError(f"is smaller than {MIN_SIDE} px a side ({width} x {height})")


def check_varied(image: Image.Image) -> None:
    """DataError for an image of mode ``L`` or ``RGB`` of which every pixel is the same."""
    if all(low == high for low, high in (band.getextrema() for band in image.split())):
        raise DataError(f"is constant (every pixel is {image.getpixel((0, 0))})")


def _check_header(image, *, ct):
    check_size(*image.size, ct=ct)
    if getattr(image, "n_frames", 1) > 1:
        raise DataError(f"has {image.n_frames} frames")
    # Pillow decodes 16-bit RGB to 8 bits without a word; only the decoder's raw mode tells.
    raw = next((str(tile.args) for tile in image.tile if ";16" in str(tile.args)), "")
    if image.mode not in ("L", "LA", "RGB", "RGBA", "P") or raw:
        raise DataError(f"is not 8-bit grey or RGB (mode {image.mode}{raw and ', stored as '}{raw})")


def fit_square(image: Image.Image, *, size: int, aspect: str) -> Image.Image:
    """Resize a grey or RGB Pillow image to ``size`` x ``size`` pixels; one of that size is returned as it is.

    ``aspect="pad"`` keeps the proportions and centres the image between black borders; ``"squash"``
    stretches it to the square. Either way the original shape stays visible to a classifier.
    """
    if image.size == (size, size):
        return image
    longest = max(image.size)
    inner = (size, size)
    if aspect == "pad":
        inner = tuple(max(1, round(side * size / longest)) for side in image.size)
    if inner != image.size:
        # BOX averages the area that a new pixel covers: no aliasing, and no halos at the ribs, which filters
        # with negative lobes (BICUBIC, LANCZOS) draw. Enlarging, it would only repeat pixels.
        reducing = inner[0] <= image.width and inner[1] <= image.height
        image = image.resize(inner, Image.Resampling.BOX if reducing else Image.Resampling.BICUBIC)
    if inner == (size, size):
        return image
    square = Image.new(image.mode, (size, size))
    square.paste(image, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return square


HISTOGRAM_BINS = 64  # one for the leak meter and for Table 1's baseline, so that they are one classifier


def histograms(images: np.ndarray, bins: int = HISTOGRAM_BINS) -> np.ndarray:
    """Share of the pixels in each of ``bins`` equal ranges of intensity: (N, bins).

    ``images`` uint8 (N, H, W), or (N, H, W, C) with (N, bins C) shares; ``bins`` divides 256.
    """
    features = [
        [np.bincount(one.ravel() // (256 // bins), minlength=bins) / one.size for one in _channels(image)]
        for image in images
    ]
    return np.array(features).reshape(len(images), -1)


def _channels(image):
    """The channels of an image (H, W) or (H, W, C), each (H, W)."""
    return [image] if image.ndim == 2 else list(np.moveaxis(image, 2, 0))
