"""Connectors between encoder and decoder, found by name in a JSON spec."""

from __future__ import annotations

import inspect
from typing import Any

from mmfuse.errors import ConfigError, check_keys, unknown
from mmfuse.models.connectors.base import Connector
from mmfuse.models.connectors.mlp import LinearConnector, MLPConnector
from mmfuse.models.connectors.perceiver import PerceiverConnector
from mmfuse.models.connectors.pooling import AvgPoolConnector, PixelShuffleConnector

__all__ = [
    "CONNECTORS",
    "AvgPoolConnector",
    "Connector",
    "LinearConnector",
    "MLPConnector",
    "PerceiverConnector",
    "PixelShuffleConnector",
    "build_connector",
]

_CLASSES = (LinearConnector, MLPConnector, PerceiverConnector, PixelShuffleConnector, AvgPoolConnector)
CONNECTORS: dict[str, type[Connector]] = {cls.name: cls for cls in _CLASSES}


def build_connector(spec: dict[str, Any], in_features: int, out_features: int, grid: tuple[int, int]) -> Connector:
    """Build a connector from `{"type": NAME, ...options}`.

    Args:
        spec: the name and the options of that connector; widths and grid do not belong into it.
        in_features: width of the encoder's features.
        out_features: width of the decoder.
        grid: (rows, columns) of the encoder's patches.

    Raises:
        ConfigError: for an unknown type or option, or a missing one.

    >>> build_connector({"type": "pixel_shuffle", "factor": 3}, 1152, 2048, (27, 27)).num_tokens(729)
    81
    """
    if "type" not in spec:
        raise ConfigError(f"a connector spec needs `type`. Known: {', '.join(sorted(CONNECTORS))}")
    kind = spec["type"]
    if kind not in CONNECTORS:
        raise ConfigError(unknown("connector", kind, CONNECTORS))
    options = {key: value for key, value in spec.items() if key != "type"}
    parameters = list(inspect.signature(CONNECTORS[kind]).parameters.values())[3:]
    check_keys(f"connector {kind!r}", options, [parameter.name for parameter in parameters])
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if missing:
        raise ConfigError(f"connector {kind!r} needs {', '.join(missing)}")
    return CONNECTORS[kind](in_features, out_features, grid, **options)
