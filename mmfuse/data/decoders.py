"""The one table of file formats that samples may hold: what the bytes of a file become, and how large it may be.

Every source decodes its records and media here, and nowhere else. A format that is not in the table is refused. None of
them can hold code: no pickle in any disguise, and nothing is unpacked that the name does not say (no implicit gzip).
Sizes are checked against a `Budget` before decoding, from the file's own header, because a file of some kilobytes can
claim gigabytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from mmfuse.errors import DataError, unknown


@dataclass(frozen=True)
class Budget:
    """The most that one file may take.

    Attributes:
        bytes: of the file.
        pixels: of an image, width times height.
        seconds: of a recording.
        values: numbers in an array or a recording, over all channels.
    """

    bytes: int = 256 << 20
    pixels: int = 89_478_485  # where Pillow begins to warn of decompression bombs
    seconds: float = 3600.0
    values: int = 1 << 28

    def check(self, name: str, found: float, where: str) -> None:
        """Raise DataError if `found` is more than the limit called `name`."""
        limit = getattr(self, name)
        if found > limit:
            raise DataError(f"{where}: {found:,.10g} {name}, more than the limit of {limit:,} (a decompression bomb?)")


DEFAULT_BUDGET: Final = Budget()


@dataclass(frozen=True, eq=False)
class Recording:
    """Audio or EEG as it was recorded.

    Attributes:
        values: float32 `[T, C]`: audio between -1 and 1, EEG in the units of the file (microvolts as a rule).
        rate: values of a channel in a second.
        channels: names, where the file gives them.
    """

    values: NDArray[np.float32]
    rate: float
    channels: tuple[str, ...] = ()


Decoder = Callable[[bytes, str, Budget], Any]


#: Image formats by the ending of a file's name, as Pillow calls them; Pillow is asked for these and no other.
PICTURES: Final[Mapping[str, str]] = MappingProxyType(
    {
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
)
#: Stands for the ending of an image whose format only its bytes tell.
PICTURE: Final = "image"
#: Formats of precomputed features.
FEATURE_FORMATS: Final = ("npy", "safetensors")

_PILLOW_FORMATS: Final = tuple(sorted(set(PICTURES.values())))
_GREY: Final = ("1", "L", "LA")
_DEEP: Final = ("I", "F")  # I;16 and its kin begin with I
_SIDEWAYS: Final = 5  # from this EXIF orientation on, width and height change places
_FIRST_FRAME: Final = ("GIF", "MPO")  # phones store a thumbnail or a depth map behind a JPEG (MPO)


def decode_file(data: bytes, ending: str, where: str, budget: Budget = DEFAULT_BUDGET) -> Any:
    """Decode the bytes of a file by the ending of its name.

    Args:
        data: the bytes.
        ending: without dot, in any case; see `DECODERS`.
        where: names the file in messages.
        budget: limits, checked before decoding.

    Returns:
        A PIL image, upright, in mode L (grey) or RGB; a `Recording`; an array; what JSON holds; or a string.

    Raises:
        DataError: an unknown format, more than the budget allows, or damaged bytes.
    """
    found = DECODERS.get(ending.lower())
    if found is None:
        raise DataError(f"{where}: {unknown('format', ending, DECODERS)}; pickles and archives are never opened")
    budget.check("bytes", len(data), where)
    try:
        return found(data, where, budget)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{where}: decoding needs more memory than there is") from error
    except Exception as error:  # decoders meet damage with errors of many types
        what = "image" if found is _picture else f".{ending}"
        raise DataError(f"{where}: cannot read this {what}: {error or type(error).__name__}") from error


def picture_header(data: bytes, where: str) -> Image.Image:
    """Open an image and read its header alone: format and size are known, and nothing is decoded.

    Raises:
        DataError: no image, or of a format that is not in `PICTURES`.
    """
    try:
        return Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS)
    except Exception as error:
        raise DataError(f"{where}: cannot read this image: {error}") from error


def picture_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height of an image, upright, from its header alone.

    Raises:
        DataError: no image, or of a format that is not in `PICTURES`.
    """
    image = picture_header(data, where)
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= _SIDEWAYS
    return (image.height, image.width) if turned else (image.width, image.height)


def _picture(data: bytes, where: str, budget: Budget) -> Image.Image:
    """The format is read from the bytes: files of the web are often named by another one."""
    image = picture_header(data, where)
    budget.check("pixels", image.width * image.height, where)
    if image.format not in _FIRST_FRAME and getattr(image, "is_animated", False):
        raise DataError(f"{where}: the image has several frames; give them as separate images")
    if image.mode.startswith(_DEEP):
        raise DataError(
            f"{where}: the image has mode {image.mode}, more than 8 bits per channel; scale it to 8 bits first"
        )
    image.load()
    if "exif" in image.info:
        image = ImageOps.exif_transpose(image)
    mode = "L" if image.mode in _GREY else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _audio(data: bytes, where: str, budget: Budget) -> Recording:
    try:
        import soundfile
    except ImportError as error:
        raise DataError(f"{where}: audio needs the package soundfile: pip install 'mmfuse[audio]'") from error
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        budget.check("seconds", file.frames / file.samplerate, where)
        budget.check("values", file.frames * file.channels, where)
        values = file.read(dtype="float32", always_2d=True)
        if len(values) != file.frames:
            raise DataError(f"{where}: the recording is cut off: {len(values)} of {file.frames} values are there")
        return Recording(values, float(file.samplerate))


def _npy(data: bytes, where: str, budget: Budget) -> NDArray[Any]:
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{where}: the array holds pickled objects, which can run code")
    count = int(np.prod(shape, dtype=object))
    budget.check("values", count, where)
    if len(data) - file.tell() != count * dtype.itemsize:
        raise DataError(f"{where}: the header says {count} values of {dtype}, {len(data) - file.tell()} bytes follow")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _safetensors(data: bytes, where: str, budget: Budget) -> NDArray[Any]:
    """The only tensor of a file; bfloat16, which NumPy lacks, becomes float32."""
    from safetensors.torch import load

    size = int.from_bytes(data[:8], "little")
    if size > len(data) - 8:
        raise DataError(f"{where}: the header should have {size} bytes, the file has {len(data)}")
    header = json.loads(data[8 : 8 + size])
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    if len(shapes) != 1:
        raise DataError(f"{where}: expected one tensor, found {len(shapes)}: {', '.join(sorted(shapes))}")
    budget.check("values", int(np.prod(next(iter(shapes.values())), dtype=object)), where)
    (tensor,) = load(data).values()
    values: NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return values


_EDF_FIELDS: Final = (16, 80, 8, 8, 8, 8, 8, 80, 8, 32)  # bytes of each field of a signal's header


def _edf(data: bytes, where: str, budget: Budget) -> Recording:
    """European Data Format (Kemp et al. 1992): an ASCII header, then records of 16-bit numbers, channel by channel.

    Channels must have one rate. Annotations of EDF+ are left out.
    """
    records, seconds, count = int(data[236:244]), float(data[244:252]), int(data[252:256])
    if count < 1 or records < 0 or seconds <= 0 or int(data[184:192]) != 256 * (count + 1):
        raise DataError(f"{where}: no EDF header that can be used: {records} records of {seconds} s, {count} signals")
    budget.check("seconds", records * seconds, where)
    columns, at = [], 256
    for width in _EDF_FIELDS:
        columns.append([data[at + width * n : at + width * (n + 1)].decode("latin-1").strip() for n in range(count)])
        at += width * count
    sizes = [int(value) for value in columns[8]]
    budget.check("values", records * sum(sizes), where)
    body = np.frombuffer(data, "<i2", offset=at)
    if min(sizes) < 1 or len(body) != records * sum(sizes):
        raise DataError(f"{where}: {len(body)} values follow the header, expected {records * sum(sizes)}")
    kept = [n for n, label in enumerate(columns[0]) if label != "EDF Annotations"]
    if not kept or len({sizes[n] for n in kept}) != 1:
        raise DataError(f"{where}: expected signals of one rate, found {sorted({sizes[n] / seconds for n in kept})} Hz")
    ends = np.cumsum(sizes)
    rows = body.reshape(records, -1)
    values = np.empty((records * sizes[kept[0]], len(kept)), np.float32)
    for column, n in enumerate(kept):
        low, high, digital_low, digital_high = (float(columns[field][n]) for field in (3, 4, 5, 6))
        gain = (high - low) / (digital_high - digital_low)
        values[:, column] = (rows[:, ends[n] - sizes[n] : ends[n]].reshape(-1) - digital_low) * gain + low
    return Recording(values, sizes[kept[0]] / seconds, tuple(columns[0][n] for n in kept))


def _json(data: bytes, where: str, budget: Budget) -> Any:
    return json.loads(data.decode("utf-8"))


def _text(data: bytes, where: str, budget: Budget) -> str:
    text = data.decode("utf-8")
    if not re.search(r"\S", text):
        raise DataError(f"{where}: the text is empty")
    return text


#: By the ending of a file's name.
DECODERS: Final[Mapping[str, Decoder]] = MappingProxyType(
    {
        **dict.fromkeys((*PICTURES, PICTURE), _picture),
        **dict.fromkeys(("wav", "flac", "ogg", "mp3"), _audio),
        "npy": _npy,
        "safetensors": _safetensors,
        "edf": _edf,
        "json": _json,
        "txt": _text,
    }
)
