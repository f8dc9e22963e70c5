"""Fusion strategies. To add one: a file beside these, and a line in `FUSIONS`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mmfuse.errors import ConfigError, check_keys, unknown
from mmfuse.fusion.base import CLASSES, IGNORED_LABEL, Fusion
from mmfuse.fusion.causal import Causal
from mmfuse.fusion.composite import CompositeAttention
from mmfuse.fusion.cross_attention import GatedCrossAttention
from mmfuse.fusion.hyper_attention import HyperAttention
from mmfuse.fusion.moda import ModularDuplexAttention
from mmfuse.fusion.modality_mutual import ModalityMutual
from mmfuse.fusion.naavit import NAAViT
from mmfuse.fusion.prefix_lm import PrefixLM
from mmfuse.fusion.saisa import SAISA
from mmfuse.fusion.shape import DecoderShape

#: The names by which configs, the command line and `mmfuse.testing` know the strategies.
FUSIONS: dict[str, type[Fusion]] = {
    "causal": Causal,
    "prefix_lm": PrefixLM,
    "mma": ModalityMutual,
    "naavit": NAAViT,
    "saisa": SAISA,
    "composite": CompositeAttention,
    "moda": ModularDuplexAttention,
    "cross_attention": GatedCrossAttention,
    "hyper_attention": HyperAttention,
}


def build_fusion(spec: str | Mapping[str, Any]) -> Fusion:
    """A strategy from its name, or from `{"type": name, …arguments…}`.

    Raises:
        ConfigError: an unknown name or argument.
    """
    settings = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = settings.pop("type", None)
    if name not in FUSIONS:
        raise ConfigError(unknown("fusion", name, FUSIONS))
    strategy = FUSIONS[name]
    check_keys(f"fusion {name!r}", settings, list(inspect.signature(strategy).parameters))
    return strategy(**settings)


__all__ = [
    "CLASSES",
    "FUSIONS",
    "IGNORED_LABEL",
    "SAISA",
    "Causal",
    "CompositeAttention",
    "DecoderShape",
    "Fusion",
    "GatedCrossAttention",
    "HyperAttention",
    "ModalityMutual",
    "ModularDuplexAttention",
    "NAAViT",
    "PrefixLM",
    "build_fusion",
]
