"""MultimodalConfig: everything needed to build a MultimodalLM, as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from mmfuse.errors import ConfigError, check_keys, unknown
from mmfuse.kernels import BACKEND_NAMES
from mmfuse.sequence import Modality

#: Decoder families that the layer loop is tested with, by the `model_type` of their config.
DECODER_FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "gemma3_text")


class MultimodalConfig(PreTrainedConfig):
    """Configuration of a `MultimodalLM`.

    Args:
        text_config: a Hugging Face decoder config, or a dict with its `model_type` (see `DECODER_FAMILIES`).
        encoders: for each modality the spec of its encoder, e.g. `{"image": {"type": "timm", "name": …}}`.
        connectors: for each modality the spec of its connector, e.g. `{"image": {"type": "mlp"}}`.
        fusion: a strategy by name, or `{"type": name, …arguments…}`.
        media_token_ids: for each modality the token id of its placeholder in `input_ids`.
        attention_backend: a backend of `mmfuse.kernels.attend`.
    """

    model_type = "mmfuse"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  (the type that transformers expects here)

    def __init__(
        self,
        text_config: PreTrainedConfig | Mapping[str, Any] | None = None,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        connectors: Mapping[str, Mapping[str, Any]] | None = None,
        fusion: str | Mapping[str, Any] = "causal",
        media_token_ids: Mapping[str, int] | None = None,
        attention_backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.text_config = decoder_config(text_config if text_config is not None else {"model_type": "llama"})
        self.encoders = {name: dict(spec) for name, spec in (encoders or {}).items()}
        self.connectors = {name: dict(spec) for name, spec in (connectors or {}).items()}
        self.fusion = fusion if isinstance(fusion, str) else dict(fusion)
        self.media_token_ids = dict(media_token_ids or {})
        if attention_backend not in BACKEND_NAMES:
            raise ConfigError(unknown("attention backend", attention_backend, BACKEND_NAMES))
        self.attention_backend = attention_backend
        _check_modalities(self.encoders, self.connectors, self.media_token_ids)
        # Tying happens inside the decoder; saying it here too would tie a second time under names we do not have.
        kwargs.setdefault("tie_word_embeddings", False)
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            kwargs.setdefault(token, getattr(self.text_config, token, None))
        super().__init__(**kwargs)


def decoder_config(spec: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedConfig:
    """A decoder config from itself or from a dict with `model_type`.

    Raises:
        ConfigError: a family that the loop is not tested with, a setting that it does not compute, or a key that the
            family's config does not have (Hugging Face configs take any key in silence).
    """
    if isinstance(spec, PreTrainedConfig):
        if spec.model_type not in DECODER_FAMILIES:
            raise ConfigError(unknown("decoder family", spec.model_type, DECODER_FAMILIES))
        return check_computable(spec)
    settings = dict(spec)
    family = settings.pop("model_type", None)
    if family not in DECODER_FAMILIES:
        raise ConfigError(unknown("decoder family (model_type)", family, DECODER_FAMILIES))
    config_class = CONFIG_MAPPING[family]
    check_keys(f"decoder {family!r}", settings, known_keys(config_class))
    return check_computable(config_class(**settings))


def check_computable(config: PreTrainedConfig, computed: Sequence[str] = ()) -> PreTrainedConfig:
    """The config, unless the decoder's own model would read from it what our loop would not.

    Args:
        config: of a decoder.
        computed: settings that a fusion strategy stands for.

    Raises:
        ConfigError: naming the setting.
    """
    for name in ("use_bidirectional_attention", "attn_logit_softcapping"):
        if getattr(config, name, None) and name not in computed:
            raise ConfigError(f"decoder {config.model_type!r}: {name} is set, which mmfuse does not compute")
    return config


def known_keys(config_class: type[PreTrainedConfig]) -> list[str]:
    """Every key that a Hugging Face config class gives a meaning to."""
    named = [field.name for field in fields(config_class)] if is_dataclass(config_class) else []
    return sorted({*named, *config_class().to_dict(), *config_class.attribute_map, "dtype", "rope_theta"})


def _check_modalities(*parts: Mapping[str, object]) -> None:
    media = [modality.name.lower() for modality in Modality if modality != Modality.TEXT]
    for part in parts:
        for name in part:
            if name not in media:
                raise ConfigError(unknown("modality", name, media))
    if not parts[0].keys() == parts[1].keys() == parts[2].keys():
        raise ConfigError(
            "encoders, connectors and media_token_ids must name the same modalities, got "
            + ", ".join(str(sorted(part)) for part in parts)
        )
