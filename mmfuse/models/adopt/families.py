"""The architectures that mmfuse adopts. To add one: a class beside these, and a line in `ADAPTERS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from mmfuse.errors import ConfigError, unknown
from mmfuse.models.adopt.base import Adapter
from mmfuse.models.adopt.gemma import Gemma3, PaliGemma
from mmfuse.models.adopt.idefics3 import Idefics3
from mmfuse.models.adopt.internvl import InternVL
from mmfuse.models.adopt.llava import Llava, LlavaNext, LlavaOnevision
from mmfuse.models.adopt.qwen2_vl import Qwen2VL, Qwen25VL

#: By the `model_type` of the architecture's config.
ADAPTERS: Final[Mapping[str, Adapter]] = MappingProxyType(
    {
        "llava": Llava(),
        "llava_next": LlavaNext(),
        "llava_onevision": LlavaOnevision(),
        "idefics3": Idefics3(),
        "smolvlm": Idefics3(),
        "paligemma": PaliGemma(),
        "gemma3": Gemma3(),
        "qwen2_vl": Qwen2VL(),
        "qwen2_5_vl": Qwen25VL(),
        "internvl": InternVL(),
    }
)


def adapter_for(model_type: object) -> Adapter:
    """The adapter of an architecture.

    Raises:
        ConfigError: an architecture that mmfuse does not know, with those that it knows and how to add one.
    """
    found = ADAPTERS.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise ConfigError(
            f"{unknown('vision-language model (model_type)', model_type, ADAPTERS)}. To add one, write an Adapter in "
            "mmfuse/models/adopt/ that names its tower, projector and decoder, and enter it in ADAPTERS (docs/adopt.md)"
        )
    return found
