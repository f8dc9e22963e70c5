"""MultimodalLM and its parts. Importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from mmfuse.models.adopt import AdoptedConfig, AdoptedLM
from mmfuse.models.build import NetworkSpec, build_network
from mmfuse.models.chat import ChatFormat, EncodedSample
from mmfuse.models.config import MultimodalConfig
from mmfuse.models.modeling import MultimodalLM, MultimodalOutput
from mmfuse.models.prefix import PrefixCache
from mmfuse.models.processor import MultimodalProcessor

AutoConfig.register(MultimodalConfig.model_type, MultimodalConfig)
AutoModelForCausalLM.register(MultimodalConfig, MultimodalLM)
AutoModelForImageTextToText.register(MultimodalConfig, MultimodalLM)
AutoConfig.register(AdoptedConfig.model_type, AdoptedConfig)
AutoModelForCausalLM.register(AdoptedConfig, AdoptedLM)
AutoModelForImageTextToText.register(AdoptedConfig, AdoptedLM)
AutoProcessor.register(MultimodalConfig, MultimodalProcessor)

__all__ = [
    "AdoptedConfig",
    "AdoptedLM",
    "ChatFormat",
    "EncodedSample",
    "MultimodalConfig",
    "MultimodalLM",
    "MultimodalOutput",
    "MultimodalProcessor",
    "NetworkSpec",
    "PrefixCache",
    "build_network",
]
