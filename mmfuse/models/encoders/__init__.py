"""Encoders, found by name in a JSON spec: one adapter for each vision library, and features computed beforehand."""

from __future__ import annotations

import inspect

from mmfuse.errors import ConfigError, check_keys, unknown
from mmfuse.models.encoders.base import Encoder, Spec, VisionEncoder
from mmfuse.models.encoders.hf import HFEncoder
from mmfuse.models.encoders.openclip import OpenCLIPEncoder
from mmfuse.models.encoders.precomputed import PrecomputedEncoder
from mmfuse.models.encoders.timm_vit import TimmEncoder

__all__ = [
    "ENCODERS",
    "Encoder",
    "HFEncoder",
    "OpenCLIPEncoder",
    "PrecomputedEncoder",
    "TimmEncoder",
    "VisionEncoder",
    "build_encoder",
]

_CLASSES: tuple[type[Encoder], ...] = (HFEncoder, TimmEncoder, OpenCLIPEncoder, PrecomputedEncoder)
ENCODERS: dict[str, type[Encoder]] = {cls.name: cls for cls in _CLASSES}


def build_encoder(spec: Spec) -> Encoder:
    """Build an encoder from `{"type": NAME, ...constructor arguments}`.

    Store the result's `spec`, not the one given here, in a model config: it builds without a checkpoint.

    >>> vit = {"model_type": "vit", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> build_encoder({"type": "hf", "config": {**vit, "image_size": 32, "patch_size": 8}}).num_tokens
    16

    Raises:
        ConfigError: for an unknown type or argument.
    """
    if "type" not in spec:
        raise ConfigError(f"an encoder spec needs `type`. Known: {', '.join(sorted(ENCODERS))}")
    kind = spec["type"]
    if kind not in ENCODERS:
        raise ConfigError(unknown("encoder", kind, ENCODERS))
    arguments = {key: value for key, value in spec.items() if key != "type"}
    parameters = list(inspect.signature(ENCODERS[kind]).parameters)
    check_keys(f"encoder {kind!r}", arguments, parameters)
    missing = [
        p.name
        for p in inspect.signature(ENCODERS[kind]).parameters.values()
        if p.default is p.empty and p.name not in arguments
    ]
    if missing:
        raise ConfigError(f"encoder {kind!r} needs {', '.join(missing)}")
    return ENCODERS[kind](**arguments)
