"""Vision-language models of Hugging Face under our layer loop."""

from __future__ import annotations

from mmfuse.models.adopt.base import Adapter, EncodedMedia
from mmfuse.models.adopt.config import NATIVE, AdoptedConfig
from mmfuse.models.adopt.families import ADAPTERS, adapter_for
from mmfuse.models.adopt.modeling import AdoptedLM, adopt

__all__ = ["ADAPTERS", "NATIVE", "Adapter", "AdoptedConfig", "AdoptedLM", "EncodedMedia", "adapter_for", "adopt"]
