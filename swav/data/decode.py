"""Image bytes to RGB pixels, strictly: what is damaged is refused, never half shown."""

import io

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # above this a header is taken for a decompression bomb, as PIL does

_JPEG_START = b"\xff\xd8\xff"
_ORIENTATION = 0x0112


class BrokenImageError(ValueError):
    """These bytes are not an image that can be shown whole; the message says why."""


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode one image of any format that libjpeg-turbo or PIL reads.

    JPEG goes through libjpeg-turbo, which runs without the GIL. Alpha is dropped, not blended (PIL's
    ``convert("RGB")``), palettes are looked up, CMYK is converted, 16-bit grey is scaled by 1/257.

    Differs: the EXIF orientation is applied; torchvision's usual pipeline ignores it and trains on lying images.
    Differs: a JPEG that libjpeg only warns about (data missing or damaged) is refused, not filled with grey.

    Args:
        data: a whole image file.

    Returns:
        uint8 [height, width, 3], C-contiguous.

    Raises:
        BrokenImageError: not an image, truncated, damaged, or larger than ``MAX_PIXELS``.
    """
    if not data:
        raise BrokenImageError("the file is empty")
    if data.startswith(_JPEG_START):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return _upright(pixels, data)
    return _decode_with_pil(data)


def _decode_jpeg(data: bytes) -> NDArray[np.uint8] | None:
    """Decode with libjpeg-turbo; None where PIL has to look: CMYK, YCCK, rare codings, harmless extra bytes."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colorspace not in ("YCbCr", "RGB", "Gray"):
        return None
    _check_size(height, width)
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB", strict=True)
    except ValueError as error:
        if "extraneous bytes" in str(error):
            return None
        raise BrokenImageError(f"damaged JPEG: {error}") from error
    return pixels


def _decode_with_pil(data: bytes) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(image.height, image.width)
            image.load()
            pixels = _to_rgb(image)
            orientation = image.getexif().get(_ORIENTATION, 1)
    except (BrokenImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise BrokenImageError(f"not an image: begins with {data[:12]!r}") from error
    except Exception as error:  # PIL's decoders raise nearly anything on damaged files
        raise BrokenImageError(f"damaged image: {error or type(error).__name__}") from error
    return _orient(pixels, orientation)


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """PIL image to uint8 [height, width, 3]."""
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels have no agreed range; convert the file to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return np.array(image.convert("RGB"), dtype=np.uint8)
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise BrokenImageError(f"grey values {values.min()}..{values.max()} do not fit 16 bits")
    grey = ((values + 128) // 257).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise BrokenImageError(f"{width}x{height} pixels are more than the {MAX_PIXELS} that are decoded")


def _upright(pixels: NDArray[np.uint8], data: bytes) -> NDArray[np.uint8]:
    """Apply a JPEG's EXIF orientation; PIL parses it only where an Exif segment is present."""
    if not _has_exif(data):
        return pixels
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # damaged metadata beside sound pixels
        raise BrokenImageError(f"damaged EXIF data: {error or type(error).__name__}") from error
    return _orient(pixels, orientation)


def _has_exif(data: bytes) -> bool:
    """Walk the JPEG's segments up to the first scan, looking for APP1 with an Exif header."""
    place = 2
    while place + 10 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xDA:
            return False
        if marker == 0xE1 and data[place + 4 : place + 10] == b"Exif\x00\x00":
            return True
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _orient(pixels: NDArray[np.uint8], orientation: object) -> NDArray[np.uint8]:
    """Turn the stored pixels as EXIF says (1 to 8); any other value means upright."""
    if orientation not in range(2, 9):
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
