"""Which engines can serve a model under its fusion strategy, and why not."""

from __future__ import annotations

from dataclasses import dataclass

from mmfuse.fusion import Causal
from mmfuse.fusion.base import MediaPath
from mmfuse.models.adopt import AdoptedLM
from mmfuse.models.modeling import MultimodalLM


@dataclass(frozen=True)
class Engine:
    """Whether one engine can serve a model.

    Attributes:
        name: of the engine.
        serves: whether it computes what the model does.
        why: in one sentence.
    """

    name: str
    serves: bool
    why: str


def is_native(model: MultimodalLM) -> bool:
    """Whether `model` computes what the Hugging Face class that it was adopted from computes."""
    if not isinstance(model, AdoptedLM):
        return False
    native = model.adapter.native(model.vlm)
    return model.config.fusion == "native" or (type(model.fusion) is type(native) is Causal)


def engines(model: MultimodalLM) -> tuple[Engine, ...]:
    """What can serve a merged model."""
    ours = Engine("mmfuse", True, "`mmfuse generate`, and `generate()` of MultimodalLM.from_pretrained")
    if isinstance(model, AdoptedLM) and is_native(model):
        name = type(model.vlm).__name__
        return (
            ours,
            Engine("transformers", True, f"{name}.from_pretrained loads it, with 0 missing keys"),
            Engine("vLLM", True, f"it is an ordinary {name} checkpoint, for every vLLM that knows the architecture"),
        )
    fusion = type(model.fusion).__name__
    strange = f"needs `import mmfuse`, which registers the class; transformers alone does not know {fusion}"
    return (ours, Engine("transformers", True, strange), Engine("vLLM", False, _why_not_vllm(model)))


def _why_not_vllm(model: MultimodalLM) -> str:
    fusion = model.fusion
    if isinstance(fusion, Causal):
        return "the mask would be its own, but it does not know the class MultimodalLM"
    if fusion.media_path is not MediaPath.ROWS:
        return f"it has no layers in which media go another way than text, as under {type(fusion).__name__}"
    return f"its attention is causal or sliding, and under {type(fusion).__name__} the mask is neither"
