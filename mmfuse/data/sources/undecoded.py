"""Media that are still the bytes of a file: knowing how long a sample is takes its text alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mmfuse.data.decoders import DEFAULT_BUDGET, FEATURE_FORMATS, Budget, decode_file, picture_size
from mmfuse.data.samples import Sample
from mmfuse.models.media import Features


@dataclass(frozen=True, eq=False)
class Undecoded:
    """One medium of a sample, where its bytes can be had.

    Attributes:
        read: returns the bytes.
        ending: of the file's name, without dot; `PICTURE` for an image of whatever format.
        where: names the medium in messages.
        budget: how large it may be.
    """

    read: Callable[[], bytes]
    ending: str
    where: str
    budget: Budget = DEFAULT_BUDGET

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
        return picture_size(self.read(), self.where)

    def decode(self) -> Any:
        """Return the picture or the features.

        Raises:
            DataError: the bytes are damaged, of the wrong kind, or more than the budget allows.
            OSError: they cannot be read.
        """
        found = decode_file(self.read(), self.ending, self.where, self.budget)
        return Features.of(found, self.where) if self.is_features else found


def decoded(sample: Sample) -> Sample:
    """`sample` with its media decoded."""
    images, audio, eeg = (tuple(map(decode, items)) for items in (sample.images, sample.audio, sample.eeg))
    return replace(sample, images=images, audio=audio, eeg=eeg)


def decode(medium: Any) -> Any:
    """What `medium` is when it is decoded; anything but an `Undecoded` is so already."""
    return medium.decode() if isinstance(medium, Undecoded) else medium
