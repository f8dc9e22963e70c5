"""The modalities beside text: the one table of their names in texts and as inputs, and features computed beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmfuse.errors import DataError


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


@dataclass(frozen=True, eq=False)
class Features:
    """Precomputed features of one medium, as files and users give them; see `of`.

    Attributes:
        values: float32 `[V, D]`, finite.
        where: names them in messages.
    """

    values: NDArray[np.float32]
    where: str

    @classmethod
    def of(cls, given: Any, where: str) -> Features:
        """Features from an array or tensor `[V, D]` of any float dtype.

        Raises:
            DataError: another type, shape or dtype, or values that are no finite float32 numbers.
        """
        array = given.detach().cpu() if isinstance(given, Tensor) else given
        if isinstance(array, Tensor):
            array = array.float().numpy() if array.is_floating_point() else array.numpy()
        if not isinstance(array, np.ndarray):
            raise DataError(f"{where}: features must be an array or a tensor [V, D], got {type(given).__name__}")
        if array.ndim != 2 or not array.size:
            raise DataError(f"{where}: features must be [V, D] (tokens, width), got shape {list(array.shape)}")
        if array.dtype.kind != "f":
            raise DataError(f"{where}: features must be floating point, got {array.dtype}")
        with np.errstate(over="ignore"):  # what does not fit into float32 is named below
            values = array.astype(np.float32)
        if not np.isfinite(values).all():
            broken = int((~np.isfinite(values)).sum())
            raise DataError(f"{where}: {broken} of {values.size} features are NaN or infinite")
        return cls(values, where)

    def plain(self) -> Features:
        """The same features without structure: every token is the mean over the medium's tokens."""
        return replace(self, values=np.broadcast_to(self.values.mean(axis=0), self.values.shape).copy())
