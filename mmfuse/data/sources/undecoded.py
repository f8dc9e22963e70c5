"""Media that are still the bytes of a file: knowing how long a sample is takes its text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mmfuse.data.samples import Sample
from mmfuse.data.sources.features import FEATURE_FORMATS, decode_features
from mmfuse.data.sources.images import decode_image, image_size


@dataclass(frozen=True, eq=False)
class Undecoded:
    """One medium of a sample, where its bytes can be had.

    Attributes:
        read: returns the bytes.
        ending: of the file's name, without dot; `""` for a picture of whatever format.
        where: names the medium in messages.
    """

    read: Callable[[], bytes]
    ending: str
    where: str

    @property
    def is_features(self) -> bool:
        """Whether it holds features, and no picture."""
        return self.ending in FEATURE_FORMATS

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture, upright; its pixels are not decoded.

        Raises:
            DataError: the bytes are damaged or of the wrong kind.
            OSError: they cannot be read.
        """
        return image_size(self.read(), self.where)

    def decode(self) -> Any:
        """Return the picture or the features.

        Raises:
            DataError: the bytes are damaged or of the wrong kind.
            OSError: they cannot be read.
        """
        data = self.read()
        if self.is_features:
            return decode_features(data, self.ending, self.where)
        return decode_image(data, self.where)


def decoded(sample: Sample) -> Sample:
    """`sample` with its media decoded."""
    images, audio, eeg = (tuple(map(decode, items)) for items in (sample.images, sample.audio, sample.eeg))
    return replace(sample, images=images, audio=audio, eeg=eeg)


def decode(medium: Any) -> Any:
    """What `medium` is when it is decoded; anything but an `Undecoded` is so already."""
    return medium.decode() if isinstance(medium, Undecoded) else medium
