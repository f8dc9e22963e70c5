"""Reading precomputed features, from formats that hold numbers and cannot hold code."""

from __future__ import annotations

import io
from typing import Any, Final

import numpy as np
from safetensors.torch import load

from mmfuse.errors import DataError
from mmfuse.models.media import Features

#: Endings of the names of files that hold features.
FEATURE_FORMATS: Final = ("npy", "safetensors")


def decode_features(data: bytes, ending: str, where: str) -> Features:
    """Return the features `[V, D]` in `data`.

    Args:
        data: the bytes of a `.npy` file, or of a `.safetensors` file with one tensor.
        ending: which of the two, see `FEATURE_FORMATS`.
        where: names the features in messages.

    Raises:
        DataError: the bytes are damaged or hold pickled objects, or what they hold is no finite `[V, D]` of floating
            point numbers.
    """
    read = _from_npy if ending == "npy" else _from_safetensors
    try:
        given = read(data)
    except Exception as error:  # readers meet damage with errors of many types
        raise DataError(f"{where}: cannot read these features: {error}") from error
    return Features.of(given, where)


def _from_npy(data: bytes) -> Any:
    file = io.BytesIO(data)
    array = np.lib.format.read_array(file, allow_pickle=False)
    if rest := len(data) - file.tell():
        raise ValueError(f"{rest} bytes follow the array")
    return array


def _from_safetensors(data: bytes) -> Any:
    tensors = load(data)
    if len(tensors) != 1:
        raise ValueError(f"expected one tensor, found {len(tensors)}: {', '.join(sorted(tensors))}")
    return next(iter(tensors.values()))
