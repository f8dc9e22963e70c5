"""The modalities beside text: the one table of what they are called in texts, in messages and as a model's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Medium:
    """The names of one modality.

    Attributes:
        placeholder: marks where one stands in a text.
        plural: what messages call several of them.
        features: the model's keyword for precomputed features `[N, V, D]`.
        raw: the model's keyword for what an encoder with a tower takes; None where no such encoder exists.
    """

    placeholder: str
    plural: str
    features: str
    raw: str | None = None


#: By the name of the `Modality`, in lower case.
MEDIA: Final[Mapping[str, Medium]] = MappingProxyType(
    {
        "image": Medium("<image>", "images", features="image_features", raw="pixel_values"),
        "audio": Medium("<audio>", "audio clips", features="audio_features"),
        "eeg": Medium("<eeg>", "EEG recordings", features="eeg_features"),
    }
)

#: Every keyword by which a model may take a medium.
INPUT_NAMES: Final = tuple(
    name for medium in MEDIA.values() for name in (medium.raw, medium.features) if name is not None
)
