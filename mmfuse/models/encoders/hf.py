"""Vision towers of Hugging Face transformers: CLIP, SigLIP and fixed-size SigLIP 2, DINOv2, DINOv3, ViT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    CLIPVisionModel,
    Dinov2Model,
    DINOv3ViTModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
    ViTModel,
)

from mmfuse.errors import ConfigError, check_keys, unknown
from mmfuse.models.encoders.base import (
    ImageSize,
    Tower,
    VisionEncoder,
    building_on_meta,
    check_image_size,
    keep_layers,
    pair,
)

Channels = tuple[float, float, float]
_IMAGENET: tuple[Channels, Channels] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP: tuple[Channels, Channels] = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF: tuple[Channels, Channels] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclasses.dataclass(frozen=True)
class _Family:
    """Where a model class keeps what the adapter needs; `resizes` if positions are resized on request."""

    model: type[PreTrainedModel]
    layers: str
    norm: str
    mean_std: tuple[Channels, Channels]
    has_cls: bool = True
    resizes: bool = False
    model_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "clip_vision_model": _Family(CLIPVisionModel, "encoder.layers", "post_layernorm", _CLIP, resizes=True),
        "siglip_vision_model": _Family(
            SiglipVisionModel, "encoder.layers", "post_layernorm", _HALF, has_cls=False, resizes=True
        ),
        "dinov2": _Family(Dinov2Model, "encoder.layer", "layernorm", _IMAGENET),
        "dinov3_vit": _Family(DINOv3ViTModel, "model.layer", "norm", _IMAGENET),
        "vit": _Family(ViTModel, "layers", "layernorm", _HALF, resizes=True, model_kwargs={"add_pooling_layer": False}),
    }
)


class HFEncoder(VisionEncoder):
    """A vision model of transformers, random from a config or with the weights of a checkpoint.

    Deliberate difference: at `layer=-1` CLIP's post-layernorm is applied to every token, as open_clip and
    timm do; transformers itself applies it to the pooled CLS token only.

    Args:
        config: `model_type` (clip_vision_model, siglip_vision_model, dinov2, dinov3_vit or vit) and fields of
            that model's config class. May be left out with `pretrained`.
        pretrained: folder or hub name of a safetensors checkpoint, also of a whole CLIP or SigLIP model. Only
            this argument can reach the network, and it is ignored on the meta device.
        image_size: pixels, one number or [height, width]; the config's own by default. Position embeddings
            are interpolated for any other.
        layer: see `VisionEncoder`.
        tokens: "patches", "cls" or "all".

    Raises:
        ConfigError: for an unknown model type or config field, a size that the tower cannot take, or a
            checkpoint that lacks some of the tower's weights.
    """

    name = "hf"

    def __init__(
        self,
        config: dict[str, Any] | None = None,
        pretrained: str | None = None,
        image_size: ImageSize | None = None,
        layer: int = -1,
        tokens: str = "patches",
    ) -> None:
        vision = _resolve_config(config, pretrained)
        family = _FAMILIES[vision.model_type]
        patch = pair(vision.patch_size)
        size = check_image_size(image_size, pair(vision.image_size), patch)
        model = _build(family, vision, None if building_on_meta() else pretrained)
        norm = model.get_submodule(family.norm)
        model.set_submodule(family.norm, nn.Identity())
        layers = model.get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        tower = Tower(
            module=model,
            norm=norm if keep_layers(layers, layer) else nn.Identity(),
            hidden_size=vision.hidden_size,
            patch_size=patch,
            image_size=size,
            prefix_tokens=int(family.has_cls) + getattr(vision, "num_register_tokens", 0),
            has_cls=family.has_cls,
            image_mean=family.mean_std[0],
            image_std=family.mean_std[1],
        )
        spec = {"config": _changed_fields(vision), "image_size": list(size), "layer": layer}
        super().__init__(tower, tokens=tokens, spec=spec)
        self._forward_kwargs = {"interpolate_pos_encoding": True} if family.resizes else {}

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden_NTD: torch.Tensor = self.tower(pixel_values, **self._forward_kwargs).last_hidden_state
        return hidden_NTD


def _resolve_config(config: dict[str, Any] | None, pretrained: str | None) -> PreTrainedConfig:
    if config is None:
        if pretrained is None:
            raise ConfigError("an encoder of type 'hf' needs `config` (with `model_type`) or `pretrained`")
        whole = AutoConfig.from_pretrained(pretrained)
        vision: PreTrainedConfig = getattr(whole, "vision_config", whole)
        _check_model_type(vision.model_type)
    else:
        fields = dict(config)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ConfigError(f"encoder config has no `model_type`. Known: {', '.join(_FAMILIES)}")
        _check_model_type(model_type)
        config_class: Any = _FAMILIES[model_type].model.config_class
        check_keys(f"{model_type} config", fields, _field_names(config_class))
        vision = config_class(**fields)
    if hasattr(vision, "vision_use_head"):
        vision.vision_use_head = False
    if hasattr(vision, "use_mask_token"):
        vision.use_mask_token = False
    return vision


def _check_model_type(model_type: str) -> None:
    if model_type not in _FAMILIES:
        raise ConfigError(unknown("vision model_type", model_type, _FAMILIES))


def _field_names(config_class: type[PreTrainedConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class) if field.init]


def _changed_fields(vision: PreTrainedConfig) -> dict[str, Any]:
    """The config as JSON, without what the class defaults to and what belongs to a checkpoint."""
    default, given = type(vision)().to_dict(), vision.to_dict()
    ignored = {"transformers_version", "architectures", "dtype"}
    names = [name for name in _field_names(type(vision)) if name not in ignored]
    changed = {name: given[name] for name in names if name in given and given[name] != default.get(name)}
    return {"model_type": vision.model_type, **changed}


def _build(family: _Family, vision: PreTrainedConfig, pretrained: str | None) -> PreTrainedModel:
    if pretrained is None:
        model = family.model(vision, **family.model_kwargs)
    else:
        loaded: Any = family.model.from_pretrained(
            pretrained,
            config=vision,
            dtype=torch.get_default_dtype(),
            use_safetensors=True,
            output_loading_info=True,
            **family.model_kwargs,
        )
        model, report = loaded
        if report["missing_keys"]:
            lacking = ", ".join(sorted(report["missing_keys"])[:5])
            raise ConfigError(f"{pretrained} lacks weights of the tower: {lacking}")
    if isinstance(model, DINOv3ViTModel):
        # Its mask token belongs to pre-training only. transformers initialises it by name, so it stays, but
        # as a buffer that nobody trains or saves; likewise the register tokens when there are none.
        _to_buffer(model.embeddings, "mask_token")
        if model.config.num_register_tokens == 0:
            _to_buffer(model.embeddings, "register_tokens")
    return model


def _to_buffer(module: nn.Module, name: str) -> None:
    value = module.get_parameter(name).detach()
    delattr(module, name)
    module.register_buffer(name, value, persistent=False)
