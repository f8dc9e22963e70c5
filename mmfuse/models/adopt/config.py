"""The config of an adopted vision-language model: its own, and the fusion strategy that it runs under."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mmfuse.errors import ConfigError, unknown
from mmfuse.kernels import BACKEND_NAMES
from mmfuse.models.adopt.families import adapter_for
from mmfuse.models.config import check_computable
from mmfuse.models.layer_parts import PARTS

#: The strategy that an architecture was trained with.
NATIVE = "native"


class AdoptedConfig(PreTrainedConfig):
    """Configuration of an `AdoptedLM`.

    Args:
        vlm_config: the config of a Hugging Face vision-language model, or a dict with its `model_type`.
        fusion: `native`, a strategy by name, or `{"type": name, …arguments…}`.
        attention_backend: a backend of `mmfuse.kernels.attend`.

    Raises:
        ConfigError: an architecture, a decoder or a backend that mmfuse does not know.
    """

    model_type = "mmfuse_vlm"
    sub_configs = {"vlm_config": AutoConfig}  # noqa: RUF012  (the type that transformers expects here)

    def __init__(
        self,
        vlm_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        fusion: str | Mapping[str, Any] = NATIVE,
        attention_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        own = _vlm_config(vlm_config if vlm_config is not None else {"model_type": "llava"})
        self.fusion = fusion if isinstance(fusion, str) else dict(fusion)
        if attention_backend not in BACKEND_NAMES:
            raise ConfigError(unknown("attention backend", attention_backend, BACKEND_NAMES))
        self.attention_backend = attention_backend
        # Tying happens inside the adopted model; saying it here too would tie a second time under names we do not have.
        kwargs.setdefault("tie_word_embeddings", False)
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(token, getattr(own.get_text_config(), token, None))
        super().__init__(**kwargs)
        # Last: the base class sets one attention function for all configs that it finds.
        self.vlm_config = own

    @property
    def text_config(self) -> PreTrainedConfig:
        """The config of the decoder."""
        return self.vlm_config.get_text_config()

    @property
    def media_token_ids(self) -> dict[str, int]:
        """For each modality the token id of its placeholder in `input_ids`."""
        return {"image": self.vlm_config.image_token_id}


def _vlm_config(spec: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    if not isinstance(spec, PreTrainedConfig):
        settings = dict(spec)
        family = settings.pop("model_type", None)
        adapter_for(family)
        spec = CONFIG_MAPPING[family](**settings)
    adapter = adapter_for(spec.model_type)
    text_config = spec.get_text_config()
    if text_config.model_type not in PARTS:
        raise ConfigError(unknown(f"decoder of a {spec.model_type}", text_config.model_type, PARTS))
    check_computable(text_config, adapter.native_settings)
    return spec
