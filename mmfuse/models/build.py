"""From the few lines of a YAML to a model and its processor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipImageProcessor,
)
from transformers.image_utils import PILImageResampling

from mmfuse.errors import ConfigError, unknown
from mmfuse.models.adopt import NATIVE, AdoptedConfig, AdoptedLM
from mmfuse.models.adopt.processor import AdoptedProcessor
from mmfuse.models.attention import ATTENTION
from mmfuse.models.config import MultimodalConfig, decoder_config, known_keys
from mmfuse.models.encoders import Encoder, VisionEncoder
from mmfuse.models.media import MEDIA
from mmfuse.models.modeling import MultimodalLM
from mmfuse.models.processor import MultimodalProcessor


@dataclass(frozen=True)
class NetworkSpec:
    """The parts of a model, as a config names them.

    Attributes:
        vlm: instead of decoder, encoders and connectors, a whole model: `{"pretrained": folder or hub name}` of a
            Hugging Face vision-language model, which is adopted with its own processor and chat template, or of a
            model that mmfuse saved. What else stands there is its config, as for `decoder`.
        decoder: a Hugging Face decoder config with its `model_type`, `{"pretrained": folder or hub name}`, or both:
            then what is given must agree with the checkpoint. On the meta device `pretrained` is not looked at.
        encoders: for each modality the spec of its encoder.
        connectors: for each modality the spec of its connector.
        fusion: a strategy by name, or `{"type": name, …}`; if not given, `causal`, and for a `vlm` its own.
        chat_format: the fields of a `ChatFormat`.
        attention_backend: a backend of `mmfuse.kernels.attend`.
    """

    decoder: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    connectors: dict[str, dict[str, Any]] = field(default_factory=dict)
    fusion: str | dict[str, Any] | None = None
    chat_format: dict[str, str] = field(default_factory=dict)
    attention_backend: str = "auto"
    vlm: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        parts = [name for name in ("decoder", "encoders", "connectors", "chat_format") if getattr(self, name)]
        if self.vlm is not None and parts:
            raise ConfigError(f"network: vlm is a whole model; take out {', '.join(parts)}")
        if self.vlm is None and not self.decoder:
            raise ConfigError("network: name a decoder with its model_type or pretrained, or a whole model under vlm")


def build_network(spec: NetworkSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[MultimodalLM, MultimodalProcessor]:
    """Build a model and the processor that feeds it. A `vlm` brings its own tokenizer.

    The tokenizer gets the placeholders of the model's modalities, such as `<image>`, and, if it has none, a padding
    token; the decoder's vocabulary grows to hold them, and a decoder without a `vocab_size` of its own takes the
    tokenizer's.

    Raises:
        ConfigError: unknown names or keys, or a vocabulary that is too small.
    """
    if spec.vlm is not None:
        return _whole_model(spec)
    media_token_ids = _placeholder_ids(spec.encoders, tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    settings = dict(spec.decoder)
    pretrained = settings.pop("pretrained", None)
    if torch.get_default_device().type == "meta" and settings:
        pretrained = None
    config = MultimodalConfig(
        text_config=_checkpoint_config(pretrained, settings) if pretrained else _decoder_for(settings, tokenizer),
        encoders=spec.encoders,
        connectors=spec.connectors,
        fusion="causal" if spec.fusion is None else spec.fusion,
        media_token_ids=media_token_ids,
        attention_backend=spec.attention_backend,
    )
    model = MultimodalLM(config)
    if pretrained:
        # In the dtype of the other parts: the trainer's precision says what is computed in fewer bits.
        dtype = torch.get_default_dtype()
        model.decoder = AutoModelForCausalLM.from_pretrained(pretrained, attn_implementation=ATTENTION, dtype=dtype)
    if len(tokenizer) > config.text_config.vocab_size:
        model.decoder.resize_token_embeddings(len(tokenizer))
        config.text_config.vocab_size = len(tokenizer)
    _set_generation_tokens(model, tokenizer)
    return model, processor_for(model, tokenizer, spec.chat_format)


def _whole_model(spec: NetworkSpec) -> tuple[MultimodalLM, MultimodalProcessor]:
    """A saved model of mmfuse, or a vision-language model of Hugging Face under our loop, and its processor."""
    settings = dict(spec.vlm or {})
    pretrained = settings.pop("pretrained", None)
    if pretrained is None:
        raise ConfigError("network.vlm: `pretrained` is missing: the folder or hub name of the model")
    saved, _ = PreTrainedConfig.get_config_dict(pretrained)
    _check_agreement(saved, settings, pretrained)
    if saved.get("model_type") in (MultimodalConfig.model_type, AdoptedConfig.model_type):
        model = MultimodalLM.from_pretrained(pretrained, dtype=torch.get_default_dtype())
        if spec.fusion not in (None, model.config.fusion):
            raise ConfigError(f"network: {pretrained} was saved under {model.config.fusion!r}, not {spec.fusion!r}")
    else:
        fusion = NATIVE if spec.fusion is None else spec.fusion
        model = MultimodalLM.from_vlm(pretrained, fusion, spec.attention_backend, dtype=torch.get_default_dtype())
    return model, load_processor(model, pretrained)


def load_processor(model: MultimodalLM, folder: str | Path) -> MultimodalProcessor:
    """The processor that is saved beside a model or an adapter; an `AdoptedProcessor` for an adopted model."""
    if isinstance(model, AdoptedLM):
        # It has the methods that training and evaluation call, and is no ProcessorMixin: it holds one.
        return cast(MultimodalProcessor, AdoptedProcessor(AutoProcessor.from_pretrained(folder)))
    loaded: MultimodalProcessor = MultimodalProcessor.from_pretrained(folder)
    return loaded


def _check_agreement(saved: Mapping[str, Any], settings: Mapping[str, Any], where: str, path: str = "vlm") -> None:
    """Raise ConfigError where a config on disk says something else than the settings that stand beside its name."""
    for name, value in settings.items():
        found = saved.get(name)
        if isinstance(value, Mapping) and isinstance(found, Mapping):
            _check_agreement(found, value, where, f"{path}.{name}")
        elif name in saved and found != value:
            raise ConfigError(f"{path}: {name} is {value!r} in the config and {found!r} in {where}")


def processor_for(
    model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, chat_format: dict[str, str] | None = None
) -> MultimodalProcessor:
    """The processor that fits a model: tokens and features by modality, and size and normalisation of its images."""
    encoders = {name: cast(Encoder, encoder) for name, encoder in model.encoders.items()}
    image_processor = SiglipImageProcessor()
    if isinstance(vision := encoders.get("image"), VisionEncoder):
        height, width = vision.image_size
        image_processor = SiglipImageProcessor(
            size={"height": height, "width": width},
            resample=PILImageResampling.BICUBIC,
            image_mean=list(vision.image_mean),
            image_std=list(vision.image_std),
            do_convert_rgb=True,
        )
    return MultimodalProcessor(
        image_processor,
        tokenizer,
        media_tokens={name: model.visual_tokens(name) for name in encoders},
        feature_shapes={name: encoder.input_shape for name, encoder in encoders.items() if encoder.precomputed},
        chat_format=chat_format,
    )


def _placeholder_ids(modalities: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The token id of each modality's placeholder, which is added to the tokenizer if it is missing."""
    found = {}
    for name in modalities:
        if name not in MEDIA:
            raise ConfigError(unknown("modality", name, MEDIA))
        text = MEDIA[name].placeholder
        if tokenizer.convert_tokens_to_ids(text) in (None, tokenizer.unk_token_id):
            tokenizer.add_special_tokens({"additional_special_tokens": [text]}, replace_extra_special_tokens=False)
        found[name] = cast(int, tokenizer.convert_tokens_to_ids(text))
    return found


def _checkpoint_config(pretrained: str, settings: dict[str, Any]) -> PreTrainedConfig:
    """The config of a checkpoint, after a check that it is what `settings` say."""
    config = decoder_config(AutoConfig.from_pretrained(pretrained))
    # Checkpoints hold keys that no class reads; a config of ours that had them could not be loaded again.
    for stranger in config.to_dict().keys() - set(known_keys(type(config))):
        delattr(config, stranger)
    for name, value in settings.items():
        found = getattr(config, name, None)
        if found != value:
            raise ConfigError(f"decoder: {name} is {value!r} in the config and {found!r} in {pretrained}")
    return config


def _decoder_for(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = decoder_config({"vocab_size": len(tokenizer), **ids, **settings})
    if config.vocab_size < len(tokenizer):
        raise ConfigError(
            f"decoder vocab_size is {config.vocab_size}, but the tokenizer has {len(tokenizer)} tokens; leave it out"
        )
    return config


def _set_generation_tokens(model: MultimodalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    for target in (model.config, model.generation_config):
        target.pad_token_id = tokenizer.pad_token_id
        target.bos_token_id = tokenizer.bos_token_id
        target.eos_token_id = tokenizer.eos_token_id
