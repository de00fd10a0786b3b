"""Every kind of file that turns up in image sets is decoded as meant, or refused in plain words."""

import io
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from swav.data.decode import BrokenImageError, decode_image


def photo(height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """A smooth colourful picture without symmetry, which JPEG keeps well."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows * 255 / height, columns * 255 / width, 255 - rows * 127 / height - columns * 127 / width]
    return np.stack(planes, axis=-1).astype(np.uint8)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, image_format, **options)
    return stream.getvalue()


def difference(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def test_a_jpeg_decodes_as_pil_decodes_it() -> None:
    data = encode(Image.fromarray(photo()), "JPEG", quality=92)
    with Image.open(io.BytesIO(data)) as image:
        assert difference(decode_image(data), np.asarray(image)) < 0.5  # two builds of libjpeg-turbo


def test_a_grey_jpeg_has_three_equal_channels() -> None:
    pixels = decode_image(encode(Image.fromarray(photo()).convert("L"), "JPEG"))
    assert pixels.shape == (48, 64, 3)
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(photo()), image_format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    pixels = decode_image(data)
    assert pixels.flags.c_contiguous
    assert difference(pixels, expected) < 0.5


def test_cmyk_comes_out_in_its_own_colours() -> None:
    data = encode(Image.fromarray(photo()).convert("CMYK"), "JPEG", quality=98)
    assert difference(decode_image(data), photo()) < 2  # what JPEG loses


def test_palette_and_alpha_become_rgb() -> None:
    image = Image.fromarray(photo())
    palette = image.quantize(64)
    assert (decode_image(encode(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    image.putalpha(40)
    assert (decode_image(encode(image, "PNG")) == photo()).all()  # alpha is dropped, not blended
    grey = image.convert("LA")
    assert (decode_image(encode(grey, "PNG")) == np.asarray(grey.convert("RGB"))).all()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = np.array([[0, 128, 129, 257], [32768, 65279, 65407, 65535]], dtype=np.uint16)
    pixels = decode_image(encode(Image.fromarray(values), "PNG"))
    assert (pixels[..., 0] == np.rint(values / 257)).all()
    assert (pixels == pixels[..., :1]).all()


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_one_pixel_is_an_image(image_format: str) -> None:
    assert decode_image(encode(Image.new("RGB", (1, 1), (9, 9, 9)), image_format)).shape == (1, 1, 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_a_truncated_jpeg_is_refused(keep: float, progressive: bool) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG", progressive=progressive)
    with pytest.raises(BrokenImageError, match=r"damaged|not an image"):
        decode_image(data[: int(len(data) * keep)])


def test_a_truncated_png_is_refused() -> None:
    data = encode(Image.fromarray(photo()), "PNG")
    with pytest.raises(BrokenImageError, match="damaged image"):
        decode_image(data[: len(data) // 2])


def test_bytes_after_the_end_do_no_harm() -> None:
    data = encode(Image.fromarray(photo()), "JPEG")
    assert (decode_image(data + b"junk" * 5) == decode_image(data)).all()


def test_text_and_nothing_are_refused_in_plain_words() -> None:
    with pytest.raises(BrokenImageError, match="not an image: begins with b'404 Not Foun'"):
        decode_image(b"404 Not Found\n" * 20)
    with pytest.raises(BrokenImageError, match="the file is empty"):
        decode_image(b"")
    with pytest.raises(BrokenImageError, match="floating-point"):
        decode_image(encode(Image.new("F", (4, 4)), "TIFF"))


def test_absurd_sizes_are_refused_before_anything_is_allocated() -> None:
    jpeg = bytearray(encode(Image.fromarray(photo()), "JPEG"))
    start_of_frame = jpeg.find(b"\xff\xc0")
    jpeg[start_of_frame + 5 : start_of_frame + 9] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(BrokenImageError, match="65000x65000 pixels are more than"):
        decode_image(bytes(jpeg))
    png = bytearray(encode(Image.fromarray(photo()), "PNG"))
    png[16:24] = struct.pack(">II", 100_000, 100_000)
    with pytest.raises(BrokenImageError):
        decode_image(bytes(png))


def test_a_jpeg_with_extra_bytes_inside_is_still_an_image() -> None:
    data = encode(Image.fromarray(photo()), "JPEG")
    scan = data.find(b"\xff\xda")
    assert decode_image(data[:scan] + b"\x00\x00\x00" + data[scan:]).shape == (48, 64, 3)
