"""Decoding images, with a clear answer for those that cannot be used."""

from __future__ import annotations

import io
from typing import Final

from PIL import ExifTags, Image, ImageOps

from mmfuse.errors import DataError

#: By file name ending; Pillow is asked for these formats and no other.
FORMATS: Final = {
    "png": "PNG",
    "jpg": "JPEG",
    "jpeg": "JPEG",
    "webp": "WEBP",
    "bmp": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "ppm": "PPM",
    "pgm": "PPM",
}
_DECODERS: Final = tuple(sorted(set(FORMATS.values())))
_GREY: Final = ("1", "L", "LA")
_SIDEWAYS: Final = 5  # Exif orientations from here on exchange width and height
_DEEP: Final = ("I", "F")  # I;16 and its kin begin with I


def decode_image(data: bytes, where: str) -> Image.Image:
    """Return the image in `data`, upright, in mode L (grey) or RGB.

    Args:
        data: the bytes of an image file.
        where: names the image in messages.

    Raises:
        DataError: the bytes are damaged, or the image is animated, deeper than 8 bits, or larger than Pillow's limit
            against decompression bombs (`PIL.Image.MAX_IMAGE_PIXELS`), at which Pillow itself only warns.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_DECODERS)
        problem = _problem(image)
        if problem is None:
            image.load()
    except Exception as error:  # decoders meet damage with errors of many types
        raise DataError(f"{where}: cannot read this image: {error}") from error
    if problem is not None:
        raise DataError(f"{where}: {problem}")
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    mode = "L" if image.mode in _GREY else "RGB"
    return image if image.mode == mode else image.convert(mode)


def image_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of the image in `data`, upright, from its head alone.

    Raises:
        DataError: the bytes are damaged.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_DECODERS) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= _SIDEWAYS
    except Exception as error:  # decoders meet damage with errors of many types
        raise DataError(f"{where}: cannot read this image: {error}") from error
    return (height, width) if turned else (width, height)


def _problem(image: Image.Image) -> str | None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        size = f"{image.width} x {image.height}"
        return f"the image has {size} pixels, more than the limit of {limit} (a decompression bomb?)"
    # Phones store a thumbnail or depth map behind a JPEG (MPO); the photograph is the first.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return "the image has several frames; give them as separate images"
    if image.mode.startswith(_DEEP):
        return f"the image has mode {image.mode}, more than 8 bits per channel; scale it to 8 bits first"
    return None
